"""Stage check_dataset: split valid rows into train, validation and held-out; list the others in quarantine.jsonl.

The stage never fails because of bad rows: it reports them with reasons. `check_limits` then compares the report with the
recipe's limits and stops the run if a limit is exceeded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import JsonValue

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import GATE_SET, ChatRecord, Message, with_system
from loraflow.data.check_report import CheckReport, Finding, NearDuplicates, Profile, SplitCounts
from loraflow.data.findings import leave_out_findings
from loraflow.data.group_leaks import drop_group_leaks, heldout_groups
from loraflow.data.heldout_fields import write_field_values
from loraflow.data.near_prompts import with_near_prompts
from loraflow.data.near_split import Clusters, ValidRow, draw_split, place_near
from loraflow.data.placement import Split
from loraflow.data.readers import Row, is_partly_learned, match_files, read_rows
from loraflow.data.sampling import spread_sample, spread_values
from loraflow.data.similar import CheckedRow, find_similar, is_last_learned
from loraflow.data.split import CLUSTER, draw, group_key, prompt_key, row_id
from loraflow.data.thinking import with_thinking
from loraflow.data.tools import dataset_tools
from loraflow.failures import BadData, LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

Splits = dict[Split, list[CheckedRow]]
DROPPED = ("duplicate", "leak", "marked_false", "near_leak", "near_both", "group_leak")
MAX_UNREAD = 50  # keys in the report
MAX_PROBLEM = 200  # characters of a problem in a failure


class Quarantined(TypedDict):
    """A line of quarantine.jsonl."""

    place: str  # file:line, or file:row
    set: str  # train, or the name of a held-out set
    problem: str
    row: str  # the row's text; empty if the row is valid but was dropped


@dataclass
class _Reading:
    """What was left out while the rows were read."""

    quarantine: list[Quarantined]
    counts: Counter[str]
    unread: Counter[str]  # keys that have values and were not read
    malformed: set[str] = field(default_factory=set)  # places of the first malformed rows
    findings: list[Finding] = field(default_factory=list)  # of data.profile

    def first_problems(self) -> list[str]:
        """Return places and problems of the first rows: the malformed ones, which can stop the run, before the others."""
        rows = sorted(self.quarantine, key=lambda row: row["place"] not in self.malformed)[:5]
        return [f"{row['place']}: {row['problem']}" for row in rows]

    def drop(self, record: ChatRecord, set_name: str, reason: str, problem: str) -> None:
        """Count a row that is left out, and put it into the quarantine."""
        self.counts[reason] += 1
        self.quarantine.append({"place": record["place"], "set": set_name, "problem": problem, "row": ""})

    def leave_out(self, valid: ValidRow, reason: str, problem: str) -> None:
        """Count a row that is left out before it has a split, and put it into the quarantine."""
        self.counts[reason] += 1
        self.quarantine.append({"place": valid.row.place, "set": valid.set, "problem": problem, "row": ""})


def run(job: Job[CheckDatasetConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write train.jsonl, validation.jsonl, heldout.jsonl, quarantine.jsonl and report.json.

    Raises:
        BadData: a file is missing or cannot be read, or rows cannot be divided by a field of `slices`.
    """
    config, files = job.config, inputs["dataset"] / "files"
    reading = _Reading(quarantine=[], counts=Counter(), unread=Counter())
    splits, clusters = _read(files, config, reading)
    groups = heldout_groups(splits["heldout"])  # of duplicates too
    _drop_duplicates(splits, reading, config.duplicates)
    _drop_leaks(splits, reading)
    drop_group_leaks(splits, groups, reading.drop)
    similar = find_similar(splits["train"] + splits["validation"], splits["heldout"])
    if config.near_duplicates is not None:
        similar = with_near_prompts(similar, splits["train"] + splits["validation"])
    _limit(splits, reading, config)
    near = None if clusters is None else _write_clusters(out, splits, clusters, config)
    for split, rows in splits.items():
        _write(out / f"{split}.jsonl", (row.record for row in rows))
    _write(out / "quarantine.jsonl", reading.quarantine)
    if config.heldout_fields:
        write_field_values(files, (row.record for row in splits["heldout"]), config.heldout_fields, out)
    counts = SplitCounts(**{split: len(rows) for split, rows in splits.items()})
    report = CheckReport(
        rows=counts,
        sets=dict(Counter(row.record["set"] for row in splits["heldout"])),
        counts=dict(reading.counts),
        malformed_share=reading.counts["malformed"] / max(reading.counts["read"], 1),
        first_problems=reading.first_problems(),
        unread=dict(reading.unread.most_common(MAX_UNREAD)),
        similar=similar,
        findings=reading.findings,
        near=near,
        profile=Profile.of([row.record for row in splits["train"]]),
    ).as_json()
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    return Summary(
        figures={
            **counts.model_dump(),
            "malformed": reading.counts["malformed"],
            "dropped": sum(
                n for reason, n in reading.counts.items() if reason in DROPPED or reason.startswith("profile_")
            ),
        },
        report=report,
        facets={"train": ["train.jsonl", "validation.jsonl"], "heldout": ["heldout.jsonl"]},
    )


