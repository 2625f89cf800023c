"""Names that newer transformers, trl and peft dropped: translated with a warning, or refused with their successor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# section → old name → new name; the value is carried over as it is.
TRANSLATED: dict[str, dict[str, str]] = {
    "training_config": {
        "evaluation_strategy": "eval_strategy",
        "max_seq_length": "max_length",
        "warmup_ratio": "warmup_steps",  # a float below 1 is a share of the steps
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    },
    "base": {"torch_dtype": "dtype", "model_name_or_path": "model"},
    "peft_config": {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
}

# Keys of the model card's script that say nothing about a run of ours: accepted, and said.
IGNORED: dict[str, dict[str, str]] = {
    "training_config": {
        "output_dir": "the store decides where artifacts lie (runtime.store)",
        "overwrite_output_dir": "artifacts are immutable; `--force train` computes one again",
        "do_eval": "evaluation is a stage of its own",
        "remove_unused_columns": "the tokenize stage keeps only what training reads",
    },
}

# Keys that would change what is trained, if we guessed: refused, with where the setting lives now.
REFUSED: dict[str, dict[str, str]] = {
    "training_config": {
        "tokenizer": "the tokenizer is the base model's (base.model)",
        "processing_class": "the tokenizer is the base model's (base.model)",
        "dataset_text_field": "rows are chats; set data.format",
        "formatting_func": "rows are chats; set data.format",
        "assistant_only_loss": "set data.loss_on: assistant",
        "completion_only_loss": "set data.loss_on: assistant",
        "attn_implementation": "set runtime.attn_implementation",
        "torch_dtype": "set base.dtype",
        "model_init_kwargs": "set base.dtype, base.quantization, runtime.attn_implementation",
        "packing_strategy": "packing is best-fit-decreasing over the whole set; set packing: true",
        "padding_free": "packed rows have no padding; set packing: true",
        "push_to_hub": "registering is a step of its own; see `register`",
        "resume_from_checkpoint": "unfinished training resumes by itself",
        "per_gpu_train_batch_size": "set per_device_train_batch_size",
        "no_cuda": "set runtime.device: cpu",
        "use_cpu": "set runtime.device: cpu",
        "deepspeed": "set runtime.devices",
        "fsdp": "set runtime.devices",
        "torch_compile": "set runtime.compile",
    },
    "base": {
        "device_map": "set runtime.device",
        "load_in_4bit": "set base.quantization: nf4",
        "load_in_8bit": "set base.quantization: nf4",
        "low_cpu_mem_usage": "weights are always loaded that way",
    },
    "peft_config": {
        "peft_type": "this is always LORA; leave it out",
        "inference_mode": "training decides; leave it out",
    },
}


def translate(section: str, values: dict[str, Any], problem: Callable[[str, str], None]) -> tuple[dict, list[str]]:
    """Return a section's values under today's names, and a warning for each that was changed.

    `problem(key, message)` is called for each key that is refused.
    """
    out: dict[str, Any] = {}
    warnings = []
    for key, value in values.items():
        if key in TRANSLATED.get(section, {}):
            new = TRANSLATED[section][key]
            if new in values:
                problem(key, f"was renamed to {new}, which stands here too; leave {key} out")
                continue
            warnings.append(f"{section}.{key} is read as {section}.{new}")
            out[new] = value
        elif key in IGNORED.get(section, {}):
            warnings.append(f"{section}.{key} has no effect: {IGNORED[section][key]}")
        elif key in REFUSED.get(section, {}):
            problem(key, f"is no setting here: {REFUSED[section][key]}")
        else:
            out[key] = value
    return out, warnings
