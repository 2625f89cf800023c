"""The outcome of a sweep, as its run's record has it: the trials, and which of them was chosen.

The choice uses validation losses only. Combinations are compared by the mean over their seeds.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from loraflow.frozen import StoredModel


class TrialRecord(StoredModel):
    """A trial: one training."""

    label: str
    settings: dict[str, JsonValue]  # values of the grid
    seed: int
    state: Literal["cached", "computed", "failed"]
    loss: float | None = None  # validation loss of the adapter, in nats per token
    seconds: float | None = None  # duration of the training, also of a cached one; in a group, the trial's share
    fingerprint: str = ""
    digest: str = ""
    problem: str = ""  # why it failed
    group_number: int | None = None  # position in train_group's artifact; None: the trial has an artifact of its own


class SweepRecord(StoredModel):
    """All trials of a sweep."""

    trials: list[TrialRecord] = []
    chosen: str | None = None  # the label of the trial whose adapter was merged; None if all failed
    notes: list[str] = []


@dataclass(frozen=True)
class Combination:
    """A combination of the grid's values with all of its seeds."""

    settings: dict[str, JsonValue]
    trials: tuple[TrialRecord, ...]

    @property
    def losses(self) -> list[float]:
        """The validation losses of the seeds that did not fail."""
        return [trial.loss for trial in self.trials if trial.loss is not None]

    @property
    def failed(self) -> int:
        """The number of seeds without a loss."""
        return len(self.trials) - len(self.losses)

    @property
    def mean(self) -> float | None:
        """The mean validation loss over the seeds; None if all failed."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation between seeds; None if fewer than two have a loss."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def seconds(self) -> float:
        """The time of its trainings."""
        return sum(trial.seconds or 0.0 for trial in self.trials)

    @property
    def best(self) -> TrialRecord | None:
        """The seed with the lowest validation loss."""
        measured = [trial for trial in self.trials if trial.loss is not None]
        return min(measured, key=lambda trial: trial.loss or 0.0) if measured else None


def ranked(trials: Sequence[TrialRecord]) -> list[Combination]:
    """Return the combinations, the best one first: by failed seeds, then by the mean loss, then by their order.

    A combination of which a seed failed comes after those of which none did: the mean of the others would hide it.
    """
    groups: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        groups.setdefault(json.dumps(trial.settings, sort_keys=True), []).append(trial)
    combinations = [Combination(group[0].settings, tuple(group)) for group in groups.values()]
    return sorted(combinations, key=lambda group: (group.failed, math.inf if group.mean is None else group.mean))


def choose(trials: Sequence[TrialRecord]) -> SweepRecord:
    """Choose a trial: of the best combination, the seed with the lowest loss."""
    order = ranked(trials)
    best = order[0].best
    return SweepRecord(
        trials=list(trials), chosen=None if best is None else best.label, notes=_notes(order) if best else []
    )


def _notes(order: Sequence[Combination]) -> list[str]:
    """Return what a person should know before trusting the choice."""
    notes = []
    first, second = order[0], order[1] if len(order) > 1 else None
    if first.failed:
        notes.append(
            "at least one seed of every combination failed; the combination with the fewest failures was chosen"
        )
    if second is None or first.mean is None or second.mean is None:
        return notes
    gap = second.mean - first.mean
    if first.deviation is None or second.deviation is None:
        notes.append(
            "with one seed per combination, it is unknown how much of a difference is chance; --seeds 3 shows it"
        )
        return notes
    error = math.sqrt(first.deviation**2 / len(first.losses) + second.deviation**2 / len(second.losses))
    if gap < 2 * error:
        notes.append(
            f"the second combination is {gap:.4f} worse, which is within the spread between seeds "
            f"(standard error of the difference {error:.4f})"
        )
    return notes