def check_limits(
    report: Mapping[str, JsonValue],
    max_quarantined: float,
    where: str,
    dataset: str = "The dataset",
    *,
    refuse_near_leaks: bool = False,
) -> None:
    """Stop the run if a report of check_dataset exceeds the recipe's limits.

    Args:
        report: the report in the artifact's manifest.
        max_quarantined: largest share of malformed rows (data.max_quarantined).
        where: location of the report, for messages.
        dataset: the dataset's name, for messages.
        refuse_near_leaks: whether training rows that are near to a held-out row stop the run (data.near_duplicates).

    Raises:
        LimitExceeded: too many rows are malformed, or training rows are near to held-out rows.
        BadData: there are no training rows, or no held-out rows.
    """
    found = CheckReport.model_validate(report)
    problems = "".join(f"\n            {_short(problem)}" for problem in found.first_problems)
    read = found.counts.get("read", 0)
    if found.malformed_share > max_quarantined:
        raise LimitExceeded(
            f"{found.counts.get('malformed', 0)} of {read} rows are malformed.",
            where=where,
            expected=f"at most {max_quarantined:.2%} (data.max_quarantined)",
            got=f"{found.malformed_share:.2%}; the first problems:{problems}",
            next_step="fix these rows, then run `loraflow data add`, or raise data.max_quarantined",
        )
    if refuse_near_leaks and (leaks := found.counts.get("near_leak", 0)):
        raise LimitExceeded(
            f"{leaks} training rows are nearly the same as held-out rows.",
            where=where,
            expected="none (data.near_duplicates: refuse)",
            got=f"the first problems:{problems}",
            next_step="remove them, then run `loraflow data add`, or set data.near_duplicates: drop; quarantine.jsonl "
            "in the artifact names all of them",
        )
    for name, count, next_step in (
        ("train", found.rows.train, "add rows, or correct data.train, data.columns or data.heldout_fraction"),
        (
            "heldout",
            found.rows.heldout,
            "name a file with held-out rows in data.heldout, or set data.heldout_fraction; it needs two different prompts",
        ),
    ):
        if not count:
            raise BadData(
                f"{dataset} has no {name} rows.",
                where=where,
                got=f"{read} rows read, {found.rows.train} left to train on{problems}",
                next_step=next_step,
            )


def _short(problem: str) -> str:
    line = " ".join(problem.split())
    return line if len(line) <= MAX_PROBLEM else line[: MAX_PROBLEM - 1] + "…"


