"""Recipes: defaults, problems with their lines, overrides; every key has an effect, in the fingerprint or outside it."""

import json
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from loraflow.config import Runtime, parse_recipe
from loraflow.config.load import section_model
from loraflow.config.locations import BaseLocation, DatasetLocation, FolderOrigin
from loraflow.config.recipe import Recipe
from loraflow.failures import BadConfig
from loraflow.stages import STAGES
from loraflow.store import Ref
from tests.job_factory import Outside, make_job

MINIMAL = "name: x\nbase: {model: bundled:smollm2}\n"

# The two dictionaries of sample_finetune.py in the Phi-3 model card.
MODEL_CARD = """
name: card
base:
  model: microsoft/Phi-3-mini-4k-instruct
  revision: 0a67737cc96d2554230f90338b163bc6380a2a85
  torch_dtype: bfloat16
  use_cache: false
  trust_remote_code: true
  attn_implementation: sdpa
training_config:
  bf16: True
  do_eval: False
  learning_rate: 5.0e-06
  log_level: info
  logging_steps: 20
  logging_strategy: steps
  lr_scheduler_type: cosine
  num_train_epochs: 1
  max_steps: -1
  output_dir: ./checkpoint_dir
  overwrite_output_dir: True
  per_device_eval_batch_size: 4
  per_device_train_batch_size: 4
  remove_unused_columns: True
  save_steps: 100
  save_total_limit: 1
  seed: 0
  gradient_checkpointing: True
  gradient_checkpointing_kwargs: {use_reentrant: False}
  gradient_accumulation_steps: 1
  warmup_ratio: 0.2
peft_config:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  bias: none
  task_type: CAUSAL_LM
  target_modules: all-linear
  modules_to_save: null
"""


def problems(text: str) -> str:
    with pytest.raises(BadConfig) as caught:
        parse_recipe(text, "r.yaml")
    return str(caught.value)


def test_the_model_cards_dictionaries_are_accepted_unchanged(caplog):
    recipe = parse_recipe(MODEL_CARD)
    assert recipe.training_config.learning_rate == 5e-6
    assert recipe.training_config.warmup_steps == 0.2
    assert recipe.runtime.attn_implementation == "sdpa"
    assert recipe.base.dtype == "bfloat16"
    assert "warmup_ratio is read as training_config.warmup_steps" in caplog.text
    assert "output_dir has no effect" in caplog.text


def test_the_defaults_equal_the_model_cards():
    card, minimal = parse_recipe(MODEL_CARD), parse_recipe(MINIMAL)
    assert (
        card.training_config.gradient_checkpointing is True and minimal.training_config.gradient_checkpointing is None
    )
    same = {
        "gradient_checkpointing": None
    }  # left open, it is as memory needs; the card's own value is taken at its word
    assert minimal.training_config == card.training_config.model_copy(update=same)
    assert minimal.peft_config == card.peft_config


