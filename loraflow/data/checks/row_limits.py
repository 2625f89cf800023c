"""What stops a run because of its rows: too many are malformed, near-duplicates are refused, or none are left;
also for each source of a mixture.
"""

from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.checks.check_report import CheckReport, finding_lines
from loraflow.failures import BadData, LimitExceeded

MAX_PROBLEM = 200  # characters of a problem in a failure


def check_limits(
    report: Mapping[str, JsonValue],
    max_quarantined: float,
    where: str,
    dataset: str = "The dataset",
    *,
    refuse_near_leaks: bool = False,
) -> None:
    """Stop the run if a report of check_dataset exceeds the recipe's limits.

    Args:
        refuse_near_leaks: whether training rows that are near to a held-out row stop the run (data.near_duplicates).

    Raises:
        LimitExceeded: too many rows are malformed, or training rows are near to held-out rows.
        BadData: there are no training rows, or no held-out rows.
    """
    found = CheckReport.model_validate(report)
    problems = "".join(f"\n            {_short(problem)}" for problem in found.first_problems)
    read = found.counts.get("read", 0)
    refuse_poor_sources(found, max_quarantined, where)
    if found.malformed_share > max_quarantined:
        raise LimitExceeded(
            f"{found.counts.get('malformed', 0)} of {read} rows are malformed.",
            where=where,
            expected=f"at most {max_quarantined:.2%} (data.max_quarantined)",
            got=f"{found.malformed_share:.2%}; the first problems:{problems}",
            next_step="change the recipe or the rows as these lines say (`loraflow data add` versions changed rows), or "
            "raise data.max_quarantined to leave them out",
        )
    if refuse_near_leaks and (leaks := found.counts.get("near_leak", 0)):
        raise LimitExceeded(
            f"{leaks} training rows are nearly the same as held-out rows.",
            where=where,
            expected="none (data.near_duplicates: refuse)",
            got=f"the first problems:{problems}",
            next_step="remove them, then run `loraflow data add`, or set data.near_duplicates: drop; quarantine.jsonl "
            "in the artifact names all of them",
        )
    for name, count, next_step in (
        ("train", found.rows.train, "add rows, or correct data.train, data.columns or data.heldout_fraction"),
        (
            "heldout",
            found.rows.heldout,
            "name a file with held-out rows in data.heldout, or set data.heldout_fraction; it needs two different prompts",
        ),
    ):
        if not count:
            raise BadData(
                f"{dataset} has no {name} rows.",
                where=where,
                got=f"{read} rows read, {found.rows.train} left to train on{problems}",
                next_step=next_step,
            )


def refuse_findings(report: Mapping[str, JsonValue], where: str) -> None:
    """Stop the run if a check of data.profile with `fail` found too many rows.

    Raises:
        LimitExceeded: it did.
    """
    failed = [f for f in CheckReport.model_validate(report).findings if f.is_over and f.action == "fail"]
    if failed:
        raise LimitExceeded(
            "The rows of the dataset do not pass data.profile.",
            where=where,
            expected=", ".join(f"{f.check}: at most {f.limit:.2%}" for f in failed),
            got="".join(f"\n            {line}" for f in failed[:3] for line in finding_lines(f, examples=1)),
            next_step="correct these rows, then run `loraflow data add`, or set another action or share in data.profile",
        )


def _short(problem: str) -> str:
    line = " ".join(problem.split())
    return line if len(line) <= MAX_PROBLEM else line[: MAX_PROBLEM - 1] + "…"


def refuse_poor_sources(report: CheckReport, max_quarantined: float, where: str) -> None:
    """Stop the run if a source gives no row, or too many malformed ones: the other sources would hide it.

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
