"""Reports as markdown: of a run, of one model's scores, and of a model that waits for approval."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from loraflow.data.chats import GATE_SET
from loraflow.data.checks.check_report import DataDrift
from loraflow.evaluation.values import (
    Confusion,
    Decision,
    MetricValue,
    ModelScores,
    Sample,
    Scores,
    SeedScores,
    SetScores,
    Slice,
    Verdict,
)
from loraflow.identity import short
from loraflow.registry.runs import RowsSummary, RunSummary, StageRun
from loraflow.reporting import chart
from loraflow.reporting.sections import History, Learned, history_lines, learned_lines, sweep_lines
from loraflow.training.validation_loss import Curves

LOSS_ROWS = 12  # rows of the table below the loss curve
QUOTED = 300  # characters of a quoted text

VERDICTS: dict[Verdict, str] = {
    "promote": "The new model is the champion now.",
    "reject": "The new model was not promoted.",
    "undecided": "The new model was not promoted: the gate could not decide.",
    "unchanged": "There was nothing to decide.",
}

APPROVAL = (
    "The gate would promote the new model. With *Promote* on, it becomes the champion. With *Promote* off, it is "
    "declined. The reason is recorded."
)

SIGN = "A difference above 0 means that the new model is better than the other one, also for a loss."  # in reasons

NO_COUNTS: Mapping[str, int] = MappingProxyType({})
NO_CONFUSIONS: Mapping[str, Sequence[Confusion]] = MappingProxyType({})
T = TypeVar("T")


@dataclass(frozen=True)
class RunReport:
    """The content of a run's report."""

    summary: RunSummary
    decision: Decision
    scores: ModelScores
    confidence: float  # the level of the scores' intervals
    losses: Sequence[tuple[float, float]]  # (step, training loss)
    samples: Sequence[Sample]  # answers of the tuned model
    store: str  # its location
    confusions: Sequence[Confusion] = ()  # the tuned model's worst labels in the gate's set
    learned: Learned | None = None
    trial_curves: Mapping[str, Curves] | None = None  # by the trials' labels
    base_answers: Mapping[str, str] = field(default_factory=dict)  # the base's answers, by a sample's id
    history: History | None = None  # settings, and earlier runs of the recipe


def run_report(report: RunReport, *, image: bool = False) -> str:
    """Return a run's report. Its charts are images with `image`, otherwise lines of bars for terminals."""
    summary, decision = report.summary, report.decision
    lines = [
        f"# {summary.recipe}: {decision.verdict}",
        "",
        VERDICTS[decision.verdict],
        "",
        *_items(decision.reasons),
        "",
        *([SIGN, ""] if decision.comparisons else []),
        *(["What can be done:", "", *_items(summary.advice), ""] if summary.advice else []),
        *([decision.budget, ""] if decision.budget else []),
        *([] if summary.reserve is None else [f"Reserve: {summary.reserve}.", ""]),
    ]
    lines += sweep_lines(summary.sweep, report.trial_curves or {}, image=image) if summary.sweep else []
    lines += _comparison(report.scores, report.confidence)
    lines += seed_lines(summary.seeds)
    lines += slice_lines(summary.slices)
    lines += _worse(decision)
    lines += _behaviour(decision)
    lines += history_lines(report.history) if report.history else []
    lines += _rows(summary.rows)
    lines += drift_lines(summary.drift, image=image)
    lines += learned_lines(report.learned, image=image) if report.learned else []
    lines += _training_loss(report.losses, image=image)
    lines += _confusions(report.confusions)
    lines += _answers(report.samples, report.base_answers)
    lines += _lineage(summary.stages, report.store)
    lines += ["## Files", "", "Adapter:", "", *_code(summary.adapter), "Merged model:", "", *_code(summary.merged)]
    lines += ["Chat with the model:", "", *_code(f"loraflow chat {summary.run}")]
    return "\n".join(lines)


def scores_report(
    model: str,
    recipe: str,
    scores: Scores,
    *,
    confidence: float,
    folder: str,
    table: str,
    available: Mapping[str, int] = NO_COUNTS,
    confusions: Mapping[str, Sequence[Confusion]] = NO_CONFUSIONS,
) -> str:
    """Return the report of one model's scores.

    Args:
        available: held-out rows of each set, of which a sample is scored.
    """
    lines = [f"# Scores of {model}, recipe {recipe}", ""]
    for rows, part in _gate_set_first(scores):
        count = _count(part.values())
        of = f" of {available[rows]}" if available.get(rows, count) != count else ""
        lines += [f"## {rows} ({count}{of} rows)", "", "| metric | value |", "|---|---|"]
        lines += [*(f"| {name} | {value} |" for name, value in part.items()), ""]
        lines += _confusions(confusions.get(rows, ()))
    lines += [_intervals(confidence), "", "Model:", "", *_code(folder), "Scores of each row:", "", *_code(table)]
    return "\n".join(lines)