def test_every_problem_is_reported_at_once_with_its_line():
    text = "name: x\nbase:\n  model: m\n  dtyp: y\ntraining_config:\n  learning_rte: 1\n  seed: a\n  tokenizer: t\nrank: 4\n"
    message = problems(text)
    for line, word in (
        (4, "did you mean dtype"),
        (6, "did you mean learning_rate"),
        (7, "seed"),
        (8, "tokenizer"),
        (9, "rank"),
    ):
        assert re.search(rf"r\.yaml:{line}: .*{word}", message), (line, word, message)
    assert "5 problems" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training_config: {evaluation_strategy: 'no', eval_strategy: 'no'}", "leave evaluation_strategy out"),
        ("training_config: {assistant_only_loss: true}", "data.loss_on"),
        ("training_config: {dataset_text_field: text}", "data.format"),
        (
            "training_config: {eval_strategy: steps, load_best_model_at_end: true, greater_is_better: true}",
            "largest loss",
        ),
        ("training_config: {warmup_steps: 1.5}", "whole number"),
        ("training_config: {eval_strategy: steps}", "validation_fraction"),
        ("training_config: {load_best_model_at_end: true}", "needs eval_strategy"),
        ("training_config: {max_steps: 0}", "max_steps"),
        ("training_config: {learning_rate: -1}", "greater than 0"),
        ("training_config: {per_device_train_batch_size: true}", "valid integer"),
        ("peft_config: {target_modules: []}", "at least one"),
        ("peft_config: {lora_r: 8}", "is not a key"),
        ("peft_config: {init_lora_weights: pissa, use_dora: true}", "choose one"),
        ("peft_config: {init_lora_weights: orthogonal, r: 3}", "even ranks"),
        ("peft_config: {init_lora_weights: loftq}", "set base.quantization: nf4"),
        ("peft_config: {init_lora_weights: pizza}", "pattern"),
        ("peft_config: {eva_config: {rho: 1.0}}", "init_lora_weights: eva"),
        ("peft_config: {loraplus_lr_ratio: 0.5}", "greater than or equal to 1"),
        ("runtime: {device: gpu}", "'cpu'"),
        ("runtime: {rendezvous: {nodes: 2}}", "runtime.rendezvous.endpoint to host:port"),
        ("runtime: {rendezvous: {nodes: 0}}", "greater than or equal to 1"),
        ("runtime: {rendezvous: {nodes: 2, endpoint: first}}", "pattern"),
        ("runtime: {rendezvous: {nodes: 2, endpoint: 'first:70000'}}", "at most 65535"),
        ("runtime: {rendezvous: {id: a b}}", "pattern"),
        ("runtime: {rendezvous: {wait_minutes: 0}}", "greater than 0"),
        (
            "runtime: {store: 's3://b', rendezvous: {nodes: 2, endpoint: 'first:29400'}}",
            "a folder that all of them mount",
        ),
        ("base2: 1", "did you mean base"),
    ],
)
def test_invalid_settings_are_refused_with_what_to_set_instead(line, message):
    assert message in problems(MINIMAL + line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- a", "not a mapping"),
        ("name: x\nname: y", "is duplicated"),
        ("a: &x [1]\nb: *x", "alias"),
        ("a: !!python/object:os.system {}", "tag"),
        ("a: [", "plain YAML"),
        ("x" * 1_000_001, "at most"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(text, message):
    assert message in problems(text)


def test_yaml_numbers_and_words_are_read_as_intended():
    recipe = parse_recipe(MINIMAL + "training_config: {learning_rate: 5e-6, eval_strategy: no, logging_strategy: no}")
    assert recipe.training_config.learning_rate == 5e-6
    assert recipe.training_config.eval_strategy == "no"


def test_overrides_replace_the_files_values_and_are_validated():
    assert parse_recipe(MINIMAL, overrides={"peft_config.r": 4}).peft_config.r == 4
    with pytest.raises(BadConfig, match="peft_config.x"):
        parse_recipe(MINIMAL, overrides={"peft_config.x": 4})
    with pytest.raises(BadConfig, match="is not a section"):
        parse_recipe(MINIMAL, overrides={"name.x": 4})


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_recipe_in_configs_loads_without_a_warning(file, caplog):
    recipe = parse_recipe(file.read_text(encoding="utf-8"), file.name)
    assert recipe.name == file.stem and not caplog.records
    targets = recipe.peft_config.target_modules
    assert targets == "all-linear" or set(targets) <= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, (
        "Phi-3's names"
    )


def test_loftq_needs_nf4_and_its_compensation_is_never_counted_twice():
    loftq = {"peft_config.init_lora_weights": "loftq", "base.quantization": "nf4"}
    parse_recipe(MINIMAL, overrides=loftq)
    for more, message in (
        ({"base.quantization": "fp8"}, "set base.quantization: nf4"),
        ({"merge.onto": "base"}, "twice"),
    ):
        with pytest.raises(BadConfig, match=message):
            parse_recipe(MINIMAL, overrides={**loftq, **more})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training_config.learning_rate", "abc", "training_config.learning_rate: should be a valid number"),
        ("training_config.max_step", 3, "did you mean max_steps"),
        ("seed", 3, "seed is not a key of a recipe; did you mean data.seed or training_config.seed or "),
        ("training_config.tokenizer", "t", "is not supported"),
        ("training_config.fp16", True, "bf16 and fp16 exclude each other"),
        ("training_config.max_seq_length", 0, "training_config.max_length: should be greater"),
        ("name.x", 1, "name is not a section"),
        ("gate.primary", "rougeQ", "gate.primary names rougeQ, which is not a score of evaluation.metrics"),
        ("gate.worst.rougeQ", {"drop": 0.1, "rows": 0}, "gate.worst names rougeQ"),
        ("gate.slices.length.rougeQ", 0.1, "gate.slices.length names rougeQ"),
        ("gate.primary", "macro_f1", "use accuracy"),
        ("gate.forgetting", {"loss": 0.1}, "gate.forgetting needs evaluation.general"),
        ("base", {"model": "b", "quantization": "nf4", "dtype": "float32"}, "set base.dtype to bfloat16"),
        ("merge.onto", "dequantized", "needs base.quantization: nf4"),
        ("loralib_config.merge_weights", True, "loralib_config needs method: loralib"),
    ],
)
def test_problem_of_an_override_names_the_override_and_not_a_line_of_the_file(key, value, message):
    text = MINIMAL + "training_config:\n  seed: 1\n"
    with pytest.raises(BadConfig) as caught:
        parse_recipe(text, "r.yaml", {key: value})
    assert f"--set {key}: " in caught.value.what and message in caught.value.what
    assert "r.yaml:" not in caught.value.what
    assert caught.value.next_step.startswith(f"correct --set {key} ")


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ("gate:\n  seeds: 2\n  primary: rougeQ\n", 3, "gate.primary names rougeQ"),
        ("gate:\n  guards:\n    rougeQ: 0.1\n", 3, "gate.guards names rougeQ"),
        ("training_config:\n  seed: 1\n  eval_strategy: steps\n", 3, "training_config.eval_strategy needs"),
        ("merge:\n  onto: dequantized\n", 2, "merge.onto dequantized needs"),
        ("loralib_config:\n  merge_weights: true\n", 1, "loralib_config needs method: loralib"),
    ],
)
def test_a_problem_of_two_keys_has_the_line_of_the_key_that_it_names(lines, line, message):
    with pytest.raises(BadConfig) as caught:
        parse_recipe(MINIMAL + lines, "r.yaml")
    start = MINIMAL.count("\n")
    assert re.search(rf"r\.yaml:{start + line}: {message}", caught.value.what)


