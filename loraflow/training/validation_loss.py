"""The validation loss of a trained adapter, read from the values that its training logged. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraflow.config.stage_configs import FingerprintedTraining

CURVES = "telemetry/curves.jsonl"  # in an adapter's artifact
GROUP_PROBLEMS = "trials.json"  # a file of train_group's artifact: why each trial failed; empty if it did not


@dataclass(frozen=True)
class Curves:
    """The losses that a training logged, as (step, loss) points, and its last step."""

    training: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...]
    last_step: int

    @classmethod
    def parse(cls, lines: bytes) -> Curves:
        """Read the file CURVES, or a trial's file of train_group's artifact (`curves_of_trial`)."""
        rows = [json.loads(line) for line in lines.decode().splitlines() if line.strip()]
        return cls(_points(rows, "loss"), _points(rows, "eval_loss"), max((row["step"] for row in rows), default=0))

    def validation_loss(self, training: FingerprintedTraining) -> float | None:
        """Return the mean validation loss, in nats per token, of the adapter that training returned.

        That is the loss at the last step; with load_best_model_at_end, the loss at the checkpoint that was loaded. None
        if it was not measured.
        """
        losses = dict(self.validation)
        step: float | None = self.last_step
        if training.load_best_model_at_end:
            step = self._loaded_step(training)
        return None if step is None else losses.get(step)

    def _loaded_step(self, training: FingerprintedTraining) -> float:
        """Return the step of the checkpoint that transformers loads at the end: the best of those that were saved.

        A checkpoint becomes a candidate when it, or a later one, is saved while its loss is the best so far. If there is
        none, the last weights stay.
        """
        # With epochs, each evaluation is followed by a checkpoint. The last step of a complete training has one too.
        every = training.save_steps if training.eval_strategy == "steps" else None
        best, best_step, loaded = None, 0.0, None
        for step, loss in self.validation:
            if best is None or (loss > best if training.greater_is_better else loss < best):
                best, best_step = loss, step
            is_saved = every is None or step % every == 0 or step == self.last_step
            if is_saved and best_step == step:
                loaded = step
        return self.last_step if loaded is None else loaded


def curves_of_trial(number: int) -> str:
    """Return the file with the curves of a trial in train_group's artifact."""
    return f"curves-{number}.jsonl"


def _points(rows: Iterable[Mapping[str, float]], key: str) -> tuple[tuple[float, float], ...]:
    """Return the points of a logged value. Of a step that was logged again after a resume, the last one counts."""
    return tuple(sorted({row["step"]: row[key] for row in rows if key in row}.items()))
