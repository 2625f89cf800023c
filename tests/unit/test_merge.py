import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from loraflow.adapters import merge_folders, origin
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.streaming_merge import _add_update, _cut, _Factors, _Scratch
from loraflow.base import stored_weights
from loraflow.failures import BadModel
from loraflow.job import Progress
from tests.conftest import build_phi3
from tests.forked_process import run_in_fork
from tests.variants import ulps

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 1, **options) -> Path:
    """An adapter of peft's, with B away from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "bias" in name or "magnitude" in name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder)
    return folder


def change_tensors(adapter: Path, change) -> None:
    """Replace each tensor of an adapter by what `change` returns; None removes it."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor.clone() for name, tensor in changed.items() if tensor is not None}, file)


def by_peft(base: Path, adapter: Path, dtype: str | None = None, *, untied: bool = False) -> dict[str, torch.Tensor]:
    """Return peft's merge; `untied`: into a base whose head is a weight of its own, as peft recommends."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model = PeftModel.from_pretrained(model, str(adapter))
    merged = model.merge_and_unload()
    return (merged.to(getattr(torch, dtype)) if dtype else merged).state_dict()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), f"{name}: {(ours[name] != theirs[name]).sum()} elements differ"


PLAIN = {
    "plain": {},
    "odd-scale": {"lora_alpha": 7, "r": 3},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"qkv_proj": 5, "layers.1.mlp.down_proj": 3}},
    "some": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
}
MORE = {
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["qkv_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_streamed_merge_equals_pefts_bit_for_bit(tmp_path, options, dtype):
    base = build_phi3(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "streamed"
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_adapters_with_several_terms_are_streamed_in_pefts_order(tmp_path, options, dtype):
    base = build_phi3(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "streamed"
    ours, theirs = read(tmp_path / "out"), by_peft(base, adapter)
    assert ours.keys() == theirs.keys()
    assert max(ulps(ours[name], theirs[name]) for name in ours) <= 1
    assert any(not torch.equal(ours[name], tensor) for name, tensor in read(base).items())


def test_adapters_that_are_not_a_sum_are_merged_by_peft(tmp_path, phi3):
    adapter = make_adapter(phi3, tmp_path / "adapter", trainable_token_indices=[3, 5])
    (tmp_path / "out").mkdir()
    assert merge(phi3, adapter, tmp_path / "out")["route"] == "peft"
    assert_same(read(tmp_path / "out"), by_peft(phi3, adapter))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_of_a_residual_base_merges_as_in_peft(tmp_path, quick_phi3, how):
    """Its base is W - s·B₀A₀: added to W, its product would count twice what the initialisation took out."""
    adapter = make_adapter(quick_phi3, tmp_path / "adapter", init_lora_weights=how, target_modules=["o_proj"])
    (tmp_path / "out").mkdir()
    assert merge(quick_phi3, adapter, tmp_path / "out")["route"] == "peft"
    assert_same(read(tmp_path / "out"), by_peft(quick_phi3, adapter))


def configured(adapter: Path, **values) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return adapter


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "merge it where it was trained"),
        ({"alora_invocation_tokens": [5, 6]}, "serve base and adapter together"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "adds layers to the base"),
        ({"lora_bias": True}, "peft cannot merge"),
        ({"init_lora_weights": "milora"}, "may have changed the base's weights"),
        ({"peft_type": "XLORA"}, "not a LoRA adapter"),
        ({"megatron_config": {"a": 1}}, "its layers are Megatron's"),
        ({"arrow_config": {"top_k": 1}}, "chooses among several adapters"),
        ({"lora_alpha": float("nan")}, "a finite number at lora_alpha"),
        ({"lora_alpha": float("inf")}, "a finite number at lora_alpha"),
        ({"lora_alpha": None}, "a finite number at lora_alpha"),
        ({"alpha_pattern": {"o_proj": "8"}}, "a finite number at alpha_pattern.o_proj"),
        ({"r": 8}, "rank 8, by adapter_config.json"),
        ({"rank_pattern": {r"layers\.1\..*": 2}}, "rank 2, by adapter_config.json"),
    ],
)
def test_an_unmergeable_configuration_is_refused(tmp_path, quick_phi3, values, says):
    options = {"lora_bias": True} if "lora_bias" in values else {}
    adapter = configured(make_adapter(quick_phi3, tmp_path / "adapter", **options), **values)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, adapter, tmp_path / "out")
    assert says in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtypes_are_refused(tmp_path, quick_phi3, dtype):
    from safetensors.torch import load_file, save_file

    file = make_adapter(quick_phi3, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="of a type that cannot be merged"):
        merge(quick_phi3, file.parent, tmp_path / "out")


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_fully_trained_embeddings_of_a_tied_base_are_merged_into_an_untied_one(tmp_path, modules):
    """As in peft. In a checkpoint that stays tied, the head would become the trained embeddings."""
    base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=modules)
    change_tensors(adapter, lambda name, tensor: tensor + 1 if "lora_" not in name else tensor)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "peft"
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_base_without_a_head_is_not_merged_with_a_random_one(tmp_path):
    """tie_word_embeddings is this class's default no more, so transformers would make up a head."""
    base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="lack weights") as caught:
        merge(base, adapter, tmp_path / "out")
    assert caught.value.got == "lm_head.weight" and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_lora_on_one_of_two_tied_modules_answers_as_before_the_merge(tmp_path, modules):
    """peft's own merge adds the update to the one weight of both, so its model answers differently."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "lora", target_modules=modules)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_refused_adapter_is_reported_with_the_command_that_accepts_it(tmp_path, quick_phi3):
    """Split projections for a fused base, and the folder around several adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=json.loads((quick_phi3 / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    adapter = make_adapter(tmp_path / "llama", tmp_path / "several" / "second", target_modules=["q_proj", "v_proj"])
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, adapter, tmp_path / "out")
    assert "expected: model.layers.0.self_attn.qkv_proj, which the base has" in str(caught.value)
    assert "loraflow adapters convert" in caught.value.next_step
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, tmp_path / "several", tmp_path / "out")
    assert str(adapter) in caught.value.next_step


