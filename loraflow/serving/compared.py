"""What `loraflow compare` shows: scores, settings and training losses from the store, as lines and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape

import pandas as pd

from loraflow.evaluation.compare import ChangedRow, Difference, TableComparison, compare_tables
from loraflow.evaluation.gate import heldout_rows
from loraflow.evaluation.values import LARGEST_VOCABULARY, vocabulary_of
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.frozen import StoredModel
from loraflow.identity import short
from loraflow.registry.runs import RunRecord, changes, find_named_run, find_run, require_consistent
from loraflow.reporting.chart import sparkline, svg
from loraflow.reporting.markdown import quote, thin
from loraflow.serving.models import named_champion
from loraflow.store import Store, read_table
from loraflow.training.validation_loss import CURVES, Curves


class _Rules(StoredModel):
    """The part of a run's gate that says how scores are compared."""

    lower_is_better: list[str] = []
    ranges: dict[str, tuple[float, float]] = {}

    def joined(self, other: _Rules) -> _Rules:
        """Return the rules of two runs; a score's range includes both ranges."""
        ranges = self.ranges | other.ranges
        for name in self.ranges.keys() & other.ranges.keys():
            (low, high), (other_low, other_high) = self.ranges[name], other.ranges[name]
            ranges[name] = min(low, other_low), max(high, other_high)
        return _Rules(lower_is_better=sorted({*self.lower_is_better, *other.lower_is_better}), ranges=ranges)


@dataclass(frozen=True)
class Compared:
    """A model that is compared: its run and its scores."""

    name: str  # as it was asked for
    record: RunRecord
    table: pd.DataFrame
    losses: tuple[tuple[float, float], ...]  # (step, training loss)
    vocabulary: int  # number of tokens of its base


@dataclass(frozen=True)
class Pairing:
    """A model against the first one."""

    name: str
    scores: TableComparison
    settings: tuple[str, ...]  # the settings that differ
    same_model: bool


@dataclass(frozen=True)
class ModelComparison:
    """Models beside each other; each further one against the first."""

    models: tuple[Compared, ...]
    pairings: tuple[Pairing, ...]


def compare_models(store: Store, names: tuple[str, ...]) -> ModelComparison:
    """Compare the models of runs, or champions.

    Raises:
        BadConfig: there is no such run or champion, or it has no scores.
        BadData: two of them were not scored on a common row.
        CorruptArtifact: scores are gone or damaged.
    """
    models = tuple(_find(store, name) for name in names)
    first = models[0]
    pairings = []
    for other in models[1:]:
        gate = _rules(first).joined(_rules(other))
        pairings.append(
            Pairing(
                other.name,
                compare_tables(
                    first.table,
                    other.table,
                    confidence=_CONFIDENCE,
                    vocabulary=max(first.vocabulary, other.vocabulary),
                    **gate.model_dump(),
                ),
                tuple(changes(first.record, other.record)),
                _digest(first.record) == _digest(other.record),
            )
        )
    return ModelComparison(models, tuple(pairings))


def _rules(model: Compared) -> _Rules:
    return _Rules.model_validate(model.record.section("gate"))


def _find(store: Store, name: str) -> Compared:
    champion = named_champion(store, name)
    record = find_run(store, champion.merged) if champion else find_named_run(store, name)
    if record is None and champion:
        raise BadConfig(
            "This store has no record of the run that made the champion, so its scores are unknown.",
            where=name,
            next_step="compare runs that `loraflow runs` lists; `loraflow show champion` shows what is known",
        )
    if record is None:
        raise BadConfig("There is no such run or champion.", where=name, next_step="`loraflow runs` lists the runs")
    stage = record.stage("evaluate tuned")
    if stage is None:
        raise BadConfig("This run did not score a model.", where=name, next_step="`loraflow runs` lists the runs")
    require_consistent(store, record)
    ref = stage.ref(store)
    table = read_table(store, ref)
    losses: tuple[tuple[float, float], ...] = ()
    trained = record.stage("train")
    if trained is not None:
        with suppress(CorruptArtifact):  # cleanup removes adapters before scores
            losses = Curves.parse(store.read(trained.ref(store), CURVES)).training
    base, config = record.stage("resolve_base"), None
    if base is not None:
        with suppress(CorruptArtifact):
            config = store.read(base.ref(store), "config.json")
    vocabulary = vocabulary_of(config) or LARGEST_VOCABULARY
    return Compared(name, record, heldout_rows(table, store.location(ref)), losses, vocabulary)


