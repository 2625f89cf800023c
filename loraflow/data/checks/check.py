"""Stage check_dataset: split valid rows into train, validation and held-out; list the others in quarantine.jsonl.

The stage never fails because of bad rows: it reports them with reasons. `check_limits` in `row_limits.py` then compares the
report with the recipe's limits, and stops the run if a limit is exceeded.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.answers.mark_names import without_marks
from loraflow.data.answers.unread_values import doubtful
from loraflow.data.chats import GATE_SET, Tool
from loraflow.data.checks.chat_table import TRAIN, ChatTable, Columns, Rows, profile
from loraflow.data.checks.check_report import CheckReport, Finding, NearDuplicates, Quarantine, SplitCounts
from loraflow.data.checks.findings import leave_out_findings
from loraflow.data.checks.heldout_fields import write_field_values
from loraflow.data.checks.near import Compared
from loraflow.data.checks.near_split import Clusters, place_near
from loraflow.data.checks.placement import HELDOUT_SIDE, SPLITS, Split
from loraflow.data.checks.row_drops import (
    drop_duplicates,
    drop_group_leaks,
    drop_leaks,
    find_similar,
    heldout_groups,
    with_near_prompts,
)
from loraflow.data.checks.row_segment import (
    LAST_LEARNED,
    PARTLY_LEARNED,
    PINNED_TO_TRAIN,
    WEIGHTED,
    LeftOut,
    RowSegment,
)
from loraflow.data.checks.rows_file import RowsFile
from loraflow.data.checks.segment_reader import SegmentReader, key_of_job
from loraflow.data.checks.sources import SourceCounts, count_read, count_sources, drawn_rows, files_of_sources, repeated
from loraflow.data.checks.split import CLUSTER, draw, spread_sample, spread_values, to_json
from loraflow.data.files.readers import RowSettings, match_files, readable_files
from loraflow.data.formats.tools import dataset_tools
from loraflow.failures import BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.chunk_cache import ChunkCache

DROPPED = ("duplicate", "leak", "marked_false", "near_leak", "near_both", "group_leak")
MAX_UNREAD = 50  # keys, and files, in the report
log = logging.getLogger("loraflow")


@dataclass
class _Reading:
    """The rows that have a chat, and what was left out while rows were read."""

    table: ChatTable
    quarantine: Quarantine
    reader: SegmentReader
    compared: Compared
    unread: Counter[str] = field(default_factory=Counter)  # keys that have values and were not read
    told: Counter[tuple[str, str]] = field(default_factory=Counter)  # what they say
    marks: Counter[str] = field(default_factory=Counter)  # keys and values that left rows out
    findings: list[Finding] = field(default_factory=list)  # of data.profile
    sources: SourceCounts = field(default_factory=dict)  # of data.sources

    @property
    def counts(self) -> Counter[str]:
        """Rows by what happened to them."""
        return self.quarantine.counts

    def drop(self, number: int, set_name: str, reason: str, problem: str) -> None:
        """Count a row that is left out, and put it into the quarantine."""
        self.quarantine.add(reason, self.table.place(number), set_name, problem)

    def leave_out(self, number: int, reason: str, problem: str) -> None:
        """Count a row that is left out before it has a split, and put it into the quarantine."""
        self.drop(number, self.table.set_read(number), reason, problem)


def run(job: Job[CheckDatasetConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write train.jsonl, validation.jsonl, heldout.jsonl, quarantine.jsonl and report.json.

    Raises:
        BadData: a file is missing or cannot be read, or rows cannot be divided by a field of `slices`.
    """
    cache = ChunkCache.beside(progress.work, job.stage)
    key = b"" if cache is None else key_of_job(job)
    reader, compared = SegmentReader(job.config, cache, key), Compared(cache, key)
    with (
        (out / "quarantine.jsonl").open("w", encoding="utf-8") as file,
        ChatTable(out, job.config) as table,
        closing(reader),
    ):
        report = _check(
            inputs["dataset"] / "files", job.config, _Reading(table, Quarantine(file), reader, compared), out
        )
    read = report.counts.get("read", 0)
    if reader.computed < read:
        log.info("%d of %d rows were read before", read - reader.computed, read)
    values = report.as_json()
    text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    return Summary(
        figures={
            **report.rows.model_dump(),
            "malformed": report.counts.get("malformed", 0),
            "dropped": sum(
                n for reason, n in report.counts.items() if reason in DROPPED or reason.startswith("profile_")
            ),
        },
        report=values,
        facets={"train": ["train.jsonl", "validation.jsonl"], "heldout": ["heldout.jsonl"]},
    )


