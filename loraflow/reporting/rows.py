"""What became of a dataset's rows in a run: read, left out by reason, learned, held out, scored."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from loraflow.config import Recipe
from loraflow.data.answers.mark_names import named_marks, split_hint
from loraflow.data.answers.unread_values import questions
from loraflow.data.chats import GATE_SET
from loraflow.data.checks.check_report import WHAT, CheckReport, NearDuplicates, finding_lines
from loraflow.data.checks.row_limits import source_lines
from loraflow.evaluation.metric_modules import find_module, metric_files
from loraflow.evaluation.values import EvaluationReport
from loraflow.failures import BadConfig
from loraflow.registry.runs import RowCount, RowsSummary
from loraflow.reporting.sections import figure

MAX_KEYS = 10  # keys that are named as not read
_LEFT_OUT = {
    "malformed": "left out: malformed",
    "marked_false": "left out: marked as not to be learned",
    "duplicate": "left out: duplicate chats",
    "leak": "left out of training: its prompt is held out",
    "near_leak": "left out of training: nearly the same as a held-out row",
    "near_both": "left out: nearly the same as rows on two sides of the split",
    "group_leak": "left out of training: its group (data.group) is held out",
    "over_limit": "left out of training: data.limit",
}
_OF_SOURCES = {
    "over_limit": "left out: the limit of its source",
    "not_drawn": "left out: not drawn by the weight of its source",
    "repeated": "added to training: repeated by the weight of its source",
}


MANY_TOO_LONG = 0.05  # share of the training rows


@dataclass(frozen=True)
class RowPolicy:
    """What a recipe says about long rows and held-out rows."""

    max_length: int  # training_config.max_length, in tokens
    too_long: Literal["error", "drop", "truncate"]  # data.too_long
    deals_rows: bool = False  # whether the recipe has data.heldout_reserve
    used_elsewhere: frozenset[str] = frozenset()  # files; see the function of this name


def used_elsewhere(recipe: Recipe) -> frozenset[str]:
    """Return the files that a recipe uses for something else than rows, such as data.tools or the words of a metric.

    The names are relative to the dataset's folder. Some may be no files.
    """
    used = {text.removesuffix(".dvc") for text in _texts(recipe.model_dump(mode="json"))}
    for name in recipe.evaluation.metrics:
        with suppress(BadConfig):
            if "/" in name:  # loraflow's own read no files
                used |= {str(file) for file in metric_files(find_module(name))}
    return frozenset(os.path.relpath(text, recipe.data.source.removesuffix(".dvc")) for text in used if text)


def _texts(value: JsonValue) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def summarise_rows(
    check: CheckReport, tokens: Mapping[str, JsonValue], evaluation: EvaluationReport, policy: RowPolicy
) -> RowsSummary:
    """Return what became of the rows."""
    rows = list(_counts(check, tokens, evaluation, policy))
    notes = [
        *_too_long_notes(tokens, policy),
        *check_notes(check, policy.used_elsewhere),
        *_heldout_notes(evaluation, policy),
    ]
    return RowsSummary(counts=rows, notes=notes)


def _counts(
    check: CheckReport, tokens: Mapping[str, JsonValue], evaluation: EvaluationReport, policy: RowPolicy
) -> Iterator[RowCount]:
    yield RowCount(what="read", rows=check.counts.get("read", 0))
    long = "cut" if policy.too_long == "truncate" else "left out of training"
    by = f" ({named_marks(check.marks)})" if check.marks else ""
    texts = {reason: text + (by if reason == "marked_false" else "") for reason, text in _LEFT_OUT.items()}
    reasons = {text: check.counts.get(reason, 0) for reason, text in texts.items()}
    reasons |= {text: sum(c.get(key, 0) for c in check.sources.values()) for key, text in _OF_SOURCES.items()}
    reasons |= {
        f"left out: {text} (data.profile)": check.counts.get(f"profile_{name}", 0) for name, text in WHAT.items()
    }
    reasons |= {
        "left out of training: a control token in its text": figure(tokens, "rows_special_tokens"),
        f"{long}: longer than max_length, {policy.max_length} tokens": figure(tokens, "rows_too_long"),
        "left out of training: no token to learn": figure(tokens, "rows_nothing_to_learn"),
    }
    yield from (RowCount(what=what, rows=count) for what, count in reasons.items() if count)
    yield RowCount(what="trained on", rows=figure(tokens, "train_rows"))
    yield RowCount(what="  tokens learned", rows=figure(tokens, "supervised_tokens"))
    yield RowCount(what="  of tokens", rows=figure(tokens, "train_tokens"))
    if check.rows.validation:
        yield RowCount(what="validation", rows=figure(tokens, "validation_rows"))
    for name, count in check.sets.items():
        scored = next((value.n for value in evaluation.metrics.get(name, {}).values()), 0)
        yield RowCount(what=f"scored, {name}{_chosen(name, scored, count, policy)}", rows=scored)


def _chosen(name: str, scored: int, count: int, policy: RowPolicy) -> str:
    """Return how the scored rows of a set were chosen; nothing if all rows were scored."""
    if scored == count:
        return ""
    if policy.deals_rows and name == GATE_SET:
        return f": the rows of {count} that were dealt to this model (data.heldout_reserve)"
    return f": a seeded sample of {count} (evaluation.max_rows)"


def check_notes(check: CheckReport, elsewhere: Collection[str] = ()) -> list[str]:
    """Return the notes of a check_dataset report, apart from its counts."""
    notes = source_lines(check)
    if files := [name for name in check.unread_files if name not in elsewhere]:
        count = max(check.unread_file_count, len(check.unread_files)) - (len(check.unread_files) - len(files))
        more = f" and {count - MAX_KEYS} more files" if count > MAX_KEYS else ""
        notes.append(f"files that no pattern of the recipe names are not read: {', '.join(files[:MAX_KEYS])}{more}")
    if check.unread:
        keys = [f"{key} ({count} rows)" for key, count in check.unread.items()]
        more = f" and {len(keys) - MAX_KEYS} more keys" if len(keys) > MAX_KEYS else ""
        notes.append(f"not read: {', '.join(keys[:MAX_KEYS])}{more}")
    notes += questions(check.doubtful)
    if returns := check.counts.get("carriage_returns", 0):
        notes.append(f"{returns} rows have carriage returns in their texts; the training keeps them")
    if marked := check.counts.get("marked_false", 0):
        by = f": {named_marks(check.marks)}{split_hint(check.marks)}" if check.marks else ""
        notes.append(f"{marked} rows are left out, because their answers are marked as not to be learned{by}")
    if partly := check.counts.get("partly_marked", 0):
        notes.append(f"{partly} rows have answers that are marked as not to be learned; only their other answers are")
    if weighted := check.counts.get("weighted", 0):
        notes.append(f"{weighted} rows have answers whose weight in the loss is not 0 or 1")
    if few := check.counts.get("held_out_of_few", 0):
        notes.append(
            f"the seeded split chose none of so few rows, so {few} with the next prompt in its order are held out"
        )
    similar = check.similar
    if similar.near_leaks:
        notes.append(
            f"{similar.near_leaks} training rows have a held-out prompt in another case, spacing or Unicode form, such as "
            f"{similar.near_leak}: the scores are better than they should be"
        )
    if similar.disputed_prompts:
        notes.append(
            f"{similar.disputed_prompts} training prompts have different answers, in {similar.disputed_rows} rows, such as "
            f"{similar.disputed}"
        )
    if similar.near_disputed_prompts:
        notes.append(
            f"{similar.near_disputed_prompts} training prompts are nearly the same as another one and have a different "
            f"answer, such as {similar.near_disputed}"
        )
    notes += ["; ".join(map(str.strip, finding_lines(f))) for f in check.findings if f.is_over]
    return notes + (near_notes(check.near) if check.near else [])


def near_notes(near: NearDuplicates) -> list[str]:
    """Return sentences about near-duplicates."""
    notes: list[str] = []
    if near.rows:
        within = ", ".join(f"{count} of {name}" for name, count in near.within.items())
        between = "; ".join(f"{count} rows, of {sets}" for sets, count in near.between.items())
        notes.append(
            f"{near.rows} rows are near-duplicates, in {near.clusters} cluster{'s'[: near.clusters != 1]}, "
            f"such as {near.pair}; the largest cluster has {near.largest} rows"
            + (f"; beyond the first row of each cluster: {within}" if within else "")
        )
        if between:
            notes.append(f"near-duplicates in two sets: {between} (clusters.jsonl in the artifact of check_dataset)")
    if near.unproposed:
        notes.append(
            f"{near.unproposed} pairs of rows that share a part of their text were not compared: too many rows share it"
        )
    return notes


def _too_long_notes(tokens: Mapping[str, JsonValue], policy: RowPolicy) -> Iterator[str]:
    """Yield a sentence if so many training rows are too long that max_length does not fit the dataset."""
    long, kept = tokens.get("rows_too_long"), tokens.get("train_rows")
    if not isinstance(long, int) or not isinstance(kept, int):
        return
    rows = kept if policy.too_long == "truncate" else kept + long
    if long > MANY_TOO_LONG * rows:
        fate = "cut" if policy.too_long == "truncate" else "left out"
        yield (
            f"{long} of {rows} training rows ({long / rows:.0%}) are longer than max_length ({policy.max_length} tokens) "
            f"and {fate}: raise training_config.max_length, or shorten them"
        )


def _heldout_notes(evaluation: EvaluationReport, policy: RowPolicy) -> Iterator[str]:
    if evaluation.control_tokens:
        yield (
            f"{evaluation.control_tokens} held-out rows have a control token in their text; they are scored, with the token "
            "as the model reads it"
        )
    if evaluation.longest > policy.max_length:
        yield (
            f"the longest held-out row has {evaluation.longest} tokens, more than max_length ({policy.max_length}); "
            "held-out rows are scored at any length"
        )
