"""The pipeline as it runs, as `plan` lists it, and as the stage table connects it."""

import inspect
from types import SimpleNamespace

import pytest

from loraflow.execution.plan import CHAMPION, find_step, inputs_of, steps_of
from loraflow.flows import pipeline as module
from loraflow.stages import STAGES
from loraflow.store import Ref
from loraflow.tasks import stages as tasks
from loraflow.tasks.run import StageResult


def ref(label: str) -> Ref:
    """Return an artifact that says which step it is of."""
    return Ref(stage="s", fingerprint=label, digest=label, uri="")


class RecordingRun:
    """Stands in for a run: records which steps the pipeline asks for, and computes nothing."""

    is_deployed = False

    def __init__(
        self,
        compares_merges: bool,
        champion: bool,
        deals_rows: bool,
        scores_general: bool,
        seeds: tuple[int, ...] = (42,),
    ):
        self.steps: list[tuple[str, str, dict[str, str]]] = []
        self.champion = ref(CHAMPION) if champion else None
        self.seeds: dict[str, int | None] = {}  # label → training seed
        recipe = SimpleNamespace(
            compares_merges=compares_merges, deals_rows=deals_rows, scores_general=scores_general, seeds=seeds
        )
        self.workspace = SimpleNamespace(recipe=recipe, champion=lambda: self.champion)

    def find_or_run(self, stage, label="", seed=None, /, **inputs):
        label = label or stage.name
        self.seeds[label] = seed
        self.steps.append((label, stage.name, {name: given.fingerprint for name, given in inputs.items()}))
        return StageResult(ref(label), SimpleNamespace(ref=None))


@pytest.mark.parametrize("seeds", [(42,), (42, 43, 44)])
@pytest.mark.parametrize("compares_merges", [False, True])
@pytest.mark.parametrize("champion", [False, True])
@pytest.mark.parametrize("deals_rows", [False, True])
@pytest.mark.parametrize("scores_general", [False, True])
def test_plan_lists_the_steps_of_the_pipeline(
    monkeypatch, compares_merges, champion, deals_rows, scores_general, seeds
):
    run = RecordingRun(compares_merges, champion, deals_rows, scores_general, seeds)
    for name in STAGES:
        monkeypatch.setattr(module, name, getattr(tasks, name).fn, raising=False)
    for name in ("check_rows", "check_merge", "deal_heldout", "check_general_rows"):
        monkeypatch.setattr(module, name, lambda *_: None)
    warned: list[str] = []  # the last step before the warning
    monkeypatch.setattr(module, "warn_of_other_tokens", lambda _: warned.append(run.steps[-1][0]))
    result = module.pipeline(run)
    labels = [label for label, _, _ in run.steps]
    assert len(warned) == 1 and labels[labels.index(warned[0]) + 1] == "train"
    steps = steps_of(run.workspace.recipe)
    planned = [(step.label, step.stage.name, inputs_of(step, compares_merges=compares_merges)) for step in steps]
    assert run.steps == [step for step in planned if champion or CHAMPION not in step[2].values()]
    assert run.seeds == {step.label: step.seed for step in steps if step.label in run.seeds}
    assert sum(step.stage.name == "train" for step in steps) == len(seeds)
    assert [further.seed for further in result.further_seeds] == [*seeds[1:]]
    models = {"base": "resolve_base", "tuned": "merge"} | ({"champion": CHAMPION} if champion else {})
    scored = {label: inputs["model"] for label, stage, inputs in run.steps if stage == "score_general"}
    assert scored == ({f"score_general {name}": model for name, model in models.items()} if scores_general else {})
    assert result.general == ({name: ref(f"score_general {name}") for name in models} if scores_general else {})
    assert [find_step(step.label).label for step in steps] == [step.label for step in steps] and find_step(
        "train seed x"
    ) is None


@pytest.mark.parametrize("scores_general", [False, True])
@pytest.mark.parametrize("deals_rows", [False, True])
def test_every_step_takes_its_inputs_from_stages_that_the_table_allows(deals_rows, scores_general):
    steps = steps_of(SimpleNamespace(deals_rows=deals_rows, scores_general=scores_general, seeds=(42, 43)))
    by_label = {step.label: step for step in steps}
    for step in steps:
        for name, source in step.inputs.items():
            if source != CHAMPION:
                assert by_label[source].stage.name in step.stage.inputs[name].source, (step.label, name)


def test_every_stage_has_a_task_of_its_name_with_its_inputs_and_a_docstring():
    for stage in STAGES.values():
        task = getattr(tasks, stage.name)
        parameters = dict(inspect.signature(task.fn).parameters)
        del parameters["run"]
        parameters.pop("label", None)
        parameters.pop("seed", None)
        assert parameters.keys() == stage.inputs.keys()
        optional = {name for name, given in stage.inputs.items() if given.optional}
        assert {name for name, given in parameters.items() if given.default is None} == optional
        assert stage.module.replace(".", "/") + ".py" in task.description, "the docstring names the stage's module"
