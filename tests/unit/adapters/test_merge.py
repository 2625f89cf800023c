import json
import os
import signal
from pathlib import Path

import pytest
import torch

from loraflow.adapters import streaming_merge
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.streaming_merge import _add_update, _cut, _Factors, _Scratch
from loraflow.job import Progress
from tests.conftest import build_phi3
from tests.forked_process import run_in_fork
from tests.tiny_adapters import TARGETS, assert_same, by_peft, make_adapter, read
from tests.variants import ulps

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
    found, expected = read(tmp_path / "out"), by_peft(base, adapter)
    assert found.keys() == expected.keys()
    assert max(ulps(found[name], expected[name]) for name in found) <= 1
    assert any(not torch.equal(found[name], tensor) for name, tensor in read(base).items())


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
    found, expected = read(tmp_path / "out"), by_peft(base, adapter)
    assert found.keys() == expected.keys()
    assert max(ulps(found[name], expected[name]) for name in found) <= 1, (shape, options)


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
    finished[2].with_suffix(".sha256").write_bytes(b"\xff" * 64)  # no text
    inodes = [file.stat().st_mtime_ns for file in finished]
    _attempt(phi3, adapter, tmp_path / "out", 0)
    done = [(tmp_path / "out" / file.name).stat().st_mtime_ns for file in finished]
    assert [a == b for a, b in zip(inodes, done, strict=True)] == [True, False, False], (
        "what was damaged is written again"
    )
    assert_same(read(tmp_path / "out"), by_peft(phi3, adapter))


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


def test_the_merge_does_not_depend_on_torchs_default_dtype(tmp_path, quick_phi3, monkeypatch):
    # transformers changes the default while it opens a model, which another thread of the merge may do at any time.
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    expected = by_peft(quick_phi3, adapter)
    write = streaming_merge.TensorWriter.write

    def write_meanwhile(*args):
        torch.set_default_dtype(torch.bfloat16)
        write(*args)

    monkeypatch.setattr(streaming_merge.TensorWriter, "write", write_meanwhile)
    (tmp_path / "out").mkdir()
    try:
        assert merge(quick_phi3, adapter, tmp_path / "out")["route"] == "streamed"
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(read(tmp_path / "out"), expected)
