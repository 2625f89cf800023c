"""The memory estimate against measurements, and the settings that are chosen by it or after out of memory."""

import pytest
import torch

from loraflow.adapters.lora_config import lora_config
from loraflow.config.recipe import PeftConfig
from loraflow.failures import OutOfMemory
from loraflow.training import memory
from loraflow.training.adapter_rank import adapter_rank
from loraflow.training.memory import MicroBatchSize, explain_out_of_memory

PHI3 = memory.ModelShape(3072, 8192, 32, 32, 32, 96, 32064, False)


def test_the_memory_estimate_is_near_the_measurement():
    """Peaks on one H100, Phi-3 mini's shape, r=16, in GiB (docs/performance.md, docs/performance-log.md)."""
    assert PHI3.linear_weights + PHI3.embedding_weights == pytest.approx(3.82e9, rel=0.01)
    assert memory.lora_weights(PHI3, 16) == 25_165_824
    for tokens, how, measured in ((8192, "none", 35.1), (16384, "none", 56.8), (16384, "elementwise", 42.7),
                                  (32768, "full", 17.5)):  # fmt: skip
        estimate = (memory.fixed_bytes(PHI3, "bfloat16", 16) + tokens * memory.token_bytes(PHI3, how)) / memory.GIB
        assert measured * 0.9 < estimate < measured * 1.35
    assert 10 < memory.least_bytes(PHI3, "bfloat16", 16, 2048) / memory.GIB < 12.5


def test_tokens_and_checkpointing_follow_the_available_memory():
    def fit(gib, **options):
        return memory.fit_memory(
            PHI3, gib * memory.GIB, options.pop("weights", "bfloat16"), 16, least=512, step_tokens=40_000, **options
        )

    big, small, tiny = fit(78), fit(20), fit(12)
    assert (big.recompute, big.tokens) == ("none", 16384)
    assert small.recompute == "selective" and 0 < small.share < 1 and small.tokens >= 4096 and not small.elementwise
    assert tiny.recompute == "full" and tiny.tokens >= 512
    assert fit(12, weights="nf4").tokens > tiny.tokens
    assert fit(78, recompute="full").recompute == "full"
    assert fit(1).tokens == 512, "never less than the longest document"


def test_elementwise_operations_are_recomputed_before_whole_layers_where_layers_are_compiled():
    def fit(gib, **options):
        return memory.fit_memory(PHI3, gib * memory.GIB, "bfloat16", 16, least=512, step_tokens=40_000, **options)

    assert fit(78, compiled=True).recompute == "none"
    medium = fit(22, compiled=True)
    assert medium.recompute == "elementwise" and medium.elementwise and medium.share == 0 and medium.tokens > 4096
    assert fit(22).recompute == "selective"
    small = fit(18, compiled=True)
    assert small.recompute == "selective" and small.elementwise and small.share < fit(18).share
    assert fit(60, enough=16384, compiled=True).recompute == "elementwise", "asked for 16,384 tokens, which do not fit"
    asked = fit(78, recompute="elementwise")
    assert asked.recompute == "none" and "not compiled" in asked.why
    assert fit(78, recompute="elementwise", compiled=True).elementwise