def _read(files: Path, config: CheckDatasetConfig, reading: _Reading) -> tuple[Splits, Clusters | None]:
    """Read all files and split their rows; malformed rows go to the quarantine."""
    splits: Splits = {"train": [], "validation": [], "heldout": []}
    rows: Iterable[ValidRow] = _valid_rows(files, config, reading)
    if config.profile:
        rows, reading.findings = leave_out_findings(
            rows, config.profile, reading.leave_out, partial(_may_be_learned, config=config)
        )
    clusters = None
    if config.near_duplicates is None:
        for row in rows:
            _place(row, draw_split(row, config), splits, config, reading)
    else:
        clusters = place_near(
            rows, config, partial(_place, splits=splits, config=config, reading=reading), reading.leave_out
        )
        reading.counts.update(clusters.counts)
    if (
        config.heldout_fraction
        and not config.heldout
        and config.near_duplicates != "drop"  # has held out a cluster
        and not any(r.record["set"] == GATE_SET for r in splits["heldout"])
    ):
        _hold_out_one(splits, reading, config)
    return splits, clusters


def _may_be_learned(row: ValidRow, config: CheckDatasetConfig) -> bool:
    """Tell whether a row may get into training: which rows of training files do with `drop` depends on other rows."""
    return row.set == "train" if config.near_duplicates == "drop" else draw_split(row, config) != "heldout"


def _valid_rows(files: Path, config: CheckDatasetConfig, reading: _Reading) -> Iterator[ValidRow]:
    """Yield the rows that have a chat; the others go to the quarantine."""
    counts, quarantine = reading.counts, reading.quarantine
    tools = dataset_tools(config.tools, "data.tools")
    for set_name, set_files in assign_files(files, config).items():
        for as_read in read_rows(files, set_files, config.format, config.columns, config.group, tools):
            row = with_thinking(as_read, config.thinking)
            counts["read"] += 1
            if row.unused_keys:
                reading.unread.update(key for key in row.unused_keys if key not in config.heldout_fields)
            if row.messages is None:
                counts["marked_false" if row.is_marked_false else "malformed"] += 1
                if not row.is_marked_false and len(reading.malformed) < 5:
                    reading.malformed.add(row.place)
                quarantine.append({"place": row.place, "set": set_name, "problem": row.problem or "", "row": row.raw})
                continue
            yield ValidRow(row, row.messages, set_name, prompt_key(row.messages))


def _place(valid: ValidRow, split: Split, splits: Splits, config: CheckDatasetConfig, reading: _Reading) -> None:
    """Put a row into its split, or into the quarantine if it cannot be held out."""
    row, messages, set_name, key = valid
    counts, quarantine = reading.counts, reading.quarantine
    if config.group is not None and row.group is None and split == "heldout":
        counts["malformed"] += 1
        problem = f"expected the field {config.group} (data.group), which names the row's group"
        quarantine.append({"place": row.place, "set": set_name, "problem": problem, "row": row.raw})
        return
    name = split if split != "heldout" else GATE_SET if set_name == "train" else set_name
    if split == "heldout" and row.learned is not None and len(messages) - 1 not in row.learned:
        counts["marked_false"] += 1
        problem = "its last answer, the reference, is marked as not to be learned"
        quarantine.append({"place": row.place, "set": set_name, "problem": problem, "row": row.raw})
        return
    record = _record(messages, row, name, config.system, is_heldout=split == "heldout")
    if row.group is not None:
        record["group"] = row.group
    if "weights" in record:
        counts["weighted"] += 1
    if "learned" in record and is_partly_learned(row):
        counts["partly_marked"] += 1
    if record["messages"] is not messages:
        key = prompt_key(record["messages"])
    splits[split].append(CheckedRow(record, key))


def _hold_out_one(splits: Splits, reading: _Reading, config: CheckDatasetConfig) -> None:
    """Hold out one prompt (or group) if the seeded hash holds out none, as in a small dataset: the next in its order."""
    rows = splits["train"]

    def unit(row: CheckedRow) -> str:
        group = row.record.get("group")
        return row.prompt if group is None else group_key(group)

    may = {unit(r) for r in rows if is_last_learned(r.record) and (config.group is None or "group" in r.record)}
    if len({unit(row) for row in rows}) < 2 or not may:
        return
    chosen = min(may, key=lambda key: draw(key, config.seed, "heldout"))
    splits["train"] = [row for row in rows if unit(row) != chosen]
    for row in rows:
        if unit(row) == chosen and is_last_learned(row.record):
            record: ChatRecord = {**row.record, "set": GATE_SET}
            record.pop("learned", None)
            record.pop("weights", None)
            splits["heldout"].append(CheckedRow(record, row.prompt))
            reading.counts["held_out_of_few"] += 1


