"""The part of a run's report about models that were trained with several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraflow.evaluation.values import SeedScores


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