@pytest.mark.parametrize("seed", range(8))
def test_random_models_and_adapters_merge_as_in_peft(tmp_path, seed):
    """Any heads, tied or not, any widths, any of the variants, any dtype, shards of any size: one unit in the last place."""
    import random

    dice = random.Random(seed)
    heads = dice.choice([2, 4])
    shape = dict(
        hidden_size=16 * heads * dice.choice([1, 2]), intermediate_size=dice.choice([40, 96, 264]), layers=dice.choice([1, 2]),
        num_attention_heads=heads, num_key_value_heads=dice.choice([1, heads]), tie_word_embeddings=dice.random() < 0.5,
        dtype=dice.choice(["bfloat16", "float16", "float32"]),
    )  # fmt: skip
    base = build_phi3(tmp_path / "base", seed=seed, **shape)
    options = dict(r=dice.choice([1, 3, 8]), lora_alpha=dice.choice([1, 5, 16]))
    options["target_modules"] = dice.sample(TARGETS, dice.choice([1, 2, 4]))
    more = dice.choice(["use_dora", "use_rslora", "modules_to_save", "embed", "none"])
    if more == "embed" and not shape["tie_word_embeddings"]:
        options["target_modules"].append("embed_tokens")
    elif more == "modules_to_save" and not shape["tie_word_embeddings"]:
        options["modules_to_save"] = ["lm_head"]
    elif more in ("use_dora", "use_rslora"):
        options[more] = True
    adapter = make_adapter(base, tmp_path / "adapter", seed, **options)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", max_shard_bytes=dice.choice([20_000, 10**9]))
    ours, theirs = read(tmp_path / "out"), by_peft(base, adapter)
    assert ours.keys() == theirs.keys()
    assert max(ulps(ours[name], theirs[name]) for name in ours) <= 1, (shape, options)