def test_problems_of_the_file_and_of_overrides_are_reported_together():
    with pytest.raises(BadConfig) as caught:
        parse_recipe(MINIMAL + "rank: 4\n", "r.yaml", {"training_config.seed": "a"})
    assert re.search(r"r\.yaml:\d+: rank", caught.value.what)
    assert "--set training_config.seed: " in caught.value.what
    assert caught.value.next_step.endswith("and r.yaml")


def test_placement_accepts_exactly_the_placeable_stages():
    names = typing.get_args(typing.get_args(Runtime.model_fields["placement"].annotation)[0])
    assert set(names) == {name for name, stage in STAGES.items() if stage.placeable}


# -- every key has an effect ----------------------------------------------------------------------------------------

OTHER: dict[str, JsonValue] = {
    "data.sources": [{"source": "faq", "weight": 2}],
    "data.format": "alpaca", "data.group": "document", "data.tools": str(Path(__file__).parents[2] / "tools.json"), "data.columns": {"prompt": "question"}, "data.ignore": ["quality"], "data.loss_on": "all", "data.too_long": "drop", "data.thinking": "empty", "data.special_tokens": "error",
    "data.duplicates": "keep", "data.near_duplicates": "drop", "data.system": "s", "data.limit": 7, "data.rev": "HEAD",
    "base.dtype": "float32", "base.repack": "phi3", "base.quantization": "nf4", "base.revision": "f" * 40,
    "training_config.lr_scheduler_type": "linear", "training_config.lr_scheduler_kwargs": {"num_cycles": 1},
    "training_config.optim": "sgd", "training_config.neftune_noise_alpha": 5.0, "training_config.max_steps": 9,
    "training_config.logging_strategy": "epoch", "training_config.log_level": "error", "training_config.report_to": "wandb",
    "training_config.run_name": "n", "training_config.eval_strategy": "epoch", "training_config.eval_steps": 50, "training_config.logging_steps": 25,
    "training_config.save_strategy": "epoch", "training_config.early_stopping_patience": 2,
    "training_config.metric_for_best_model": "loss", "training_config.save_steps": 200, "training_config.gradient_checkpointing_kwargs": {},
    "training_config.bf16": False, "training_config.fp16": True,
    "method": "loralib", "loralib_config.enable_lora": {"qkv_proj": ["q"]},
    "peft_config.target_modules": ["o_proj"], "peft_config.bias": "all", "peft_config.modules_to_save": ["lm_head"],
    "peft_config.init_lora_weights": "gaussian", "peft_config.trainable_token_indices": [5],
    "peft_config.loraplus_lr_ratio": 16.0, "peft_config.eva_config.tau": 0.5, "peft_config.rank_pattern": {"o_proj": 2},
    "peft_config.alpha_pattern": {"o_proj": 2.0}, "peft_config.layers_to_transform": [0], "peft_config.exclude_modules": ["o_proj"],
    "peft_config.target_parameters": ["mlp.experts.down_proj"],
    "gate.slices": {"language": {"token_loss": 0.1}}, "evaluation.metrics": ["token_loss"], "evaluation.confidence": 0.9, "evaluation.dtype": "bfloat16", "evaluation.max_rows": 3,
    "merge.dtype": "float32", "merge.onto": "base", "runtime.device": "cpu", "runtime.attn_implementation": "eager", "runtime.engine": "stock",
    "training_config.gradient_checkpointing": False, "runtime.compile": "on", "runtime.cuda_graphs": "on", "runtime.checkpointing": "selective",
    "runtime.rendezvous.endpoint": "other:29500", "runtime.rendezvous.id": "other",
    "runtime.shard_base": "on", "runtime.worker_start": "spawn",
}  # fmt: skip