def _digest(record: RunRecord) -> str | None:
    stage = record.stage("merge")
    return stage.digest if stage else None


_CONFIDENCE = 0.95  # of intervals and bounds
_SHOWN = 5  # rows of each metric and direction in the terminal
_BARS = 40  # of a curve there
_NOTE = "The interval says how large the difference is. The gate decides with the bounds."
_SIGN = "A difference above 0 means that {} is better than A, also for a loss."
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem } th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem }
th { background: #f2f4f7; text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
td.text { max-width: 20rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
.better { color: #0a6b2d } .worse { color: #a3161d } code { background: #f2f4f7; padding: 0 0.25rem }
figure { display: inline-block; width: calc(50% - 1.5rem); margin: 0 1rem 1rem 0 } svg { max-width: 100%; height: auto }
"""


def terminal_lines(comparison: ModelComparison) -> Iterator[str]:
    """Yield the comparison as text."""
    for letter, model in zip("ABC", comparison.models, strict=False):
        yield f"{letter}  {_describe(model)}"
        losses = [loss for _, loss in model.losses]
        if losses:
            bars = sparkline(thin(losses, _BARS))
            yield f"   training loss {losses[0]:.3f} {bars} {losses[-1]:.3f} at step {model.losses[-1][0]:g}"
    for letter, pairing in zip("BC", comparison.pairings, strict=False):
        yield ""
        yield f"{letter} against A on {_rows(pairing)}"
        if pairing.same_model:
            yield "  the same model"
        table = [["", *_head(letter)]]
        table += [_cells(difference) for difference in pairing.scores.differences]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            yield f"  {'  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))}".rstrip()
        yield f"  {_SIGN.format(letter)}"
        yield f"  {_NOTE}"
        yield "  settings that differ:" if pairing.settings else "  no setting differs"
        yield from (f"    {setting}" for setting in pairing.settings)
        yield from _changed_lines(pairing)


def _changed_lines(pairing: Pairing) -> Iterator[str]:
    for difference in pairing.scores.differences:
        for word, rows in (("better", difference.better), ("worse", difference.worse)):
            for row in rows[:_SHOWN]:
                yield f"  {difference.metric} {word}: {row.id} {row.first:.3f} → {row.second:.3f}  {quote(row.question)}"


def html_page(comparison: ModelComparison) -> str:
    """Return the comparison as a page: no scripts, no fonts or images from elsewhere."""
    names = ", ".join(model.name for model in comparison.models)
    body = [f"<h1>{escape(names)}</h1>", *_models(comparison.models), *_curves(comparison.models)]
    for letter, pairing in zip("BC", comparison.pairings, strict=False):
        body += [f"<h2>{letter} ({escape(pairing.name)}) against A</h2>", f"<p>On {_rows(pairing)}.</p>"]
        body += ["<p>The same model.</p>"] if pairing.same_model else []
        head = "metric", *_head(letter)
        rows = map(_cells, pairing.scores.differences)
        body += _table(head, ([_text(cell, number=i > 0) for i, cell in enumerate(row)] for row in rows))
        body += [
            f"<p>{_SIGN.format(letter)}</p>",
            f"<p>{_NOTE}</p>",
            "<h3>Settings that differ</h3>",
            *_settings(pairing),
        ]
        body += _changed_rows(pairing, letter)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _describe(model: Compared) -> str:
    record = model.record
    merged = record.stage("merge")
    verdict = record.summary.decision.verdict if record.summary and record.summary.decision else record.state
    digest = short(merged.digest) if merged else "none"
    return f"{model.name}: run {record.run}, recipe {record.recipe}, model {digest}, {verdict}"


def _rows(pairing: Pairing) -> str:
    scores = pairing.scores
    left_out = f"; scored for one of the two only: {_count(scores.only_first)} of A, {scores.only_second} of the other"
    tokens = "".join(
        f"; {metric} is per token, and the models split the references into different tokens (another tokenizer or chat "
        "template)"
        for metric in scores.left_out
    )
    ranges = "".join(
        f"; {metric} has values outside of gate.ranges, so its bounds do not allow for failures that no row shows"
        for metric in scores.out_of_range
    )
    capped = "".join(
        f"; a row's {each.metric} counts at most {math.log(scores.vocabulary):.1f} in the difference, which is "
        f"{each.uncapped:+.4f} otherwise"
        for each in scores.differences
        if abs(each.uncapped - each.bounds.mean) > 1e-9 * max(1.0, abs(each.uncapped))
    )
    which = left_out if scores.only_first or scores.only_second else ""
    return f"{_count(scores.rows, 'held-out ')}{which}{tokens}{ranges}{capped}"


def _count(rows: int, kind: str = "") -> str:
    return f"{rows} {kind}{'row' if rows == 1 else 'rows'}"


def _head(letter: str) -> tuple[str, ...]:
    level = f"{100 * _CONFIDENCE:g} %"
    return "A", letter, "difference", f"{level} interval", f"one-sided {level} bounds", "rows better, worse"


def _cells(difference: Difference) -> list[str]:
    ends = difference.interval, difference.bounds
    return [
        difference.metric,
        f"{difference.first:.4f}",
        f"{difference.second:.4f}",
        f"{difference.bounds.mean:+.4f}",
        *("(no interval)" if math.isinf(high - low) else f"[{low:+.4f}, {high:+.4f}]" for _, low, high in ends),
        f"{difference.better_rows}, {difference.worse_rows}",
    ]


def _models(models: Iterable[Compared]) -> list[str]:
    rows = ([_text(letter), _text(_describe(model))] for letter, model in zip("ABC", models, strict=False))
    return _table(("", "model"), rows)


def _curves(models: Iterable[Compared]) -> Iterator[str]:
    for letter, model in zip("ABC", models, strict=False):
        if model.losses:
            picture = svg(model.losses, f"training loss of {letter}")
            yield f"<figure>{picture}<figcaption>{letter}: training loss</figcaption></figure>"


def _settings(pairing: Pairing) -> list[str]:
    if not pairing.settings:
        return ["<p>None.</p>"]
    return ["<ul>", *(f"<li><code>{escape(setting)}</code></li>" for setting in pairing.settings), "</ul>"]


def _changed_rows(pairing: Pairing, letter: str) -> Iterator[str]:
    for difference in pairing.scores.differences:
        for word, rows, count in (
            ("better", difference.better, difference.better_rows),
            ("worse", difference.worse, difference.worse_rows),
        ):
            if rows:
                of = "" if len(rows) == count else f", the {len(rows)} that changed most"
                yield f'<h3>{escape(difference.metric)}: <span class="{word}">{_count(count)} {word}{of}</span></h3>'
                head = ("row", "A", letter, "question", "expected", "answer of A", f"answer of {letter}")
                yield from _table(head, map(_row, rows))


def _row(row: ChangedRow) -> list[str]:
    texts = (row.question, row.reference, row.first_answer, row.second_answer)
    numbers = [_text(f"{value:.3f}", number=True) for value in (row.first, row.second)]
    return [_text(row.id), *numbers, *(f'<td class="text">{escape(text)}</td>' for text in texts)]


def _text(text: str, *, number: bool = False) -> str:
    return f'<td class="n">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return ["<table>", f"<tr>{heads}</tr>", *(f"<tr>{''.join(row)}</tr>" for row in rows), "</table>"]
