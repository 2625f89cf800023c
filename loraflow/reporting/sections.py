"""Sections of a run's report: what is learned, the settings and earlier runs, the trials of a sweep.

What is learned: shares, lengths against max_length, and samples with the mask. Trials: a table of the combinations, and
their loss curves.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import TextWrapper
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.config.grid import short_names, show_value
from loraflow.data.chats import GATE_SET
from loraflow.data.tokens.token_report import Lengths, SampleRow, TokenReport
from loraflow.identity import short
from loraflow.registry.runs import RunRecord, changes
from loraflow.registry.sweeps import SweepRecord, ranked
from loraflow.reporting.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    curves_image,
    embedded,
    frame,
    level_line,
    round_numbers,
    sparkline,
)
from loraflow.training.validation_loss import Curves


@dataclass(frozen=True)
class Learned:
    """What tokenize says about the training rows."""

    figures: Mapping[str, JsonValue]  # the figures of tokenize's report
    report: TokenReport


def learned_lines(learned: Learned, *, image: bool) -> Iterator[str]:
    """Yield the part of the report, as markdown; with `image`, the lengths are an image."""
    tokens, supervised, without = (
        figure(learned.figures, name) for name in ("train_tokens", "supervised_tokens", "rows_nothing_to_learn")
    )
    if not tokens:
        return
    yield from ("## What is learned", "")
    yield f"- {supervised:,} of {tokens:,} tokens of the training rows are learned ({supervised / tokens:.1%})"
    yield f"- rows without a token to learn: {without:,}" + (", left out" if without else "")
    yield ""
    if lengths := learned.report.lengths:
        yield from _lengths(lengths, image=image)
    for number, row in enumerate(learned.report.samples):
        if not number:
            yield from (
                "Training rows, drawn at random, as the model reads them. What is learned is in ⟦ ⟧; ↪ continues a line:",
                "",
            )
        yield from _sample(row)


def figure(figures: Mapping[str, JsonValue], name: str) -> int:
    """Return a number of tokenize's report; 0 if it has none of this name."""
    found = figures.get(name, 0)
    return int(found) if isinstance(found, int | float) else 0


def _lengths(lengths: Lengths, *, image: bool) -> Iterator[str]:
    title = "lengths of the training rows"
    last = lengths.first + lengths.width * (len(lengths.rows) - 1)
    start = max(1, lengths.first - lengths.width + 1)
    yield from ("### Lengths", "")
    yield embedded(svg(lengths, title), title) if image else f"`{sparkline([0, *lengths.rows])[1:]}`"
    yield ""
    fate = "cut there" if lengths.too_long == "truncate" else "left out"
    over = f"{lengths.too_long_rows:,} rows are longer than max_length ({lengths.max_length} tokens)"
    yield f"Rows by their tokens, {start} to {last}, before rows are left out or cut. {over}" + (
        f", and {fate} (data.too_long: {lengths.too_long})." if lengths.too_long_rows else "."
    )
    if lengths.beyond:
        yield f"Not drawn: {lengths.beyond:,} rows of more than {last} tokens."
    yield from ("", "| longest rows | tokens |", "|---|---:|")
    for row in lengths.longest:
        place = row.place.replace("|", "\\|")
        yield f"| {place} | {row.tokens:,}{' (too long)' if row.tokens > lengths.max_length else ''} |"
    yield ""


# Prefect's page shows 66 characters of a block's line; the learned answer often begins after them.
WRAPPED = TextWrapper(64, expand_tabs=False, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False)


def _sample(row: SampleRow) -> Iterator[str]:
    text = "".join(itertools.starmap(marked, row.parts)) + (
        f"\n[{row.more_parts} more parts]" if row.more_parts else ""
    )
    text = "\n".join("\n↪ ".join(WRAPPED.wrap(line)) for line in text.split("\n"))
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # a text may hold code blocks itself
    yield f"{row.place}: {row.tokens:,} tokens, {row.learned_tokens:,} learned" + (
        f"; {row.left_out}" if row.left_out else ""
    )
    yield from ("", fence, text, fence, "")


def marked(text: str, weight: float) -> str:
    """Return a part of a row: in ⟦ ⟧ if it is learned, with its weight if that is not 1."""
    if not weight:
        return text
    return f"⟦{text}⟧" + ("" if weight == 1 else f"×{weight:g}")


LABEL_ROOM = 14  # pixels above the bars, for the label of max_length
INSIDE, OVER, LIMIT = "#1860f2", "#d9822b", "#b00020"  # colours: bars up to max_length, bars beyond it, and its line