def test_out_of_memory_proposes_smaller_settings_until_none_is_left():
    proposed = []
    for size in (MicroBatchSize(512, tokens=4096), MicroBatchSize(512, tokens=512, recompute="none"),
                 MicroBatchSize(512, rows=3), MicroBatchSize(512, tokens=512, recompute="full"),
                 MicroBatchSize(512, rows=1, tokens=4096, recompute="none"), MicroBatchSize(512, rows=1)):  # fmt: skip
        with pytest.raises(OutOfMemory) as caught, explain_out_of_memory("a test", size.retry_with()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        proposed.append(caught.value.details["retry_with"])
    assert proposed == [
        {"micro_tokens": 2048},
        {"checkpointing": "full"},
        {"micro_batch": 1},
        {},
        {"checkpointing": "full"},
        {},
    ]


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained_by_peft(config, adapters):
    """Return the shape of a model, and the number of weights that peft trains in adapters, each module's padded."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    counts = []
    for adapter in adapters:
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(config), lora_config(adapter))
        counts.append({name: p.numel() for name, p in model.named_parameters() if p.requires_grad})
    names = {name for count in counts for name in count}
    padded = sum(max(count.get(name, 0) for count in counts) for name in names)
    return memory.shape_of(config.to_dict()), len(adapters) * padded


@pytest.mark.parametrize(
    "adapters",
    [
        [{"r": 4, "target_modules": ALL, "rank_pattern": {"down_proj": 64, r"layers\.0\.self_attn\.qkv_proj": 1}}],
        [{"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [0, 2]}],
        [{"r": 4, "target_modules": "all-linear", "exclude_modules": ["lm_head"], "rank_pattern": {".*_proj": 16}}],
        [{"r": 8, "target_modules": r".*layers\.1\..*(o_proj|down_proj)"}],
        [
            {"r": 2, "target_modules": ALL, "rank_pattern": {"o_proj": 32}},
            {"r": 8, "target_modules": ALL, "rank_pattern": {"down_proj": 1}},
        ],
    ],
    ids=["ranks", "layers", "all-linear", "expression", "two in one pass"],
)
def test_the_memory_of_adapters_counts_the_weights_that_peft_trains(adapters):
    from transformers import Phi3Config

    configs = [PeftConfig(**adapter) for adapter in adapters]
    shape, trained = trained_by_peft(Phi3Config(**TINY), configs)
    assert memory.lora_weights(shape, adapter_rank(shape, configs)) == trained


def test_modules_with_names_of_their_own_count_with_the_largest_rank():
    for adapter in (
        {"r": 4, "target_modules": ["query_key_value"], "rank_pattern": {"dense": 32}},
        {"r": 4, "target_modules": ["q_proj", "fc1"], "rank_pattern": {"q_proj": 32}},
        {"r": 4, "rank_pattern": {"dense_h_to_4h": 32}},
    ):
        assert adapter_rank(PHI3, [PeftConfig(**adapter)]) == 32


@pytest.mark.parametrize(
    "adapters",
    [
        [{"target_modules": ["q_proj", "v_proj"]}],
        [{"target_modules": ["v_proj"]}],
        [{"target_modules": SEVEN}],
        [{"target_modules": "all-linear"}],
        [{"target_modules": "all-linear", "rank_pattern": {"k_proj": 64, "gate_proj": 2}}],
        [{"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}],
        [{"target_modules": r".*(q_proj|embed_tokens|lm_head)", "r": 256}],
        [{"target_modules": ["o_proj", "lm_head"], "layers_to_transform": None, "exclude_modules": ["layers.0.self_attn.o_proj"]}],
        [{"target_modules": ["q_proj"], "r": 4}, {"target_modules": ["q_proj", "k_proj"], "r": 2}],
    ],
    ids=["q and v", "v", "seven", "all-linear", "ranks", "saved", "expression with the head", "head", "two in one pass"],
)  # fmt: skip
def test_split_projections_embeddings_and_head_count_as_peft_trains_them(adapters):
    """With the shape of Llama 3.1 8B in four layers: q_proj, k_proj and v_proj each have an A of their own."""
    from transformers import LlamaConfig

    llama = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=4,
                        num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
    configs = [PeftConfig(**adapter) for adapter in adapters]
    shape, trained = trained_by_peft(llama, configs)
    assert memory.lora_weights(shape, adapter_rank(shape, configs)) == trained


def test_fused_projections_of_a_glm_count_as_peft_trains_them():
    from transformers import GlmConfig

    configs = [PeftConfig(r=4)]
    shape, trained = trained_by_peft(GlmConfig(**TINY, head_dim=8), configs)
    assert memory.lora_weights(shape, adapter_rank(shape, configs)) == trained
