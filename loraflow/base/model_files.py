"""The files of a model's folder, copies of them, and the conversion of a Llama-shaped model to Phi-3's fused projections.

Phi-3 is Llama with fused projections, so concatenating rows gives a model with the same logits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.base.stored_weights import loaded_files, refuse_pickles
from loraflow.data.templates.tokenizer_config import further_templates
from loraflow.failures import BadModel

if TYPE_CHECKING:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Packages with which transformers converts a tokenizer to tokenizer.json, by the end of its file's name.
_CONVERTERS = {"tekken.json": "mistral-common", ".model": "sentencepiece protobuf", ".tiktoken": "tiktoken"}
# Texts that tokenizers of different classes treat differently.
SAMPLES = (
    "A color.",
    "It's 42: naïve, 你好 😀 ﬁ½ e\u0301 x\u00a0y",
    '{"a": [1, 2]}',
    "def f(x):\n\treturn x  # two\n\n12345",
    "No",
)
_MODEL_FILES = re.compile(
    r"^(config|generation_config)\.json$|^(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template).*"
    r"|^.*\.safetensors(\.index\.json)?$"
)


def model_files(folder: Path, trust: bool) -> list[str]:
    """Return the names of the files that make a model; with `trust`, the Python code that comes with it as well.

    Raises:
        BadModel: the folder has no config.json, or no safetensors.
    """
    names = _names(folder, trust=trust)
    if "config.json" not in names:
        raise BadModel(
            "The folder does not contain a model.",
            where=str(folder),
            expected="config.json",
            got="none",
            next_step="name the folder that holds config.json and the weights",
        )
    refuse_pickles(folder)
    return names


def _names(folder: Path, *, trust: bool) -> list[str]:
    found = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and (_MODEL_FILES.match(path.name) or (trust and path.suffix == ".py"))
    ]
    if "tokenizer.json" not in found:  # it is made from these files then
        found += _tokenizer_sources(folder)
    return sorted({*found, *further_templates(folder)})


def _tokenizer_sources(folder: Path) -> list[str]:
    """Return the names of files that are a tokenizer in another form: of sentencepiece, tiktoken or mistral-common."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(tuple(_CONVERTERS)))


def copy_model(folder: Path, out: Path, *, trust: bool, with_weights: bool = True) -> None:
    """Copy a model's files unchanged. Weights are hard links where the file system allows it.

    Files of weights that transformers does not load are left out: which of them a hub snapshot has depends on the cache.

    Args:
        trust: the model's own code may run, so it is copied too.
        with_weights: otherwise only the other files are copied.

    Raises:
        BadModel: the folder is no model's, its index of the weights is damaged, or its tokenizer cannot be read.
    """
    weights: set[str] = set()
    if with_weights:
        model_files(folder, trust)
        weights = {file.name for file in loaded_files(folder)}
    for name in _names(folder, trust=trust):
        source, target = (folder / name).resolve(), out / name
        if ".safetensors" in name and name not in weights:
            continue
        if name.endswith(".safetensors"):
            try:
                os.link(source, target)  # the store hashes what it reads, so it notices an edit in place
            except OSError:
                shutil.copyfile(source, target)
        elif name in ("config.json", "tokenizer_config.json") and not trust:
            _copy_without_auto_map(source, target)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    if not (out / "tokenizer.json").exists() or not (out / "tokenizer_config.json").exists():
        save_tokenizer(open_tokenizer(folder, trust=trust), out, trust=trust)
        if not (out / "tokenizer.json").exists():
            raise BadModel(
                "Training cannot read the base's tokenizer.",
                where=str(folder),
                expected="tokenizer.json, or files that transformers converts to it",
                got=", ".join(_tokenizer_sources(folder)) or "none",
                next_step="choose a copy of the model with tokenizer.json",
            )


