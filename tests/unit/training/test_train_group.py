"""Adapters that are trained in one pass, each against the one that the stage train makes alone. A tiny Phi-3 in fp32."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from loraflow.config.stage_configs import TrainConfig
from loraflow.failures import BadConfig, CannotGroup, OutOfMemory, Preempted
from loraflow.job import Inputs, Progress
from loraflow.training import fast_engine, train_group
from loraflow.training.memory import MemoryFit, lora_weights
from tests.job_factory import Outside, make_job
from tests.unit.training.test_training import REF, StopAt, base, recipe, run, tokenize  # noqa: F401  (base is a fixture)

MEASURED = {
    "data__validation_fraction": 0.1,
    "training_config__eval_strategy": "epoch",
    "training_config__max_steps": 5,
}
FIT = MemoryFit(4096, "none", 0.0, "made up")
TRIALS = (
    {"peft_config__r": 2, "training_config__learning_rate": 1e-2},
    {"peft_config__r": 8, "peft_config__lora_dropout": 0.3, "training_config__learning_rate": 3e-3,
     "peft_config__init_lora_weights": "gaussian", "peft_config__use_rslora": True, "training_config__warmup_steps": 3,
     "training_config__lr_scheduler_type": "polynomial",
     "training_config__lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 2.0}},
    {"peft_config__r": 4, "peft_config__lora_alpha": 8.0, "training_config__seed": 3, "training_config__weight_decay": 0.1,
     "training_config__warmup_steps": 0.5, "training_config__max_grad_norm": 0.05,
     "peft_config__rank_pattern": {"down_proj": 9, r"layers\.0\.self_attn\.qkv_proj": 1},
     "peft_config__alpha_pattern": {"o_proj": 64.0}, "training_config__adam_beta1": 0.5,
     "training_config__adam_beta2": 0.9, "training_config__adam_epsilon": 1e-3},
)  # fmt: skip


def group(trials, folder, base, shards, report=None, **overrides):  # noqa: F811
    """Train a group; return what each trial logged, their problems, and the final adapters' weights."""
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    recipes = [recipe(**{**MEASURED, **overrides, **trial}) for trial in trials]
    outside = Outside(grouped=tuple(TrainConfig.from_recipe(recipe, Outside()) for recipe in recipes))
    job = make_job("train_group", recipes[0], {"tokens": REF, "base": REF}, outside)
    kept = []
    build = train_group.build_group

    def keeping(*args):
        kept.append(build(*args))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_group, "build_group", keeping)
        train_group.run(
            job, Inputs({"tokens": shards, "base": base}), out, report or Progress(work / "progress.jsonl", work)
        )
    curves = [
        [json.loads(line) for line in (out / f"curves-{k}.jsonl").read_text().splitlines()] for k in range(len(trials))
    ]
    trainer = kept[0][0]
    return curves, json.loads((out / "trials.json").read_text()), trainer


def alone(trial, folder, base, shards, **overrides):  # noqa: F811
    """Train a trial alone; return its adapter and what it logged."""
    adapter, _ = run(base, shards, folder, **{**MEASURED, **overrides, **trial})
    curve = folder / "out" / "telemetry" / "curves.jsonl"
    return adapter, [json.loads(line) for line in curve.read_text().splitlines()]


def points(curve, key):
    return {row["step"]: row[key] for row in curve if key in row}


@pytest.mark.parametrize("packing", [False, True])
def test_each_adapter_of_a_group_equals_the_one_trained_alone(base, tmp_path, packing):  # noqa: F811
    shards = tokenize(base, tmp_path / "data", training_config__packing=packing)
    options = {"training_config__packing": packing, "runtime__micro_batch": 2}
    curves, problems, trainer = group(TRIALS, tmp_path / "group", base, shards, **options)
    assert problems == ["", "", ""]
    for k, trial in enumerate(TRIALS):
        adapter, expected = alone(trial, tmp_path / str(k), base, shards, **options)
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            mine, other = points(curves[k], key), points(expected, key)
            assert mine.keys() == other.keys() and len(mine) >= 1
            assert mine == pytest.approx(other, rel=1e-3, abs=2e-4), (k, key)
        modules = trainer.model.adapters.modules
        assert len(adapter) == 2 * len(modules)
        stacked = [name for name, module in trainer.model.model.named_modules() if hasattr(module, "downs")]
        for name, module in zip(stacked, modules, strict=True):
            path = name.removeprefix("base_model.model.")
            (of_a,) = [tensor for key, tensor in adapter.items() if f"{path}.lora_A" in key]
            (of_b,) = [tensor for key, tensor in adapter.items() if f"{path}.lora_B" in key]
            rank, down, up = len(of_a), module.downs[k].detach(), module.ups[k].detach()
            assert torch.allclose(down[:rank], of_a, rtol=0, atol=5e-5), name
            assert torch.allclose(up[:rank], of_b.t(), rtol=0, atol=5e-5), name
            assert not down[rank:].any() and not up[rank:].any()


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory):  # noqa: F811
    return tokenize(base, tmp_path_factory.mktemp("shards"))


