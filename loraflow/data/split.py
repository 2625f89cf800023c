"""A split that a row keeps whatever happens to the others: by a seeded hash of its content."""

from __future__ import annotations

import hashlib
import json


def row_id(messages: list[dict[str, str]]) -> str:
    """Return a chat's id: a hash of its content, the same wherever and whenever it is read."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]


def prompt_key(messages: list[dict[str, str]]) -> str:
    """Return a hash of everything but the last answer: rows with one prompt must not fall on both sides of a split."""
    return row_id(messages[:-1])


def falls_in(key: str, share: float, seed: int, purpose: str) -> bool:
    """Tell whether a row is in a share of all rows.

    The same seed gives each purpose its own draw, so that validation is not the complement of held-out.
    """
    draw = hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()
    return int.from_bytes(draw[:8], "big") < share * 2**64
