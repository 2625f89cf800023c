"""How a training runs on this machine: attention, precision, what goes into memory at a time, what is compiled.

Every choice is said once, with its reason, and kept in the artifact's telemetry. None of it is part of identity.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loraflow.config.recipe import TrainerSettings
from loraflow.config.stage_configs import JobRuntime, TrainConfig
from loraflow.data.token_rows import TokenRows
from loraflow.failures import BadConfig, OutOfMemory
from loraflow.hardware.group import Group
from loraflow.training import batches, memory, sharding
from loraflow.training import prefix_sharing as shared
from loraflow.training.attention import Attention, choose

log = logging.getLogger(__name__)

# Compiling took 10 s with a warm cache and 30 s without; a token then takes 15 µs less (one H100, Phi-3 mini).
WORTH_COMPILING = 2_000_000  # tokens of a run


@dataclass
class Engine:
    """One training on one machine. `trainer` builds it."""

    base: Path
    config: TrainConfig
    settings: TrainerSettings
    runtime: JobRuntime
    rows: TokenRows
    validation: TokenRows | None
    order: np.ndarray
    group: Group
    stopper: Any
    callbacks: list[Any]
    tokenizer: Any
    arguments: Callable[..., Any]  # the trainer's, given what the engine decides
    work: Path  # a folder that a resumed run finds again
    sharing: shared.Sharing | None = None  # of what the rows of a grid begin with
    sharded: bool = False  # the devices hold the base together
    initial: dict[str, Any] = field(default_factory=dict)  # of PiSSA and OLoRA, to write the adapter on the base itself
    said: dict[str, Any] = field(default_factory=dict)

    def trainer(self) -> Any:
        """Load the base, put the adapter in, and return the trainer."""
        from transformers import AutoConfig

        from loraflow.base.load import pick_device

        base, device = self.config.base, pick_device(self.runtime)
        model_config = AutoConfig.from_pretrained(self.base, trust_remote_code=base.trust_remote_code)
        fast = self.runtime.engine == "fast"
        attention = choose(self.runtime, device, self._computes_in(), model_config)
        if attention.flat and not fast:  # trl's collator pads, or packs behind position ids: sdpa gets a mask for both
            attention = Attention("sdpa", False, "sdpa", "the stock engine's rows are padded")
        if attention.flat and self.config.peft_config.init_lora_weights == "eva":
            attention = Attention("sdpa", False, "sdpa", "EVA looks at padded rows first")
        self._look_at_devices(device)
        self._shard_or_not(device, attention, fast)
        model = self._load(attention, device)
        if fast and not self._head_is_plain(model):
            log.info("the loss is left to trl: this model's logits are more than its head's product")
            fast = False
        self.said |= {
            "engine": "fast" if fast else "stock",
            "attention": attention.kernel,
            "attention_why": attention.why,
        }
        self.said |= {"device": _device_name(device), "dtype": self._computes_in()}
        if device == "cpu" and self._computes_in() == "bfloat16" and not _cpu_has_bfloat16():
            log.warning(
                "this CPU has no bfloat16 units: base.dtype: float32 with training_config.bf16: false is far faster"
            )
        return self._fast(model, attention, device) if fast else self._stock(model)

    def _load(self, attention: Attention, device: str) -> Any:
        from loraflow.adapters import variants
        from loraflow.adapters.lora_config import check_reach, check_targets
        from loraflow.base.load import load_model

        base = self.config.base
        double = base.double_quantization if base.quantization == "nf4" else None
        if base.quantization == "fp8":
            _refuse_fp8(device, self._computes_in(), self.runtime.engine)
        model = load_model(
            self.base, base.dtype, self.runtime, double_quantization=double, trust=base.trust_remote_code,
            attention=attention.implementation, weights_device="cpu" if self.sharded else None,
        )  # fmt: skip
        model.config.use_cache = self.runtime.use_cache
        check_targets(model, self.config.peft_config)
        check_reach(model, self.config.peft_config)
        variants.check(model, self.config.peft_config)
        if self.config.method == "loralib":
            from loraflow.adapters.loralib.model import prepare
            from loraflow.adapters.loralib.swap import Settings

            settings = Settings.of(self.config.peft_config, self.config.loralib_config)
            model = prepare(model, settings, self.settings.seed, checkpointing=self._stock_recomputes())
        return sharding.shard(model, device, self.group.size) if self.sharded else model

    def _look_at_devices(self, device: str) -> None:
        """Refuse unlike GPUs: a step is as fast as the slowest, and as large as the smallest has room for."""
        names = self.group.all_say(_device_name(device))
        if len(set(names)) > 1:
            raise BadConfig(
                "The devices that train together are of several types.", where="runtime.devices",
                expected="one type of GPU", got=", ".join(sorted(set(names))),
                next_step="choose like ones by CUDA_VISIBLE_DEVICES, and set runtime.devices to their number",
            )  # fmt: skip

    def _shard_or_not(self, device: str, attention: Attention, fast: bool) -> None:
        """Decide whether the devices hold the base together."""
        told = self.runtime.shard_base
        if self.group.size == 1 or told == "off":
            why = "told so" if told == "off" else "there is one device"
        elif told == "on":
            self.sharded, why = True, "told so"
        elif device == "cpu" or (shape := self._shape()) is None:
            why = "not asked for"
        else:
            longest = self.rows.row_length or int(self.rows.lengths.max())
            least, _ = memory.needed(shape, self._weights(), self.config.peft_config.r, longest)
            free = self._free()
            self.sharded = least > free
            why = f"one needs {least / memory.GIB:.1f} GiB, and has {free / memory.GIB:.1f}"
        if self.sharded:
            sharding.refuse(self.config, "fast" if fast else "stock")
        self.said |= {"base_sharded": self.sharded, "base_sharded_why": why}

    def _shape(self) -> memory.Shape | None:
        return memory.shape_of(json.loads((self.base / "config.json").read_text(encoding="utf-8")))

    def _weights(self) -> str:
        return str(self.config.base.quantization or self.config.base.dtype)

    def _free(self) -> float:
        """Return the bytes of GPU memory that every device has, what this process holds included."""
        import torch

        return min(self.group.all_say(torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()))

    def _stock_recomputes(self) -> bool:
        return self.runtime.engine == "stock" and self.settings.gradient_checkpointing is not False

    def _begin(self, trainer: Any) -> Any:
        """Initialise what needs data or the base's weights, and set LoRA+'s rates; return the trainer."""
        from loraflow.adapters import variants

        peft_config = self.config.peft_config
        rows = (self.rows[int(row)] for row in self.order[: variants.EVA_ROWS])
        first = batches.batches_of(rows, self.tokenizer.pad_token_id)
        self.initial = variants.initialize(trainer.model, peft_config, self.base, self.work, first)
        if peft_config.loraplus_lr_ratio:
            trainer.loraplus = (peft_config.loraplus_lr_ratio, peft_config.loraplus_lr_embedding)
        return trainer

    def _lora_config(self) -> Any:
        from loraflow.adapters.lora_config import lora_config

        return lora_config(self.config.peft_config) if self.config.method == "peft" else None

    @staticmethod
    def _head_is_plain(model: Any) -> bool:
        from loraflow.base.load import head_is_plain

        text = model.config.get_text_config()
        routed = getattr(text, "output_router_logits", False) or getattr(text, "num_local_experts", 0)
        return head_is_plain(model) and not routed

    def _computes_in(self) -> str:
        """Return the dtype of products: the base's, or autocast's where that is another one."""
        if self.settings.bf16:
            return "bfloat16"
        return "float16" if self.settings.fp16 else str(self.config.base.dtype)

    # -- stock -------------------------------------------------------------------------------------------------------

    def _stock(self, model: Any) -> Any:
        from loraflow.training.trainer import StockTrainer

        wanted = self.runtime.micro_batch or self.settings.per_device_train_batch_size
        share = max(1, self.config.training_config.global_batch // self.group.size)
        if share * self.group.size != self.config.training_config.global_batch:
            raise BadConfig(
                "The stock engine needs a global batch that its devices divide.", where="runtime.devices",
                expected=f"a divisor of {self.config.training_config.global_batch}", got=str(self.group.size),
                next_step="set runtime.engine to fast",
            )  # fmt: skip
        rows = batches.micro_batch(share, wanted)
        self.said |= {"rows_at_once": rows}
        trainer = StockTrainer(
            model=model,
            args=self.arguments(
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=share // rows,
                gradient_checkpointing=self._stock_recomputes(),
                gradient_checkpointing_kwargs=self.settings.gradient_checkpointing_kwargs,
            ),
            train_rows=self.order,
            validation_rows=len(self.validation) if self.validation is not None else 0,
            collator=batches.Collator(self.rows, self.validation, self.tokenizer.pad_token_id),
            processing_class=self.tokenizer,
            peft_config=self._lora_config(),
            callbacks=self.callbacks,
        )
        return self._begin(trainer)

    # -- fast --------------------------------------------------------------------------------------------------------

    def _fast(self, model: Any, attention: Attention, device: str) -> Any:
        import torch

        from loraflow.training.lora_kernels import accelerate_loras, to_fp8
        from loraflow.training.trainer import FastTrainer, prepare_layers

        steps = self.order.reshape(-1, self.config.training_config.global_batch)
        fit = self._fit(model, attention, device, steps)
        self._share(model, attention)
        base_dtype, computes = getattr(torch, self.config.base.dtype), getattr(torch, self._computes_in())
        trainer = FastTrainer(
            model=model,
            args=self.arguments(
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                gradient_checkpointing=False,
                activation_offloading=fit.recompute == "offload",
            ),
            steps=self._steps(self.rows, steps, self._layout(self.rows, steps, attention, fit), trains=True),
            validation=self._validation(attention, fit),
            group=self.group,
            stopper=self.stopper,
            autocast=computes if computes != base_dtype else None,
            processing_class=self.tokenizer,
            peft_config=self._lora_config(),
            callbacks=self.callbacks,
        )
        self._begin(trainer)
        for parameter in trainer.trained:  # trl casts a quantized base's adapter to 16 bits, where small steps are lost
            parameter.data = parameter.data.float()
        if trainer.autocast_dtype is None:
            trainer.loras = accelerate_loras(trainer.model, base_dtype)
            ours = {id(parameter) for module in trainer.loras for parameter in module.parameters()}
            # What else is trained (a whole module, DoRA, loralib's layers) is fp32 among 16 bits: autocast's matter.
            if computes != torch.float32 and any(id(parameter) not in ours for parameter in trainer.trained):
                trainer.autocast_dtype = computes
        if self.config.base.quantization == "fp8":
            to_fp8(trainer.loras)
        share = {"none": 0.0, "offload": 0.0}.get(fit.recompute, fit.share)
        compiled = prepare_layers(trainer, compiled=self._compiles(device, attention), recomputed=share)
        self.said |= {"tokens_at_once": fit.tokens, "recompute": fit.recompute, "recompute_why": fit.why}
        self.said |= sharding.held(trainer.model)
        self.said |= {"layers_recomputed": fit.share, "fast_loras": len(trainer.loras), "compiled_layers": compiled}
        return trainer

    def _steps(self, rows: TokenRows, steps: np.ndarray, layout: Any, *, trains: bool) -> batches.Steps:
        drops = trains and self.config.peft_config.lora_dropout > 0
        return batches.Steps(
            rows, steps, layout, self.tokenizer.pad_token_id, seed=self.settings.seed, dropout=drops,
            rank=self.group.rank, devices=self.group.size, sharing=self.sharing, even=self.sharded,
        )  # fmt: skip

    def _share(self, model: Any, attention: Attention) -> None:
        """Let the rows of a grid share what they begin with, where that is exact."""
        shape = self._shape()
        if attention.flat or self.rows.row_length or shape is None:
            return
        drops = self.config.peft_config.lora_dropout > 0
        longest = max(int(one.lengths.max(initial=0)) for one in (self.rows, self.validation) if one is not None)
        why_not = "dropout differs from row to row" if drops else shared.obstacle(model, longest)
        self.sharing = None if why_not else shared.Sharing.of(shape)
        self.said |= {"shared_prefix": why_not or "computed once where rows begin with the same"}

    def _validation(self, attention: Attention, fit: memory.Fit) -> batches.Steps | None:
        if self.validation is None:
            return None
        whole = np.arange(len(self.validation))[None]
        if attention.flat:
            layout: Any = batches.flat_layout(self.validation, whole, fit.tokens, self.group.size)
        else:
            layout = self.settings.per_device_eval_batch_size
        return self._steps(self.validation, whole, layout, trains=False)

    def _layout(self, rows: TokenRows, steps: np.ndarray, attention: Attention, fit: memory.Fit) -> Any:
        if attention.flat:
            return batches.flat_layout(rows, steps, fit.tokens, self.group.size)
        share = math.ceil(steps.shape[1] / self.group.size)
        wanted = self.runtime.micro_batch or self.settings.per_device_train_batch_size
        rows_at_once = min(wanted, share)
        self.said |= {"rows_at_once": rows_at_once}
        return rows_at_once

    def _fit(self, model: Any, attention: Attention, device: str, steps: np.ndarray) -> memory.Fit:
        """Decide how many tokens go in at a time, and what is recomputed."""
        told = self.runtime.checkpointing
        recompute: memory.Recompute | None = None if told == "auto" else told
        if recompute is None and self.settings.gradient_checkpointing is not None:
            recompute = "full" if self.settings.gradient_checkpointing else "none"
        least = self.rows.row_length or int(self.rows.lengths.max())
        share = math.ceil(steps.shape[1] / self.group.size)
        packed = share * self.rows.row_length if self.rows.row_length else 0
        wanted = packed or math.ceil(int(self.rows.tokens[steps].sum(1).max()) / self.group.size)
        tokens = self.runtime.micro_tokens or (self.runtime.micro_batch or 0) * least
        shape = self._shape()
        if device == "cpu" or shape is None or not attention.flat:
            share = {"full": 1.0, "selective": 0.5}.get(recompute or "none", 0.0)
            why = "as told" if recompute else "not asked for"
            return memory.Fit(tokens or max(least, 4096), recompute or "none", share, why)
        found = memory.fit(shape, self._free(), self._weights(), self.config.peft_config.r, least=least,
                           wanted=tokens or wanted, told=recompute,
                           devices=self.group.size if self.sharded else 1)  # fmt: skip
        return memory.Fit(max(least, tokens), found.recompute, found.share, found.why) if tokens else found

    def _compiles(self, device: str, attention: Attention) -> bool:
        told = self.runtime.compile
        if told != "auto":
            return told == "on"
        tokens = int(self.rows.tokens[self.order].sum()) / self.group.size
        return device == "cuda" and attention.flat and tokens >= WORTH_COMPILING


def _refuse_fp8(device: str, computes_in: str, engine: str) -> None:
    import torch

    if device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise BadConfig(
            "The products of an fp8 base need a GPU that computes in fp8.",
            where="base.quantization",
            expected="compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
            got=_device_name(device),
            next_step="set base.quantization to null (bfloat16), or nf4 to save memory",
        )
    if computes_in != "bfloat16" or engine != "fast":
        raise BadConfig(
            "An fp8 base goes with bfloat16 and the fast engine.",
            where="base.quantization",
            got=f"{computes_in}, engine {engine}",
            next_step="set training_config.bf16: true, base.dtype: bfloat16 and runtime.engine: fast",
        )


def _cpu_has_bfloat16() -> bool:
    import torch

    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return platform.machine() not in ("x86_64", "AMD64") or any(probe() for probe in probes if probe is not None)


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


@contextlib.contextmanager
def answers_to_out_of_memory(engine: Engine) -> Iterator[None]:
    """Turn the GPU's out-of-memory error into a failure that says what to try instead."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        said = engine.said
        least = engine.rows.row_length or int(engine.rows.lengths.max())
        instead: dict[str, Any] = {}
        if (rows := said.get("rows_at_once", 1)) > 1:
            instead = {"micro_batch": rows // 2}
        elif said.get("tokens_at_once", 0) > least and "rows_at_once" not in said:
            instead = {"micro_tokens": max(least, said["tokens_at_once"] // 2)}
        elif said.get("recompute") not in (None, "full"):
            instead = {"checkpointing": "full"}
        raise OutOfMemory(
            "The GPU's memory did not suffice.",
            where=f"train, {json.dumps(said)}"[:600],
            got=str(error)[:300],
            next_step="lower training_config.max_length, or quantize the base (base.quantization: nf4)",
            instead=instead,
        ) from error
