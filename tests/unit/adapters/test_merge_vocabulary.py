"""Merging embeddings, heads, added tokens, and the tokenizer's files."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from loraflow.adapters.merge_folders import merge
from loraflow.failures import BadModel
from tests.conftest import build_phi3
from tests.tiny_adapters import assert_same, by_peft, change_tensors, make_adapter, read


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
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    from loraflow.data.tokens.loss_mask import ChatTemplate

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


@pytest.mark.parametrize("named", ['{"eos_token_id": 7}', None])
@pytest.mark.parametrize("eos", [9, [7, 9], 100_000])
def test_transformers_stops_where_an_evaluation_of_the_merged_model_stops(named, eos, tmp_path, phi3):
    from transformers import AutoModelForCausalLM

    from loraflow.base.load import stop_ids

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(phi3, base)
    (base / "generation_config.json").unlink()
    if named:
        (base / "generation_config.json").write_text(named)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "eos_token_id": eos}))
    out.mkdir()
    merge(base, make_adapter(phi3, tmp_path / "adapter"), out)
    found = AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id
    assert sorted(found) == [token for token in stop_ids(out) if token < values["vocab_size"]]


def test_generation_config_tokenizer_and_template_are_copied(tmp_path, phi3):
    (tmp_path / "out").mkdir()
    merge(phi3, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (phi3 / name).read_bytes()


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