class KillAt(Progress):
    """Kill this process when so many shards are done."""

    shards = 0

    def __call__(self, **figures):
        if self.shards and figures.get("shards") == self.shards:
            os.kill(os.getpid(), signal.SIGKILL)


def _attempt(base: Path, adapter: Path, out: Path, shards: int) -> None:
    out.mkdir()
    report = KillAt(None, out.parent / "work")
    report.shards = shards
    merge(base, adapter, out, max_shard_bytes=60_000, progress=report)


def test_a_killed_merge_resumes_from_its_finished_shards(tmp_path, phi3):
    adapter = make_adapter(phi3, tmp_path / "adapter")
    (tmp_path / "work").mkdir()
    assert run_in_fork(_attempt, phi3, adapter, tmp_path / "killed", 3) == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("*.safetensors")), "no partial model is visible"
    finished = sorted((tmp_path / "work" / "shards").glob("*.safetensors"))
    assert len(finished) == 3
    raw = bytearray(finished[1].read_bytes())
    raw[-1] ^= 1
    finished[1].write_bytes(raw)
    inodes = [file.stat().st_mtime_ns for file in finished]
    _attempt(phi3, adapter, tmp_path / "out", 0)
    done = [(tmp_path / "out" / file.name).stat().st_mtime_ns for file in finished]
    assert [a == b for a, b in zip(inodes, done, strict=True)] == [True, False, True], (
        "the damaged shard was written again"
    )
    assert_same(read(tmp_path / "out"), by_peft(phi3, adapter))


# what is refused


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "gone.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, phi3, name):
    base = tmp_path / "base"
    shutil.copytree(phi3, base)
    index = {"weight_map": dict.fromkeys((e.name for e in stored_weights.model_entries(base)), name)}
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (base / "other.safetensors").write_bytes(b"")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="outside of its folder|is missing"):
        merge(base, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_index_that_contradicts_its_files_is_refused(tmp_path, phi3):
    (tmp_path / "base").mkdir()
    adapter = make_adapter(phi3, tmp_path / "adapter")
    merge(phi3, adapter, tmp_path / "base", max_shard_bytes=60_000)
    file = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="index does not match"):
        merge(tmp_path / "base", adapter, tmp_path / "out")


