"""Architectures beyond the families of the matrix: what could be silently wrong is noticed with their weights."""

import itertools

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from loraflow.adapters.lora_config import check_trainable
from loraflow.adapters.targets import find_targets, has_routers
from loraflow.base.architecture import logit_factor, obstacle_to_fast_engine
from loraflow.base.load import has_linear_head
from loraflow.base.usable import refuse_unknown_architecture
from loraflow.config.lora import PeftConfig
from loraflow.evaluation.generation import batches_are_exact, generate_answers, prefix_is_exact
from loraflow.failures import BadConfig, BadModel
from loraflow.hardware.attention import DOCUMENTS, attention_with_mask
from loraflow.training import attention
from loraflow.training.document_check import refuse_padding_that_is_seen, refuse_seeing_later_tokens
from loraflow.training.stock_engine import use_own_logits_where_trl_is_wrong
from tests.families.test_cells import spread
from tests.families.test_targets import adapted, on_meta
from tests.families.tiny import COMMON, OPTIONS, tiny_config, tiny_model

FLOAT = torch.float32


def known(*families):
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason=f"no {name} here"))
        for name in families
    ]


def model_of(family, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {}), **more})
    attention_name = attention_with_mask(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_name, dtype=FLOAT)
    return spread(model).eval()


# -- later tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "more"), [("bert", {}), ("gemma3_text", {"use_bidirectional_attention": True})])
def test_a_model_whose_tokens_see_later_ones_is_refused_before_the_first_step(family, more):
    with pytest.raises(BadModel, match="attention is not causal") as caught:
        refuse_seeing_later_tokens(model_of(family, **more), 0, is_concatenated=False, compute_dtype=FLOAT)
    assert family in caught.value.got


@pytest.mark.parametrize("family", known("gemma3_text", "lfm2", "gpt_oss", "mixtral", "opt", "mamba", "rwkv"))
def test_a_decoder_passes_the_check_of_later_tokens(family):
    refuse_seeing_later_tokens(model_of(family), 0, is_concatenated=False, compute_dtype=FLOAT)


def test_the_check_of_later_tokens_takes_the_layout_of_the_fast_engine():
    attention.register()
    refuse_seeing_later_tokens(tiny_model("llama", DOCUMENTS), 0, is_concatenated=True, compute_dtype=FLOAT)


@pytest.mark.parametrize(("family", "seen"), [("cpmant", True), ("opt", False), ("lfm2", False), ("mixtral", False)])
def test_a_model_that_sees_the_padding_behind_a_row_is_refused_before_the_first_step(family, seen):
    model = model_of(family)
    if not seen:
        refuse_padding_that_is_seen(model, 0, compute_dtype=FLOAT)
        return
    with pytest.raises(BadModel, match="Padding changes this model's logits") as caught:
        refuse_padding_that_is_seen(model, 0, compute_dtype=FLOAT)
    assert family in caught.value.got


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta"])
def test_an_encoder_with_a_head_for_text_is_refused_by_its_config(kind):
    with pytest.raises(BadModel, match="an encoder"):
        refuse_unknown_architecture({"model_type": kind, "architectures": ["AnyForCausalLM"]}, trust=False)
    refuse_unknown_architecture({"model_type": kind, "is_decoder": True}, trust=False)


@pytest.mark.parametrize("kind", ["bart", "mbart", "mvp"])
def test_a_decoder_that_transformers_also_lists_for_masked_text_is_not_taken_for_an_encoder(kind):
    refuse_unknown_architecture({"model_type": kind, "architectures": ["AnyForCausalLM"]}, trust=False)


# -- logits that are not head times state -----------------------------------------------------------------------------


