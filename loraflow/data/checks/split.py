"""Split rows by a seeded hash of their content: adding or removing rows does not move the others between splits.

Samples are seeded too, and spread over the values of the rows: sets, groups, or labels of a classification set.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence

from loraflow.data.chats import Chat, Message
from loraflow.identity import canonical

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
        share: the fraction of rows, 0 to 1.
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


# A set is a classification set if its answers are few and short, and each of them has several rows on average.
MAX_LABELS = 1000
MAX_LABEL_CHARACTERS = 80
ROWS_PER_LABEL = 3


def label_values(answers: Iterable[str]) -> list[str] | None:
    """Return the label of each row of a classification set; None if its answers are no labels."""
    different: dict[str, str] = {}
    labels: list[str] = []
    for answer in answers:
        label = answer.strip()
        labels.append(different.setdefault(label, label))  # one text for all rows, which saves memory
        if len(different) > MAX_LABELS or len(label) > MAX_LABEL_CHARACTERS or "\n" in label:
            return None
    return labels if 2 <= len(different) <= len(labels) / ROWS_PER_LABEL else None


def spread_values(groups: Sequence[str | None], answers: Iterable[str]) -> list[str] | None:
    """Return the value by which each row is sampled: its group, or else its label; None if no row has one.

    Args:
        groups: the group of each row by data.group. Clusters of near-duplicates are none: most rows have no cluster.
    """
    named = [group if group and not group.startswith(CLUSTER) else "" for group in groups]
    labels = label_values(answers)
    if labels is None:
        return named if any(named) else None
    return [group or f"label {label}" for group, label in zip(named, labels, strict=True)]


def spread_sample(keys: Sequence[str], values: Sequence[str] | None, size: int, seed: int, purpose: str) -> list[int]:
    """Return the positions of a seeded sample in which each value has its share of all rows, in ascending order.

    A value gets the whole part of its share, and one row more with about the probability of its fractional part (Pareto
    sampling, Rosén 1997): no rare value is left out for certain, and the mean over the sample estimates the mean over all
    rows. Values and rows keep their random numbers, so adding rows changes few rows of the sample.

    Args:
        values: the value of each row; None for a sample that looks at no value.
    """
    if values is None or size >= len(keys):
        return sample(keys, size, seed, purpose)
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        rows.setdefault(value, []).append(number)
    quota = {value: size * len(numbers) // len(keys) for value, numbers in rows.items()}
    rest = {value: size * len(numbers) % len(keys) / len(keys) for value, numbers in rows.items()}

    def rank(value: str) -> tuple[float, str]:
        number = (draw(value, seed, purpose) + 0.5) / 2**64
        return number / (1 - number) * (1 - rest[value]) / rest[value], value

    for value in sorted((value for value in rows if rest[value]), key=rank)[: size - sum(quota.values())]:
        quota[value] += 1
    return sorted(
        numbers[n]
        for value, numbers in rows.items()
        for n in sample([keys[number] for number in numbers], quota[value], seed, purpose)
    )


def chat_key(messages: Chat) -> str:
    """Return the `row_key` of a chat whose last message is the answer."""
    return row_key(to_json(messages[:-1]))


def row_key(prompt: str) -> str:
    """Return the identity of a held-out row: 16 hex digits of a hash of its prompt, a JSON list of messages.

    System messages, letter case and white space do not count, nor does the reference: a row with another system message or
    a corrected answer was still seen before.
    """
    try:
        messages = json.loads(prompt)
        texts = [str(message["content"]) for message in messages if message["role"] != "system"]
    except (ValueError, TypeError, KeyError):
        texts = [prompt]
    # Stored looks and deals have these keys: rows with other keys would count as never scored.
    return hashlib.sha256(canonical(list(map(normalize, texts)))).hexdigest()[:16]
