"""The flow sweep with recorded stages: what runs how often, what a failure does, and which trial goes on."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from loraflow.config.load import read_recipe
from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import Registration, Workspace
from loraflow.failures import BadConfig, BadPlacement, Crashed, DiskFull, Failure, NonFiniteLoss, OutOfMemory
from loraflow.flows import pipeline as pipeline_module
from loraflow.flows import sweep as flow_module
from loraflow.identity import fingerprint
from loraflow.registry.runs import RunSummary, StageRun
from loraflow.stages import STAGES, TRAIN
from loraflow.store import Ref
from loraflow.tasks import stages as tasks
from loraflow.tasks import trials as trials_module
from loraflow.tasks.run import StageResult
from tests.unit.execution.test_sweep import file  # noqa: F401  (a fixture)

LOSS = {2: 2.0, 4: 1.0, 8: 3.0}  # by rank; a seed adds a hundredth


class FakeStore:
    """Has the curves of all adapters, and the files of all tokens."""

    uri = "store"

    def __init__(self):
        self.curves: dict[str, list[dict]] = {}

    def manifest(self, ref):
        return SimpleNamespace(
            files={"validation/rows.arrow": SimpleNamespace(sha256=ref.facets["validation"])}, seconds=1.5
        )

    def read(self, ref, name):
        return "".join(json.dumps(row) + "\n" for row in self.curves[ref.fingerprint]).encode()

    def location(self, ref):
        return ref.digest


class RecordingRun:
    """Stands in for a run: records the stages, and trains nothing."""

    is_deployed = False

    def __init__(self, recipe, settings):
        self.recipe_file = read_recipe(recipe, settings)
        self.workspace = self.own = Workspace(self.recipe_file.recipe)
        self.workspace.store = FakeStore()
        self.stages, self.recompute, self.sweep, self.labels = {}, set(), None, []
        self.fails = lambda recipe: None
        self.validation = lambda recipe: "same"
        self.cached: dict[str, list[dict]] = {}

    def find_or_run(self, stage, label="", seed=None, /, **inputs):
        label, recipe = label or stage.name, self.workspace.recipe
        self.labels.append(label)
        config = stage.config.from_recipe(recipe, self.workspace).identity() if stage is not STAGES["evaluate"] else {}
        key = fingerprint(
            {"stage": stage.name, "config": config, "inputs": {n: r.fingerprint for n, r in inputs.items()}}
        )
        curves = self.workspace.store.curves
        if stage is TRAIN and (key not in curves or key in self.recompute):
            if error := self.fails(recipe):
                raise error
            curves[key] = [{"step": 6, "eval_loss": LOSS[recipe.peft_config.r] + recipe.training_config.seed / 100}]
            state = "computed"
        else:
            state = "cached" if stage is TRAIN else "computed"
        ref = Ref(stage=stage.name, fingerprint=key, digest=key, uri="", facets={"validation": self.validation(recipe)})
        self.stages[label] = StageRun(stage=label, state=state, fingerprint=key, digest=key)
        return StageResult(ref, SimpleNamespace(ref=None))


@pytest.fixture
def sweep(file, monkeypatch):  # noqa: F811
    """Return a function that runs the flow's code with recorded stages."""
    for name in STAGES:
        for module in (pipeline_module, trials_module):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(tasks, name).fn)
    monkeypatch.setattr(trials_module, "train_trial", trials_module.train_trial.fn)
    for name in ("check_rows", "check_merge"):
        monkeypatch.setattr(pipeline_module, name, lambda *_: None)
    monkeypatch.setattr(trials_module, "check_rows", lambda *_: None)
    monkeypatch.setattr(Workspace, "champion", lambda self: None)
    judged = []

    def decide(run, result, approval):
        judged.append((run.workspace.recipe, result))
        return Registration(Decision.unchanged("recorded"))

    monkeypatch.setattr(flow_module, "decide_and_register", decide)
    monkeypatch.setattr(
        flow_module, "publish_and_report", lambda run, *_: RunSummary(run="r", recipe="tiny", sweep=run.sweep)
    )

    def sweep(grid=None, seeds=1, prepare=lambda run: None, **settings):
        run = RecordingRun(file, {})
        prepare(run)

        @contextmanager
        def opened(*_, **__):
            yield run

        monkeypatch.setattr(flow_module, "open_run", opened)
        grid = grid or {"peft_config.r": [2, 4, 8]}
        run.document = flow_module.sweep.fn(recipe=str(file), grid=grid, seeds=seeds)
        run.judged = judged
        return run

    return sweep