def test_an_adapter_that_becomes_nan_leaves_the_others_as_they_are(base, shards, tmp_path):  # noqa: F811
    wild = {"training_config__learning_rate": 1e30, "training_config__max_grad_norm": 0.0}
    (expected, _), _, _ = group([TRIALS[0], TRIALS[1]], tmp_path / "tame", base, shards)
    (ended, found), problems, trainer = group([wild, TRIALS[0]], tmp_path / "wild", base, shards)
    assert problems[0].startswith(("loss became", "grad_norm became", "eval_loss became")) and problems[1] == ""
    assert ended[-1]["step"] < 5, "nothing is logged after its end"
    assert points(found, "loss") == pytest.approx(points(expected, "loss"), abs=1e-6)
    assert trainer.model.adapters.values[1].isfinite().all()


def test_a_group_of_which_all_adapters_became_nan_ends(base, shards, tmp_path):  # noqa: F811
    wild = {"training_config__learning_rate": 1e30, "training_config__max_grad_norm": 0.0}
    _, problems, trainer = group([wild, wild | {"peft_config__r": 2}], tmp_path, base, shards)
    assert all(problems) and trainer.step < 5


def test_a_resumed_group_equals_an_uninterrupted_one_bit_for_bit(base, shards, tmp_path):  # noqa: F811
    expected, _, straight = group(TRIALS[:2], tmp_path / "straight", base, shards)
    with pytest.raises(Preempted, match="asked to stop"):
        group(TRIALS[:2], tmp_path, base, shards, StopAt(3, tmp_path / "work"))
    assert sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir())[-1] == "checkpoint-3"
    found, _, resumed = group(TRIALS[:2], tmp_path, base, shards)
    assert found == expected
    assert torch.equal(resumed.model.adapters.values, straight.model.adapters.values)
    last, _, _ = group(TRIALS[:2], tmp_path / "last", base, shards, StopAt(5, tmp_path / "last" / "work"))
    assert last == expected, "a signal in the last step discards nothing"


def test_a_trial_of_a_group_whose_modules_are_not_trained_is_named(base, shards, tmp_path, monkeypatch, caplog):  # noqa: F811
    warn = train_group._warn_of_untrained

    def with_one_unreached_module(trainer):
        with torch.no_grad():
            trainer.model.adapters.modules[1].ups[1].zero_()
        trainer.members[2].problem = "ended"
        warn(trainer)

    monkeypatch.setattr(train_group, "_warn_of_untrained", with_one_unreached_module)
    still, moves = ({**TRIALS[0], "training_config__warmup_steps": steps} for steps in (1, 0))
    group([still, moves, still], tmp_path, base, shards, training_config__max_steps=1)
    assert "Trial 1 of 3: No step changed the adapter" in caplog.text
    assert "Trial 2 of 3: 1 of" in caplog.text and "such as model.layers.0." in caplog.text
    assert "Trial 3" not in caplog.text


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_that_is_refused_alone_is_refused_in_a_group(base, shards, tmp_path, pattern):  # noqa: F811
    wrong = {f"peft_config__{pattern}": {"nonexistent": 4}}
    with pytest.raises(BadConfig, match="No module matches nonexistent"):
        group([TRIALS[0], TRIALS[0] | wrong], tmp_path, base, shards)


def test_the_memory_of_a_group_is_that_of_its_padded_adapters(base, shards, tmp_path, monkeypatch):  # noqa: F811
    class Estimated(Exception):
        pass

    def stop(self):
        raise Estimated(self.model.adapters.values.numel())

    prepared, prepare = [], train_group._prepare
    monkeypatch.setattr(train_group, "_prepare", lambda *args: prepared.extend(prepare(*args)) or prepared)
    monkeypatch.setattr(train_group.GroupTrainer, "train", stop)
    ranks = ({"peft_config__r": 2}, {"peft_config__r": 4, "peft_config__rank_pattern": {"(o|down)_proj": 16}})
    with pytest.raises(Estimated) as caught:
        group(ranks, tmp_path, base, shards)
    assert len({setup.rank for setup in prepared}) == 1 and 2 * 4 < prepared[0].rank < 2 * 16
    assert caught.value.args == (lora_weights(prepared[0].shape, prepared[0].rank),), (
        "of the tensors, with their padding"
    )
    needed = []
    monkeypatch.setattr(
        fast_engine, "fit_memory", lambda shape, free, weights, rank, **sizes: needed.append(rank) or FIT
    )
    monkeypatch.setattr("loraflow.training.setup.free_gpu_bytes", lambda: 2**30)
    train_group._fit([replace(setup, device="cuda") for setup in prepared], SimpleNamespace(concatenated=True))
    assert needed == [prepared[0].rank]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"runtime__engine": "stock"}, "the stock engine"),
        ({"training_config__bf16": True}, "another dtype"),
    ],
)
def test_what_cannot_be_grouped_is_refused_with_the_reason(base, shards, tmp_path, overrides, why):  # noqa: F811
    with pytest.raises(CannotGroup, match=why):
        group(TRIALS[:2], tmp_path, base, shards, **overrides)


def test_a_group_that_does_not_fit_into_memory_proposes_no_retry_of_its_own(base, shards, tmp_path, monkeypatch):  # noqa: F811
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_group.GroupTrainer, "train", full)
    with pytest.raises(OutOfMemory) as caught:
        group(TRIALS[:2], tmp_path, base, shards)
    assert caught.value.details["retry_with"] == {}, "the sweep makes a smaller group"