def approval_request(recipe: str, decision: Decision, scores: ModelScores, *, confidence: float) -> str:
    """Return the question whether a model is promoted, with the gate's reasons and the scores."""
    lines = [f"# {recipe}: promote?", "", APPROVAL, "", *_items(decision.reasons), ""]
    lines += [SIGN, ""] if decision.comparisons else []
    lines += [decision.budget, ""] if decision.budget else []
    return "\n".join([*lines, *_comparison(scores, confidence), *_worse(decision), *_behaviour(decision)])


def _comparison(scores: ModelScores, confidence: float) -> Iterator[str]:
    models = {"base": scores.base, "tuned": scores.tuned, "champion": scores.champion}
    shown = {name: part for name, part in models.items() if part is not None}
    for rows, tuned in _gate_set_first(scores.tuned):
        yield from (f"## Scores on {rows} ({_count(tuned.values())} rows)", "")
        yield from (f"| metric | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|")
        for name in tuned:
            cells = [part.get(rows, {}).get(name) for part in shown.values()]
            yield f"| {name} | {' | '.join('' if cell is None else str(cell) for cell in cells)} |"
        yield ""
    yield from (_intervals(confidence), "")


def _gate_set_first(scores: Scores) -> list[tuple[str, SetScores]]:
    return sorted(scores.items(), key=lambda item: item[0] != GATE_SET)


def _intervals(confidence: float) -> str:
    return f"In brackets: {100 * confidence:.4g}% confidence intervals."


def _count(values: Iterable[MetricValue]) -> int:
    return next(iter(values)).n


def _items(texts: Iterable[str]) -> list[str]:
    return [f"- {text}" for text in texts]


def _worse(decision: Decision) -> Iterator[str]:
    """Yield the rows that got much worse, for each rule of gate.worst."""
    if decision.worse:
        yield from ("## Rows that got much worse", "")
    for found in decision.worse:
        yield from (f"{found.reason}.", "")
        if found.rows:
            yield from (f"| row | {found.against} | tuned | question | answer |", "|---|---:|---:|---|---|")
            for row in found.rows:
                texts = f"{_cell(row.question)} | {_cell(row.answer)}"
                yield f"| {_cell(row.id)} | {row.other:.3f} | {row.score:.3f} | {texts} |"
            yield ""


def _behaviour(decision: Decision) -> Iterator[str]:
    """Yield the results of gate.behaviour, with the answers that do not meet them."""
    if decision.behaviour:
        yield from ("## Behaviour", "")
    for result in decision.behaviour:
        yield from (f"- {'holds' if result.holds else '**fails**'}: {quote(result.reason)}", "")
        if result.failed:
            yield from ("| row | question | answer |", "|---|---|---|")
            for row in result.failed:
                yield f"| {_cell(row.id)} | {_cell(row.question)} | {_cell(row.answer)} |"
            yield ""


def _training_loss(losses: Sequence[tuple[float, float]], *, image: bool) -> list[str]:
    if not losses:
        return []
    title, bars = "training loss", chart.sparkline([loss for _, loss in losses])
    curve = chart.embedded(chart.svg(losses, title), title) if image else f"`{bars}`"
    rows = [f"| {step} | {loss:.4f} |" for step, loss in thin(losses, LOSS_ROWS)]
    return ["## Training loss", "", curve, "", "| step | loss |", "|---:|---:|", *rows, ""]


def _rows(rows: RowsSummary | None) -> list[str]:
    if rows is None:
        return []
    counts = [f"| {count.what.strip()} | {count.rows:,} |" for count in rows.counts]
    return ["## Rows", "", "| rows | |", "|---|---:|", *counts, "", *_items(map(quote, rows.notes)), ""]


def _confusions(confusions: Sequence[Confusion]) -> Iterator[str]:
    if not confusions:
        return
    yield from ("### Worst labels", "", "| label | rows | wrong | most often taken for |", "|---|---:|---:|---|")
    for confusion in confusions:
        name, other = (_cell(text[:80]) for text in (confusion.label, confusion.as_label))
        yield f"| {name} | {confusion.rows} | {confusion.wrong} | {other} ({confusion.as_count}) |"
    yield ""


