"""The cases of the GPU training benchmark, and the shapes of their models."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraflow.config import Recipe

TINY = os.environ.get("LORAFLOW_BENCH_TINY") == "1"  # a dry run on a CPU: says nothing about speed
LENGTH = 256 if TINY else 2048


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        targets: the linear layers that get adapters.
        config: the class of its configuration in transformers, where it is not Phi-3 or Llama.
        head_dim: the width of a head; None is hidden // heads.
        options: further settings of the configuration.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    targets: tuple[str, ...]
    tied: bool = False
    config: str | None = None
    head_dim: int | None = None
    options: tuple[tuple[str, float], ...] = ()

    @property
    def head_width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden // self.heads


FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
if TINY:
    PHI3 = Shape("phi3", 96, 256, 2, 4, 4, 507, FUSED)
    LLAMA_1B = Shape("llama-1b", 96, 256, 2, 4, 2, 507, SPLIT, tied=True)
else:
    PHI3 = Shape("phi3", 3072, 8192, 32, 32, 32, 32064, FUSED)
    LLAMA_1B = Shape("llama-1b", 2048, 8192, 16, 32, 8, 128256, SPLIT, tied=True)
# Other families in their own sizes, from the configurations that were published with their models.
FAMILIES = [
    Shape("qwen3-0.6b", 1024, 3072, 28, 16, 8, 151936, SPLIT, tied=True, config="Qwen3Config", head_dim=128),
    Shape("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151936, SPLIT, tied=True, config="Qwen2Config"),
    Shape("llama-3b", 3072, 8192, 28, 24, 8, 128256, SPLIT, tied=True, head_dim=128),
    Shape("gemma3-1b", 1152, 6912, 26, 4, 1, 262144, SPLIT, tied=True, config="Gemma3TextConfig", head_dim=256,
          options=(("sliding_window", 512), ("query_pre_attn_scalar", 256))),
    Shape("granite3-2b", 2048, 8192, 40, 32, 8, 49159, SPLIT, tied=True, config="GraniteConfig",
          options=(("embedding_multiplier", 12.0), ("residual_multiplier", 0.22), ("attention_multiplier", 1 / 64),
                   ("logits_scaling", 8.0))),
    Shape("olmo2-1b", 2048, 8192, 16, 16, 16, 100352, SPLIT, config="Olmo2Config"),
    Shape("smollm3-3b", 2048, 11008, 36, 16, 4, 128256, SPLIT, tied=True, config="SmolLM3Config"),
    Shape("phi4-mini", 3072, 8192, 32, 24, 8, 200064, FUSED, tied=True, config="Phi3Config",
          options=(("partial_rotary_factor", 0.75),)),
]  # fmt: skip
if TINY:
    FAMILIES = [
        replace(shape, hidden=96, inner=256, layers=2, heads=4, kv_heads=2, vocabulary=507) for shape in FAMILIES
    ]
VOCABULARY = PHI3.vocabulary  # every model has these tokens
# Together more than 50 steps: loraflow records the passes of no shorter training as CUDA graphs.
WARM_UP, TIMED = (5, 11) if TINY else (10, 46)

Setting = str | float | bool | list[str] | None


@dataclass
class Case:
    """One line of the table: settings of a recipe for loraflow, or of SFTConfig for the baseline."""

    name: str
    description: str
    rows: int = 8  # of 2,048 tokens in an optimizer step
    settings: dict[str, Setting] = field(default_factory=dict)
    baseline: dict[str, Setting] | None = None  # of trl's SFTConfig
    timed: int = TIMED
    shape: Shape = PHI3
    peer: str | None = None  # trl or unsloth


SETTINGS = {
    "training_config.learning_rate": 1e-4,
    "training_config.packing": True,
    "training_config.max_length": LENGTH,
    "training_config.gradient_accumulation_steps": 1,
    "training_config.logging_steps": 5,
    "training_config.save_strategy": "no",
    "peft_config.lora_dropout": 0.0,
    "runtime.compile": "on",
    "runtime.device": "cpu" if TINY else "cuda",
}
RECOMPUTED = {"training_config.gradient_checkpointing": True}
ELEMENTWISE: dict[str, Setting] = {"runtime.checkpointing": "elementwise"}
CASES = [
    Case("bf16", "loraflow, bf16, 16k tokens per micro-batch"),
    Case("bf16-8k", "loraflow, bf16, 8k tokens", rows=4),
    Case("bf16-fa2", "loraflow, bf16, 16k tokens, torch's own FA2", settings={"runtime.attn_implementation": "varlen"}),
    Case("bf16-elementwise", "loraflow, bf16, 16k, elementwise operations recomputed", settings=ELEMENTWISE),
    Case("bf16-24gib", "loraflow, bf16, 6k tokens, elementwise operations recomputed", rows=6,
         settings={**ELEMENTWISE, "runtime.micro_tokens": 6144}),
    Case("bf16-dropout", "loraflow, bf16, 16k, dropout 0.05", settings={"peft_config.lora_dropout": 0.05}),
    Case("bf16-eager", "loraflow, bf16, 16k, nothing compiled", settings={"runtime.compile": "off"}, timed=16),
    Case("bf16-small", "loraflow, bf16, 4k tokens, recomputed", rows=8,
         settings={**RECOMPUTED, "runtime.micro_tokens": 4096}),
    Case("fp8", "loraflow, fp8 base, 16k tokens", settings={"base.quantization": "fp8"}),
    Case("fp8-elementwise", "loraflow, fp8 base, 16k, elementwise operations recomputed",
         settings={"base.quantization": "fp8", **ELEMENTWISE}),
    Case("fp8-dropout", "loraflow, fp8 base, 16k, dropout 0.05",
         settings={"base.quantization": "fp8", "peft_config.lora_dropout": 0.05}),
    Case("dropout-elementwise", "loraflow, bf16, 16k, dropout 0.05, elementwise operations recomputed",
         settings={"peft_config.lora_dropout": 0.05, **ELEMENTWISE}),
    Case("nf4", "loraflow, QLoRA nf4, 8k tokens", rows=4, settings={"base.quantization": "nf4"}),
    Case("nf4-small", "loraflow, QLoRA nf4, 4k tokens, recomputed",
         settings={"base.quantization": "nf4", **RECOMPUTED, "runtime.micro_tokens": 4096}),
    Case("stock", "loraflow with runtime.engine: stock, 8k tokens", rows=4, timed=11,
         settings={"runtime.engine": "stock", "training_config.gradient_checkpointing": False}),
    Case("llama-1b", "loraflow, Llama-3.2-1B's shape, bf16, 16k tokens", shape=LLAMA_1B),
    Case("llama-1b-elementwise", "the same, elementwise operations recomputed", shape=LLAMA_1B, settings=ELEMENTWISE),
    Case("llama-1b-graphs", "the same, recorded as CUDA graphs", shape=LLAMA_1B, settings={"runtime.cuda_graphs": "on"}),
    Case("unsloth", "unsloth: packing, its varlen branch, nothing recomputed, 16k tokens", peer="unsloth",
         baseline={"packing": True}),
    Case("unsloth-nf4", "unsloth: QLoRA nf4, 8k tokens", rows=4, peer="unsloth",
         baseline={"packing": True, "load_in_4bit": True}),
    Case("unsloth-llama", "unsloth: Llama-3.2-1B's shape, bf16, 16k tokens", peer="unsloth", shape=LLAMA_1B,
         baseline={"packing": True}),
    Case("trl-best", "trl: bfd packing, padding-free, liger, varlen FA2, nothing recomputed", rows=4, timed=16, peer="trl",
         baseline={"packing": True, "gradient_checkpointing": False, "use_liger_kernel": True}),
    Case("card", "the model card's recipe: padded batches of 4, recomputed, sdpa, dropout 0.05", timed=20, peer="trl",
         baseline={"per_device_train_batch_size": 4, "gradient_checkpointing": True}),
    Case("card-nocudnn", "the same without cuDNN's attention, which makes a plan for each shape", timed=20, peer="trl",
         baseline={"per_device_train_batch_size": 4, "gradient_checkpointing": True, "cudnn": False}),
]  # fmt: skip
for shape in FAMILIES:  # `train_gpu.py qwen3-0.6b qwen3-0.6b-unsloth qwen3-0.6b-trl`
    CASES += [
        Case(shape.name, "loraflow, bf16, 16k tokens", shape=shape),
        Case(f"{shape.name}-unsloth", "unsloth: packing, 16k tokens", peer="unsloth", shape=shape,
             baseline={"packing": True}),
        Case(f"{shape.name}-trl", "trl: packing, padding-free, liger, varlen FA2, 8k tokens", rows=4, timed=16, peer="trl",
             shape=shape, baseline={"packing": True, "gradient_checkpointing": False, "use_liger_kernel": True}),
    ]  # fmt: skip


def recipe_of(case: Case, **overrides: Setting) -> Recipe:
    """Return the recipe of a case."""
    from loraflow.config import parse_recipe

    steps = WARM_UP + case.timed
    settings = {
        **SETTINGS,
        "training_config.max_steps": steps,
        "peft_config.target_modules": list(case.shape.targets),
        "training_config.per_device_train_batch_size": case.rows,
    }
    return parse_recipe("name: bench\nbase: {model: x}\n", overrides={**settings, **case.settings, **overrides})
