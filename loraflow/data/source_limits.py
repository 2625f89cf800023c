"""The limits of a mixture's sources, which stop a run, and a line about each source."""

from __future__ import annotations

from loraflow.data.check_report import CheckReport
from loraflow.failures import BadData, LimitExceeded


def refuse_poor_sources(report: CheckReport, max_quarantined: float, where: str) -> None:
    """Stop the run if a source gives no row, or too many malformed ones: the other sources would hide it.

    Args:
        report: the report of check_dataset.
        max_quarantined: largest share of malformed rows (data.max_quarantined).
        where: location of the report, for messages.

    Raises:
        BadData: no row of a source is left.
        LimitExceeded: too many rows of a source are malformed.
    """
    for number, (name, counts) in enumerate(report.sources.items(), 1):
        read, malformed = counts.get("read", 0), counts.get("malformed", 0)
        problem = next((p for p in report.first_problems if p.startswith(f"{name}/")), "")
        if malformed > max_quarantined * read:
            raise LimitExceeded(
                f"{malformed} of {read} rows of source {number} ({name}) are malformed.",
                where=where,
                expected=f"at most {max_quarantined:.2%} of each source (data.max_quarantined)",
                got=f"{malformed / read:.2%}" + (f"; {problem}" if problem else ""),
                next_step="correct its format or columns, fix these rows, or raise data.max_quarantined",
            )
        if not any(counts.get(split) for split in ("train", "validation", "heldout")):
            raise BadData(
                f"Source {number} ({name}) gives no rows.",
                where=where,
                got=f"{read} rows read, none left"
                + "".join(f", {n} {what}" for what, n in counts.items() if n and what != "read"),
                next_step="remove the source, or correct its files, limit or weight",
            )


def source_lines(report: CheckReport) -> list[str]:
    """Return a line for each source: how many rows it gives."""
    return [f"source {name}: {_counts(counts)}" for name, counts in report.sources.items()]


def _counts(counts: dict[str, int]) -> str:
    train, repeated = counts.get("train", 0), counts.get("repeated", 0)
    parts = [
        f"{counts.get('read', 0)} rows read",
        f"{train} trained on" + (f" ({train - repeated} different)" if repeated else ""),
    ]
    parts += [f"{counts[key]} {word}" for key, word in _WORDS.items() if counts.get(key)]
    return ", ".join(parts)


_WORDS = {
    "validation": "validation",
    "heldout": "held out",
    "malformed": "malformed",
    "over_limit": "over its limit",
    "not_drawn": "not drawn by its weight",
}