def _answers(samples: Sequence[Sample], base: Mapping[str, str]) -> Iterator[str]:
    if samples:
        yield from ("## Sample answers", "")
    for sample in samples:
        yield from (f"**{quote(sample.prompt)}**", "")
        yield f"- expected: {_shown(sample.reference)}"
        if sample.id in base:
            yield f"- base: {_shown(base[sample.id])}"
        yield from (f"- tuned: {_shown(sample.answer)}", "")


def _lineage(stages: Iterable[StageRun], store: str) -> list[str]:
    rows = [
        f"| {stage.stage} | {stage.state} | {stage.seconds:.1f} | `{short(stage.fingerprint)}` | `{short(stage.digest)}` |"
        for stage in stages
    ]
    header = ["| stage | state | seconds | fingerprint | digest |", "|---|---|---:|---|---|"]
    where = ["An artifact is in the folder `STAGE/FINGERPRINT/DIGEST` of the store:", "", *_code(store)]
    return ["## Lineage", "", *header, *rows, "", *where]


def _code(text: str) -> list[str]:
    """Return a block for a path or a command: long lines scroll in it, instead of widening the page."""
    return ["```", text, "```", ""]


def thin(rows: Sequence[T], most: int) -> Sequence[T]:
    """Return every k-th row, so that there are at most `most`, and the last one."""
    if len(rows) <= most:
        return rows
    every = -(-(len(rows) - 1) // (most - 1))
    return [*rows[: len(rows) - 1 : every], rows[-1]]


def quote(text: str) -> str:
    """Return a text for a line of markdown in backticks: without line breaks, and cut after 300 characters."""
    flat = " ".join(text.split()).replace("`", "'")
    return flat if len(flat) <= QUOTED else flat[: QUOTED - 1] + "…"


def drift_lines(drift: DataDrift | None, *, image: bool = False) -> Iterator[str]:
    """Yield what changed since the champion's training rows, as markdown; nothing if it was not measured."""
    if drift is not None:
        yield from ("## Training rows since the champion", "")
        yield from (f"- {line.replace('|', chr(92) + '|')}" for line in drift.lines)
        yield ""
        if image and drift.changed and len(drift.lengths) > 1:
            curves = [chart.Curve(name, points) for name, points in drift.lengths.items()]
            yield from (
                chart.curves_image(curves, "share of the answers up to a length", "characters of an answer"),
                "",
            )


def seed_lines(found: Sequence[SeedScores]) -> Iterator[str]:
    """Yield a table of each seed's scores, with mean and standard deviation, as markdown."""
    if not found:
        return
    seeds = [*found[0].values]
    yield from ("## Scores by training seed", "")
    yield f"The gate compares the means. The model of seed {seeds[0]} is registered."
    yield from ("", f"| metric | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | standard deviation |")
    yield "|---|" + "---:|" * (len(seeds) + 2)
    for scores in found:
        cells = " | ".join(f"{value:.3f}" for value in scores.values.values())
        yield f"| {scores.metric} | {cells} | {scores.mean:.3f} | {scores.deviation:.3f} |"
    yield ""


def slice_lines(slices: Sequence[Slice]) -> Iterator[str]:
    """Yield a table for each kind of slice, as markdown."""
    if slices:
        yield from (
            "## Scores of parts of the held-out rows",
            "",
            "Only the parts in gate.slices affect the decision. With many parts, some differ by chance.",
            "",
        )
    for by in dict.fromkeys(part.by for part in slices):
        found = [part for part in slices if part.by == by]
        models = list(found[0].values)
        yield from (f"| {_cell(by)} | rows | metric | {' | '.join(models)} |", "|---|---:|---|" + "---|" * len(models))
        for part in found:
            for metric in part.values[models[0]]:
                cells = " | ".join(str(part.values[model][metric]) for model in models)
                yield f"| {_cell(part.name)} | {part.rows} | {metric} | {cells} |"
        yield ""


def _cell(text: str) -> str:
    """Return a text for a cell of a table, where a vertical bar would begin the next one."""
    return quote(text).replace("|", "\\|")


def _shown(text: str) -> str:
    """Return a text in backticks, or what it is if nothing could be seen of it."""
    return f"`{quote(text)}`" if text.strip() else "*only white space*" if text else "*empty*"
