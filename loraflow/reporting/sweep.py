"""The trials of a sweep in a run's report: a table of the combinations, and their loss curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraflow.config.grid import short_names, show_value
from loraflow.registry.sweeps import Combination, SweepRecord, ranked
from loraflow.reporting.chart import Curve, curves_image

MAX_CURVES = 8  # in an image: those of the best trials
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class TrialCurves:
    """The losses of a trial, as (step, loss) points."""

    training: Points
    validation: Points


@dataclass(frozen=True)
class TableRow:
    """A combination in the table of trials, as text."""

    rank: str
    settings: tuple[str, ...]  # the value of each key of the grid
    losses: str  # for each seed
    mean: str
    deviation: str
    seconds: str
    is_chosen: bool
    problem: str


def columns(sweep: SweepRecord) -> list[str]:
    """Return the names of the table's columns for the keys of the grid."""
    return [*short_names([*(sweep.trials[0].settings if sweep.trials else {})]).values()]


def table_rows(sweep: SweepRecord) -> list[TableRow]:
    """Return the rows of the table, the best combination first."""
    order = ranked(sweep.trials)
    return [_row(number, one, sweep) for number, one in enumerate(order, 1)]


def _row(number: int, combination: Combination, sweep: SweepRecord) -> TableRow:
    problems = [trial.problem for trial in combination.trials if trial.problem]
    return TableRow(
        rank=str(number),
        settings=tuple(show_value(value) for value in combination.settings.values()),
        losses=", ".join("failed" if trial.loss is None else f"{trial.loss:.4f}" for trial in combination.trials),
        mean="" if combination.mean is None else f"{combination.mean:.4f}",
        deviation="" if combination.deviation is None else f"{combination.deviation:.4f}",
        seconds=f"{combination.seconds:.1f}",
        is_chosen=any(trial.label == sweep.chosen for trial in combination.trials),
        problem=problems[0] if problems else "",
    )


def sweep_lines(sweep: SweepRecord, curves: Mapping[str, TrialCurves], *, image: bool) -> Iterator[str]:
    """Yield the section of a run's report. `curves` are by the trials' labels; they are drawn with `image` only."""
    keys, rows = columns(sweep), table_rows(sweep)
    count = len(sweep.trials) // len(rows)
    seeds = f"{count} seed{'s' if count > 1 else ''} for each combination"
    yield from (f"## Trials ({len(sweep.trials)})", "", f"Chosen by the loss on validation rows: {sweep.chosen}.", "")
    header = ["rank", *keys, "validation loss", "mean", "spread", "seconds"]
    yield from (f"| {' | '.join(map(_cell, header))} |", "|---:" * len(header) + "|")
    for row in rows:
        cells = [row.rank, *row.settings, row.losses, row.mean, row.deviation, row.seconds]
        marks = "**" if row.is_chosen else ""
        yield f"| {' | '.join(f'{marks}{_cell(cell)}{marks}' if cell else '' for cell in cells)} |"
    yield from ("", f"{seeds}; the spread is the standard deviation between seeds.", "")
    yield from (f"- {_cell(note)}" for note in sweep.notes)
    yield from (f"- {_cell(row.problem)}" for row in rows if row.problem)
    yield ""
    if image:
        yield from _images(sweep, curves)


def _images(sweep: SweepRecord, curves: Mapping[str, TrialCurves]) -> Iterator[str]:
    done = [trial for one in ranked(sweep.trials) for trial in one.trials if trial.label in curves]
    best = done[:MAX_CURVES]
    for title, of in (("training loss", "training"), ("validation loss", "validation")):
        found = [(trial.label, getattr(curves[trial.label], of)) for trial in best]
        drawn = [Curve(label, points, label == sweep.chosen) for label, points in found if points]
        if any(len(curve.points) > 1 for curve in drawn):
            of_all = f"the best {len(best)} of {len(done)} trials" if len(best) < len(done) else "all trials"
            yield from (curves_image(drawn, f"{title} of {of_all}"), "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
