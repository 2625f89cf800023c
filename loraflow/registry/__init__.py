"""The promotion log: which model is in use, since when, and why. It is append-only; a rollback adds an entry."""

from loraflow.registry.log import Entry, PromotionLog

__all__ = ["Entry", "PromotionLog"]
