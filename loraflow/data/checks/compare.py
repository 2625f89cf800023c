"""Compare the rows of two versions of a dataset for `loraflow data diff`: files, folders, or what a `.dvc` file pins.

The rows that check_dataset left to learn are compared with the champion's in the same way. The largest shift is a number
from 0 (the same) to 1.

- Lengths of prompts and answers: the distance of Kolmogorov and Smirnov, which is the largest difference between the shares
  of the rows that are at most so long.
- Labels of a classification set: the total variation distance, which is the share of rows that would need another label.
- Fields of the rows: the change of the share of rows where a field has a value.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loraflow.config.data import Data
from loraflow.config.locations import DvcOrigin
from loraflow.data.chats import ChatRecord
from loraflow.data.checks.check_report import CheckReport, DataDrift
from loraflow.data.checks.split import label_values, prompt_key, row_id
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import match_files, read_rows, read_values
from loraflow.data.formats.row_fields import has_value
from loraflow.data.versions import dvc
from loraflow.data.versions.version import locate
from loraflow.failures import BadData
from loraflow.store.files import HashMemo

MIN_DRIFT = 0.01  # smallest change of a field's share of the rows that is shown


@dataclass
class Version:
    """The valid rows of a version of a dataset."""

    files: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)  # file → (prompt, row) → how often
    prompts: list[int] = field(default_factory=list)  # characters
    answers: list[int] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)  # key of the rows → rows where it has a value
    read: int = 0  # rows, with malformed ones
    malformed: int = 0  # rows that are no chat; rows whose marks exclude every answer are no such rows
    problem: str = ""  # place and problem of the first of them


@dataclass(frozen=True)
class Changes:
    """What became of the rows. An edited row has the same prompt and another answer."""

    before: int
    after: int
    added: int
    removed: int
    edited: int

    def __str__(self) -> str:
        counts = f"{self.added} added, {self.removed} removed, {self.edited} edited"
        return f"{self.before} → {self.after} rows, {counts}"


def read_files(
    folder: Path, names: Sequence[str], format_name: str, columns: Mapping[str, str], ignore: Collection[str] = ()
) -> Version:
    """Read the rows of files, as they are read for training: without those that a column `split` keeps for tests.

    Args:
        columns: `data.columns`; if empty and the format is auto, they are guessed for each file.

    Raises:
        BadData: a file cannot be read, or no row is a chat.
    """
    found = Version()
    for name in names:
        guess = not columns and format_name == "auto"
        used = columns_of(folder / name, name) if guess else columns
        rows = found.files.setdefault(name, Counter())
        for row in read_rows(folder, [name], format_name, used, ignore=ignore, is_training=True):
            if row.messages:
                rows[prompt_key(row.messages), row_id(row.messages)] += 1
                found.prompts.append(sum(len(message["content"]) for message in row.messages[:-1]))
                found.answers.append(len(row.messages[-1]["content"]))
            elif not row.is_marked_false:
                found.malformed += 1
                found.problem = found.problem or f"{row.place}: {row.problem}"
        count_fields(folder, name, found)
    if found.malformed and not found.prompts:
        raise BadData(
            f"{found.malformed} of {found.read} rows could not be read, and none is a chat.",
            where=", ".join(names[:3]),
            expected="messages, ShareGPT, Alpaca or prompt/completion",
            got=found.problem,
            next_step="`loraflow data check FILE` names every problem",
        )
    return found


def count_fields(folder: Path, name: str, found: Version, query: str | None = None) -> None:
    """Count a file's rows, and in how many of them each field has a value.

    Raises:
        BadData: the file cannot be read.
    """
    for value in read_values(folder / name, name, query):
        found.read += 1
        if isinstance(value.value, dict):
            found.fields.update(str(key) for key, cell in value.value.items() if has_value(cell))


def read_revision(data: Data) -> Version:
    """Read the rows of the version of a dataset that the settings name.

    Raises:
        BadData: the dataset has no `.dvc` file, or cannot be read.
    """
    memo = HashMemo(None)
    location = locate(data, memo)
    origin = location.origin
    if not isinstance(origin, DvcOrigin):
        raise BadData(
            "Only datasets with a .dvc file have versions to compare.",
            where=data.source,
            expected="a .dvc file",
            next_step="`loraflow data add FOLDER` versions a folder; or compare files, folders or runs",
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        pin = dvc.Pin(origin.dvc_file, origin.path, location.md5)
        dvc.fetch(origin.repo, pin, origin.commit or origin.rev, target, memo)
        return read_files(target, match_files(target, ["*"]), data.format, data.columns, data.ignore)


def changes(before: Mapping[tuple[str, str], int], after: Mapping[tuple[str, str], int]) -> Changes:
    """Compare two collections of rows. Rows that are there several times count as often."""
    old, new = Counter(before), Counter(after)
    gone, come = Counter[str](), Counter[str]()
    for counts, rows in ((gone, old - new), (come, new - old)):
        for (prompt, _), count in rows.items():
            counts[prompt] += count
    edited = (gone & come).total()
    return Changes(old.total(), new.total(), come.total() - edited, gone.total() - edited, edited)


def difference_lines(before: Version, after: Version) -> Iterator[str]:
    """Yield what differs: rows that could not be read, rows of each file and of all, lengths, fields."""
    for name, version in (("OLD", before), ("NEW", after)):
        if version.malformed:
            yield f"{name}: {version.malformed} of {version.read} rows could not be read, first {version.problem}"
    old, new = before.files, after.files
    if len(old) == len(new) == 1 and old.keys() != new.keys():
        yield f"{next(iter(old))} → {next(iter(new))}: {changes(all_rows(before), all_rows(after))}"
    else:
        for name in sorted(old.keys() | new.keys()):
            yield f"{name}: {changes(old.get(name, Counter()), new.get(name, Counter()))}"
        if len(old.keys() | new.keys()) > 1:
            yield f"all files: {changes(all_rows(before), all_rows(after))}"
    for what, was, is_now in (("prompts", before.prompts, after.prompts), ("answers", before.answers, after.answers)):
        if sorted(was) != sorted(is_now):
            yield f"characters of {what}: {_spread(was)} → {_spread(is_now)}"
    for name, (share, share_now) in field_shares(before, after).items():
        if abs(share_now - share) >= MIN_DRIFT:
            yield f"field {name}: in {share:.1%} → {share_now:.1%} of the rows"


def field_shares(before: Version, after: Version) -> dict[str, tuple[float, float]]:
    """Return for each field the shares of the rows where it has a value, before and after."""
    names = sorted(before.fields.keys() | after.fields.keys())
    return {
        name: (before.fields[name] / max(before.read, 1), after.fields[name] / max(after.read, 1)) for name in names
    }


def all_rows(version: Version) -> Counter[tuple[str, str]]:
    """Return the rows of all files: (prompt, row) → how often."""
    return sum(version.files.values(), Counter())


def _spread(lengths: list[int]) -> str:
    if not lengths:
        return "no rows"
    tenth, median, ninth, longest = np.percentile(lengths, [10, 50, 90, 100]).round().astype(int).tolist()
    return f"median {median} (10 % {tenth}, 90 % {ninth}, max {longest})"


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
    drawn = {"the champion's rows": before.version.answers, "the rows of this run": after.version.answers}
    return DataDrift(
        **vars(found),
        shift=round(largest.size, 6),
        shifted=largest.what if largest.size else "",
        lines=[
            *difference_lines(before.version, after.version),
            *(
                f"label {label}: {was:.1%} → {now:.1%} of the rows"
                for label, (was, now) in _label_shares(before.answers, after.answers).items()
                if abs(now - was) >= MIN_DRIFT
            ),
            *_report_lines(before.report, after.report),
            *([f"largest shift: {largest.size:.3f} ({largest.what})"] if largest.size else []),
        ],
        lengths={name: _shares_up_to(found) for name, found in drawn.items() if found},
    )


def _shares_up_to(lengths: Sequence[int]) -> list[tuple[float, float]]:
    """Return points of a curve: a length, and the share of the rows that are at most as long."""
    shares = np.linspace(0, 0.95, 20)  # few very long answers would press the others together
    return list(zip(np.quantile(lengths, shares).tolist(), shares.tolist(), strict=True))


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