def _limit(splits: Splits, reading: _Reading, config: CheckDatasetConfig) -> None:
    """Keep a seeded sample of the training rows, spread over groups or labels (data.limit)."""
    rows = splits["train"]
    if config.limit and config.limit < len(rows):
        reading.counts["over_limit"] = len(rows) - config.limit
        values = spread_values(
            [row.record.get("group") for row in rows], [row.record["messages"][-1]["content"] or "" for row in rows]
        )
        taken = spread_sample([row.prompt for row in rows], values, config.limit, config.seed, "limit")
        splits["train"] = [rows[n] for n in taken]


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


def _record(messages: list[Message], row: Row, set_name: str, system: str | None, *, is_heldout: bool) -> ChatRecord:
    """Return a row's record. Of a held-out row, only the last answer is used: marks and weights are left out."""
    added = bool(system) and messages[0]["role"] != "system"
    if system and added:
        messages = with_system(messages, system)
    record: ChatRecord = {"id": row_id(messages), "set": set_name, "place": row.place, "messages": messages}
    if row.learned is not None and not is_heldout:
        record["learned"] = [number + added for number in row.learned]
        if row.weights is not None:
            record["weights"] = list(row.weights)
    return record


def _drop_duplicates(splits: Splits, reading: _Reading, policy: Literal["drop", "keep"]) -> None:
    """Drop duplicates within a split. Held-out duplicates are always dropped: ids join the scores of two models.

    Chats with other marks are not duplicates.
    """
    for split, rows in splits.items():
        places: dict[str, dict[str, str]] = {}  # set → chat → place of its first row
        unique: list[CheckedRow] = []
        for row in rows:
            record = row.record
            seen = places.setdefault(record["set"], {})
            chat = f"{record['id']} {record['learned']}" if "learned" in record else record["id"]
            chat += f" {record['weights']}" if "weights" in record else ""
            if chat in seen and (policy == "drop" or split == "heldout"):
                reading.drop(record, record["set"], "duplicate", f"same as {seen[chat]}")
                continue
            seen.setdefault(chat, record["place"])
            unique.append(row)
        splits[split] = unique


def _drop_leaks(splits: Splits, reading: _Reading) -> None:
    """Drop training and validation rows whose prompt is held out: scores must not come from rows that were learned."""
    heldout = {row.prompt: row.record["place"] for row in splits["heldout"]}
    for split in ("train", "validation"):
        remaining: list[CheckedRow] = []
        for row in splits[split]:
            place = heldout.get(row.prompt)
            if place is None:
                remaining.append(row)
            else:
                reading.drop(row.record, split, "leak", f"its prompt is held out ({place})")
        splits[split] = remaining


def _write_clusters(out: Path, splits: Splits, clusters: Clusters, config: CheckDatasetConfig) -> NearDuplicates:
    """Write clusters.jsonl, which is in no facet: no stage depends on it. Held-out rows of a cluster become a group."""
    lines = clusters.lines([row.record for rows in splits.values() for row in rows])
    _write(out / "clusters.jsonl", lines)
    if config.group is None:
        for row in splits["heldout"]:
            if group := clusters.group.get(row.record["place"]):
                row.record["group"] = f"{CLUSTER}{group}"
    return clusters.report(lines)


def _write(path: Path, rows: Iterable[ChatRecord] | Iterable[Quarantined] | Iterable[dict[str, str]]) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row
    with path.open("w", encoding="utf-8") as file:
        file.writelines(encode(row) + "\n" for row in rows)