# Keys that the flow reads, not a stage: `locate`, the checks between stages, the gate, the registry, the report.
BY_THE_FLOW = {
    "name", "data.heldout_reserve", "data.source", "data.repo", "data.rev", "data.add", "data.remote", "data.max_quarantined", "base.model",
    "base.chat_template",
    "base.revision", "evaluation.samples", "evaluation.general", "gate.forgetting", "merge.max_kl", "register.model", "register.git_tags",
    "gate.lower_is_better", "gate.ranges", "gate.worst", "gate.behaviour", "gate.independent_rows",
    "gate.primary", "gate.min_gain", "gate.guards", "gate.confidence", "gate.error", "gate.looks", "gate.seeds", "runtime.store", "runtime.keep", "runtime.keep_champions", "runtime.mlflow.uri", "runtime.mlflow.experiment", "runtime.mlflow.model", "runtime.placement",
    "peft_config.task_type", "publish.repo", "publish.what", "publish.private",
}  # fmt: skip


def leaves(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    found = []
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        inner = section_model(field)
        found += leaves(inner, path + ".") if inner else [(path, field)]
    return found


def jobs_of(recipe: Recipe) -> dict[str, dict[str, JsonValue]]:
    facets = dict.fromkeys(("train", "heldout", "tokenizer", "adapter", "general"), "d")
    ref = Ref(stage="s", fingerprint="f", digest="d", uri="", facets=facets)
    inputs = {
        "check_dataset": ["dataset"], "tokenize": ["rows", "base"], "train": ["tokens", "base"], "merge": ["base", "adapter"],
        "verify": ["base", "adapter", "merged", "rows"], "evaluate": ["model", "rows"], "deal_rows": ["rows"],
        "train_group": ["tokens", "base"], "check_general": ["rows"], "score_general": ["model", "general"],
    }  # fmt: skip
    dataset = DatasetLocation(md5="0.dir", name="data", origin=FolderOrigin(folder="data"))
    outside = Outside(dataset=dataset, metric_modules=dict.fromkeys(recipe.evaluation.metrics, "0"))
    return {
        name: make_job(name, recipe, dict.fromkeys(inputs.get(name, []), ref), outside).model_dump() for name in STAGES
    }


def another(path: str, value: JsonValue) -> JsonValue:
    """Return a value for a key that differs from the given one."""
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, list):
        return ["other.jsonl"]
    if path == "data.profile":
        return {"refusals": {"action": "quarantine"}}
    if isinstance(value, dict):
        return {"extra": "x.jsonl"}
    return {None: 3}.get(value, "other")


def before_and_after(path: str, base: dict[str, JsonValue]) -> tuple[Recipe, Recipe]:
    """Return a recipe with the settings of `base` and those that a key needs, and the same with another value of the key."""
    if path == "training_config.fp16":
        base["training_config.bf16"] = False
    if path.startswith("loralib_config."):
        base["method"] = "loralib"
    if path.startswith("peft_config.eva_config"):
        base["peft_config.init_lora_weights"] = "eva"
    if path == "peft_config.target_parameters":
        base["peft_config.lora_dropout"] = 0.0
    if path.startswith("runtime.rendezvous."):
        base["runtime.rendezvous.endpoint"] = "first:29400"
    before = parse_recipe(MINIMAL, overrides=base)
    value = before.model_dump(by_alias=True)
    for key in path.split("."):
        value = value[key]
    return before, parse_recipe(MINIMAL, overrides={**base, path: another(path, value)})


@pytest.mark.parametrize("path", [path for path, _ in leaves(Recipe) if path not in BY_THE_FLOW])
def test_every_key_reaches_a_stage(path):
    base = {"data.validation_fraction": 0.1, "training_config.eval_strategy": "steps", "training_config.save_strategy": "steps",
            "training_config.load_best_model_at_end": True, "base.quantization": "nf4"}  # fmt: skip
    if path.removeprefix("training_config.") in (
        "load_best_model_at_end",
        "eval_strategy",
        "save_strategy",
        "greater_is_better",
    ):
        base.pop("training_config.load_best_model_at_end")
    if path in ("base.quantization", "base.dtype", "method") or path.startswith("loralib_config."):
        base.pop("base.quantization")
    before, after = before_and_after(path, base)
    assert jobs_of(before) != jobs_of(after), f"{path} has no effect"


