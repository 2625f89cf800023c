"""Stage check_dataset: split valid rows into train, validation and held-out; list the others in quarantine.jsonl.

The stage never fails because of bad rows: it reports them with reasons. `check_limits` then compares the report with the
recipe's limits and stops the run if a limit is exceeded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import JsonValue

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import GATE_SET, ChatRecord, Message
from loraflow.data.check_report import CheckReport, Profile, SplitCounts
from loraflow.data.readers import match_files, read_rows
from loraflow.data.split import group_key, in_share, prompt_key, row_id
from loraflow.failures import BadData, LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

Split = Literal["train", "validation", "heldout"]
Splits = dict[Split, list[ChatRecord]]


class Quarantined(TypedDict):
    """A line of quarantine.jsonl."""

    place: str  # file:line, or file:row
    set: str  # train, or the name of a held-out set
    problem: str
    row: str  # the row's text; empty if the row is valid but was dropped


def run(job: Job[CheckDatasetConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write train.jsonl, validation.jsonl, heldout.jsonl, quarantine.jsonl and report.json.

    Raises:
        BadData: a file is missing or cannot be read.
    """
    config, files = job.config, inputs["dataset"] / "files"
    quarantine: list[Quarantined] = []
    counts: Counter[str] = Counter()
    splits = _read(files, config, quarantine, counts)
    _drop_duplicates(splits, quarantine, counts, config.duplicates)
    _drop_leaks(splits, quarantine, counts)
    if config.limit:
        splits["train"] = splits["train"][: config.limit]
    for split, records in splits.items():
        _write(out / f"{split}.jsonl", records)
    _write(out / "quarantine.jsonl", quarantine)
    rows = SplitCounts(**{split: len(records) for split, records in splits.items()})
    report = CheckReport(
        rows=rows,
        sets=dict(Counter(record["set"] for record in splits["heldout"])),
        counts=dict(counts),
        malformed_share=counts["malformed"] / max(counts["read"], 1),
        first_problems=[f"{row['place']}: {row['problem']}" for row in quarantine[:5]],
        profile=Profile.of(splits["train"]),
    ).as_json()
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    return Summary(
        figures={
            **rows.model_dump(),
            "malformed": counts["malformed"],
            "dropped": counts["duplicate"] + counts["leak"],
        },
        report=report,
        facets={"train": ["train.jsonl", "validation.jsonl"], "heldout": ["heldout.jsonl"]},
    )


def check_limits(report: Mapping[str, JsonValue], max_quarantined: float, where: str) -> None:
    """Stop the run if a report of check_dataset exceeds the recipe's limits.

    Args:
        report: the report in the artifact's manifest.
        max_quarantined: largest share of malformed rows (data.max_quarantined).
        where: location of the report, for messages.

    Raises:
        LimitExceeded: too many rows are malformed.
        BadData: there are no training rows, or no held-out rows.
    """
    found = CheckReport.model_validate(report)
    problems = "\n            ".join(found.first_problems)
    if found.malformed_share > max_quarantined:
        raise LimitExceeded(
            f"{found.counts.get('malformed', 0)} of {found.counts['read']} rows are malformed.",
            where=where,
            expected=f"at most {max_quarantined:.2%} (data.max_quarantined)",
            got=f"{found.malformed_share:.2%}; the first problems:\n            {problems}",
            next_step="fix these rows, then run `loraflow data add`, or raise data.max_quarantined",
        )
    for name, count, key in (
        ("train", found.rows.train, "data.train"),
        ("heldout", found.rows.heldout, "data.heldout or data.heldout_fraction"),
    ):
        if not count:
            raise BadData(
                f"There are no {name} rows.",
                where=where,
                got=problems or "an empty set",
                next_step=f"correct the dataset or {key}",
            )


def _read(files: Path, config: CheckDatasetConfig, quarantine: list[Quarantined], counts: Counter[str]) -> Splits:
    """Read all files and split their rows; malformed rows go to `quarantine`."""
    splits: Splits = {"train": [], "validation": [], "heldout": []}
    for set_name, set_files in _assign_files(files, config).items():
        for row in read_rows(files, set_files, config.format, config.columns, config.group):
            counts["read"] += 1
            if row.messages is None:
                counts["malformed"] += 1
                quarantine.append({"place": row.place, "set": set_name, "problem": row.problem or "", "row": row.raw})
                continue
            split = _assign_split(row.messages, row.group, set_name, config)
            if config.group is not None and row.group is None and split == "heldout":
                counts["malformed"] += 1
                problem = f"expected the field {config.group} (data.group), which names the row's group"
                quarantine.append({"place": row.place, "set": set_name, "problem": problem, "row": row.raw})
                continue
            name = split if split != "heldout" else GATE_SET if set_name == "train" else set_name
            splits[split].append(_record(row.messages, row.place, name, config.system, row.group))
    return splits


def _assign_files(files: Path, config: CheckDatasetConfig) -> dict[str, list[str]]:
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


def _assign_split(messages: list[Message], group: str | None, set_name: str, config: CheckDatasetConfig) -> Split:
    if set_name != "train":
        return "heldout"
    key = prompt_key(messages) if group is None else group_key(group)
    if not config.heldout and in_share(key, config.heldout_fraction, config.seed, "heldout"):
        return "heldout"
    if config.validation_fraction and in_share(key, config.validation_fraction, config.seed, "validation"):
        return "validation"
    return "train"


def _record(messages: list[Message], place: str, set_name: str, system: str | None, group: str | None) -> ChatRecord:
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    record: ChatRecord = {"id": row_id(messages), "set": set_name, "place": place, "messages": messages}
    return record if group is None else {**record, "group": group}


def _drop_duplicates(
    splits: Splits, quarantine: list[Quarantined], counts: Counter[str], policy: Literal["drop", "keep"]
) -> None:
    """Drop duplicates within a split. Held-out duplicates are always dropped: ids join the scores of two models."""
    for split, records in splits.items():
        seen: dict[tuple[str, str], str] = {}
        unique: list[ChatRecord] = []
        for record in records:
            key = (record["id"], record["set"])
            if key in seen and (policy == "drop" or split == "heldout"):
                counts["duplicate"] += 1
                quarantine.append(_dropped(record, record["set"], f"same as {seen[key]}"))
                continue
            seen.setdefault(key, record["place"])
            unique.append(record)
        splits[split] = unique


def _drop_leaks(splits: Splits, quarantine: list[Quarantined], counts: Counter[str]) -> None:
    """Drop training and validation rows whose prompt is held out: scores must not come from rows that were learned."""
    heldout = {prompt_key(record["messages"]): record["place"] for record in splits["heldout"]}
    for split in ("train", "validation"):
        remaining: list[ChatRecord] = []
        for record in splits[split]:
            place = heldout.get(prompt_key(record["messages"]))
            if place is None:
                remaining.append(record)
                continue
            counts["leak"] += 1
            quarantine.append(_dropped(record, split, f"its prompt is held out ({place})"))
        splits[split] = remaining


def _dropped(record: ChatRecord, set_name: str, problem: str) -> Quarantined:
    return {"place": record["place"], "set": set_name, "problem": problem, "row": ""}


def _write(path: Path, rows: Iterable[ChatRecord] | Iterable[Quarantined]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
