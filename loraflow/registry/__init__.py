"""The promotion log: which model is in use, since when, and why. Append-only; a rollback is an entry like another."""

from loraflow.registry.log import Entry, PromotionLog

__all__ = ["Entry", "PromotionLog"]
