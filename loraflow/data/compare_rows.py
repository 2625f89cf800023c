"""How the training rows of a dataset differ from those that the champion was trained on.

It compares the rows that check_dataset left to learn, as `loraflow data diff` compares files. The largest shift is a number
from 0 (the same) to 1.

- Lengths of prompts and answers: the distance of Kolmogorov and Smirnov, which is the largest difference between the shares
  of the rows that are at most so long.
- Labels of a classification set: the total variation distance, which is the share of rows that would need another label.
- Fields of the rows: the change of the share of rows where a field has a value.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from loraflow.data.chats import ChatRecord
from loraflow.data.check_report import CheckReport
from loraflow.data.compare import MIN_DRIFT, Version, all_rows, changes, difference_lines, field_shares
from loraflow.data.drift import DataDrift
from loraflow.data.sampling import label_values
from loraflow.data.split import prompt_key

TRAINING_ROWS = "training rows"


@dataclass
class CheckedRows:
    """The training rows of a version of a dataset, and the report about them."""

    report: CheckReport
    version: Version = field(default_factory=Version)
    answers: list[str] = field(default_factory=list)

    def add(self, lines: bytes) -> None:
        """Add rows, as check_dataset wrote them: the content of train.jsonl or validation.jsonl."""
        rows = self.version.files.setdefault(TRAINING_ROWS, Counter())
        for line in lines.removesuffix(b"\n").split(b"\n"):
            if line:
                record: ChatRecord = json.loads(line)
                messages = record["messages"]
                rows[prompt_key(messages), record["id"]] += 1
                self.version.prompts.append(sum(len(message["content"] or "") for message in messages[:-1]))
                self.version.answers.append(len(messages[-1]["content"] or ""))
                self.answers.append(messages[-1]["content"] or "")


class _Shift(NamedTuple):
    size: float
    what: str


def measure_drift(before: CheckedRows, after: CheckedRows) -> DataDrift:
    """Compare the champion's training rows with new ones."""
    found = changes(all_rows(before.version), all_rows(after.version))
    largest = max(_shifts(before, after), default=_Shift(0.0, ""))
    return DataDrift(
        before=found.before,
        after=found.after,
        added=found.added,
        removed=found.removed,
        edited=found.edited,
        shift=round(largest.size, 6),
        shifted=largest.what if largest.size else "",
        lines=[
            *difference_lines(before.version, after.version),
            *_label_lines(before.answers, after.answers),
            *_report_lines(before.report, after.report),
            *([f"largest shift: {largest.size:.3f} ({largest.what})"] if largest.size else []),
        ],
    )


def _shifts(before: CheckedRows, after: CheckedRows) -> Iterator[_Shift]:
    old, new = before.version, after.version
    for what, was, now in (
        ("length of the prompts", old.prompts, new.prompts),
        ("length of the answers", old.answers, new.answers),
    ):
        if was and now:
            yield _Shift(_distance(was, now), what)
    shares = _label_shares(before.answers, after.answers)
    if shares:
        yield _Shift(sum(abs(now - was) for was, now in shares.values()) / 2, "labels")
    for name, (share, share_now) in field_shares(old, new).items():
        yield _Shift(abs(share_now - share), f"field {name}")


def _distance(was: Sequence[int], now: Sequence[int]) -> float:
    """Return the distance of Kolmogorov and Smirnov. (scipy's `ks_2samp` also computes a p-value, and warns of few rows.)"""
    points = np.concatenate([was, now])
    shares = [np.searchsorted(np.sort(sizes), points, side="right") / len(sizes) for sizes in (was, now)]
    return float(np.abs(shares[0] - shares[1]).max())


def _label_shares(before: Sequence[str], after: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return for each label its shares of the rows; nothing if one of the versions is no classification set."""
    old, new = label_values(before), label_values(after)
    if old is None or new is None:
        return {}
    was, now = Counter(old), Counter(new)
    return {label: (was[label] / len(old), now[label] / len(new)) for label in sorted(was.keys() | now.keys())}


def _label_lines(before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    for label, (was, now) in _label_shares(before, after).items():
        if abs(now - was) >= MIN_DRIFT:
            yield f"label {label}: {was:.1%} → {now:.1%} of the rows"


def _report_lines(before: CheckReport, after: CheckReport) -> Iterator[str]:
    """Yield how many rows were left out for each reason, and how many are nearly the same as others, if that changed."""
    read = (before.counts.get("read", 0), after.counts.get("read", 0))
    for reason in sorted((before.counts.keys() | after.counts.keys()) - {"read"}):
        was, now = before.counts.get(reason, 0), after.counts.get(reason, 0)
        if was != now:
            yield f"{reason.replace('_', ' ')}: {was} of {read[0]} → {now} of {read[1]} rows that were read"
    old, new = before.near, after.near
    if old and new and (old.rows, old.clusters) != (new.rows, new.clusters):
        yield f"near-duplicates: {old.rows} rows in {old.clusters} clusters → {new.rows} in {new.clusters}"
    held = (before.rows.heldout, after.rows.heldout)
    if held[0] != held[1]:
        yield f"held-out rows: {held[0]} → {held[1]}"
