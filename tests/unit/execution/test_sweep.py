"""The grid of a sweep, its trials, the choice among them, and what is refused before anything runs."""

import json
import re

import pytest

from loraflow.config.grid import check_grid, parse_grid, short_names
from loraflow.config.load import read_recipe
from loraflow.config.stage_configs import FingerprintedTraining
from loraflow.execution.sweep import differing_keys, make_trials, sharing_lines, stage_counts
from loraflow.execution.sweep_plan import plan_sweep
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig
from loraflow.registry.sweeps import TrialRecord, choose, ranked
from loraflow.reporting.sections import sweep_lines
from loraflow.stages import STAGES
from loraflow.training.validation_loss import Curves
from tests.conftest import RECIPE, write_chats


@pytest.fixture
def file(tmp_path):
    """A recipe with validation rows. Its base is a folder that no stage could use: nothing runs here."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}')
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "tokenizer.json").write_text("{}")
    write_chats(tmp_path / "data" / "train.jsonl", range(8))
    write_chats(tmp_path / "data" / "heldout.jsonl", range(100, 104))
    text = RECIPE.format(data=tmp_path / "data", base=base, store=tmp_path / "store")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(text.replace("data:\n", "data:\n  validation_fraction: 0.2\n"))
    return recipe


def trials_of(file, *grid, seeds=1, **overrides):
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    checked = check_grid(parse_grid(grid), seeds, settings)
    found = read_recipe(file, settings)
    return make_trials(found, checked, Workspace(found.recipe))


def test_values_are_read_as_in_a_recipe():
    grid = parse_grid(["a.b=8, 16", "c=1e-4,true,null,no", "d=all-linear,[q, v],'x,y'"])
    assert grid == {"a.b": [8, 16], "c": [1e-4, True, None, "no"], "d": ["all-linear", ["q", "v"], "x,y"]}


@pytest.mark.parametrize(
    "options",
    [["r"], ["r="], ["=1,2"], ["r=8,"], ["r=8,,16"], ["r=[8,16"], ["r=8],[16"], ["r=*a,8"], ["r=8,16", "r=32,64"]],
)
def test_an_option_that_is_no_list_of_values_is_refused(options):
    with pytest.raises(BadConfig, match="--grid") as refused:
        parse_grid(options)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("grid", "seeds", "overrides", "message"),
    [
        ({"peft_config.r": [8, 8.0]}, 1, {}, "a value twice"),
        ({"peft_config.r": [8]}, 1, {}, "only one trial"),
        ({}, 1, {}, "only one trial"),
        ({"peft_config.r": 8}, 1, {}, "list of values"),
        ({"peft_config.r": []}, 1, {}, "list of values"),
        ({"peft_config.r": [*range(1, 101)], "peft_config.lora_alpha": [*range(1, 101)]}, 1, {}, "10,000 trials"),
        ({}, 65, {}, "65 trials"),
        ({"training_config.seed": [0, 1]}, 2, {}, "seeds are given twice"),
        ({"peft_config.rank": [2, 4], "peft_config.r": [2, 4]}, 1, {}, "set twice"),
        ({"peft_config": [{"r": 2}, {"r": 4}], "peft_config.r": [2, 4]}, 1, {}, "set twice"),
        ({"peft_config.r": [2, 4]}, 1, {"peft_config.r": 3}, "set twice"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_without_the_recipe(grid, seeds, overrides, message):
    with pytest.raises(BadConfig, match=message):
        check_grid(grid, seeds, overrides)


def test_one_and_true_are_two_values():
    assert check_grid({"x": [1, True]}, 1, {}).size == 2


def test_a_higher_limit_allows_more_trials():
    assert check_grid({"peft_config.r": [*range(1, 101)]}, 1, {}, max_trials=100).size == 100


def test_names_are_as_short_as_they_can_be():
    names = short_names(["training_config.seed", "data.seed", "peft_config.r", "name"])
    assert [*names.values()] == ["training_config.seed", "data.seed", "r", "name"]


def test_a_trial_has_the_fingerprint_of_a_run_with_its_settings(file):
    """The measurement of the validation loss is in no fingerprint."""
    trials = trials_of(file, "peft_config.r=2,4", "training_config.learning_rate=1e-2,1e-3", seeds=2)
    assert len(trials) == 8
    assert trials[3].label == "train r=2 learning_rate=0.001 seed=1"
    for trial in trials:
        run = read_recipe(file, {**trial.settings, "training_config.seed": trial.seed})
        workspace = Workspace(run.recipe)
        for name in ("version_dataset", "check_dataset", "resolve_base", "tokenize", "train"):
            config = STAGES[name].config.from_recipe(run.recipe, workspace).identity()
            assert json.loads(trial.settings_of_steps[name]) == config
    assert len({trial.identities["train"] for trial in trials}) == 8
    assert trials[0].workspace.recipe.training_config.eval_strategy == "epoch"
    assert set(stage_counts(trials).values()) == {1}


def test_trials_look_up_dataset_and_base_once(file, monkeypatch):
    from loraflow.data.versions import version

    calls = []
    locate = version.locate
    monkeypatch.setattr(version, "locate", lambda *given: calls.append(1) or locate(*given))
    trials_of(file, "peft_config.r=2,4,8", seeds=2)
    assert len(calls) == 1


def test_stages_that_differ_between_trials_are_named_with_their_keys(file):
    grid = ("training_config.max_length=64,128", "data.limit=2,4", "peft_config.r=2,4")
    trials = trials_of(file, *grid)
    keys = [option.partition("=")[0] for option in grid]
    assert stage_counts(trials) == {"version_dataset": 1, "check_dataset": 2, "resolve_base": 1, "tokenize": 4}
    assert differing_keys(trials, keys) == {
        "check_dataset": ["data.limit"],
        "tokenize": ["training_config.max_length"],
    }
    assert sharing_lines(trials, keys) == [
        "run once for all 8 trials: version_dataset, resolve_base",
        "check_dataset runs 2 times, because data.limit differs between trials",
        "tokenize runs 4 times, because training_config.max_length differs between trials",
    ]


def test_trials_that_are_the_same_training_are_counted_once(file):
    grid = ("training_config.per_device_train_batch_size=2,4", "training_config.gradient_accumulation_steps=2,4")
    trials = trials_of(file, *grid)
    assert "the 4 trials are 3 different trainings; equal ones are trained once" in sharing_lines(trials, [])


def test_seeds_can_be_a_key_of_the_grid(file):
    seeds = [trial.workspace.recipe.training_config.seed for trial in trials_of(file, "training_config.seed=3,5")]
    assert seeds == [3, 5]


@pytest.mark.parametrize(
    "key",
    ["runtime.threads=1,2", "gate.min_gain=0,1", "evaluation.max_rows=2,3", "merge.max_kl=0.1,0.2", "name=a,b",
     "training_config.logging_steps=1,2", "training_config.output_dir=a,b", "register.model=a,b",
     "training_config.eval_strategy=steps,epoch", "evaluation={max_rows: 2},{max_rows: 3}"],
)  # fmt: skip
def test_a_key_that_cannot_change_training_is_refused(file, key):
    with pytest.raises(BadConfig, match="does not change what is trained") as refused:
        trials_of(file, "peft_config.r=2,4", key)
    assert refused.value.where == f"--grid {key.partition('=')[0]}"


@pytest.mark.parametrize(
    "key",
    ["data.validation_fraction=0.1,0.2", "data.loss_on=assistant,all", "data.seed=0,1", "data.system=a,b",
     "data={validation_fraction: 0.1},{validation_fraction: 0.2}", "base.chat_template=auto,qwen3"],
)  # fmt: skip
def test_a_key_that_changes_the_validation_rows_is_refused(file, key):
    with pytest.raises(BadConfig, match="could not be compared"):
        trials_of(file, key)


def test_a_recipe_without_validation_rows_is_refused_with_the_line_to_add(file):
    with pytest.raises(BadConfig, match="has none") as refused:
        trials_of(file, "peft_config.r=2,4", data__validation_fraction=0.0)
    assert "`validation_fraction: 0.1` below `data:`" in refused.value.next_step


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("peft_config.rr=8,16", "--grid peft_config.rr: peft_config.rr is not a key of a recipe; did you mean r?"),
        ("peft_config.r=8,eight", "--grid peft_config.r: peft_config.r: should be a valid integer"),
        ("peft_config..r=8,16", "expected a key of the recipe"),
    ],
)
def test_a_trial_that_is_no_recipe_is_refused_by_the_option_that_causes_it(file, key, problem):
    with pytest.raises(BadConfig, match=re.escape(problem)):
        trials_of(file, key)


def test_a_warning_about_the_recipe_is_logged_once(file, caplog):
    trials_of(file, "training_config.warmup_ratio=0.1,0.2,0.3", seeds=2)
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1


def test_the_plan_of_a_new_store_runs_everything_once(file):
    trials = trials_of(file, "peft_config.r=2,4")
    planned = plan_sweep(trials, ["peft_config.r"]).to_json()
    assert [trial["status"] for trial in planned["trials"]] == ["runs", "runs"]
    assert {stage["stage"]: stage["to_run"] for stage in planned["stages"]} == dict.fromkeys(
        ("version_dataset", "check_dataset", "resolve_base", "tokenize"), 1
    )
    json.dumps(planned)


def test_the_command_prints_the_plan_and_refuses_a_mistake_before_a_flow_starts(file):
    from click.testing import CliRunner

    from loraflow.cli.sweep import sweep

    grid = [str(file), "--grid", "peft_config.r=2,4"]
    result = CliRunner().invoke(sweep, [*grid, "--seeds", "2", "--plan", "--json"])
    assert [trial["label"] for trial in json.loads(result.stdout)["trials"]] == [
        "train r=2 seed=0", "train r=2 seed=1", "train r=4 seed=0", "train r=4 seed=1",
    ]  # fmt: skip
    text = CliRunner().invoke(sweep, [*grid, "--plan"]).stdout
    assert "run once for all 2 trials: version_dataset, check_dataset, resolve_base, tokenize" in text
    assert "to run: 1 x version_dataset, 1 x check_dataset, 1 x resolve_base, 1 x tokenize, 2 x train; then" in text
    refused = CliRunner().invoke(sweep, [*grid, "--grid", "runtime.threads=1,2"])
    assert isinstance(refused.exception, BadConfig) and refused.exception.exit_code == 2


def test_a_variant_of_a_recipe_locates_what_it_names_itself(file, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    found = read_recipe(file, {"evaluation.general": str(tmp_path / "a.jsonl")})
    workspace = Workspace(found.recipe)
    first, base = workspace.general, workspace.base
    other = workspace.with_recipe(found.with_overrides({"evaluation.general": str(tmp_path / "b.jsonl")}).recipe)
    assert other.general is not None and other.general.md5 != first.md5 and other.base is base
    assert workspace.with_recipe(read_recipe(file, {}).recipe).general is None
    same = found.with_overrides({"evaluation.general": str(tmp_path / "a.jsonl"), "evaluation.max_rows": 2})
    assert workspace.with_recipe(same.recipe).general is first


def test_credentials_in_a_value_are_hidden():
    grid = check_grid({"base.model": ["https://me:secret-token@host/a", "b"]}, 1, {})
    assert "secret-token" not in str(grid)


def record(r, seed, loss, problem=""):
    state = "computed" if loss is not None else "failed"
    return TrialRecord(
        label=f"train r={r} seed={seed}", settings={"r": r}, seed=seed, state=state, loss=loss, problem=problem
    )


def test_the_choice_is_by_the_mean_over_seeds_and_then_by_the_best_seed():
    trials = [record(2, 0, 1.0), record(2, 1, 2.0), record(4, 0, 1.3), record(4, 1, 1.2)]
    found = choose(trials)
    assert found.chosen == "train r=4 seed=1", "r=2 has the lowest loss, but a higher mean"
    best = ranked(trials)[0]
    assert (best.mean, best.deviation) == (pytest.approx(1.25), pytest.approx(0.0707, abs=1e-4))
    assert "within the spread between seeds" in found.notes[0]


def test_a_combination_of_which_a_seed_failed_comes_last():
    trials = [
        record(2, 0, 1.0),
        record(2, 1, None, "NonFiniteLoss: loss became nan."),
        record(4, 0, 3.0),
        record(4, 1, 3.1),
    ]
    assert choose(trials).chosen == "train r=4 seed=0"
    assert choose(trials[1:2]).chosen is None


def test_equal_losses_choose_the_first_combination():
    assert choose([record(4, 0, 1.0), record(2, 0, 1.0)]).chosen == "train r=4 seed=0"


def curve(rows):
    return Curves.parse("".join(json.dumps(row) + "\n" for row in rows).encode())


def training(**values):
    return FingerprintedTraining.model_validate({"global_batch": 4, **values})


def test_the_validation_loss_is_that_of_the_last_step():
    rows = [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0}, {"step": 4, "train_loss": 3.0}]
    assert curve(rows).validation_loss(training()) == 2.0
    assert curve([*rows, {"step": 5, "train_loss": 3.0}]).validation_loss(training()) is None, "not of the last weights"
    assert curve(rows[2:]).validation_loss(training()) is None


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 2}


@pytest.mark.parametrize(
    ("losses", "loaded"),
    [
        ([5, 4, 3, 2], 2),  # saved at 2 and 4
        ([5, 2, 3, 4], 2),
        ([5, 4, 1, 2], 4),  # the best, at step 3, was never saved: the best one before it is loaded
        ([1, 2, 3, 4], 4),  # none of the saved ones was the best at its time: the last weights stay
        ([5, 4, 3, 3], 4),  # step 3 was as good before
        ([5, 4, 6, 6, 3], 3),  # the last step of a training is saved too
    ],
)
def test_with_the_best_checkpoint_it_is_the_loss_of_the_one_that_transformers_loads(losses, loaded):
    rows = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, 1)]
    assert curve(rows).validation_loss(training(**BEST)) == loaded


def test_a_step_that_is_logged_again_after_a_resume_counts_once():
    found = curve([{"step": 2, "eval_loss": 1.0}, {"step": 2, "eval_loss": 2.0}])
    assert found.validation == ((2, 2.0),)


def test_the_report_has_a_table_and_a_picture_of_each_loss():
    found = choose([record(2, 0, 1.0), record(4, 0, None, "OutOfMemory: a | b")])
    curves = {"train r=2 seed=0": Curves(((1, 2.0), (2, 1.5)), ((1, 2.5), (2, 1.0)), 2)}
    lines = [*sweep_lines(found, curves, image=True)]
    assert "| **1** | **2** | **1.0000** | **1.0000** |  | **0.0** |" in lines
    assert "| 2 | 4 | failed |  |  | 0.0 |" in lines
    assert "- OutOfMemory: a \\| b" in lines
    assert sum(line.startswith("![") for line in lines) == 2
    assert not any(line.startswith("![") for line in sweep_lines(found, curves, image=False))


def test_the_terminal_shows_the_table_of_the_report(capsys):
    from loraflow.cli.sweep import show_trials

    show_trials(choose([record(2, 0, 1.0), record(4, 0, None, "OutOfMemory: a | b")]))
    shown = capsys.readouterr().out
    rows = [re.sub(r"[│┃|]", " ", line).split() for line in shown.splitlines()]
    assert ["r", "validation", "loss", "mean", "spread", "seconds"] in rows
    assert ["1", "2", "1.0000", "1.0000", "0.0"] in rows and ["2", "4", "failed", "0.0"] in rows
    assert "note: OutOfMemory: a | b" in shown and "chosen        train r=2 seed=0" in shown
