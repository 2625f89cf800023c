"""Build the fast trainer, which has its own batches, loss and LoRA kernels, and compiles the layers."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from loraflow.data.tokens.token_files import TokenRows
from loraflow.hardware.attention import Attention
from loraflow.training.base_model import adapter_config, initialise_adapter
from loraflow.training.batches import (
    GridRows,
    Layout,
    PrefixSharing,
    StepDataset,
    concatenated_layout,
    obstacle_to_sharing,
)
from loraflow.training.choices import EngineChoices
from loraflow.training.choices import frozen_bytes as count_frozen_bytes
from loraflow.training.cuda_graphs import (
    COMPILE_SECONDS,
    FLOPS,
    LENGTH_SECONDS,
    RECORDING_PASSES,
    GraphedPass,
    choose_graphs,
    seconds_saved,
)
from loraflow.training.layers import prepare_layers
from loraflow.training.lora_kernels import accelerate_loras, to_fp8
from loraflow.training.memory import ENOUGH_TOKENS, MemoryFit, MicroBatchSize, Recompute, fit_memory
from loraflow.training.setup import BatchSettings, TrainingSetup, trainer_arguments
from loraflow.training.trainer import BuiltTrainer, FastTrainer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel
    from trl import SFTConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Passes:
    """The passes of a training on one device."""

    fit: MemoryFit
    tokens: int  # tokens of a pass
    count: int  # in the whole training
    is_compiling: bool  # whether compiling pays off if no passes are recorded


def build_fast_trainer(
    setup: TrainingSetup, model: PreTrainedModel, attention: Attention, choices: EngineChoices
) -> BuiltTrainer:
    """Build the trainer, and prepare its model's layers."""
    passes = _plan_passes(setup, attention)
    fit = passes.fit
    sharing, sharing_note = choose_prefix_sharing(setup, model, attention)
    micro_batch_rows = None if attention.concatenated else grid_rows(setup)
    base_dtype: torch.dtype = getattr(torch, setup.config.base.dtype)
    compute_dtype: torch.dtype = getattr(torch, setup.compute_dtype)
    trainer = FastTrainer(
        model=model,
        args=_arguments(setup, fit),
        steps=_training_steps(
            setup,
            fit,
            micro_batch_rows,
            sharing,
            length_cost=cost_of_length(setup, passes.tokens, passes.is_compiling),
        ),
        validation=_validation_steps(setup, fit, attention, sharing),
        group=setup.group,
        autocast=compute_dtype if compute_dtype != base_dtype else None,
        noise_alpha=setup.settings.neftune_noise_alpha,
        processing_class=setup.tokenizer,
        peft_config=adapter_config(setup, model),
        callbacks=setup.callbacks,
    )
    initial = initialise_adapter(setup, trainer)
    _prepare_adapter(setup, trainer, base_dtype, compute_dtype)
    is_graphed, graphs_why, compiled_why = _accelerate(setup, attention, passes, trainer)
    frozen_bytes, replicated_bytes = count_frozen_bytes(trainer.model)
    choices = replace(
        choices,
        micro_batch_rows=micro_batch_rows,
        micro_batch_tokens=fit.tokens,
        recompute=fit.recompute,
        recompute_why=fit.why,
        layers_recomputed=fit.share,
        elementwise_recomputed=fit.elementwise,
        shared_prefix=sharing_note,
        frozen_bytes=frozen_bytes,
        replicated_bytes=replicated_bytes,
        fast_loras=len(trainer.loras),
        compiled_layers=len(trainer.compiled_layers),
        compiled_why=compiled_why,
        cuda_graphs=is_graphed,
        cuda_graphs_why=graphs_why,
    )
    size = MicroBatchSize(setup.longest_row, rows=micro_batch_rows, tokens=fit.tokens, recompute=fit.recompute)
    return BuiltTrainer(trainer, choices, size, initial)


def _plan_passes(setup: TrainingSetup, attention: Attention) -> _Passes:
    """Choose the size of a micro-batch. Layers recompute elementwise operations only if they are compiled."""
    fit = choose_memory_fit(setup, attention)
    tokens, count = passes_of(setup, fit.tokens)
    is_compiling = choose_compile(setup, attention, tokens, count, graphed=False)[0]
    # If it is asked for, the layers are compiled for it, whatever time that saves.
    if fit.elementwise and not is_compiling and setup.runtime.checkpointing != "elementwise":
        fit = choose_memory_fit(setup, attention, compiled=False)
        tokens, count = passes_of(setup, fit.tokens)
    return _Passes(fit, tokens, count, is_compiling)


def _arguments(setup: TrainingSetup, fit: MemoryFit) -> SFTConfig:
    """Return the trainer's arguments. The dataset's items are whole optimizer steps."""
    batch_settings = BatchSettings(
        rows=1, accumulation=1, gradient_checkpointing=False, activation_offloading=fit.recompute == "offload"
    )
    arguments = trainer_arguments(setup, batch_settings, setup.runtime.engine)
    arguments.neftune_noise_alpha = None  # not transformers' noise, but `add_noise`
    return arguments


