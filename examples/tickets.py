"""Generate the quickstart's dataset: support tickets and their answers as JSON, from a seed.

    python examples/tickets.py data

A ticket is composed of a greeting, a request, a remark on its urgency and a close, from `ticket_phrases.json`. Training
and held-out rows share no phrase, and a quarter of the held-out products never occur in training. A model that answers
held-out rows correctly has therefore learned the task, not the sentences. `data/handwritten.jsonl` is not generated: its
rows were written by hand.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple, TypedDict

SYSTEM = (
    'Reply to the ticket with JSON only: {"intent": refund|order_status|cancel_order|change_address|damaged_item|'
    'wrong_item|login_problem|invoice|warranty|product_question, "product": name|null, "order": number|null, '
    '"urgency": low|normal|high}'
)


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str


class Row(TypedDict):
    """One line of a generated file."""

    messages: list[Message]


class Answer(TypedDict):
    """The JSON object that the model should answer with."""

    intent: str
    product: str | None
    order: str | None
    urgency: str


class Sides(NamedTuple):
    """Phrases for training rows and for held-out rows."""

    train: list[str]
    heldout: list[str]

    def of(self, heldout: bool) -> list[str]:
        """Return the phrases of a side."""
        return self.heldout if heldout else self.train


_PHRASES = json.loads(Path(__file__).with_name("ticket_phrases.json").read_text(encoding="utf-8"))
PRODUCTS = Sides(**_PHRASES["products"])
# In a request, {p} is "the desk lamp" or a phrase such as "my item"; {o} is "order KD-48213" or nothing.
REQUESTS = {intent: Sides(**sides) for intent, sides in _PHRASES["requests"].items()}
URGENCY = {urgency: Sides(**sides) for urgency, sides in _PHRASES["urgency"].items()}
GREETINGS = Sides(**_PHRASES["greetings"])
CLOSES = Sides(**_PHRASES["closes"])
NO_PRODUCT = Sides(**_PHRASES["no_product"])
ORDER_FORMS = Sides(**_PHRASES["order_forms"])


def ticket(rng: random.Random, heldout: bool) -> Row:
    """Return a random row: system message, ticket, answer."""
    intent, urgency = rng.choice(list(REQUESTS)), rng.choice(list(URGENCY))
    unseen = heldout and rng.random() < 0.25
    product = rng.choice(PRODUCTS.of(unseen)) if rng.random() < 0.85 else None
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTUVWXZ", k=2))
    order = f"{letters}-{rng.randint(10000, 99999)}" if rng.random() < 0.7 else None

    noun = rng.choice(["the ", "my "]) + product if product else rng.choice(NO_PRODUCT.of(heldout))
    mention = rng.choice(ORDER_FORMS.of(heldout)).format(o=order) if order else ""
    request = rng.choice(REQUESTS[intent].of(heldout)).format(p=noun, P=noun[0].upper() + noun[1:], o=mention)
    parts = [
        rng.choice(GREETINGS.of(heldout)),
        request,
        rng.choice(URGENCY[urgency].of(heldout)),
        rng.choice(CLOSES.of(heldout)),
    ]
    answer: Answer = {"intent": intent, "product": product, "order": order, "urgency": urgency}
    return row(" ".join(part for part in parts if part), answer)


def row(text: str, answer: Answer) -> Row:
    """Return a ticket and its answer as a chat."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def write(path: Path, count: int, seed: int, heldout: bool) -> None:
    """Write `count` different tickets as JSON lines."""
    rng, seen = random.Random(seed), set[str]()
    with path.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            line = json.dumps(ticket(rng, heldout), ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                file.write(line + "\n")


def main(folder: str) -> None:
    """Write train.jsonl (2,000 rows) and heldout.jsonl (240 rows)."""
    Path(folder).mkdir(exist_ok=True)
    write(Path(folder, "train.jsonl"), 2000, seed=1, heldout=False)
    write(Path(folder, "heldout.jsonl"), 240, seed=2, heldout=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data")
