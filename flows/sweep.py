"""The flow sweep: train a recipe with several settings and seeds, and take the best adapter through the pipeline.

loraflow sweep configs/tickets.yaml --grid peft_config.r=8,16 --seeds 3
"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

from typing import Annotated

from pydantic import Field, JsonValue

from loraflow.config.grid import MAX_TRIALS, check_grid
from loraflow.execution.sweep import Trial, make_trials
from loraflow.execution.workspace import PipelineResult
from loraflow.flows.finetune import decide_and_register, publish_and_report, repairs
from loraflow.flows.parameters import NO_SETTINGS, THE_ONLY_RECIPE, JsonObject, RecipeName, Settings, flow
from loraflow.flows.pipeline import pipeline
from loraflow.registry.runs import StageRun
from loraflow.stages import TRAIN
from loraflow.tasks.approval import refuse_without_deployment
from loraflow.tasks.run import Run, mask_parameters, open_run, run_name
from loraflow.tasks.trials import group_labels, note_loss_alone, refuse_if_all_failed, run_trials, validation_loss

NO_GRID: JsonObject = {}


def _run_name() -> str:
    return f"{run_name()}, sweep"


@flow(name="sweep", flow_run_name=_run_name, validate_parameters=True)
def sweep(
    recipe: RecipeName = THE_ONLY_RECIPE,
    grid: JsonObject = NO_GRID,
    seeds: Annotated[int, Field(ge=1)] = 1,
    approval: bool = False,
    settings: Settings = NO_SETTINGS,
    max_trials: Annotated[int, Field(ge=1)] = MAX_TRIALS,
) -> dict[str, JsonValue]:
    """Train a recipe with several settings, choose by the loss on validation rows, and promote the best if it is better.

    Args:
        recipe: Name of a recipe in configs/, or a path; it needs data.validation_fraction. Empty: the only one of configs/.
        grid: Values to try, such as {"peft_config.r": [8, 16], "training_config.learning_rate": [1e-4, 2e-4]}.
        seeds: Train each combination with this many seeds, and compare the means.
        approval: Require manual approval before promotion.
        settings: Any other key of the recipe, for all trials, such as {"evaluation.max_rows": 50}.
        max_trials: Refuse a sweep with more trials than this.
    """
    if approval:
        refuse_without_deployment()
    mask_parameters({"grid": grid})
    checked = check_grid(grid, seeds, settings, max_trials)
    with open_run(recipe, settings, [], rename=False) as run:
        trials = make_trials(run.recipe_file, checked, run.workspace)
        for attempt in repairs(run):
            with attempt:
                run.sweep = run_trials(run, trials)
                label = refuse_if_all_failed(run.sweep)
                chosen = next(trial for trial in trials if trial.label == label)
                result = _finish(run, chosen, trials)
                run.sweep = note_loss_alone(run.sweep, validation_loss(run, result.adapter))
                registration = decide_and_register(run, result, approval)
        return publish_and_report(run, result, registration).model_dump(mode="json")


def _finish(run: Run, chosen: Trial, trials: list[Trial]) -> PipelineResult:
    """Continue as the run of the chosen trial: its stages up to training are cached, the others are computed."""
    run.workspace, run.recipe_file = chosen.workspace, chosen.recipe_file
    before, of_trials = dict(run.stages), {trial.label for trial in trials} | group_labels(run.stages)
    if chosen.label in before:  # otherwise it was trained in a group, and is trained by itself now
        before[TRAIN.name] = before[chosen.label].model_copy(update={"stage": TRAIN.name})
    result = pipeline(run)
    run.stages = _as_computed(run.stages, before, of_trials)
    return result


def _as_computed(after: dict[str, StageRun], before: dict[str, StageRun], trials: set[str]) -> dict[str, StageRun]:
    """Return the stages without those of the trials. A stage that this sweep computed keeps the state computed."""
    stages = {label: stage for label, stage in after.items() if label not in trials}
    for label, stage in stages.items():
        earlier = before.get(label)
        if earlier is not None and earlier.digest == stage.digest:
            stages[label] = earlier
    return stages