def _check(files: Path, config: CheckDatasetConfig, reading: _Reading, out: Path) -> CheckReport:
    table, counts = reading.table, reading.counts
    splits, columns, clusters = _read(files, config, reading)
    groups = heldout_groups(columns, splits["heldout"])  # of duplicates too
    drop_duplicates(table, columns, splits, config.duplicates, reading.drop)
    drop_leaks(table, columns, splits, reading.drop)
    drop_group_leaks(table, columns, splits, groups, reading.drop)
    learnable = np.concatenate([splits["train"], splits["validation"]])
    similar = find_similar(table, columns, learnable, splits["heldout"])
    if config.near_duplicates is not None:
        similar = with_near_prompts(similar, table, columns, learnable, reading.compared)
        reading.compared.keep()
    _limit(table, columns, splits, reading, config)
    near = None if clusters is None else _write_clusters(out, table, splits, clusters)
    splits["train"] = repeated(columns, splits["train"], config)
    if config.heldout_fields:
        heldout: list[int] = splits["heldout"].tolist()
        gate_rows = (number for number in heldout if table.set_of(number, "heldout") == GATE_SET)
        places = ((table.id_of(number), table.place(number)) for number in gate_rows)
        queries = {source.name: source.query for source in config.sources if source.query is not None}
        write_field_values(files, places, config.heldout_fields, out, queries)
    unread = unread_files(files, config)
    for split, rows in splits.items():
        _write_rows(out / f"{split}.jsonl", table, rows, split, clusters if config.group is None else None)
    return CheckReport(
        rows=SplitCounts(**{split: len(rows) for split, rows in splits.items()}),
        sets=dict(Counter(table.set_of(number, "heldout") for number in splits["heldout"].tolist())),
        counts=dict(counts),
        malformed_share=counts["malformed"] / max(counts["read"], 1),
        first_problems=reading.quarantine.first_problems(),
        unread=without_marks(dict(reading.unread.most_common(MAX_UNREAD)), reading.marks),
        marks=dict(reading.marks.most_common(MAX_UNREAD)),
        doubtful=doubtful(reading.told, reading.unread, len(table)),
        unread_files=unread[:MAX_UNREAD],
        unread_file_count=len(unread),
        similar=similar,
        findings=reading.findings,
        sources=count_sources(columns, splits, config, reading.sources),
        near=near,
        profile=profile(columns, splits["train"]),
    )


def _read(
    files: Path, config: CheckDatasetConfig, reading: _Reading
) -> tuple[dict[Split, Rows], Columns, Clusters | None]:
    table, found = reading.table, array("q")
    hold_out = partial(_hold_out, found=found, config=config, reading=reading)
    numbers: Iterable[int] = chain.from_iterable(_valid_rows(files, config, reading))
    if config.sources:
        numbers = drawn_rows(numbers, table, config, reading.sources)
    if config.profile:
        numbers, reading.findings = leave_out_findings(
            numbers, table, config.profile, reading.leave_out, partial(_may_be_learned, table=table, config=config)
        )
    clusters = None
    if config.near_duplicates is None:
        placed = np.fromiter(_each_drawn(numbers, table, hold_out), np.int64)
        sides = table.columns.drawn[placed]
    else:
        placed = np.fromiter(numbers, np.int64)
        clusters, sides = place_near(
            table, table.columns, placed, config, hold_out, reading.leave_out, reading.compared
        )
        if clusters.held_out_of_few:
            reading.counts["held_out_of_few"] += clusters.held_out_of_few
    columns = table.columns
    splits: dict[Split, Rows] = {split: placed[sides == side] for side, split in enumerate(SPLITS)}
    splits["heldout"] = np.frombuffer(found, np.int64)
    for name, flag in (("weighted", WEIGHTED), ("partly_marked", PARTLY_LEARNED)):
        if count := int(columns.has(flag)[placed[(sides >= 0) & (sides < HELDOUT_SIDE)]].sum()):
            reading.counts[name] += count
    if (
        config.heldout_fraction
        and not config.heldout
        and config.near_duplicates != "drop"  # has held out a cluster
        and not (columns.sets[splits["heldout"]] <= 1).any()  # the gate's set
    ):
        _hold_out_prompt(table, columns, splits, reading, config)
    return splits, columns, clusters