def _accelerate(
    setup: TrainingSetup, attention: Attention, passes: _Passes, trainer: FastTrainer
) -> tuple[bool, str, str]:
    """Record passes as CUDA graphs and compile the trainer's layers, where that pays off.

    Returns:
        whether passes are recorded, why, and why the layers are compiled or not.
    """
    fit = passes.fit
    is_graphed, graphs_why = choose_graphs(setup, attention, fit, trainer, passes=passes.count)
    log.info("passes are %srecorded as CUDA graphs: %s", "" if is_graphed else "not ", graphs_why)

    def compile_after_all() -> None:
        """Compile the layers, if that was not worthwhile only because passes were to be recorded."""
        pays_off, why = choose_compile(setup, attention, passes.tokens, passes.count, graphed=False)
        if pays_off and not trainer.compiled_layers and fit.recompute == "none":
            log.info("layers are compiled: %s", why)
            trainer.compiled_layers = prepare_layers(trainer.decoder, compiled=True, recomputed=0.0)

    if is_graphed:
        trainer.graphs = GraphedPass(trainer.hidden_states, trainer.trained, compile_after_all)
    is_compiled, compiled_why = choose_compile(setup, attention, passes.tokens, passes.count, graphed=is_graphed)
    if fit.elementwise and not is_compiled:
        is_compiled, compiled_why = True, fit.why
    log.info("layers are %scompiled: %s", "" if is_compiled else "not ", compiled_why)
    trainer.compiled_layers = prepare_layers(
        trainer.decoder,
        compiled=is_compiled,
        recomputed=0.0 if fit.recompute == "offload" else fit.share,  # offloaded activations are not recomputed
        elementwise=fit.elementwise,
    )
    return is_graphed, graphs_why, compiled_why


def choose_memory_fit(
    setup: TrainingSetup, attention: Attention, *, compiled: bool = True, adapters: int = 1
) -> MemoryFit:
    """Choose the tokens of a micro-batch, and what is recomputed in the backward pass.

    Args:
        adapters: the adapters that are trained in one pass. A micro-batch has the tokens of all of them.
    """
    recompute: Recompute | None = None if setup.runtime.checkpointing == "auto" else setup.runtime.checkpointing
    if recompute is None and setup.settings.gradient_checkpointing is not None:
        recompute = "full" if setup.settings.gradient_checkpointing else "none"
    least = setup.longest_row
    tokens = setup.runtime.micro_tokens or (setup.runtime.micro_batch or 0) * least
    if setup.device == "cpu" or setup.shape is None or not attention.concatenated:
        share = {"full": 1.0, "selective": 0.5}.get(recompute or "none", 0.0)
        why = "asked for" if recompute else "not asked for"
        if recompute == "elementwise":
            recompute, why = "none", "elementwise needs concatenated documents on a GPU"
        return MemoryFit(tokens or max(least, 4096), recompute or "none", share, why)
    least *= adapters
    if setup.rows.row_length:
        step_tokens = setup.rows_per_device * setup.rows.row_length
    else:
        step_tokens = math.ceil(int(setup.rows.tokens[setup.step_rows].sum(1).max()) / setup.group.size)
    found = fit_memory(
        setup.shape,
        setup.free_bytes(),
        setup.weight_format,
        setup.rank,
        least=least,
        step_tokens=tokens or step_tokens * adapters,
        recompute=recompute,
        devices=setup.group.size if setup.is_sharded else 1,
        compiled=compiled and setup.runtime.compile != "off",
        enough=tokens or ENOUGH_TOKENS,
        width=setup.activation_width,
    )
    return replace(found, tokens=max(least, tokens)) if tokens else found


def choose_prefix_sharing(
    setup: TrainingSetup, model: PreTrainedModel, attention: Attention
) -> tuple[PrefixSharing | None, str | None]:
    """Choose whether to compute the common prefix of a grid's rows only once, if that is exact; return also why."""
    if attention.concatenated or setup.rows.row_length or setup.shape is None:
        return None, None
    if setup.config.peft_config.lora_dropout > 0:
        return None, "dropout differs from row to row"
    if setup.settings.neftune_noise_alpha is not None:
        return None, "noise differs from row to row"
    if setup.longrope_switch is not None:
        return None, "long documents have different rotary angles"
    sets = [rows for rows in (setup.rows, setup.validation) if rows is not None]
    obstacle = obstacle_to_sharing(model, max(int(rows.lengths.max(initial=0)) for rows in sets))
    if obstacle:
        return None, obstacle
    return PrefixSharing.of(setup.shape), "computed once if the rows of a micro-batch have a common prefix"


def grid_rows(setup: TrainingSetup) -> int:
    """Return the rows of a micro-batch whose rows are padded."""
    rows = setup.runtime.micro_batch or setup.settings.per_device_train_batch_size
    return min(rows, setup.rows_per_device)


