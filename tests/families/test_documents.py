"""Documents in one row are computed as each document alone, or the architecture is not given such rows."""

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from loraflow.base.architecture import FAST, logit_factor, obstacle_to_fast_engine, obstacle_to_packing
from loraflow.failures import BadModel
from loraflow.hardware.attention import DOCUMENTS, attention_with_mask
from loraflow.training import attention
from loraflow.training.collation import concatenated, packed
from loraflow.training.document_check import refuse_leaking_documents, refuse_seeing_later_tokens
from tests.families.tiny import COMMON, OPTIONS, tiny_config, tiny_model

LENGTHS = (13, 1, 21)
# With the fast engine's, all architectures that may be packed.
PACKABLE = FAST | {
    "apertus", "cohere", "cohere2", "gemma2", "gemma3n_text", "gemma4_text", "granite", "granitemoe", "mixtral",
    "nemotron", "qwen3_moe", "stablelm",
}  # fmt: skip
LEAKING = (
    "falcon_h1",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "lfm3",
    "mamba",
    "minimax",
    "opt",
    "qwen3_5_text",
    "qwen3_next",
)


def documents(seed=0):
    draw = np.random.default_rng(seed)
    return [(draw.integers(3, 300, length), np.full(length, -100)) for length in LENGTHS]


def each_alone(model, docs):
    """Return the logits of each document, computed by itself without padding."""
    with torch.no_grad():
        parts = [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids, _ in docs]
    return torch.cat(parts)


def missing(family):
    return pytest.mark.skipif(family not in CONFIG_MAPPING, reason=f"this transformers has no {family}")


def families(names):
    return [pytest.param(name, marks=missing(name)) for name in sorted(names)]


@pytest.mark.parametrize("family", families(FAST))
def test_concatenated_documents_equal_each_document_alone(family):
    """The computation of the fast engine: embeddings, decoder with document borders, head."""
    attention.register()
    model, docs = tiny_model(family, DOCUMENTS), documents()
    batch = concatenated([docs], 40, 8, max(LENGTHS), 0)
    borders = {
        key: batch[key] for key in ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    }
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
        hidden = model.get_decoder()(inputs_embeds=embedded, attention_mask=None, **borders, use_cache=False)
        found = model.get_output_embeddings()(hidden.last_hidden_state)[0, : sum(LENGTHS)]
        found = found * logit_factor(tiny_config(family))
    torch.testing.assert_close(found, each_alone(tiny_model(family, "eager"), docs), rtol=1e-4, atol=1e-5)
    assert not obstacle_to_fast_engine(tiny_config(family))


@pytest.mark.parametrize("family", families(PACKABLE))
def test_packed_documents_equal_each_document_alone(family):
    """The computation of the stock engine: position ids that start at 0 in each document."""
    model, docs = tiny_model(family, attention_with_mask(tiny_config(family))), documents()
    grid = packed([docs], 40, 0)
    with torch.no_grad():
        found = model(input_ids=grid["input_ids"], position_ids=grid["position_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(found[: sum(LENGTHS)], each_alone(model, docs), rtol=1e-4, atol=1e-5)
    refuse_leaking_documents(model, 0, is_concatenated=False, compute_dtype=torch.float32)


@pytest.mark.parametrize("family", families(LEAKING))
def test_leaking_documents_are_detected_before_the_first_step(family):
    model = tiny_model(family, attention_with_mask(tiny_config(family)))
    with pytest.raises(BadModel, match="influence each other") as caught:
        refuse_leaking_documents(model, 0, is_concatenated=False, compute_dtype=torch.float32)
    assert family in caught.value.got and "training_config.packing to false" in caught.value.next_step
    assert model.dtype == torch.float32 and not model.training


@pytest.mark.parametrize("family", families({*LEAKING, *PACKABLE} - FAST))
def test_other_architectures_are_trained_by_the_stock_engine(family):
    assert obstacle_to_fast_engine(tiny_config(family))


@pytest.mark.parametrize(
    ("family", "odd"),
    [("llama", {"is_causal": False}), ("gemma3_text", {"use_bidirectional_attention": True}), ("mistral", {"sliding_window": 0})],
)  # fmt: skip
def test_a_config_with_another_mask_than_the_fast_engines_uses_the_stock_engine(family, odd):
    """transformers' models see later tokens then, or none; the fast engine's attention would train another model."""
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {}), **odd})
    assert f"{next(iter(odd))}: " in obstacle_to_fast_engine(config)
    if odd != {"sliding_window": 0}:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        with pytest.raises(BadModel, match="not causal"):
            refuse_seeing_later_tokens(model.eval(), 0, is_concatenated=False, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "usual"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}),
        ("gemma3_text", {"use_bidirectional_attention": False}),
        ("llama", {"is_causal": True}),
    ],
)
def test_a_config_that_names_the_usual_mask_uses_the_fast_engine(family, usual):
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {}), **usual})
    assert obstacle_to_fast_engine(config) == ""


@pytest.mark.parametrize("family", families(set(LEAKING) - {"gpt_oss", "opt"}))
def test_packed_rows_are_refused_from_the_config_for_layers_with_a_state(family):
    assert "carry a state from one document to the next" in obstacle_to_packing(tiny_config(family))


@pytest.mark.parametrize("family", families(PACKABLE))
def test_packed_rows_are_accepted_for_attention_layers(family):
    assert not obstacle_to_packing(tiny_config(family))


@pytest.mark.parametrize("family", families({"gemma2", "gpt_oss", "llama", "mamba"}))
def test_padded_rows_use_an_attention_that_the_architecture_has(family):
    """transformers refuses to load some architectures with sdpa."""
    model = tiny_model(family, attention_with_mask(tiny_config(family)))
    ids, mask = torch.arange(3, 37).view(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, 11:] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[1, :11]
        alone = model(input_ids=ids[1:, :11], use_cache=False).logits[0]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