def _each_drawn(numbers: Iterable[int], table: ChatTable, hold_out: Callable[[int], None]) -> Iterator[int]:
    """Yield all rows; hold those out that are drawn, so that the quarantine is in the order of the files."""
    for number in numbers:
        if table.drawn[number] == HELDOUT_SIDE:
            hold_out(number)
        yield number


def _may_be_learned(number: int, table: ChatTable, config: CheckDatasetConfig) -> bool:
    """Tell whether a row may get into training: which rows of training files do with `drop` depends on other rows."""
    if config.near_duplicates == "drop":
        return table.set_read(number) == TRAIN
    return SPLITS[table.drawn[number]] != "heldout"


def _valid_rows(files: Path, config: CheckDatasetConfig, reading: _Reading) -> Iterator[Iterable[int]]:
    """Yield the numbers of the rows that have a chat, segment by segment; the others go to the quarantine."""
    for file in files_of_sets(files, config, dataset_tools(config.tools, "data.tools")):
        for segment, place, first in reading.reader.read(file):
            numbers = reading.table.extend(segment, place, first, file.set_name, file.source)
            reading.counts["read"] += len(segment) + len(segment.left_out)
            if file.source is not None:
                malformed = sum(row.marked_by is None for row in segment.left_out)
                count_read(reading.sources, file.source, len(segment) + len(segment.left_out), malformed)
            for key, count in segment.unread.items():
                if key not in config.heldout_fields:
                    reading.unread[key] += count
            for item, count in segment.told.items():
                if item[0] not in config.heldout_fields:
                    reading.told[item] += count
            if segment.carriage_returns:
                reading.counts["carriage_returns"] += segment.carriage_returns
            yield numbers if not segment.left_out else _in_order(numbers, segment, file, (place, first), reading)


def _in_order(
    numbers: range, segment: RowSegment, file: RowsFile, at: tuple[str, int], reading: _Reading
) -> Iterator[int]:
    """Yield the rows with a chat; put the others into the quarantine where they are in the file.

    A row that cannot be held out gets into the quarantine after it was yielded.
    """
    left_out = deque(segment.left_out)
    for in_segment, number in zip(segment.arrays["numbers"].tolist(), numbers, strict=True):
        while left_out and left_out[0].number < in_segment:
            _leave_out(left_out.popleft(), *at, file.set_name, reading)
        yield number
    for row in left_out:
        _leave_out(row, *at, file.set_name, reading)


def _leave_out(row: LeftOut, place: str, first: int, set_name: str, reading: _Reading) -> None:
    is_malformed = row.marked_by is None
    if row.marked_by is not None:
        reading.marks[row.marked_by] += 1
    reading.quarantine.add(
        "malformed" if is_malformed else "marked_false",
        f"{place}{first + row.number}",
        set_name,
        row.problem,
        row.raw,
        first=is_malformed,
    )


def files_of_sets(files: Path, config: CheckDatasetConfig, tools: list[Tool] | None) -> Iterator[RowsFile]:
    """Yield the files of a dataset in the order in which they are read: those that are held out first.

    Raises:
        BadData: a file is missing, or two sources have the same file.
    """
    if config.sources:
        yield from files_of_sources(files, config, tools)
        return
    for set_name, names in assign_files(files, config).items():
        settings = RowSettings(
            config.format,
            config.columns,
            config.group,
            tools,
            ignore=config.ignore,
            is_training=set_name == TRAIN,
        )
        for name in names:
            yield RowsFile(files, name, settings, set_name)


def _hold_out(number: int, found: array[int], config: CheckDatasetConfig, reading: _Reading) -> None:
    """Hold a row out, or put it into the quarantine if it cannot be held out."""
    table = reading.table
    if config.group is not None and table.group[number] < 0:
        problem = f"expected the field {config.group} (data.group), which names the row's group"
        _refuse(number, "malformed", problem, reading)
    elif not table.flags[number] & LAST_LEARNED:
        _refuse(number, "marked_false", "its last answer, the reference, is marked as not to be learned", reading)
    else:
        found.append(number)


def _refuse(number: int, reason: str, problem: str, reading: _Reading) -> None:
    table = reading.table
    reading.quarantine.add(reason, table.place(number), table.set_read(number), problem, table.raw(number))


