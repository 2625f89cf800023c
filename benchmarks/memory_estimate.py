"""Compare the memory estimate with the measured peak, for the quickstart's training and its evaluation of the base.

python benchmarks/memory_estimate.py [RECIPE [KEY=VALUE ...]]

Runs the stages up to train and `evaluate base` in a store of its own, in a folder with the recipe and its dataset. Both
figures are in the manifests that any run writes; `loraflow show RUN` prints them too. By default the training has 12 steps:
the peak grows by one per cent after them. Evaluation has a batch of 72 answers.
"""

from __future__ import annotations

import sys
import tempfile

from loraflow.cli import parse_overrides
from loraflow.cli.show import memory_of
from loraflow.config import load_recipe
from loraflow.execution.launcher import run_job
from loraflow.execution.plan import STEPS
from loraflow.execution.plan_notes import planned_memory
from loraflow.execution.workspace import Workspace
from loraflow.store import Ref
from loraflow.training.memory import describe

BEFORE = ("version_dataset", "check_dataset", "resolve_base", "tokenize")
MEASURED = ("train", "evaluate base")
SHORT = ("training_config.max_steps=12", "training_config.save_strategy=no", "evaluation.max_rows=72")


def main(recipe: str = "configs/quickstart.yaml", *sets: str) -> None:
    """Run the stages, and print for each a line with estimate and peak."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = parse_overrides((*SHORT, f"runtime.store={folder}/store", *sets))
        workspace, refs = Workspace(load_recipe(recipe, overrides)), dict[str, Ref]()
        for step in STEPS:
            if step.label not in (*BEFORE, *MEASURED):
                continue
            if step.label == "train" and (planned := planned_memory(workspace)):
                print(
                    f"planned        {planned.training.total / 2**30:.2f} GiB: {describe(planned.training.as_bytes())}"
                )
            inputs = {name: refs[source] for name, source in step.inputs.items()}
            refs[step.label] = run_job(workspace.job(step.stage, inputs), workspace.store)
            if step.label in MEASURED:
                print(f"{step.label:<14} {memory_of(workspace.store.manifest(refs[step.label]))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