def svg(lengths: Lengths, title: str) -> str:
    """Draw a bar for each range of lengths, in another colour beyond max_length."""
    last = lengths.first + lengths.width * (len(lengths.rows) - 1)
    shows_limit = lengths.max_length <= 2 * last  # far to the right of all bars, it would press them together
    end = max(last, lengths.max_length) if shows_limit else last
    most = max(lengths.rows, default=0) or 1
    base, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM - LABEL_ROOM

    def across(tokens: float) -> float:
        return LEFT + tokens / end * (WIDTH - LEFT - RIGHT)

    drawn = []
    for count in round_numbers(0, most, at_least=1):
        drawn.append(level_line(base - count / most * height, f"{count:,.0f}"))
    for tokens in round_numbers(0, end, at_least=1):
        x, y = across(tokens), base + 16
        drawn.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tokens:g}</text>')
    for number, count in enumerate(lengths.rows):
        to = lengths.first + number * lengths.width
        left, right, tall = across(max(0, to - lengths.width)), across(to), count / most * height
        size = f'width="{max(1.0, right - left - 1):.1f}" height="{tall:.1f}"'
        colour = INSIDE if to <= lengths.max_length else OVER
        drawn.append(f'<rect x="{left:.1f}" y="{base - tall:.1f}" {size} fill="{colour}"/>')
    drawn.append(_limit(across(lengths.max_length) if shows_limit else None, lengths.max_length))
    return frame(title, "tokens of a row", "".join(drawn))


def _limit(x: float | None, max_length: int) -> str:
    if x is None:
        return (
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 2}" text-anchor="end" fill="{LIMIT}">max_length {max_length} →</text>'
        )
    is_right = x > WIDTH / 2
    anchor, at = ("end", x - 4) if is_right else ("start", x + 4)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}" stroke="{LIMIT}" stroke-dasharray="4 3"/>'
        f'<text x="{at:.1f}" y="{TOP + 2}" text-anchor="{anchor}" fill="{LIMIT}">max_length {max_length}</text>'
    )


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
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


MAX_CURVES = 8  # in an image: those of the best trials


class TableRow(NamedTuple):
    """A combination in the table of trials."""

    cells: list[str]  # as the header
    is_chosen: bool
    problem: str


def sweep_table(sweep: SweepRecord) -> tuple[list[str], list[TableRow]]:
    """Return the header of the table of trials, without a name for the rank, and its rows, the best combination first."""
    keys = short_names([*(sweep.trials[0].settings if sweep.trials else {})]).values()
    rows = []
    for rank, found in enumerate(ranked(sweep.trials), 1):
        losses = ", ".join("failed" if trial.loss is None else f"{trial.loss:.4f}" for trial in found.trials)
        numbers = ["" if value is None else f"{value:.4f}" for value in (found.mean, found.deviation)]
        cells = [str(rank), *map(show_value, found.settings.values()), losses, *numbers, f"{found.seconds:.1f}"]
        is_chosen = any(trial.label == sweep.chosen for trial in found.trials)
        rows.append(TableRow(cells, is_chosen, next((trial.problem for trial in found.trials if trial.problem), "")))
    return ["", *keys, "validation loss", "mean", "spread", "seconds"], rows


def sweep_lines(sweep: SweepRecord, curves: Mapping[str, Curves], *, image: bool) -> Iterator[str]:
    """Yield the section of a run's report. `curves` are by the trials' labels; they are drawn with `image` only."""
    header, rows = sweep_table(sweep)
    count = len(sweep.trials) // len(rows)
    seeds = f"{count} seed{'s' if count > 1 else ''} for each combination"
    yield from (f"## Trials ({len(sweep.trials)})", "", f"Chosen by the loss on validation rows: {sweep.chosen}.", "")
    yield from (f"| {' | '.join(map(_cell, ['rank', *header[1:]]))} |", "|---:" * len(header) + "|")
    for row in rows:
        marks = "**" if row.is_chosen else ""
        yield f"| {' | '.join(f'{marks}{_cell(cell)}{marks}' if cell else '' for cell in row.cells)} |"
    yield from ("", f"{seeds}; the spread is the standard deviation between seeds.", "")
    yield from (f"- {_cell(note)}" for note in sweep.notes)
    yield from (f"- {_cell(row.problem)}" for row in rows if row.problem)
    yield ""
    if image:
        yield from _images(sweep, curves)


def _images(sweep: SweepRecord, curves: Mapping[str, Curves]) -> Iterator[str]:
    done = [trial for combination in ranked(sweep.trials) for trial in combination.trials if trial.label in curves]
    best = done[:MAX_CURVES]
    for title, of in (("training loss", "training"), ("validation loss", "validation")):
        found = [(trial.label, getattr(curves[trial.label], of)) for trial in best]
        drawn = [Curve(label, points, label == sweep.chosen) for label, points in found if points]
        if any(len(curve.points) > 1 for curve in drawn):
            of_all = f"the best {len(best)} of {len(done)} trials" if len(best) < len(done) else "all trials"
            yield from (curves_image(drawn, f"{title} of {of_all}"), "")
