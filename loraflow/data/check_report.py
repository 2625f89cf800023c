"""The report of check_dataset: what was read, dropped and split, and what the training rows look like."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import BeforeValidator, JsonValue, PlainSerializer

from loraflow.data.chats import ChatRecord
from loraflow.frozen import StoredModel


class SplitCounts(StoredModel):
    """Rows of each split."""

    train: int
    validation: int
    heldout: int


class Spread(StoredModel):
    """Median and maximum of a length."""

    median: int
    max: int


class Profile(StoredModel):
    """What the training rows look like, for people and for comparing two versions of a dataset."""

    turns: dict[str, int]  # messages per chat → chats
    with_system: float  # share of chats with a system message
    prompt_characters: Spread
    answer_characters: Spread

    @classmethod
    def of(cls, records: list[ChatRecord]) -> Profile | None:
        """Return the profile of training rows; None if there are none."""
        if not records:
            return None
        chats = [record["messages"] for record in records]
        return cls(
            turns=dict(sorted(Counter(str(len(chat)) for chat in chats).items())),
            with_system=sum(chat[0]["role"] == "system" for chat in chats) / len(chats),
            prompt_characters=_spread([sum(len(m["content"]) for m in chat[:-1]) for chat in chats]),
            answer_characters=_spread([len(chat[-1]["content"]) for chat in chats]),
        )


def _spread(lengths: list[int]) -> Spread:
    ordered = sorted(lengths)
    return Spread(median=ordered[len(ordered) // 2], max=ordered[-1])


class CheckReport(StoredModel):
    """The content of report.json, and the report in the artifact's manifest."""

    rows: SplitCounts
    sets: dict[str, int]  # held-out rows of each set
    counts: dict[str, int]  # rows read, malformed, duplicate, leak
    malformed_share: float
    first_problems: list[str]  # place and problem of the first rows in quarantine
    # In JSON, {} stands for the profile of no rows.
    profile: Annotated[
        Profile | None,
        BeforeValidator(lambda profile: profile or None),
        PlainSerializer(lambda profile: {} if profile is None else profile.model_dump()),
    ] = None

    def as_json(self) -> dict[str, JsonValue]:
        """Return the report as JSON values."""
        values: dict[str, JsonValue] = self.model_dump(mode="json")
        return values
