"""Reports as markdown: of a run, of one model's scores, and of a model that waits for approval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from loraflow.evaluation.values import Decision, MetricValue, ModelScores, Sample, Scores
from loraflow.identity import short
from loraflow.reporting import chart

LOSS_ROWS = 12  # of the table below the loss curve
QUOTED = 300  # characters of a quoted text
_BARS = "▁▂▃▄▅▆▇█"

T = TypeVar("T")


class StageRow(Protocol):
    """A stage as a run saw it: a row of the lineage."""

    @property
    def stage(self) -> str:
        """The stage's label."""

    @property
    def state(self) -> str:
        """`cached` or `computed`."""

    @property
    def fingerprint(self) -> str:
        """The job's fingerprint."""

    @property
    def seconds(self) -> float:
        """The time that it took."""

    @property
    def uri(self) -> str:
        """The artifact's location."""


@dataclass(frozen=True)
class RunReport:
    """The content of a run's report."""

    run: str
    recipe: str  # its name
    decision: Decision
    scores: ModelScores
    losses: Sequence[tuple[float, float]]  # (step, training loss)
    samples: Sequence[Sample]  # answers of the tuned model
    stages: Sequence[StageRow]
    adapter: str  # locations
    merged: str


def run_report(report: RunReport, *, image: bool = False) -> str:
    """Return a run's report. The loss curve is an image with `image`, otherwise a sparkline for terminals."""
    lines = [f"# {report.recipe}: {report.decision.verdict}", "", *_items(report.decision.reasons), ""]
    lines += _comparison(report.scores)
    lines += _training_loss(report.losses, image=image)
    lines += _answers(report.samples)
    lines += _lineage(report.stages)
    lines += [
        f"Adapter: `{report.adapter}`",
        "",
        f"Merged model: `{report.merged}`",
        "",
        f"Chat with it: `loraflow chat {report.run}`",
        "",
    ]
    return "\n".join(lines)


def scores_report(model: str, recipe: str, scores: Scores, *, folder: str, table: str) -> str:
    """Return the report of one model's scores.

    Args:
        model: its name.
        recipe: the name of the recipe by which it was scored.
        scores: of the model.
        folder: the location of the model.
        table: the location of the score table.
    """
    lines = [f"# {model} by {recipe}", ""]
    for rows, part in scores.items():
        lines += [f"## {rows} ({_count(part.values())} rows)", "", "| metric | value |", "|---|---|"]
        lines += [*(f"| {name} | {value} |" for name, value in part.items()), ""]
    return "\n".join([*lines, f"Model: `{folder}`", "", f"Row by row: `{table}`", ""])


def approval_request(recipe: str, decision: Decision, scores: ModelScores) -> str:
    """Return the question whether a model is promoted, with the gate's reasons and the scores."""
    return "\n".join([f"# {recipe}: promote?", "", *_items(decision.reasons), "", *_comparison(scores)])


def comparison_table(scores: ModelScores) -> str:
    """Return the scores of base, tuned and champion, a table for each set of rows."""
    return "\n".join(_comparison(scores))


def _comparison(scores: ModelScores) -> Iterator[str]:
    for rows, tuned in scores.tuned.items():
        yield from (f"## Scores on {rows} ({_count(tuned.values())} rows)", "")
        yield from ("| metric | base | tuned | champion |", "|---|---|---|---|")
        for name in tuned:
            cells = [(part or {}).get(rows, {}).get(name) for part in (scores.base, scores.tuned, scores.champion)]
            yield f"| {name} | {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
        yield ""


def _count(values: Iterable[MetricValue]) -> int:
    return next(iter(values)).n


def _items(texts: Iterable[str]) -> list[str]:
    return [f"- {text}" for text in texts]


def _training_loss(losses: Sequence[tuple[float, float]], *, image: bool) -> list[str]:
    if not losses:
        return []
    curve = chart.image(losses, "training loss") if image else f"`{sparkline([loss for _, loss in losses])}`"
    rows = [f"| {step} | {loss:.4f} |" for step, loss in thin(losses, LOSS_ROWS)]
    return ["## Training loss", "", curve, "", "| step | loss |", "|---:|---:|", *rows, ""]


def _answers(samples: Sequence[Sample]) -> Iterator[str]:
    if samples:
        yield from ("## Answers", "")
    for sample in samples:
        yield from (f"**{quote(sample.prompt)}**", "")
        yield from (f"- expected: `{quote(sample.reference)}`", f"- tuned: `{quote(sample.answer)}`", "")


def _lineage(stages: Iterable[StageRow]) -> list[str]:
    rows = [
        f"| {stage.stage} | {stage.state} | `{short(stage.fingerprint)}` | {stage.seconds:.1f} | `{stage.uri}` |"
        for stage in stages
    ]
    header = ["| stage | state | fingerprint | seconds | artifact |", "|---|---|---|---:|---|"]
    return ["## Lineage", "", *header, *rows, ""]


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a line of bars."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)


def thin(rows: Sequence[T], most: int) -> Sequence[T]:
    """Return at most `most` rows at equal distances, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def quote(text: str) -> str:
    """Return a text for a line of markdown in backticks: without line breaks, and cut after 300 characters."""
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return flat if len(flat) <= QUOTED else flat[: QUOTED - 1] + "…"