def open_tokenizer(folder: Path, *, trust: bool) -> PreTrainedTokenizerBase:
    """Open a tokenizer with transformers.

    Raises:
        BadModel: transformers cannot open it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        tokenizer(SAMPLES[1])  # a class that does not fit tokenizer.json fails only here
    except Exception as error:  # tokenizers and the model's own code raise anything
        sources = [] if (folder / "tokenizer.json").exists() else _tokenizer_sources(folder)
        found = ((package, name) for end, package in _CONVERTERS.items() for name in sources if name.endswith(end))
        needed, source = next(found, (None, None))
        raise BadModel(
            "transformers cannot open the base's tokenizer.",
            where=str(folder),
            expected="tokenizer.json and tokenizer_config.json",
            got=source or " ".join(str(error).split())[:300] or type(error).__name__,
            next_step=f"pip install {needed}; or open the tokenizer where that is installed, and save it "
            "(save_pretrained) into the base's folder"
            if needed
            else "download the base model again, or choose another base",
        ) from error
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path, *, trust: bool) -> None:
    """Save a tokenizer so that, opened again, it gives the same ids.

    transformers does not save `legacy`, which old Llama tokenizers need: without it, no space is put behind special tokens.

    Raises:
        BadModel: what was saved gives other ids.
    """
    tokens = [*sorted(map(str, tokenizer.all_special_tokens))[:50], *sorted(tokenizer.get_added_vocab())[:200]]
    texts = [*SAMPLES, *(f"{token}a word{token} a word\n{token}\n  {token}" for token in dict.fromkeys(tokens))]
    before = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    for name in ("special_tokens_map", "added_tokens"):  # older forms would be read with the new files
        (out / f"{name}.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(out)
    if legacy := getattr(tokenizer, "legacy", False):
        file = out / "tokenizer_config.json"
        values = {**json.loads(file.read_text(encoding="utf-8")), "legacy": legacy}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    saved = open_tokenizer(out, trust=trust)
    for text, expected in zip(texts, before, strict=True):
        if (found := list(saved(text, add_special_tokens=False)["input_ids"])) != expected:
            raise BadModel(
                "The base's tokenizer gives other ids after transformers has saved it.",
                where=f"{out}: {text!r}",
                expected=str(tokenizer.convert_ids_to_tokens(expected)[:20]),
                got=str(saved.convert_ids_to_tokens(found)[:20]),
                next_step="choose a copy of the model with tokenizer.json",
            )


def _copy_without_auto_map(source: Path, target: Path) -> None:
    """Copy a JSON file without `auto_map`: it would ask everybody who opens the merged model to run the hub's code."""
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        values.pop("auto_map", None)
    except (ValueError, AttributeError) as error:
        raise BadModel(
            "A file of the base is not a JSON object.",
            where=str(source),
            got=str(error)[:200],
            next_step="fetch the base again",
        ) from error
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_phi3(model: PreTrainedModel, bos: int | None, eos: int | None, pad: int | None) -> Phi3ForCausalLM:
    """Return a Phi3ForCausalLM with a Llama-shaped model's weights.

    Args:
        bos: id of the token that begins a text.
        eos: id of the token that ends one.
        pad: id of the pad token.

    Raises:
        BadModel: Phi-3 has no form for a part of the model, such as biases or scaled rotary embeddings.
    """
    import torch
    from transformers import Phi3ForCausalLM

    if obstacles := _obstacles(model.config):
        raise BadModel(
            "This model cannot be repacked as Phi-3.",
            where="base.repack",
            expected="a Llama-shaped model without biases",
            got=", ".join(obstacles),
            next_step="set base.repack to null: LoRA works on split projections as well",
        )
    with torch.device("meta"):
        phi3 = Phi3ForCausalLM(_phi3_config(model.config, bos, eos, pad))
    # The rotary buffers are not in the state, so compute them.
    phi3.model.rotary_emb = type(phi3.model.rotary_emb)(config=phi3.config)
    # assign: what is not fused is shared with the model, which saves a copy of all weights.
    missing, unexpected = phi3.load_state_dict(_fused_weights(model.state_dict()), strict=False, assign=True)
    if unexpected or [key for key in missing if key != "lm_head.weight"]:
        raise BadModel(
            "Repacking lost weights.",
            where="base.repack",
            got=f"missing {missing}, unexpected {unexpected}",
            next_step="set base.repack to null: LoRA works on split projections as well",
        )
    phi3.tie_weights()
    phi3.eval()
    return phi3


def _obstacles(config: PreTrainedConfig) -> list[str]:
    """Return the model's features that Phi-3 lacks."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None)
    found = {
        f"model type {config.model_type}": config.model_type not in ("llama", "mistral"),
        "attention biases": getattr(config, "attention_bias", False),
        "MLP biases": getattr(config, "mlp_bias", False),
        f"rotary embeddings of type {rope_type}": rope_type != "default",
        "a head size that is not hidden size / heads": head_dim
        not in (None, config.hidden_size // config.num_attention_heads),
    }
    return [obstacle for obstacle, present in found.items() if present]


def _phi3_config(config: PreTrainedConfig, bos: int | None, eos: int | None, pad: int | None) -> Phi3Config:
    from transformers import Phi3Config

    return Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        sliding_window=getattr(config, "sliding_window", None),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _fused_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Llama's weights under Phi-3's names, the rows of split projections one after another."""
    import torch

    fused: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if ".self_attn.q_proj." in key:
            parts = [weights[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            fused[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".mlp.gate_proj." in key:
            fused[key.replace("gate_proj", "gate_up_proj")] = torch.cat([value, weights[key.replace("gate_", "up_")]])
        elif not any(name in key for name in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[key] = value
    return fused


def largest_difference(first: PreTrainedModel, second: PreTrainedModel, ids: list[int]) -> float:
    """Return the largest difference between two models' logits over a text."""
    import torch

    with torch.no_grad():
        batch = torch.tensor([ids])
        return float((first(batch).logits - second(batch).logits).abs().max())
