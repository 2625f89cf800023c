"""Which trials of a sweep are trained together, and what the sweep does with a group's losses and failures."""

import json
from types import SimpleNamespace

import pytest

from loraflow.cli.sweep import _show_plan
from loraflow.execution import sweep_plan
from loraflow.execution.plan import PlannedStep
from loraflow.execution.sweep_plan import plan_sweep
from loraflow.execution.trial_groups import group_job, make_groups, why_alone
from loraflow.failures import BadConfig, BadPlacement, CannotGroup, DiskFull, MissingExtra, NonFiniteLoss, OutOfMemory
from loraflow.identity import canonical
from loraflow.stages import STAGES, TRAIN, TRAIN_GROUP
from loraflow.store import Ref
from loraflow.tasks.run import StageResult
from loraflow.tasks.trials import OF_THE_GROUP, OF_THE_TRIAL
from tests.unit.execution.test_sweep import file, trials_of  # noqa: F401  (file is a fixture)
from tests.unit.flows.test_trials import LOSS, FakeStore, RecordingRun, sweep  # noqa: F401  (sweep is a fixture)

TOGETHER = {"runtime.trials_together": 8}
TOGETHER_KEYS = {"runtime__trials_together": 8}


def groups_of(trials, size=8, reads=None):
    return make_groups(trials, reads or {trial.label: "same" for trial in trials}, size)


def test_trials_that_differ_in_what_belongs_to_an_adapter_are_trained_together(file):  # noqa: F811
    trials = trials_of(
        file,
        "peft_config.r=4,8",
        "training_config.learning_rate=1e-4,2e-4",
        "peft_config.lora_dropout=0.0,0.1",
        seeds=2,
    )
    found = groups_of(trials)
    assert [len(group) for group in found.groups] == [8, 8] and not found.alone


def sizes_of(found):
    return [len(group) for group in found.groups]


def test_groups_have_about_the_same_size_also_if_some_are_trained_already(file):  # noqa: F811
    trials = trials_of(file, "peft_config.r=1,2,3,4,5,6,7,8,9")
    assert sizes_of(groups_of(trials, size=8)) == [5, 4]
    assert sizes_of(groups_of(trials, size=4)) == [3, 3, 3]
    assert groups_of(trials[5:], size=8).groups == groups_of(trials, size=8).groups[1:]
    odd = groups_of(trials[:3], size=2)
    assert sizes_of(odd) == [2]
    assert odd.alone == {"train r=3": "the others fill groups of 2: runtime.trials_together"}
    assert groups_of(trials[:1]).alone == {"train r=1": "it is the only remaining trial"}


def test_trials_that_are_the_same_training_are_in_a_group_once(file):  # noqa: F811
    found = groups_of(trials_of(file, "data.limit=1000,2000", "peft_config.r=4,8"))
    assert [[trial.label for trial in group] for group in found.groups] == [
        ["train limit=1000 r=4", "train limit=1000 r=8"]
    ]
    assert found.equal == {f"train limit=2000 r={r}": f"train limit=1000 r={r}" for r in (4, 8)} and not found.alone
    assert "not trained again: train limit=2000 r=4 is the same training as train limit=1000 r=4" in found.lines()


@pytest.mark.parametrize(
    "grid", ["training_config.max_steps=4,6", "training_config.per_device_train_batch_size=2,4", "peft_config.target_modules=[o_proj],[down_proj]"]
)  # fmt: skip
def test_trials_with_other_rows_steps_or_modules_are_in_groups_of_their_own(file, grid):  # noqa: F811
    found = groups_of(trials_of(file, grid, "peft_config.r=4,8"))
    assert len(found.groups) == 2
    assert all(
        len({trial.settings[grid.partition("=")[0]].__repr__() for trial in group}) == 1 for group in found.groups
    )


