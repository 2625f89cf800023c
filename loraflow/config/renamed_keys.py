"""Keys that newer transformers, trl and peft renamed or removed: translated with a warning, or refused with a hint."""

from typing import NamedTuple

from pydantic import JsonValue

from loraflow.config.yaml import apply, scalars

# section → old name → new name. The value is unchanged.
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

# Keys of the model card's script that have no effect here: accepted with a warning. section → key → reason
IGNORED: dict[str, dict[str, str]] = {
    "training_config": {
        "output_dir": "artifacts are in the store (runtime.store)",
        "overwrite_output_dir": "artifacts are immutable; `--force train` recomputes the adapter",
        "do_eval": "evaluation is a separate stage",
        "remove_unused_columns": "the tokenize stage keeps only what training reads",
    },
}

# Keys whose translation would be a guess that changes the training: refused. section → key → what to set instead
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
        "packing_strategy": "packing is always best-fit-decreasing over the whole set; set packing: true",
        "padding_free": "packed rows have no padding; set packing: true",
        "push_to_hub": "registering is a separate step; see `register` and `publish`",
        "resume_from_checkpoint": "unfinished training resumes automatically",
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
        "low_cpu_mem_usage": "weights are always loaded this way",
    },
    "peft_config": {
        "peft_type": "it is always LORA; leave it out",
        "inference_mode": "it is set automatically; leave it out",
    },
}


class Translated(NamedTuple):
    """A section's values with current names."""

    values: dict[str, JsonValue]
    warnings: list[str]  # for each key that was renamed or has no effect
    refused: dict[str, str]  # key → what is wrong with it


def current_name(dotted: str) -> str:
    """Return a dotted key with the current name of a renamed one."""
    section, _, key = dotted.partition(".")
    return f"{section}.{TRANSLATED.get(section, {}).get(key, key)}" if key else section


def translate(section: str, values: dict[str, JsonValue]) -> Translated:
    """Translate the keys of a section."""
    out: dict[str, JsonValue] = {}
    warnings: list[str] = []
    refused: dict[str, str] = {}
    for key, value in values.items():
        if key in TRANSLATED.get(section, {}):
            new = TRANSLATED[section][key]
            if new in values:
                refused[key] = f"was renamed to {new}, which is set too; leave {key} out"
                continue
            warnings.append(f"{section}.{key} is read as {section}.{new}")
            out[new] = value
        elif key in IGNORED.get(section, {}):
            warnings.append(f"{section}.{key} has no effect: {IGNORED[section][key]}")
        elif key in REFUSED.get(section, {}):
            refused[key] = f"is not supported: {REFUSED[section][key]}"
        else:
            out[key] = value
    return Translated(out, warnings, refused)


class Upgraded(NamedTuple):
    """A file's text after the upgrade, and what a person has to do."""

    text: str
    notes: list[str]


def rename_keys(text: str) -> Upgraded:
    """Return a recipe's text with the current names, and a note for each key that a person has to look at.

    Raises:
        Syntax: the text is not valid YAML.
    """
    keys = [scalar for scalar in scalars(text) if scalar.is_key and len(scalar.path) == 2]
    present = {scalar.path for scalar in keys}
    edits, notes = [], []
    for key in keys:
        section, old = str(key.path[0]), key.value
        line = text.count("\n", 0, key.start) + 1
        new = TRANSLATED.get(section, {}).get(old)
        if new is not None and (section, new) in present:
            notes.append(f"line {line}: {section}.{old} and {section}.{new} are both set; leave {old} out")
        elif new is not None:
            edits.append(key.replaced_by(new))
        elif old in IGNORED.get(section, {}):
            notes.append(f"line {line}: {section}.{old} has no effect: {IGNORED[section][old]}")
        elif old in REFUSED.get(section, {}):
            notes.append(f"line {line}: {section}.{old} is not supported: {REFUSED[section][old]}")
    return Upgraded(apply(text, edits), notes)