IDENTITY_FREE = {
    "training_config.gradient_checkpointing", "training_config.gradient_checkpointing_kwargs", "training_config.logging_steps",
    "training_config.logging_strategy", "training_config.logging_first_step", "training_config.log_level",
    "training_config.report_to", "training_config.run_name", "training_config.save_strategy", "training_config.save_steps",
    "training_config.save_total_limit", "training_config.per_device_eval_batch_size", "training_config.dataloader_num_workers",
    "training_config.eval_strategy", "training_config.eval_steps", "training_config.metric_for_best_model",
    "training_config.greater_is_better", "base.use_cache", "training_config.early_stopping_patience",
}  # fmt: skip


# These two have no effect alone; test_every_key_reaches_a_stage sets what they need.
NOT_ALONE = {"training_config.early_stopping_patience", "training_config.load_best_model_at_end"}


@pytest.mark.parametrize("path", [p for p, _ in leaves(Recipe) if p not in BY_THE_FLOW | NOT_ALONE])
def test_every_key_is_in_a_fingerprint_unless_it_is_listed_as_identity_free(path):
    base: dict[str, JsonValue] = {"data.validation_fraction": 0.1}
    if path in ("base.double_quantization", "merge.onto"):
        base["base.quantization"] = "nf4"
    before, after = before_and_after(path, base)
    strip = lambda jobs: {n: {k: v for k, v in j.items() if k != "runtime"} for n, j in jobs.items()}  # noqa: E731
    same = strip(jobs_of(before)) == strip(jobs_of(after))
    assert same == (path in IDENTITY_FREE or path.startswith("runtime.")), path


def test_a_named_template_is_in_the_fingerprint_of_the_base_by_its_text(tmp_path):
    def config(text: str) -> dict[str, JsonValue]:
        found = BaseLocation(source={}, origin=FolderOrigin(folder="base"), chat_template=text)
        job = make_job("resolve_base", parse_recipe(MINIMAL), {}, Outside(base=found))
        assert job.runtime.chat_template == text
        return dict(job.payload)

    assert config("a") == config("a") != config("b")
    assert "chat_template" not in json.dumps(jobs_of(parse_recipe(MINIMAL))), "not unless it is used"


@pytest.mark.parametrize(
    ("thinking", "keys"),
    [
        ("keep", {"tokenize": "keep"}),
        ("strip", {"check_dataset": "strip"}),
        ("empty", {"check_dataset": "strip", "resolve_base": "empty"}),
    ],
)
def test_thinking_is_in_the_config_of_the_stages_that_it_changes(thinking, keys):
    assert "thinking" not in json.dumps(jobs_of(parse_recipe(MINIMAL))), "not unless it is used"
    jobs = jobs_of(parse_recipe(MINIMAL, overrides={"data.thinking": thinking}))
    assert {name: job["config"]["thinking"] for name, job in jobs.items() if "thinking" in job["config"]} == keys


def test_only_the_product_of_batch_size_and_accumulation_is_fingerprinted():
    first = parse_recipe(MINIMAL + "training_config: {per_device_train_batch_size: 8, gradient_accumulation_steps: 2}")
    second = parse_recipe(MINIMAL + "training_config: {per_device_train_batch_size: 2, gradient_accumulation_steps: 8}")
    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    fingerprints = {make_job("train", r, {"tokens": ref, "base": ref}).fingerprint for r in (first, second)}
    assert len(fingerprints) == 1


def test_a_jobs_runtime_records_only_settings_of_its_stage():
    """Manifests keep it: a stage that trains nothing and reads nothing from outside says nothing of that."""
    recipe = parse_recipe(MINIMAL)
    own = {"training_config", "use_cache", "origin"}
    jobs = {name: job["runtime"] for name, job in jobs_of(recipe).items()}
    assert {name: own & runtime.keys() for name, runtime in jobs.items() if own & runtime.keys()} == {
        "version_dataset": {"origin"}, "resolve_base": {"origin"}, "train": {"training_config", "use_cache"},
        "train_group": {"training_config", "use_cache"},
    }  # fmt: skip
    assert jobs["merge"] == recipe.runtime.model_dump()
