"""A base that transformers cannot generate with as it is trained is refused before the first step."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from loraflow.base.generation_settings import ONE_ANSWER
from loraflow.base.load import has_linear_head
from loraflow.failures import BadModel
from loraflow.hardware.attention import attention_with_mask
from loraflow.training.document_check import (
    NO_ROW,
    errors_as_refusal,
    refuse_other_generation,
    refuse_seeing_later_tokens,
)
from loraflow.training.stock_engine import use_own_logits_where_trl_is_wrong
from tests.families.test_cells import spread
from tests.families.test_untested_architectures import known, model_of

FLOAT = torch.float32
DECODER = {"vocab_size": 300, "d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "is_encoder_decoder": False}  # fmt: skip
PROPHETNET = {"vocab_size": 300, "hidden_size": 64, "decoder_ffn_dim": 96, "num_decoder_layers": 2, "num_encoder_layers": 2,
              "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
              "eos_token_id": 2, "is_decoder": True, "is_encoder_decoder": False}  # fmt: skip


def decoder_of(family, **options):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} here")
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(0)
    attention = attention_with_mask(config)
    return spread(AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=FLOAT)).eval()


@pytest.mark.parametrize(
    "family", known("opt", "mixtral", "gpt_oss", "gemma2", "lfm2", "mamba", "falcon_h1", "qwen3_5_text")
)
def test_a_model_that_generates_what_it_is_trained_for_passes(family):
    refuse_other_generation(model_of(family), 0, compute_dtype=FLOAT)


SETTINGS = [
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "guidance_scale": 1.5, "min_length": 40},
    {"suppress_tokens": [9, 12], "bad_words_ids": [[9]], "begin_suppress_tokens": [8], "sequence_bias": [[[9], 5.0]]},
    {"forced_bos_token_id": 3, "forced_eos_token_id": 2, "max_length": 10, "max_time": 1e-4},
    {"num_return_sequences": 2, "num_beams": 4, "return_dict_in_generate": True, "cache_implementation": "static"},
    {"stop_strings": ["a"], "token_healing": True, "prompt_lookup_num_tokens": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_settings_of_generation_are_no_fault_of_the_model(settings):
    """The model is the same as without them, and the check leaves them as they were."""
    model = model_of("stablelm")
    model.generation_config.update(**settings)
    before = model.generation_config.to_dict()
    refuse_other_generation(model, 0, compute_dtype=FLOAT)
    assert model.generation_config.to_dict() == before
    assert before.items() >= settings.items(), "the settings are those of the model"


def test_a_model_that_is_refused_keeps_its_settings():
    model = decoder_of("bart", **DECODER, encoder_layers=1, decoder_layers=2)
    own = model.generation_config
    with pytest.raises(BadModel):
        refuse_other_generation(model, 0, compute_dtype=FLOAT)
    assert model.generation_config is own


@pytest.mark.parametrize("settings", SETTINGS[3:], ids=lambda settings: "-".join(settings))
def test_an_answer_is_one_row_of_ids_whatever_the_settings_of_generation_ask_for(settings):
    model, ids = model_of("stablelm").eval(), torch.arange(3, 20)[None]
    greedy = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False, "num_beams": 1, "top_k": None, **ONE_ANSWER}
    expected = model.generate(**greedy, eos_token_id=None)
    model.generation_config.update(**settings)
    assert torch.equal(model.generate(**greedy, eos_token_id=None), expected)


def test_a_model_that_counts_positions_differently_in_generation_is_refused():
    """RoBERTa's positions begin behind the pad token's id in training, and at 0 in generation."""
    model = model_of("roberta", is_decoder=True)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        trained = model(input_ids=ids, use_cache=False).logits[0, -1].argmax().item()
        answered = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, eos_token_id=None)[0, -1].item()
    if trained == answered:
        pytest.skip("this version of transformers counts alike")
    with pytest.raises(BadModel, match="logits differ between training and generation") as caught:
        refuse_other_generation(model, 0, compute_dtype=FLOAT)
    assert "roberta" in caught.value.got


def test_a_model_whose_rows_depend_on_their_width_is_refused():
    with pytest.raises(BadModel, match="logits differ between training and generation"):
        refuse_other_generation(decoder_of("prophetnet", **PROPHETNET), 0, compute_dtype=FLOAT)


def test_a_decoder_that_cannot_generate_is_refused_with_the_library_s_reason():
    """transformers sizes the cache by the layers of the encoder, which this decoder does not have."""
    model = decoder_of("bart", **DECODER, encoder_layers=1, decoder_layers=2)
    with pytest.raises(BadModel, match="fails to generate with this model") as caught:
        refuse_other_generation(model, 0, compute_dtype=FLOAT)
    assert "bart: " in caught.value.got and "\n" not in caught.value.got


@pytest.mark.parametrize("check", [refuse_other_generation, refuse_seeing_later_tokens])
def test_a_model_that_computes_rows_of_some_lengths_only_is_refused_before_the_first_step(check):
    model = decoder_of(
        "xlstm", vocab_size=300, hidden_size=64, num_blocks=2, num_heads=4, chunk_size=48, mode="train", pad_token_id=0
    )
    options = {} if check is refuse_other_generation else {"is_concatenated": False}
    with pytest.raises(BadModel, match="fails to compute a row of tokens") as caught:
        check(model, 0, compute_dtype=FLOAT, **options)
    assert "not divisible by chunk size 48" in caught.value.got


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(28, "no space")]
)
def test_an_error_of_the_machine_is_no_refusal_of_the_model(error):
    with pytest.raises(type(error)), errors_as_refusal(model_of("opt"), NO_ROW, "rows"):
        raise error


def test_a_head_behind_a_layer_of_its_own_is_not_applied_to_the_last_hidden_state():
    assert not has_linear_head(model_of("rembert", is_decoder=True, output_embedding_size=48))


def test_a_cap_that_trl_does_not_know_is_kept_however_small_the_logits_are():
    """The cap of small logits changes the loss by less than rounding in 16 bits, and that of real logits by far more."""
    model = model_of("recurrent_gemma")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)
    add_fused_lm_head(model, outputs=("log_probs",))
    assert use_own_logits_where_trl_is_wrong(model, FLOAT)
