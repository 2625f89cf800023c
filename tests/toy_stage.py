"""A stage as a developer would add it: a config, a row, `run`, and a task. See docs/design.md, "Adding a stage"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

from loraflow.config import Recipe
from loraflow.config.stage_configs import RecipeContext, StageConfig
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import Input, Stage
from loraflow.store import Ref, Summary
from loraflow.tasks.run import Run, StageResult
from loraflow.tasks.stages import stage_task


class CountWordsConfig(StageConfig):
    """Config of count_words."""

    lower: bool

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Lower-case the words of recipes whose name ends in -lower."""
        return cls.of({"lower": recipe.name.endswith("-lower")})


COUNT_WORDS = Stage(
    name="count_words",
    version=1,
    module="tests.toy_stage",
    config=CountWordsConfig,
    inputs={"rows": Input(("check_dataset",), part="train")},
    code=("tests.toy_stage",),
    in_worker=False,
)


def run(job: Job[CountWordsConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write words.json: how often each word occurs in the training rows."""
    counts: dict[str, int] = {}
    for line in (inputs["rows"] / "train.jsonl").read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            for word in message["content"].split():
                word = word.lower() if job.config.lower else word
                counts[word] = counts.get(word, 0) + 1
    (out / "words.json").write_text(json.dumps(counts, sort_keys=True))
    return Summary(figures={"words": len(counts)})


@stage_task
def count_words(run: Run, *, rows: Ref) -> StageResult:
    """Count the words of the training rows. Work: `tests/toy_stage.py`."""
    return run.find_or_run(COUNT_WORDS, rows=rows)
