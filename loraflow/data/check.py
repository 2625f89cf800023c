"""Stage check_dataset: rows that passed, split into train, validation and held-out; the rest in quarantine, with reasons.

Nothing is decided here: the report says what was found, and `admit` compares it with the recipe's bounds.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.readers import Row, match_files, read_rows
from loraflow.data.split import falls_in, prompt_key, row_id
from loraflow.failures import BadData, Inadmissible
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

GATE_SET = "heldout"  # the set that the gate looks at; extra sets are reported beside it


def run(job: Job[CheckDatasetConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write train.jsonl, validation.jsonl, heldout.jsonl, quarantine.jsonl and report.json.

    Raises:
        BadData: a file is missing or unreadable, or nothing is left to train on or to hold out.
    """
    config, files = job.config, inputs["dataset"] / "files"
    names = _assign_files(files, config)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "heldout": []}
    quarantine: list[dict[str, str]] = []
    counts: Counter[str] = Counter()

    for set_name, set_files in names.items():
        for row in read_rows(files, set_files, config.format, config.columns):
            counts["read"] += 1
            if row.messages is None:
                counts["malformed"] += 1
                quarantine.append({"place": row.place, "set": set_name, "problem": row.problem or "", "row": row.raw})
                continue
            side = _side(row, set_name, config)
            name = side if side != "heldout" else GATE_SET if set_name == "train" else set_name
            rows[side].append(_record(row, name, config))

    _drop_duplicates(rows, quarantine, counts, config.duplicates)
    _drop_leaks(rows, quarantine, counts)
    if config.limit:
        rows["train"] = rows["train"][: config.limit]
    for name, found in rows.items():
        _write(out / f"{name}.jsonl", found)
    _write(out / "quarantine.jsonl", quarantine)
    summary: dict[str, Any] = {
        "rows": {name: len(found) for name, found in rows.items()},
        "sets": dict(Counter(row["set"] for row in rows["heldout"])),
        "counts": dict(counts),
        "malformed_share": counts["malformed"] / max(counts["read"], 1),
        "first_problems": [f"{q['place']}: {q['problem']}" for q in quarantine[:5]],
        "profile": _profile(rows),
    }
    (out / "report.json").write_text(json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    figures = {**summary["rows"], "malformed": counts["malformed"], "dropped": counts["duplicate"] + counts["leak"]}
    return Summary(
        figures=figures,
        report=summary,
        facets={"train": ["train.jsonl", "validation.jsonl"], "heldout": ["heldout.jsonl"]},
    )


def admit(report: dict[str, Any], max_quarantined: float, where: str) -> None:
    """Decide whether a run goes on with what check_dataset found.

    Raises:
        Inadmissible: too many rows are malformed.
        BadData: no row is left to train on, or to hold out.
    """
    problems = "\n            ".join(report["first_problems"])
    if report["malformed_share"] > max_quarantined:
        raise Inadmissible(
            f"{report['counts'].get('malformed', 0)} of {report['counts']['read']} rows are malformed.",
            where=where,
            expected=f"at most {max_quarantined:.2%} (data.max_quarantined)",
            got=f"{report['malformed_share']:.2%}; the first:\n            {problems}",
            next_step="mend the rows and version them again, or raise data.max_quarantined",
        )
    for name, key in (("train", "data.train"), ("heldout", "data.heldout or data.heldout_fraction")):
        if not report["rows"][name]:
            raise BadData(
                f"No {name} row is left.",
                where=where,
                got=problems or "an empty set",
                next_step=f"mend the dataset or {key}",
            )


def _assign_files(files: Path, config: CheckDatasetConfig) -> dict[str, list[str]]:
    """Return {set name: files}; a file belongs to the first set that names it, held-out sets before training."""
    names: dict[str, list[str]] = {}
    taken: set[str] = set()
    for set_name, patterns in (*((n, [f]) for n, f in config.extra_heldout.items()), (GATE_SET, config.heldout)):
        found = [name for name in match_files(files, patterns) if name not in taken] if patterns else []
        if patterns and not found:
            raise BadData(
                "All files of a held-out set belong to another one.",
                where=set_name,
                got=", ".join(patterns),
                next_step="mend data.heldout or data.extra_heldout",
            )
        taken.update(found)
        names[set_name] = found
    everything = match_files(files, ["*"])
    patterns = config.train
    if len(everything) == 1 and patterns == ["train*"]:
        patterns = everything  # a single file of any name
    names["train"] = [name for name in match_files(files, patterns) if name not in taken]
    return names


def _side(row: Row, set_name: str, config: CheckDatasetConfig) -> str:
    if set_name != "train":
        return "heldout"
    assert row.messages is not None
    key = prompt_key(row.messages)
    if not config.heldout and falls_in(key, config.heldout_fraction, config.seed, "heldout"):
        return "heldout"
    if config.validation_fraction and falls_in(key, config.validation_fraction, config.seed, "validation"):
        return "validation"
    return "train"


def _record(row: Row, set_name: str, config: CheckDatasetConfig) -> dict[str, Any]:
    assert row.messages is not None
    messages = row.messages
    if config.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system}, *messages]
    return {
        "id": row_id(messages),
        "set": set_name,
        "place": row.place,
        "messages": messages,
    }


def _drop_duplicates(
    rows: dict[str, list[dict[str, Any]]], quarantine: list[dict[str, str]], counts: Counter[str], policy: str
) -> None:
    """Drop rows that stand twice within a side; held-out rows always, since ids join the scores of two models."""
    for name, found in rows.items():
        seen: dict[tuple[str, str], str] = {}
        kept = []
        for row in found:
            key = (row["id"], row["set"])
            if key in seen and (policy == "drop" or name == "heldout"):
                counts["duplicate"] += 1
                quarantine.append(
                    {"place": row["place"], "set": row["set"], "problem": f"same as {seen[key]}", "row": ""}
                )
                continue
            seen.setdefault(key, row["place"])
            kept.append(row)
        rows[name] = kept


def _drop_leaks(rows: dict[str, list[dict[str, Any]]], quarantine: list[dict[str, str]], counts: Counter[str]) -> None:
    """Drop training rows whose prompt is held out: a score on rows that were learned says nothing."""
    held = {prompt_key(row["messages"]): row["place"] for row in rows["heldout"]}
    for name in ("train", "validation"):
        kept = []
        for row in rows[name]:
            place = held.get(prompt_key(row["messages"]))
            if place is None:
                kept.append(row)
                continue
            counts["leak"] += 1
            quarantine.append(
                {"place": row["place"], "set": name, "problem": f"its prompt is held out ({place})", "row": ""}
            )
        rows[name] = kept


def _profile(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Describe training rows, for people and for comparing two versions of a dataset."""
    train = rows["train"]
    if not train:
        return {}
    answers = sorted(len(row["messages"][-1]["content"]) for row in train)
    prompts = sorted(sum(len(m["content"]) for m in row["messages"][:-1]) for row in train)
    return {
        "turns": dict(sorted(Counter(str(len(row["messages"])) for row in train).items())),
        "with_system": sum(row["messages"][0]["role"] == "system" for row in train) / len(train),
        "prompt_characters": {"median": prompts[len(prompts) // 2], "max": prompts[-1]},
        "answer_characters": {"median": answers[len(answers) // 2], "max": answers[-1]},
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