def test_trials_that_read_other_tokens_are_not_trained_together(file):  # noqa: F811
    trials = trials_of(file, "peft_config.r=4,8")
    found = groups_of(trials, reads={trials[0].label: "one", trials[1].label: "another"})
    assert not found.groups
    assert set(found.alone.values()) == {"no other remaining trial has the same rows, batch and steps"}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"runtime__engine": "stock"}, "stock"),
        ({"runtime__devices": 2}, "several devices"),
        ({"runtime__placement": {"train": "gpu"}}, "another work pool"),
        ({"peft_config__use_dora": True}, "use_dora"),
        ({"training_config__optim": "adafactor"}, "neither AdamW nor SGD"),
        ({"base__dtype": "float32", "training_config__bf16": True}, "computes in bfloat16"),
        ({"peft_config__init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_a_trial_that_needs_a_training_of_its_own_says_why(file, overrides, why):  # noqa: F811
    trials = trials_of(file, "peft_config.r=4,8", **overrides)
    assert all(why in why_alone(trial) for trial in trials)
    found = groups_of(trials)
    assert not found.groups
    (line,) = found.lines()
    assert line.startswith(f"trained alone: {trials[0].label}, {trials[1].label} (") and why in line


def test_the_plan_names_the_groups_and_the_trials_by_themselves(file):  # noqa: F811
    grid = ["peft_config.r=4,8", "peft_config.use_dora=true,false"]
    trials = trials_of(file, *grid, runtime__trials_together=8)
    notes = plan_sweep(trials, ["peft_config.r", "peft_config.use_dora"]).notes
    assert "trained together, in one process: train r=4 use_dora=false, train r=8 use_dora=false" in notes
    assert "trained alone: train r=4 use_dora=true, train r=8 use_dora=true (peft_config.use_dora)" in notes
    apart = plan_sweep(trials_of(file, *grid), ["peft_config.r", "peft_config.use_dora"]).notes
    assert not any("trained" in note for note in apart)


def cached(label, fingerprint):
    return PlannedStep(label, label, "cached", [], fingerprint=fingerprint)


@pytest.fixture
def plan_of(monkeypatch):
    """Return a function that plans a sweep whose shared stages are in a store, with the adapters of some trials alone."""

    def plan_of(trials, store, alone=()):
        def plan(workspace, steps):
            (label,) = [trial.label for trial in trials if trial.workspace is workspace]
            found = [cached(step.label, step.stage.name) for step in steps if step.stage is not TRAIN]
            if label in alone:
                return [*found, cached(TRAIN.name, workspace.job(TRAIN, INPUTS).fingerprint)]
            return [*found, PlannedStep(TRAIN.name, TRAIN.name, "runs", ["new"])]

        for trial in trials:
            trial.workspace.store = store
            if trial.label in alone:
                key = trial.workspace.job(TRAIN, INPUTS).fingerprint
                store.curves[key] = [{"step": 6, "eval_loss": LOSS[trial.workspace.recipe.peft_config.r]}]
        monkeypatch.setattr(sweep_plan, "plan", plan)
        return plan_sweep(trials, [*trials[0].settings])

    return plan_of


def ref_of(stage):
    return Ref(stage=stage.name, fingerprint=stage.name, digest=stage.name, uri="")


INPUTS = {"tokens": ref_of(STAGES["tokenize"]), "base": ref_of(STAGES["resolve_base"])}


def grouped_in(store, trials):
    """Put a group of trials into a store."""
    job = group_job(trials, INPUTS)
    ranks = [trial.workspace.recipe.peft_config.r for trial in trials]
    store.groups[job.fingerprint] = json.loads(canonical(job.payload)), [LOSS[r] for r in ranks]


def test_the_plan_groups_no_trial_whose_own_adapter_is_in_the_store(file, plan_of):  # noqa: F811
    trials = trials_of(file, "peft_config.r=2,4,8", **TOGETHER_KEYS)
    planned = plan_of(trials, GroupStore(), alone=["train r=2"])
    assert planned.notes[-1] == "trained together, in one process: train r=4, train r=8"
    planned = plan_of(trials, GroupStore(), alone=["train r=2", "train r=8"])
    assert planned.notes[-1] == "trained alone: train r=4 (it is the only remaining trial)"
    assert planned.trainings == {"train": 1}


def test_the_plan_counts_the_training_that_follows_a_group(file, plan_of):  # noqa: F811
    trials = trials_of(file, "peft_config.r=2,4,8", **TOGETHER_KEYS)
    follows = {"train for the chosen trial": 1}
    assert plan_of(trials, GroupStore()).trainings == {"train_group": 1} | follows
    store = GroupStore()
    grouped_in(store, trials)
    assert plan_of(trials, store).trainings == follows
    assert plan_of(trials, store, alone=["train r=8"]).trainings == follows, "r=4 has the lowest loss"
    assert plan_of(trials, store, alone=["train r=4"]).trainings == {}


def test_the_command_says_that_the_chosen_trial_is_trained_again(file, plan_of, monkeypatch, capsys):  # noqa: F811
    trials, store = trials_of(file, "peft_config.r=2,4", **TOGETHER_KEYS), GroupStore()
    grouped_in(store, trials)
    _show_plan(plan_of(trials, store))
    assert "to run: 1 x train for the chosen trial; then the chosen trial is merged" in capsys.readouterr().out
    _show_plan(plan_of(trials, store, alone=["train r=4"]))
    assert "all trials are trained; the chosen trial is merged" in capsys.readouterr().out


class GroupStore(FakeStore):
    """Has groups as well: {fingerprint: (payload, losses)}."""

    def __init__(self):
        super().__init__()
        self.groups = {}

    def artifacts(self):
        return [Ref(stage=TRAIN_GROUP.name, fingerprint=key, digest=key, uri="") for key in self.groups]

    def find(self, stage, key):
        known = {TRAIN_GROUP.name: self.groups, TRAIN.name: self.curves}.get(stage)
        return Ref(stage=stage, fingerprint=key, digest=key, uri="") if known is None or key in known else None

    def manifest(self, ref):
        if ref.stage != TRAIN_GROUP.name:
            return super().manifest(ref)
        payload, losses = self.groups[ref.fingerprint]
        return SimpleNamespace(payload=payload, figures={"trials": len(losses)}, seconds=12.0)

    def read(self, ref, name):
        if ref.stage != TRAIN_GROUP.name:
            return super().read(ref, name)
        losses = self.groups[ref.fingerprint][1]
        if name == "trials.json":
            return json.dumps(["" if loss else "loss became nan at step 3" for loss in losses]).encode()
        number = int(name.removeprefix("curves-").removesuffix(".jsonl"))
        return (json.dumps({"step": 6, "eval_loss": losses[number]}) + "\n").encode()


@pytest.fixture
def grouped(sweep, monkeypatch):  # noqa: F811
    """Return a function that runs a sweep with groups; its run has the sizes of the groups that were trained."""
    store = GroupStore()
    find_or_run = RecordingRun.find_or_run

    def recorded(run, stage, label="", seed=None, /, **inputs):
        if stage is not TRAIN_GROUP:
            result = find_or_run(run, stage, label, seed, **inputs)
            has_same_bytes = stage.name == run.has_same_bytes
            return (
                StageResult(result.ref.model_copy(update={"digest": "same"}), result.lookup)
                if has_same_bytes
                else result
            )
        run.labels.append(label)
        job = run.workspace.job(stage, inputs)
        ref = Ref(stage=stage.name, fingerprint=job.fingerprint, digest=job.fingerprint, uri="")
        run.sizes.append(len(job.config.trials))
        if error := run.refuses(job):
            raise error
        ranks = [trial.peft_config.r for trial in job.config.trials]
        seeds = [trial.training_config.seed for trial in job.config.trials]
        losses = [run.losses.get(r, 1) and LOSS[r] + seed / 100 for r, seed in zip(ranks, seeds, strict=True)]
        store.groups[job.fingerprint] = json.loads(canonical(job.payload)), losses
        run.stages[label] = computed_stage(label, ref)
        return StageResult(ref, SimpleNamespace(ref=None))

    monkeypatch.setattr(RecordingRun, "find_or_run", recorded)

    def run(grid=None, seeds=1, refuses=lambda job: None, losses=None, prepare=lambda run: None, **settings):
        def set_up(found):
            found.recipe_file = found.recipe_file.with_overrides({**TOGETHER, **settings})
            found.workspace = found.own = found.workspace.with_recipe(found.recipe_file.recipe)
            found.workspace.store, found.sizes, found.refuses, found.losses = store, [], refuses, losses or {}

            found.has_same_bytes = ""  # a stage whose artifacts are equal, whatever it takes from the recipe
            prepare(found)

        return sweep(grid, seeds, set_up)

    return run


def computed_stage(label, ref):
    from loraflow.registry.runs import StageRun

    return StageRun(stage=label, state="computed", fingerprint=ref.fingerprint, digest=ref.digest)


def test_a_group_chooses_and_the_chosen_trial_is_trained_by_itself(grouped):
    run = grouped()
    assert run.sizes == [3]
    assert [trial.loss for trial in run.sweep.trials] == [2.0, 1.0, 3.0]
    assert [trial.group_number for trial in run.sweep.trials] == [0, 1, 2]
    assert {trial.seconds for trial in run.sweep.trials} == {4.0}, "its share of the group's"
    assert run.sweep.chosen == "train r=4" and run.judged[-1][0].peft_config.r == 4
    assert [label for label in run.labels if label.startswith("train")] == ["train_group 1", "train"]
    assert run.stages["train"].state == "computed" and "train_group 1" not in run.stages
    assert "trained alone, train r=4 has a validation loss of 1.0000; in its group it had 1.0000" in run.sweep.notes


def test_a_sweep_with_more_values_trains_only_the_new_trials(grouped):
    grouped({"peft_config.r": [2, 4]}, seeds=2)
    run = grouped({"peft_config.r": [2, 4, 8]}, seeds=2)
    assert run.sizes == [2], "r=8 with both seeds"
    assert [trial.state for trial in run.sweep.trials] == ["cached"] * 4 + ["computed"] * 2
    assert grouped({"peft_config.r": [2, 4, 8]}, seeds=2).sizes == []


def test_a_group_that_does_not_fit_into_memory_is_halved(grouped):
    def refuses(job):
        return OutOfMemory("No memory.") if len(job.config.trials) > 2 else None

    run = grouped(seeds=2, refuses=refuses)
    assert run.sizes == [6, 3, 2, 3, 2]
    assert [label for label in run.labels if label.startswith("train ")] == ["train r=4 seed=0", "train r=8 seed=1"]
    assert all(trial.loss for trial in run.sweep.trials)


@pytest.mark.parametrize("failure", [CannotGroup, MissingExtra])
def test_trials_whose_group_failed_are_trained_by_themselves(grouped, failure):
    run = grouped(refuses=lambda job: failure("a recurrent model, or one trial's settings."))
    assert [label for label in run.labels if label.startswith("train ")] == [f"train r={r}" for r in (2, 4, 8)]
    assert {trial.group_number for trial in run.sweep.trials} == {None}


def test_of_a_group_that_one_trial_spoils_only_that_trial_fails(grouped):
    def prepare(run):
        run.fails = lambda recipe: BadConfig("no such module.") if recipe.peft_config.r == 4 else None

    run = grouped(refuses=lambda job: BadConfig("no such module."), prepare=prepare)
    assert [(trial.state, trial.problem) for trial in run.sweep.trials] == [
        ("computed", ""), ("failed", "BadConfig: no such module."), ("computed", ""),
    ]  # fmt: skip


def test_every_failure_that_a_trial_may_have_is_one_that_its_group_may_have():
    assert set(OF_THE_GROUP) == {CannotGroup, *OF_THE_TRIAL}


def test_a_missing_worker_ends_the_sweep_of_groups(grouped):
    with pytest.raises(BadPlacement):
        grouped(refuses=lambda job: BadPlacement("no worker."))


def test_a_trial_that_is_the_same_training_as_another_has_its_result(grouped):
    def of_equal_tokens(run):
        run.has_same_bytes = "tokenize"

    grid = {"data.limit": [1000, 2000], "peft_config.r": [2, 4]}
    run = grouped(grid, prepare=of_equal_tokens)
    assert run.sizes == [2] and [trial.loss for trial in run.sweep.trials] == [2.0, 1.0] * 2
    assert [trial.state for trial in run.sweep.trials] == ["computed"] * 2 + ["cached"] * 2
    assert [trial.settings["data.limit"] for trial in run.sweep.trials] == [1000, 1000, 2000, 2000]
    again = grouped(grid, prepare=of_equal_tokens)
    assert again.sizes == [] and {trial.state for trial in again.sweep.trials} == {"cached"}
    assert [trial.loss for trial in again.sweep.trials] == [2.0, 1.0] * 2


def test_a_failure_of_the_machine_ends_the_sweep_of_groups_too(grouped):
    with pytest.raises(DiskFull):
        grouped(refuses=lambda job: DiskFull("full."))


def test_a_trial_that_failed_in_its_group_is_not_chosen(grouped):
    run = grouped(losses={4: None})
    failed = run.sweep.trials[1]
    assert (failed.state, failed.loss) == ("failed", None) and failed.problem.startswith(
        "NonFiniteLoss: loss became nan"
    )
    assert run.sweep.chosen == "train r=2"


def test_if_all_trials_of_all_groups_fail_the_sweep_fails_as_they_did(grouped):
    with pytest.raises(NonFiniteLoss):
        grouped(losses={2: None, 4: None, 8: None})


def test_groups_are_off_unless_they_are_asked_for(grouped):
    run = grouped(**{"runtime.trials_together": 1})
    assert not run.sizes and TRAIN.name in run.labels