def test_shared_stages_run_once_and_only_the_best_trial_is_merged_and_judged(sweep):
    run = sweep()
    trials = [f"train r={r}" for r in (2, 4, 8)]
    shared = ["version_dataset", "check_dataset", "resolve_base", "tokenize"]
    assert run.labels[: len(shared) + 3] == [*shared, *trials]
    assert run.labels[len(shared) + 3 :] == [
        *shared, "evaluate base", "train", "merge", "verify", "evaluate tuned",
    ]  # fmt: skip
    [(recipe, result)] = run.judged
    assert recipe.peft_config.r == 4, "the lowest validation loss"
    assert result.adapter.fingerprint == run.sweep.trials[1].fingerprint
    assert run.document["sweep"]["chosen"] == "train r=4"
    assert [trial["loss"] for trial in run.document["sweep"]["trials"]] == [2.0, 1.0, 3.0]
    assert run.recipe_file.overrides["peft_config.r"] == 4, "the record names the settings of the model"
    assert not any(label in run.stages for label in trials)
    assert run.stages["train"].state == "computed", "by this sweep"


def test_seeds_are_trials_of_a_combination(sweep):
    run = sweep(seeds=2)
    assert len(run.sweep.trials) == 6
    assert (run.sweep.chosen, run.judged[0][0].training_config.seed) == ("train r=4 seed=0", 0)


@pytest.mark.parametrize("error", [NonFiniteLoss("loss became nan."), OutOfMemory("No memory."), Crashed("gone")])
def test_a_failed_trial_is_shown_and_does_not_end_the_sweep(sweep, error):
    def prepare(run):
        run.fails = lambda recipe: error if recipe.peft_config.r == 4 else None

    run = sweep(prepare=prepare)
    assert [trial.state for trial in run.sweep.trials] == ["computed", "failed", "computed"]
    assert run.sweep.trials[1].problem == f"{type(error).__name__}: {error.what}"
    assert run.sweep.chosen == "train r=2"


def test_a_full_disk_ends_the_sweep_and_a_missing_work_pool_too(sweep):
    for error in (DiskFull("The disk is full."), BadPlacement("No worker.")):

        def prepare(run, error=error):
            run.fails = lambda recipe: error if recipe.peft_config.r == 4 else None

        with pytest.raises(type(error)):
            sweep(prepare=prepare)


@pytest.mark.parametrize(
    ("errors", "kind"),
    [({2: NonFiniteLoss, 4: NonFiniteLoss, 8: NonFiniteLoss}, NonFiniteLoss), ({2: BadConfig, 4: BadConfig, 8: BadConfig}, BadConfig),
     ({2: NonFiniteLoss, 4: OutOfMemory, 8: OutOfMemory}, Failure)],
)  # fmt: skip
def test_if_all_trials_fail_the_sweep_fails_as_they_did(sweep, errors, kind):
    def prepare(run):
        run.fails = lambda recipe: errors[recipe.peft_config.r]("It failed.")

    with pytest.raises(Failure, match="All 3 trials failed") as failed:
        sweep(prepare=prepare)
    assert type(failed.value) is kind
    assert failed.value.exit_code == (2 if kind is BadConfig else 1)
    assert "train r=2: " in failed.value.got


def test_an_adapter_without_a_validation_loss_is_trained_once_more(sweep):
    """One that `loraflow run` trained without measuring it."""
    before = sweep()
    adapters = {trial.label: trial.fingerprint for trial in before.sweep.trials}

    def prepare(run):
        curves = run.workspace.store.curves
        curves[adapters["train r=2"]] = [{"step": 6, "eval_loss": 0.5}]
        curves[adapters["train r=4"]] = [{"step": 6, "loss": 0.1}]

    run = sweep(prepare=prepare)
    assert [(trial.state, trial.loss) for trial in run.sweep.trials] == [
        ("cached", 0.5),
        ("computed", 1.0),
        ("computed", 3.0),
    ]
    assert run.recompute == {adapters["train r=4"]}
    assert run.labels.count("train r=4") == 2


def test_trials_with_other_validation_tokens_are_refused_before_training(sweep):
    def prepare(run):
        run.validation = lambda recipe: str(recipe.training_config.max_length)

    with pytest.raises(BadConfig, match="different validation rows"):
        sweep({"training_config.max_length": [64, 128]}, prepare=prepare)


def test_the_record_of_a_sweep_that_ends_early_has_the_recipe_and_not_a_trials(sweep):
    runs = []

    def prepare(run):
        run.fails = lambda recipe: DiskFull("The disk is full.") if recipe.peft_config.r == 8 else None
        runs.append(run)

    with pytest.raises(DiskFull):
        sweep(prepare=prepare)
    assert runs[0].workspace is runs[0].own


def test_the_deployment_form_has_recipe_grid_and_seeds():
    from prefect.utilities.callables import parameter_schema

    properties = parameter_schema(flow_module.sweep).model_dump()["properties"]
    assert list(properties) == ["recipe", "grid", "seeds", "approval", "settings", "max_trials"]
    assert properties["grid"]["type"] == "object" and properties["grid"]["additionalProperties"] is True
    assert properties["seeds"]["minimum"] == 1