def _training_steps(
    setup: TrainingSetup,
    fit: MemoryFit,
    micro_batch_rows: int | None,
    sharing: PrefixSharing | None,
    *,
    length_cost: float,
) -> StepDataset:
    layout = choose_layout(setup.rows, setup.step_rows, fit, micro_batch_rows, setup.group.size, length_cost)
    dropout = setup.config.peft_config.lora_dropout > 0
    noise = setup.settings.neftune_noise_alpha is not None
    return _step_dataset(setup, setup.rows, setup.step_rows, layout, sharing, dropout=dropout, noise=noise)


def _validation_steps(
    setup: TrainingSetup, fit: MemoryFit, attention: Attention, sharing: PrefixSharing | None
) -> StepDataset | None:
    """Return the validation rows as a single step; None without any."""
    if setup.validation is None:
        return None
    step = np.arange(len(setup.validation))[None]
    rows = None if attention.concatenated else setup.settings.per_device_eval_batch_size
    layout = choose_layout(setup.validation, step, fit, rows, setup.group.size)
    return _step_dataset(setup, setup.validation, step, layout, sharing, dropout=False, noise=False)


def choose_layout(
    rows: TokenRows,
    steps: NDArray[np.int64],
    fit: MemoryFit,
    grid_rows: int | None,
    devices: int = 1,
    length_cost: float = 0.0,
) -> Layout:
    """Return the layout of micro-batches: a grid of `grid_rows` rows; with None, concatenated documents."""
    if grid_rows is not None:
        return GridRows(grid_rows)
    return concatenated_layout(rows, steps, fit.tokens, devices, length_cost)


def _step_dataset(
    setup: TrainingSetup,
    rows: TokenRows,
    steps: NDArray[np.int64],
    layout: Layout,
    sharing: PrefixSharing | None,
    *,
    dropout: bool,
    noise: bool,
) -> StepDataset:
    return StepDataset(
        rows,
        steps,
        layout,
        setup.tokenizer.pad_token_id,
        seed=setup.settings.seed,
        dropout=dropout,
        noise=noise,
        group=setup.group,
        sharing=sharing,
        equal_count=setup.is_sharded,
        with_positions=setup.longrope_switch is not None,
    )


def cost_of_length(setup: TrainingSetup, tokens: int, is_compiling: bool) -> float:
    """Return what one more length of micro-batches costs, in tokens of padding.

    Args:
        is_compiling: whether the layers are compiled, once for each length. Otherwise, passes may be recorded.
    """
    if not is_compiling or setup.shape is None:
        return RECORDING_PASSES * tokens
    return LENGTH_SECONDS * FLOPS[setup.activation_width] / (4 * setup.shape.linear_weights)


def passes_of(setup: TrainingSetup, micro_batch_tokens: int) -> tuple[int, int]:
    """Return (tokens of a pass, passes of the whole training), on one device."""
    tokens = int(setup.rows.tokens[setup.order].sum()) / setup.group.size
    passes = max(len(setup.step_rows), math.ceil(tokens / micro_batch_tokens))
    return int(tokens / passes), passes


def choose_compile(
    setup: TrainingSetup, attention: Attention, tokens: int, passes: int, *, graphed: bool
) -> tuple[bool, str]:
    """Return whether the layers are compiled, and why. A resumed training decides the same: the whole training counts."""
    if setup.runtime.compile != "auto":
        return setup.runtime.compile == "on", f"runtime.compile is {setup.runtime.compile}"
    if setup.device != "cuda" or not attention.concatenated or setup.shape is None:
        return False, "only concatenated documents on a GPU have the fixed shapes that it needs"
    shape, dropout = setup.shape, setup.config.peft_config.lora_dropout
    saved = seconds_saved(shape.hidden, shape.layers, dropout, passes, tokens, graphed=graphed)
    why = f"compiling takes about {COMPILE_SECONDS:.0f} s and would save about {saved:.0f} s in {passes:,} passes"
    return saved > COMPILE_SECONDS, why


def _prepare_adapter(
    setup: TrainingSetup, trainer: FastTrainer, base_dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """Keep the adapter in fp32, and use the fast LoRA kernels if the base computes in its own dtype."""
    # trl casts a quantized base's adapter to 16 bits, which rounds small updates away.
    for parameter in trainer.trained:
        parameter.data = parameter.data.float()
    if trainer.autocast_dtype is None:
        trainer.loras = accelerate_loras(trainer.model, base_dtype)
        accelerated = {id(parameter) for module in trainer.loras for parameter in module.parameters()}
        # Other trained parameters (full modules, DoRA, loralib's layers) are fp32 beside 16-bit weights: use autocast.
        others = any(id(parameter) not in accelerated for parameter in trainer.trained)
        if compute_dtype != torch.float32 and others:
            trainer.autocast_dtype = compute_dtype
    if setup.config.base.quantization == "fp8":
        to_fp8(trainer.loras)
