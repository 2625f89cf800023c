"""QLoRA's merge without a GPU, compared with bitsandbytes, which packs on a CPU too."""

import json

import pytest
import torch

from loraflow.adapters import logits, verify
from loraflow.adapters.merge import comparison_rows
from loraflow.adapters.merge import run as run_merge
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.nf4 import Nf4, quantized_modules, quantized_names
from loraflow.config import Runtime
from loraflow.failures import MissingExtra
from loraflow.job import Inputs, Progress
from tests.conftest import build_phi3, chat
from tests.job_factory import make_job
from tests.tiny_adapters import assert_same, make_adapter, read
from tests.unit.training.test_training import REF, recipe, tokenize

pytest.importorskip("bitsandbytes")
SHAPES = {"gqa": {}, "tied": {"tie_word_embeddings": True}, "tall": {"intermediate_size": 200}}


def by_bitsandbytes(base, double, dtype=torch.bfloat16):
    """Return the model that training sees, packed by transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map={"": "cpu"}, quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype,
        ),
    ).eval()  # fmt: skip


def unpacked(model):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_dequantized_base_equals_that_of_transformers_and_bitsandbytes(tmp_path, shape, double):
    from transformers import AutoModelForCausalLM

    base = build_phi3(
        tmp_path / "base", hidden_size=320, num_attention_heads=10, **shape
    )  # qkv: 448 rows, not one block
    expected = unpacked(by_bitsandbytes(base, double))
    assert expected.keys() == quantized_names(base), "lm_head and what is tied to it stay as they are"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = {f"{name}.weight": module.weight.clone() for name, module in quantized_modules(model).items()}
    Nf4("bfloat16", double).apply(model)
    for name, module in quantized_modules(model).items():
        assert torch.equal(module.weight, expected[f"{name}.weight"]), name
        assert not torch.equal(module.weight, before[f"{name}.weight"])


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["o_proj"], "trainable_token_indices": [3]}],
                         ids=["lora", "dora", "by-peft"])  # fmt: skip
def test_a_merge_onto_the_dequantized_base_equals_pefts(tmp_path, options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, nf4 = build_phi3(tmp_path / "base", hidden_size=320, num_attention_heads=10), Nf4("bfloat16", True)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    (tmp_path / "out").mkdir()
    figures = merge(base, adapter, tmp_path / "out", nf4=nf4)
    assert figures["route"] == ("peft" if "trainable_token_indices" in options else "streamed")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    nf4.apply(model)
    assert_same(read(tmp_path / "out"), PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def stages(base, adapter, shards, folder, **overrides):
    """Run merge and verify; return merge's figures and verify's report."""
    asked = recipe(**{"base__quantization": "nf4", "base__dtype": "bfloat16", "merge__verify_prompts": 4, **overrides})
    tokens = {"tokens": shards} if asked.compares_merges else {}
    for name in ("merged", "work", "report", "rows"):
        (folder / name).mkdir(parents=True)
    rows = [json.dumps({"id": str(i), "set": "heldout", **chat(i)}) + "\n" for i in range(4)]
    (folder / "rows" / "heldout.jsonl").write_text("".join(rows))
    inputs = {"base": base, "adapter": adapter.parent, **tokens}
    job = make_job("merge", asked, dict.fromkeys(inputs, REF.model_copy(update={"facets": {"adapter": "d"}})))
    report = Progress(folder / "work" / "progress.jsonl", folder / "work")
    figures = run_merge(job, Inputs(inputs), folder / "merged", report).figures
    assert not (folder / "work" / "onto").exists(), "the merge that was not chosen is deleted"
    inputs = {"base": base, "adapter": adapter.parent, "merged": folder / "merged", "rows": folder / "rows"}
    facets = REF.model_copy(update={"facets": {"adapter": "d", "heldout": "d"}})
    job = make_job("verify", asked, dict.fromkeys(inputs, facets))
    return figures, verify.run(job, Inputs(inputs), folder / "report", Progress()).report


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base, an adapter in its artifact's folder, and tokenized training rows."""
    folder = tmp_path_factory.mktemp("parts")
    base = build_phi3(folder / "phi3")
    (folder / "artifact").mkdir()
    return base, make_adapter(base, folder / "artifact" / "adapter"), tokenize(base, folder)


def test_the_merge_closer_to_the_trained_model_is_chosen(parts, tmp_path):
    from peft import PeftModel

    base, adapter, shards = parts
    figures, report = stages(base, adapter, shards, tmp_path / "auto")
    plain, onto_base = stages(base, adapter, shards, tmp_path / "base", merge__onto="base")
    chosen, near = stages(base, adapter, shards, tmp_path / "dequantized", merge__onto="dequantized")
    assert figures["onto"] == "dequantized" and figures["kl_dequantized"] < figures["kl_base"] / 10
    assert "kl_base" not in plain and (plain["onto"], chosen["onto"]) == ("base", "dequantized")
    assert_same(read(tmp_path / "auto" / "merged"), read(tmp_path / "dequantized" / "merged"))
    assert not torch.equal(
        *(read(tmp_path / name / "merged")["model.layers.0.mlp.down_proj.weight"] for name in ("auto", "base"))
    )
    assert report == near and near["mean_kl"] < onto_base["mean_kl"] / 10, "the trained model is the reference"
    # the recorded KL is the distance to the model that bitsandbytes itself packs
    probes = comparison_rows(shards / "train")
    trained = PeftModel.from_pretrained(by_bitsandbytes(base, True, torch.float32), str(adapter)).eval()
    with torch.inference_mode():
        expected = [trained(input_ids=row).logits[0] for row in probes]
    theirs = logits.compare_logits(
        expected, logits.model_logits(tmp_path / "base" / "merged", probes, Runtime(), trust=False)
    ).mean_kl
    assert theirs == pytest.approx(figures["kl_base"], rel=0.02)


def test_without_bitsandbytes_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("loraflow.adapters.nf4.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="bitsandbytes alone"):
        Nf4("bfloat16", True)
