"""Split rows by a seeded hash of their content: adding or removing rows does not move the others between splits."""

from __future__ import annotations

import hashlib
import json

from loraflow.data.chats import Chat


def row_id(messages: Chat) -> str:
    """Return a chat's id: 16 hex digits of a hash of its content."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]


def prompt_key(messages: Chat) -> str:
    """Return a hash of the prompt: all messages but the last. Rows with equal prompts go to the same split."""
    return row_id(messages[:-1])


def group_key(group: str) -> str:
    """Return a hash of a group's name. Rows of a group go to the same split."""
    return hashlib.sha256(json.dumps({"group": group}, ensure_ascii=False).encode()).hexdigest()[:16]


def in_share(key: str, share: float, seed: int, purpose: str) -> bool:
    """Tell whether a row belongs to a random share of all rows.

    Args:
        key: the row's prompt key.
        share: the fraction of rows, 0 to 1.
        seed: the recipe's split seed.
        purpose: heldout or validation; each purpose is an independent draw.
    """
    draw = hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()
    return int.from_bytes(draw[:8], "big") < share * 2**64
