"""The rows of the sources of a mixture (`data.sources`): which rows each of them gives, and how often they are trained on.

The files of a source are in a folder with its name, so the place of each of its rows begins with that name.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from loraflow.config.stage_configs import CheckDatasetConfig, SourceConfig
from loraflow.data.chats import GATE_SET, Tool
from loraflow.data.checks.chat_table import TRAIN, ChatTable, Columns, Rows
from loraflow.data.checks.placement import Split
from loraflow.data.checks.rows_file import RowsFile
from loraflow.data.checks.split import draw, in_share
from loraflow.data.files.readers import RowSettings, match_files
from loraflow.data.files.table_readers import plain_query
from loraflow.failures import BadData

SourceCounts = dict[str, dict[str, int]]  # source → what is counted → rows


def files_of_sources(files: Path, config: CheckDatasetConfig, tools: list[Tool] | None) -> Iterator[RowsFile]:
    """Yield the files of all sources: those that are held out first.

    Raises:
        BadData: a pattern matches no file, or two sources have the same file.
    """
    names = _names(files, config.sources)
    for source in sorted(config.sources, key=lambda source: source.split != "heldout"):
        is_training = source.split != "heldout"
        settings = RowSettings(
            source.format,
            source.columns,
            config.group,
            tools,
            source.query,
            ignore=source.ignore,
            is_training=is_training,
        )
        for name in names[source.name]:
            set_name = TRAIN if is_training else GATE_SET
            yield RowsFile(files, name, settings, set_name, source.name, is_pinned=source.split == TRAIN)


def _names(files: Path, sources: Sequence[SourceConfig]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    sizes: dict[tuple[int, str | None], list[tuple[str, str]]] = {}  # of files that are not empty, and their query
    for number, source in enumerate(sources, 1):
        try:
            found = match_files(files / source.name, source.files)
        except BadData as failure:
            failure.what = f"Source {number} ({source.name}): {failure.what}"
            failure.next_step = "correct source or files"
            raise
        names[source.name] = [f"{source.name}/{name}" for name in found]
        for name in names[source.name]:
            if size := (files / name).stat().st_size:
                sizes.setdefault((size, plain_query(source.query)), []).append((source.name, name))
    for same in sizes.values():
        if len({source for source, _ in same}) > 1:
            _refuse_same(files, same)
    return names


def _refuse_same(files: Path, candidates: Sequence[tuple[str, str]]) -> None:
    first: dict[str, tuple[str, str]] = {}
    for source, name in candidates:
        with (files / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        other, other_name = first.setdefault(digest, (source, name))
        if other != source:
            raise BadData(
                f"The sources {other} and {source} have the same file.",
                where=f"{other_name} and {name}",
                expected="each file in one source: its weight says how often its rows are used",
                next_step="remove it from one of them, or choose others by files",
            )


def drawn_rows(
    numbers: Iterable[int], table: ChatTable, config: CheckDatasetConfig, counts: SourceCounts
) -> Iterator[int]:
    """Yield the numbers of the rows that the limits and weights of their sources take; the others are counted.

    The sample depends only on a row's prompt and its source: other rows and sources do not change it, but for those that a
    limit has to leave out.
    """
    for position, group in groupby(numbers, key=table.source.__getitem__):
        source = config.sources[position]
        of_source = counts.setdefault(source.name, {})
        for number in _limited(source, group, table, config.seed, of_source):
            key = table.drawn_key(number)
            if source.weight < 1 and not in_share(key, source.weight, config.seed, f"weight of {source.name}"):
                _count(of_source, "not_drawn", 1)
            else:
                yield number


def _limited(
    source: SourceConfig, group: Iterable[int], table: ChatTable, seed: int, counts: dict[str, int]
) -> Iterable[int]:
    if source.limit is None:
        return group
    numbers = np.frombuffer(array("q", group), np.int64)
    keys = (table.drawn_key(number) for number in numbers.tolist())
    draws = np.fromiter((draw(key, seed, f"limit of {source.name}") for key in keys), np.uint64, len(numbers))
    taken = np.sort(np.argsort(draws, kind="stable")[: source.limit])  # as `sample` does, with 16 bytes a row
    _count(counts, "over_limit", len(numbers) - len(taken))
    found: list[int] = numbers[taken].tolist()
    return found


def repeated(columns: Columns, rows: Rows, config: CheckDatasetConfig) -> Rows:
    """Return training rows as often as the weights of their sources say; of a fraction, a seeded share once more."""
    if all(source.weight <= 1 for source in config.sources):
        return rows
    times = np.ones(len(rows), np.int64)
    for position, number in enumerate(rows.tolist()):
        source = config.sources[int(columns.sources[number])]
        if source.weight <= 1:
            continue
        whole, fraction = divmod(source.weight, 1)
        key = f"{int(columns.drawn_keys[number]):016x}"
        more = bool(fraction) and in_share(key, fraction, config.seed, f"repeat of {source.name}")
        times[position] = int(whole) + more
    return np.repeat(rows, times)


def count_sources(
    columns: Columns, splits: Mapping[Split, Rows], config: CheckDatasetConfig, counts: SourceCounts
) -> SourceCounts:
    """Return the rows of each source: read, malformed, left out by limit and weight, and those of each split."""
    found: SourceCounts = {}
    for number, source in enumerate(config.sources):
        of_splits = {split: rows[columns.sources[rows] == number] for split, rows in splits.items()}
        numbers: dict[str, int] = {split: len(rows) for split, rows in of_splits.items()}
        found[source.name] = {"read": 0, **counts.get(source.name, {}), **numbers}
        _count(found[source.name], "repeated", len(of_splits["train"]) - len(np.unique(of_splits["train"])))
    return found


def _count(counts: dict[str, int], what: str, number: int) -> None:
    if number:
        counts[what] = counts.get(what, 0) + number


def count_read(counts: SourceCounts, source: str, read: int, malformed: int) -> None:
    """Count rows of a source that were read."""
    of_source = counts.setdefault(source, {})
    _count(of_source, "read", read)
    _count(of_source, "malformed", malformed)
