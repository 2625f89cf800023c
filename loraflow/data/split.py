"""Split rows by a seeded hash of their content: a row stays on its side when other rows come or go."""

from __future__ import annotations

import hashlib
import json

from loraflow.data.chats import Chat


def row_id(messages: Chat) -> str:
    """Return a chat's id: 16 hex digits of a hash of its content."""
    return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]


def prompt_key(messages: Chat) -> str:
    """Return a hash of the prompt, which is all but the last message. Rows with equal prompts stay on one side."""
    return row_id(messages[:-1])


def falls_in(key: str, share: float, seed: int, purpose: str) -> bool:
    """Return whether a row belongs to a share of all rows.

    Each purpose has its own draw, so that validation rows are not drawn from the complement of held-out rows.
    """
    draw = hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()
    return int.from_bytes(draw[:8], "big") < share * 2**64
