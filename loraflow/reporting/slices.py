"""The part of a run's report about slices of the held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraflow.evaluation.values import Slice


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
    return text.replace("|", "\\|")