def _hold_out_prompt(
    table: ChatTable, columns: Columns, splits: dict[Split, Rows], reading: _Reading, config: CheckDatasetConfig
) -> None:
    """Hold out one prompt (or group) if the seeded hash holds out none, as in a small dataset: the next in its order."""
    rows = splits["train"]
    units = [table.unit(number, int(columns.keys[number])) for number in rows.tolist()]
    is_pinned = columns.has(PINNED_TO_TRAIN)[rows]
    may_be_reference = columns.has(LAST_LEARNED)[rows] & ~is_pinned
    may_be_held_out = may_be_reference if config.group is None else may_be_reference & (columns.groups[rows] >= 0)
    may = {units[position] for position in np.flatnonzero(may_be_held_out).tolist()}
    if len(set(units)) < 2 or not may:
        return
    chosen = min(may, key=lambda key: draw(key, config.seed, "heldout"))
    is_chosen = np.array([unit == chosen for unit in units], bool)
    splits["train"] = rows[~is_chosen | is_pinned]  # pinned rows with this prompt are leaks, and counted as such
    held_out = rows[is_chosen & may_be_reference]
    splits["heldout"] = np.concatenate([splits["heldout"], held_out])
    reading.counts["held_out_of_few"] += len(held_out)


def _limit(
    table: ChatTable, columns: Columns, splits: dict[Split, Rows], reading: _Reading, config: CheckDatasetConfig
) -> None:
    """Keep a seeded sample of the training rows, spread over groups or labels (data.limit)."""
    rows = splits["train"]
    if config.limit and config.limit < len(rows):
        reading.counts["over_limit"] = len(rows) - config.limit
        numbers = rows.tolist()
        values = spread_values(
            [table.group_name(number) for number in numbers],
            (table.messages(number)[-1]["content"] or "" for number in numbers),
        )
        keys = [f"{key:016x}" for key in columns.keys[rows].tolist()]
        splits["train"] = rows[spread_sample(keys, values, config.limit, config.seed, "limit")]


def assign_files(files: Path, config: CheckDatasetConfig) -> dict[str, list[str]]:
    """Return {set: files}. A file belongs to the first set that names it; held-out sets come before training.

    Raises:
        BadData: every file of a held-out set already belongs to another set, or a pattern matches no file.
    """
    names: dict[str, list[str]] = {}
    set_of: dict[str, str] = {}
    for set_name, patterns in (*((n, [f]) for n, f in config.extra_heldout.items()), (GATE_SET, config.heldout)):
        matches = match_files(files, patterns)
        found = [name for name in matches if name not in set_of]
        if patterns and not found:
            raise BadData(
                f'Every file of the held-out set "{set_name}" already belongs to the set "{set_of[matches[0]]}".',
                where=set_name,
                got=", ".join(patterns),
                next_step="correct data.heldout or data.extra_heldout",
            )
        set_of |= dict.fromkeys(found, set_name)
        names[set_name] = found
    everything = match_files(files, ["*"])
    patterns = config.train
    if len(everything) == 1 and patterns == ["train*"]:
        patterns = everything  # a single file of any name
    names["train"] = [name for name in match_files(files, patterns) if name not in set_of]
    return names


def unread_files(files: Path, config: CheckDatasetConfig) -> list[str]:
    """Return the readable files that no pattern of the recipe names: a new file of the dataset may be forgotten there."""
    read = {file.name for file in files_of_sets(files, config, None)}
    return [name for name in readable_files(files) if name not in read]


def _write_clusters(out: Path, table: ChatTable, splits: Mapping[Split, Rows], clusters: Clusters) -> NearDuplicates:
    """Write clusters.jsonl, which is in no facet: no stage depends on it."""
    numbers, of_splits = clusters.among(splits)
    with (out / "clusters.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in clusters.lines(table, numbers, of_splits))
    return clusters.report(table, numbers, of_splits)


def _write_rows(path: Path, table: ChatTable, rows: Rows, split: Split, clusters: Clusters | None) -> None:
    """Write the rows of a split. Held-out rows of a cluster become a group, if `clusters` is given."""

    def group(number: int) -> str | None:
        cluster = clusters.group(number) if clusters is not None and split == "heldout" else None
        return f"{CLUSTER}{cluster}" if cluster else table.group_name(number)

    is_in_cluster = clusters is not None and split == "heldout"
    with path.open("wb") as file:
        file.writelines(table.lines(rows, split, group if is_in_cluster or table.has_groups else None))
