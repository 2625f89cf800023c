"""The part of a run's report about its settings, what changed since the last run, and earlier runs of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import JsonValue

from loraflow.data.chats import GATE_SET
from loraflow.identity import short
from loraflow.registry.runs import RunRecord, changes

MOST_CHANGES = 12  # in the report; `loraflow compare` shows all
_TRAINING = ("learning_rate", "num_train_epochs", "max_steps", "max_length", "seed")
_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules")


@dataclass(frozen=True)
class History:
    """A run, and earlier runs of its recipe that reached a decision."""

    run: RunRecord
    earlier: Sequence[RunRecord]  # newest first
    dataset: str  # the version of the dataset, as text


def history_lines(history: History) -> Iterator[str]:
    """Yield the settings, what changed since the last run, and the table of earlier runs, as markdown."""
    yield from ("## Settings", "", "| setting | value |", "|---|---|")
    for name, value in _settings(history):
        yield f"| {name} | {value} |"
    yield ""
    if not history.earlier:
        return
    last = history.earlier[0]
    changed = list(changes(last, history.run))
    yield f"Changed since run {last.run}:" if changed else f"Nothing changed since run {last.run}."
    yield ""
    for line in changed[:MOST_CHANGES]:
        yield f"- `{_cell(line)}`"
    if len(changed) > MOST_CHANGES:
        yield f"- and {len(changed) - MOST_CHANGES} more: `loraflow compare {last.run} {history.run.run}`"
    yield from ([""] if changed else [])
    yield from _runs(history)


def _settings(history: History) -> Iterator[tuple[str, str]]:
    run = history.run
    base, training = run.section("base"), run.section("training_config")
    yield "dataset", _cell(history.dataset)
    revision = base.get("revision")
    yield "base", _cell(f"{base.get('model')}" + (f" at {short(str(revision))}" if revision else ""))
    steps = training.get("max_steps")
    for name in _TRAINING:
        # with a number of steps, epochs are not used
        is_unused = name == ("num_train_epochs" if isinstance(steps, int) and steps > 0 else "max_steps")
        if not is_unused and training.get(name) is not None:
            yield name, _text(training[name])
    rows, repeats = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")
    if isinstance(rows, int) and isinstance(repeats, int):
        yield "rows of a step", str(rows * repeats)
    for name in _ADAPTER:
        if (value := run.section("peft_config").get(name)) is not None:
            yield name, _text(value)
    yield "loraflow", _cell(run.loraflow or "unknown")
    if run.commit:
        yield "git commit", f"{run.commit[:12]}" + (" with uncommitted changes" if run.uncommitted else "")


def _runs(history: History) -> Iterator[str]:
    """Yield a table of this run and the earlier ones, with the score that decides."""
    primary = history.run.section("gate").get("primary")
    yield from ("### Runs of this recipe", "", f"| run | started | verdict | {primary} | entry in the registry |")
    yield "|---|---|---|---:|---:|"
    for record in (history.run, *history.earlier):
        summary = record.summary
        if summary is None or summary.decision is None:
            continue
        value = ((summary.metrics.get("tuned") or {}).get(GATE_SET) or {}).get(str(primary))
        started = datetime.fromtimestamp(record.started, UTC).strftime("%Y-%m-%d %H:%M UTC")
        entry = "" if summary.registered is None else str(summary.registered)
        score = "" if value is None else f"{value.value:.3f}"
        name = f"**{record.run}**" if record.run == history.run.run else record.run
        yield f"| {name} | {started} | {summary.decision.verdict} | {score} | {entry} |"
    yield from ("", "Scores of runs are comparable only if they were computed on the same held-out rows.", "")


def _text(value: JsonValue) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else _cell(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    )


def _cell(text: str) -> str:
    """Return a text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