def expected_log_probs(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    ("family", "replaced"),
    [
        *(
            pytest.param(*p.values, True, marks=p.marks)
            for p in known("modernbert-decoder", "llama4_text", "recurrent_gemma")
        ),
        *(pytest.param(*p.values, False, marks=p.marks) for p in known("mixtral", "gemma2", "falcon_h1", "lfm2")),
    ],
)
def test_the_stock_engines_loss_is_that_of_the_models_own_logits(family, replaced):
    model, ids = model_of(family), torch.arange(3, 33)[None]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # real logits are large enough for caps
    expected = expected_log_probs(model, ids)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert use_own_logits_where_trl_is_wrong(model, FLOAT) == replaced
    labels = ids.clone()
    labels[0, 5:9] = -100
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    mask = labels[:, 1:] != -100
    torch.testing.assert_close(found.log_probs, expected.masked_fill(~mask, 0), rtol=1e-4, atol=1e-4)
    assert found.log_probs.requires_grad and torch.equal(found.label_mask, mask)
    assert found.entropy.shape == found.is_top1.shape == mask.shape
    found.log_probs.sum().backward()


@pytest.mark.parametrize("key", ["logit_scale", "logits_scaling", "final_logit_softcapping"])
def test_a_factor_that_only_config_json_has_does_not_change_the_stock_engines_loss(key):
    """trl applies it, whatever the architecture; Llama's code does not, so the fast engine computes the loss too."""
    model, ids = model_of("llama", **{key: 0.5}), torch.arange(3, 33)[None]
    assert logit_factor(model.config) == 1.0 and obstacle_to_fast_engine(model.config) == ""
    expected = expected_log_probs(model, ids)
    add_fused_lm_head(model, outputs=("log_probs",))
    assert use_own_logits_where_trl_is_wrong(model, FLOAT)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_cap_of_the_architectures_own_is_left_to_trl():
    """It takes less memory than the model's own logits."""
    model, ids = model_of("gemma3_text", final_logit_softcapping=0.5), torch.arange(3, 33)[None]
    assert logit_factor(model.config) is None and "changes its head's logits" in obstacle_to_fast_engine(model.config)
    expected = expected_log_probs(model, ids)
    add_fused_lm_head(model, outputs=("log_probs",))
    assert not use_own_logits_where_trl_is_wrong(model, FLOAT)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", known("modernbert-decoder", "llama4_text", "recurrent_gemma", "mixtral", "lfm2"))
def test_a_head_is_linear_only_if_the_logits_are_its_product(family):
    model, ids = model_of(family), torch.arange(3, 20)[None]
    linear = has_linear_head(model)
    assert linear == (family in ("mixtral", "lfm2"))
    if linear:
        with torch.no_grad():
            state = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            torch.testing.assert_close(model.get_output_embeddings()(state), model(input_ids=ids).logits)


@pytest.mark.parametrize(("family", "more", "found"), [("mixtral", {}, True), ("doge", {"num_experts": 4}, False)])
def test_a_routers_loss_needs_a_router(family, more, found):
    """Doge's config has a number of experts and a coefficient also without experts."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} here")
    assert has_routers(on_meta(AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {}), **more}))) == found


# -- batches of answers -----------------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer whose texts are ids."""

    pad_token_id = 0

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("family", known("minimax", "recurrent_gemma", "rwkv", "openai-gpt"))
def test_answers_are_generated_alone_where_padding_changes_them(family):
    model = model_of(family)
    assert batches_are_exact(model, 0) == (family == "openai-gpt")
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (length,), generator=draw).tolist() for length in (5, 23, 9, 14)]
    shared = list(itertools.islice(itertools.cycle(range(3, 30)), 20))
    prompts = [shared + prompt for prompt in prompts]
    found = generate_answers(model, Numbers(), prompts, stop_ids=[299], max_new_tokens=6, batch_size=4)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=299,
                pad_token_id=0,
            )  # fmt: skip
        alone = out[0, len(prompt) :].tolist()
        assert answer["text"] == Numbers().decode(alone[: alone.index(299)] if 299 in alone else alone)