def test_a_non_finite_adapter_is_refused(tmp_path, phi3):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(phi3, tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    state[sorted(state)[2]][0, 0] = float("inf")
    save_file(state, adapter / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite"):
        merge(phi3, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_of_another_base_or_template_is_refused(tmp_path, phi3):
    adapter = make_adapter(phi3, tmp_path / "adapter")
    origin.write_origin(adapter, phi3, "digest-a")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="another base"):
        merge(phi3, adapter, tmp_path / "out", base_digest="digest-b")
    other = tmp_path / "other"
    shutil.copytree(phi3, other)
    (other / "chat_template.jinja").write_text((phi3 / "chat_template.jinja").read_text() + " ")
    with pytest.raises(BadModel, match="another chat template"):
        merge(other, adapter, tmp_path / "out", base_digest="digest-a")
    assert not list((tmp_path / "out").iterdir())
    merge(phi3, adapter, tmp_path / "out", base_digest="digest-a")
    recorded = json.loads((tmp_path / "out" / origin.ORIGIN).read_text())
    assert recorded == {"base": "digest-a", "chat_template_sha256": origin.template_hash(phi3)}


def grow(folder: Path, *tokens: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def test_an_extended_vocabulary_without_embeddings_is_refused(tmp_path, phi3):
    adapter, base = make_adapter(phi3, tmp_path / "adapter"), tmp_path / "base"
    shutil.copytree(phi3, base)
    grow(base, "<|new|>")
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the adapter brings it
        shutil.copyfile(base / name, adapter / name)
    with pytest.raises(BadModel, match="without an embedding"):
        merge(phi3, adapter, tmp_path / "out")
    template = base / "chat_template.jinja"
    template.write_text("<|new|>" + template.read_text())  # or each chat does
    with pytest.raises(BadModel, match="without an embedding"):
        merge(base, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_base_token_that_no_chat_uses_needs_no_embedding(tmp_path, phi3, caplog):
    """As published: gemma-3-1b's tokenizer has <image_soft_token> behind the last row of its embeddings."""
    base = tmp_path / "base"
    shutil.copytree(phi3, base)
    grow(base, "<image_soft_token>")
    (tmp_path / "out").mkdir()
    merge(base, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    assert "<image_soft_token>" in caplog.text


def test_a_template_unusable_for_training_does_not_stop_a_merge(tmp_path, phi3, caplog):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(phi3, base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    out.mkdir()
    merge(base, make_adapter(phi3, tmp_path / "adapter"), out)
    assert "generation_config.json stays as it is" in caplog.text
    assert (out / "generation_config.json").read_bytes() == (phi3 / "generation_config.json").read_bytes()


def test_the_answers_stop_token_ends_generation(tmp_path, phi3):
    from loraflow.data.loss_mask import ChatTemplate

    adapter, needed = make_adapter(phi3, tmp_path / "adapter"), ChatTemplate(phi3).stop_ids()
    for text in (None, "{}", '{"eos_token_id": 1, "top_k": 5}'):
        base, out = tmp_path / f"base{text}", tmp_path / f"out{text}"
        shutil.copytree(phi3, base)
        (base / "generation_config.json").unlink()
        if text is not None:
            (base / "generation_config.json").write_text(text)
        out.mkdir()
        merge(base, adapter, out)
        values = json.loads((out / "generation_config.json").read_text())
        assert needed <= set(values["eos_token_id"]) and values.get("top_k") == (
            5 if text and "top_k" in text else None
        )


def test_high_ranks_and_a_few_rows_more_than_a_block_merge_as_in_peft(tmp_path):
    """Kernels add the products of such matrices in another order than those of the others."""
    base = build_phi3(tmp_path / "base", dtype="float32", layers=1, intermediate_size=257)
    adapter = make_adapter(base, tmp_path / "adapter", r=256, lora_alpha=512, target_modules="all-linear")
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


@pytest.mark.parametrize("columns", [1, 4, 8, 16, 100])
@pytest.mark.parametrize("rows", [3, 64, 257])
def test_narrow_matrices_get_pefts_bits(rows, columns):
    for rank in (1, 4, 16, 64, 200):
        weight, up, down = torch.randn(rows, columns), torch.randn(rows, rank) * 0.05, torch.randn(rank, columns)
        merged = weight.clone()
        for first, count in _cut(rows):
            part = slice(first, first + count)
            _add_update(merged[part], _Factors(down, up, 2.0, None, embedding=False), part, _Scratch())
        assert torch.equal(merged, weight + (up @ down) * 2.0)


def test_wide_matrices_merge_as_in_peft(tmp_path):
    """Wider and taller than a block of rows, so that the cut matters."""
    base = build_phi3(tmp_path / "base", hidden_size=768, intermediate_size=1536, num_attention_heads=12,
                      num_key_value_heads=12, layers=1)  # fmt: skip
    adapter = make_adapter(base, tmp_path / "adapter", r=16, lora_alpha=32)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_shards_and_a_cast_merge_as_in_peft(tmp_path, tie):
    base = build_phi3(tmp_path / "base", tie_word_embeddings=tie)
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", dtype="float32", max_shard_bytes=100_000)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_same(read(tmp_path / "out"), by_peft(base, adapter, "float32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    # from a sharded base as well
    (tmp_path / "again").mkdir()
    merge(tmp_path / "out", adapter, tmp_path / "again")
    assert_same(read(tmp_path / "again"), by_peft(tmp_path / "out", adapter))


def test_generation_config_tokenizer_and_template_are_copied(tmp_path, phi3):
    (tmp_path / "out").mkdir()
    merge(phi3, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (phi3 / name).read_bytes()


def test_an_adapter_for_another_base_is_refused(tmp_path, phi3):
    other = build_phi3(tmp_path / "other", layers=3)
    adapter = make_adapter(other, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="does not fit the base") as caught:
        merge(phi3, adapter, tmp_path / "out")
    assert "8 unexpected" in caught.value.got and "layers.2" in caught.value.got
    wide = make_adapter(build_phi3(tmp_path / "wide", hidden_size=128), tmp_path / "adapter2")
    with pytest.raises(BadModel, match="of another shape"):
        merge(phi3, wide, tmp_path / "out")


def test_a_pickle_is_refused_and_never_opened(tmp_path, phi3):
    import pickle

    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    adapter = make_adapter(phi3, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="pickle"):
        merge(phi3, adapter, tmp_path / "out")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_damaged_header_is_refused(tmp_path, phi3, raw):
    adapter = make_adapter(phi3, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(raw)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="damaged"):
        merge(phi3, adapter, tmp_path / "out")


def test_insufficient_memory_is_not_reported_as_a_bad_adapter(tmp_path, monkeypatch):
    base = build_phi3(tmp_path / "base", dtype="float32")
    adapter = make_adapter(base, tmp_path / "adapter", init_lora_weights="olora")

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("by_peft", [False, True])
def test_merged_weights_that_are_not_finite_are_refused(tmp_path, quick_phi3, monkeypatch, by_peft):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    change_tensors(adapter, lambda name, tensor: tensor * 1e25 if "lora_" in name else tensor)
    if by_peft:
        monkeypatch.setattr(merge_folders, "_plan", lambda *a, **k: None)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite"):
        merge(quick_phi3, adapter, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_with_a_weight_that_is_not_finite_is_refused_also_where_the_adapter_changes_nothing(
    tmp_path, value, tensor, monkeypatch
):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("loraflow.adapters.streaming_merge.CHECKED_BYTES", 1000)
    base = build_phi3(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    weights = load_file(base / "model.safetensors")
    weights[tensor].view(-1)[-1] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite, and the adapter does not change it") as caught:
        merge(base, adapter, tmp_path / "out")
    assert tensor in caught.value.where


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@pytest.mark.parametrize(
    "tokens", [{"lm_head": [3, 5]}, {"lm_head": [3, 5], "embed_tokens": [3, 7]}, {"embed_tokens": [3, 7]}, [3, 5]]
)
def test_trained_tokens_of_tied_embeddings_give_the_adapter_s_logits(tmp_path, tokens):
    """Where head and embeddings train other tokens, one weight for both would give each the other's, too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(base, tmp_path / "adapter", trainable_token_indices=tokens, target_modules=["o_proj"])
    change_tensors(adapter, lambda name, tensor: tensor + 0.3 if "trainable_tokens" in name else tensor)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "peft"
    expected = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), expected)
    assert merged.config.tie_word_embeddings == ("lm_head" not in tokens)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["o_proj", "lm_head"]}])
def test_two_kinds_of_updates_of_one_tied_head_are_refused_in_one_sentence(tmp_path, options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "base",
        tmp_path / "adapter",
        **{"trainable_token_indices": [3, 5], "target_modules": ["o_proj"], **options},
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="lm_head has two kinds of updates"):
        merge(tmp_path / "base", adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("change", ["missing", "two values"])
def test_a_foreign_base_whose_files_do_not_fit_its_config_is_refused(tmp_path, change):
    """Its merged model would be loaded with random numbers, or answer with another head than a server's."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    if change == "missing":
        weights = load_file(base / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    else:
        values = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    out.mkdir()
    with pytest.raises(BadModel, match="lack weights" if change == "missing" else "two weights are one"):
        merge(base, adapter, out)
    assert not list(out.iterdir())
