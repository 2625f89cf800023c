"""Split rows by a seeded hash of their content: adding or removing rows does not move the others between splits."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from loraflow.data.chats import Chat, Message

to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row


def row_id(messages: Chat) -> str:
    """Return a chat's id: 16 hex digits of a hash of its content."""
    if any(len(message) > 2 for message in messages):
        return hashlib.sha256(to_json([without_call_ids(message) for message in messages]).encode()).hexdigest()[:16]
    return hashlib.sha256(to_json(messages).encode()).hexdigest()[:16]


def without_call_ids(message: Message) -> dict[str, object]:
    """Return a message without the ids of its calls, which are random: they make no other chat."""
    calls = [{key: value for key, value in call.items() if key != "id"} for call in message.get("tool_calls", [])]
    kept = {key: value for key, value in message.items() if key != "tool_call_id"}
    return {**kept, "tool_calls": calls} if calls else kept


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
    return draw(key, seed, purpose) < share * 2**64


CLUSTER = "near "  # begins the group of rows that are near-duplicates of each other


def draw(key: str, seed: int, purpose: str) -> int:
    """Return a row's seeded random number, 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()[:8], "big")


def sample(keys: Sequence[str], size: int, seed: int, purpose: str) -> list[int]:
    """Return the positions of a seeded sample, in ascending order.

    The rows with the smallest random numbers are taken, so that n added rows change at most n rows of the sample.

    Args:
        keys: a key of each row, such as its prompt key.
        size: the number of rows to take.
        seed: the seed.
        purpose: each purpose is an independent draw.
    """
    if size >= len(keys):
        return list(range(len(keys)))
    return sorted(sorted(range(len(keys)), key=lambda row: draw(keys[row], seed, purpose))[:size])


def normalized_key(messages: Chat) -> int:
    """Return a hash of texts without the differences of case, white space and Unicode form, as a 64-bit number."""
    return text_key(normalize("\0".join(map(_content, messages))))


def _content(message: Message) -> str:
    """Return a message's text, and what else it has, such as tool calls."""
    others = {key: value for key, value in without_call_ids(message).items() if key not in ("role", "content")}
    text = message["content"] or ""
    return f"{text}\0{to_json(others)}" if others else text


def normalize(text: str) -> str:
    """Return a text without differences of case, white space and Unicode form."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def text_key(text: str) -> int:
    """Return a hash of a text, as a 64-bit number."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