@pytest.mark.parametrize("family", known("recurrent_gemma"))
def test_a_prompt_of_one_token_does_not_go_on_from_the_prompt_before_it(family):
    """Its convolutions keep their state in the model, and take one token for the next one of an answer."""
    prompts = [[*range(3, 20)], [7], [9, 30, 5]]
    found = generate_answers(model_of(family), Numbers(), prompts, stop_ids=[299], max_new_tokens=6, batch_size=4)
    for prompt, answer in zip(prompts, found, strict=True):
        ids, model = torch.tensor([prompt]), model_of(family)  # which has seen nothing
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=299, pad_token_id=0)
        assert answer["text"] == Numbers().decode(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize(("family", "exact"), [("mpt", False), ("bloom", True)])
def test_a_prefix_is_shared_only_where_padding_behind_it_changes_nothing(family, exact):
    """MPT's bias for distances counts the padding."""
    model = model_of(family)
    assert batches_are_exact(model, 0) and prefix_is_exact(model, 0) == exact
    draw = torch.Generator().manual_seed(0)
    prompts = [[*range(3, 23), *torch.randint(3, 300, (n,), generator=draw).tolist()] for n in (5, 23, 9, 1)]
    found = generate_answers(model, Numbers(), prompts, stop_ids=[299], max_new_tokens=4, batch_size=4)
    alone = [
        generate_answers(model, Numbers(), [p], stop_ids=[299], max_new_tokens=4, batch_size=1)[0] for p in prompts
    ]
    assert found == alone


@pytest.mark.parametrize("family", known("mixtral", "qwen3_5_text", "lfm2", "gemma2", "gpt_oss", "falcon_h1"))
def test_other_architectures_take_batches(family):
    assert batches_are_exact(model_of(family), 0)


# -- modules that cannot carry an adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", known("falcon_h1", "mamba", "mamba2"))
def test_all_linear_leaves_out_what_peft_refuses_and_a_name_is_refused_in_one_sentence(family):
    config, recipe = tiny_config(family), PeftConfig(lora_dropout=0)
    model = on_meta(config)
    targets = find_targets(model, recipe)
    left_out = {name.rpartition(".")[2] for name in targets.left_out}
    assert left_out == {"out_proj"} and "state space" in targets.summary()
    assert adapted(model, recipe) == set(targets.modules) and targets.modules
    with pytest.raises(BadConfig, match="out_proj cannot carry an adapter in this base: the kernel") as caught:
        check_trainable(on_meta(config), PeftConfig(lora_dropout=0, target_modules=["in_proj", "out_proj"]))
    assert "leave it out" in caught.value.next_step


def test_all_linear_adapts_a_linear_layer_that_computes_its_product_in_its_own_steps():
    """Falcon's linear layers round between product and bias; they are adapted as those of peft."""
    config = AutoConfig.for_model("falcon", vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    recipe = PeftConfig(lora_dropout=0)
    targets, model = find_targets(on_meta(config), recipe), on_meta(config)
    check_trainable(model, recipe)
    assert not targets.left_out and adapted(model, recipe) == set(targets.modules) and len(targets.modules) == 4


def test_a_recipe_that_adapts_nothing_is_refused_in_one_sentence():
    recipe = PeftConfig(lora_dropout=0, exclude_modules=r".*")
    with pytest.raises(BadConfig, match="adapts no module of this base"):
        check_trainable(on_meta(tiny_config("llama")), recipe)


@pytest.mark.skipif("deepseek_v4" not in CONFIG_MAPPING, reason="no deepseek_v4 here")
def test_all_linear_leaves_out_a_linear_layer_with_a_product_of_its_own():
    """DeepSeek-V4's o_a_proj multiplies groups of heads by parts of its weight: peft's adapter has other shapes."""
    targets = find_targets(
        on_meta(AutoConfig.for_model("deepseek_v4", num_hidden_layers=1)), PeftConfig(lora_dropout=0)
    )
    assert {name.rpartition(".")[2] for name, why in targets.left_out.items() if "another product" in why} == {
        "o_a_proj"
    }
