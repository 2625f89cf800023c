"""A base that cannot be trained is refused by its config.json, with one sentence and what to do, before anything heavy."""

import json
import os
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import transformers

from loraflow.base import hub, resolve
from loraflow.base.usable import refuse_unusable
from loraflow.config import parse_recipe
from loraflow.config.locations import BaseLocation, FolderOrigin, HubOrigin
from loraflow.config.recipe import Base
from loraflow.failures import BadModel
from loraflow.job import Inputs, Job, Progress
from loraflow.store.files import HashMemo
from tests.job_factory import Outside, make_job

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BAD = {
    "encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder", "choose a model"),
    "bare encoder": ({"model_type": "bert", "architectures": ["BertModel"]}, "without a head", "choose a model"),
    "embeddings": ({"model_type": "qwen3", "architectures": ["Qwen3Model"]}, "without a head", "choose a model"),
    "reward": ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "reward model", "choose a model"),
    "own reward": ({"model_type": "internlm2", "architectures": ["InternLM2ForRewardModel"], "auto_map": {"AutoModel": "m.M"}}, "reward model", "trust_remote_code"),
    "labels": ({"model_type": "qwen2", "architectures": ["Qwen2ForTokenClassification"]}, "without a head", "choose a model"),
    "t5": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder", "choose a model"),
    "gptq": ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already", "name the original"),
    "awq": ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, "quantized already", "name the original"),
    "fp8": ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantized already", "name the original"),
    "nvfp4": ({**LLAMA, "quantization_config": {"quant_algo": "NVFP4", "quant_method": "modelopt"}}, "quantized already", "name the original"),
    "bitsandbytes": ({**LLAMA, "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "quantized already", "name the original"),
    "mxfp4": ({**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}, "quantized already", "name the original"),
    "compressed": ({**LLAMA, "compression_config": {"format": "int-quantized"}}, "quantized already", "name the original"),
    "no architectures": ({"model_type": "llama"}, "does not say which model", "add the name"),
    "architectures null": ({"model_type": "llama", "architectures": None}, "does not say which model", "add the name"),
    "architectures text": ({"model_type": "llama", "architectures": "LlamaForCausalLM"}, "does not say which model", "add the name"),
    "a list": ([1], "not a JSON object", None),
}  # fmt: skip


def folder_with(config, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_a_base_that_cannot_be_trained_is_refused_before_its_weights_are_read(name, tmp_path):
    """There are no weights: the folder's config is enough. `loraflow plan` and `run` begin here."""
    config, says, advice = BAD[name]
    with pytest.raises(BadModel, match=says) as caught:
        resolve.locate(Base(model=str(folder_with(config, tmp_path))), HashMemo(None))
    assert caught.value.where == "base.model" and (advice is None or advice in caught.value.next_step)
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("name", ["encoder", "gptq", "no architectures", "t5"])
def test_a_model_on_the_hub_is_refused_before_its_weights_are_downloaded(name, tmp_path, monkeypatch):
    config, says, _ = BAD[name]
    monkeypatch.setattr(hub, "download_config", lambda *_: folder_with(config, tmp_path))
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("the weights were downloaded"))
    with pytest.raises(BadModel, match=says):
        resolve._folder_of(HubOrigin(hub="org/name", commit="0" * 40), trust=False)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [("adapter_config.json", {}, "adapter beside the model"), ("hf_quant_config.json", {}, "quantized already"),
     ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["other/repo--code.Tokenizer", None]}}, "in another repository")],
)  # fmt: skip
def test_files_beside_the_configuration_refuse_a_hub_model_before_its_weights_are_downloaded(
    file, content, says, tmp_path, monkeypatch
):
    folder = folder_with(LLAMA, tmp_path)
    (folder / file).write_text(json.dumps(content))

    def download(*_, trust, with_weights=True):
        assert not with_weights, "the weights were downloaded"
        return folder

    monkeypatch.setattr(hub, "download_config", lambda *_: folder_with(LLAMA, tmp_path / "config alone"))
    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(BadModel, match=says):
        resolve._folder_of(HubOrigin(hub="org/name", commit="0" * 40), trust=True)


def test_the_template_of_a_hub_model_is_refused_before_its_weights_are_downloaded(tmp_path, quick_phi3, monkeypatch):
    folder = folder_with(json.loads((quick_phi3 / "config.json").read_text()), tmp_path / "hub")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(quick_phi3 / name, folder / name)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def download(*_, trust, with_weights=True):
        assert not with_weights, "the weights were downloaded"
        return folder

    monkeypatch.setattr(hub, "download_config", lambda *_: folder)
    monkeypatch.setattr(hub, "download", download)
    location = BaseLocation(source={}, origin=HubOrigin(hub="org/name", commit="0" * 40))
    job = make_job("resolve_base", parse_recipe("name: t\nbase: {model: org/name}\n"), {}, Outside(base=location))
    with pytest.raises(BadModel, match="does not end an answer with a control token"):
        resolve.run(job, Inputs({}), tmp_path / "out", Progress())


@pytest.mark.parametrize(
    ("config", "says", "advice"),
    [
        ({"model_type": "made_up", "architectures": ["MadeUpForCausalLM"]}, "not a causal language model", "newer transformers"),
        ({"model_type": "made_up", "architectures": ["MadeUpForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.M"}}, "needs Python code", "if you trust it"),
        *(({"model_type": kind, "architectures": [f"{kind}ForConditionalGeneration"]}, "The base reads images", "another base")
          for kind in ("blip", "llava", "qwen2_vl", "mistral3", "smolvlm")),
    ],
)  # fmt: skip
def test_an_architecture_that_transformers_does_not_have_is_refused_before_it_is_copied(config, says, advice, tmp_path):
    from loraflow.config.locations import FolderOrigin

    origin = FolderOrigin(folder=str(folder_with(config, tmp_path)))
    with pytest.raises(BadModel, match=says) as caught:
        resolve._folder_of(origin, trust=False)
    assert advice in caught.value.next_step and len(str(caught.value).splitlines()) <= 6
    if "auto_map" in config:
        assert resolve._folder_of(origin, trust=True)
        return
    with pytest.raises(BadModel, match=says):  # there is no code to trust
        resolve._folder_of(origin, trust=True)


@pytest.mark.parametrize("kind", ["file", "folder", "folder with config.json"])
def test_a_gguf_is_refused_with_what_to_name_instead(kind, tmp_path):
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    if kind == "folder with config.json":
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(BadModel, match="GGUF file cannot be trained") as caught:
        resolve.locate(Base(model=str(file if kind == "file" else tmp_path)), HashMemo(None))
    assert "made from" in caught.value.next_step


def test_quantization_in_a_file_of_its_own_is_found(tmp_path):
    folder = folder_with(LLAMA, tmp_path)
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(BadModel, match="quantized already"):
        resolve.locate(Base(model=str(folder)), HashMemo(None))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
    ],
)
def test_models_that_generate_text_are_accepted(config):
    refuse_unusable(config, trust=False)


def test_a_models_own_code_is_accepted_where_it_is_trusted():
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoModelForCausalLM": "m.M"}}
    refuse_unusable(config, trust=True)
    with pytest.raises(BadModel):
        refuse_unusable(config, trust=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("reference", ["org/other--m.M", [None, "org/other--m.M"]])
def test_code_of_another_repository_is_refused_if_the_recipe_would_run_it(name, reference, tmp_path, monkeypatch):
    """transformers reads org/other at its newest commit, so the base's own commit or content does not pin it."""
    from transformers import dynamic_module_utils

    folder = folder_with(LLAMA, tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": reference}}))
    for call in (
        lambda: resolve.locate(Base(model=str(folder), trust_remote_code=True), HashMemo(None)),
        lambda: resolve._folder_of(FolderOrigin(folder=str(folder)), trust=True),
    ):
        with pytest.raises(BadModel, match="without a pinned version(.|\n)*org/other--m.M"):
            call()
    resolve.locate(Base(model=str(folder)), HashMemo(None))  # transformers has the architecture
    asked = []
    monkeypatch.setattr(
        dynamic_module_utils, "cached_file", lambda repo, file, **more: asked.append((repo, more["revision"]))
    )
    with pytest.raises(TypeError):  # there is no file
        dynamic_module_utils.get_class_from_dynamic_module("org/other--m.M", str(folder), revision="0" * 40)
    assert asked == [("org/other", None)]  # the newest commit, whatever the revision of the base


STRAY = {
    "a window": {"sliding_window": 8},
    "turned off": {"sliding_window": 8, "use_sliding_window": False},
    "none at all": {"sliding_window": 0},
    "without a number of positions": {"sliding_window": 8, "max_position_embeddings": None},
    "chunks": {"attention_chunk_size": 8},
    "types of layers": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
    "a text": {"sliding_window": "8"},
    "only full layers": {"layer_types": ["full_attention"] * 2},
}
OWN = {
    "no window": {},
    "Mistral's own": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "Qwen2's own, turned off": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [*STRAY, *OWN])
def test_a_window_that_the_architecture_does_not_have_is_a_warning_if_answers_follow_it(name, tmp_path, caplog):
    """The oracle: what transformers generates beyond the window with its cache, and without it, as in training."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.families.tiny import COMMON

    values = {**COMMON, **LLAMA, **STRAY.get(name, OWN.get(name))}
    folder = folder_with({key: value for key, value in values.items() if value is not None}, tmp_path)
    resolve._folder_of(FolderOrigin(folder=str(folder)), trust=False)  # is not refused
    resolve._warn_of_config(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    prompt = torch.arange(3, 33)[None]
    plain = torch.stack(model.generate(prompt, use_cache=False, **options).logits)
    try:
        follows = not torch.allclose(torch.stack(model.generate(prompt, **options).logits), plain, atol=1e-5, rtol=1e-5)
    except Exception:  # transformers makes no cache for it
        follows = True
    assert (name in STRAY and name != "only full layers") is follows
    assert ("generates answers with it" in caplog.text) is follows


@pytest.mark.parametrize(
    ("classes", "is_named"),
    [
        (["MistralForCausalLM"], True),
        (["LlamaForCausalLM"], False),
        (["LLaMAForCausalLM"], False),  # of early conversions
    ],
)
def test_a_class_of_another_model_type_is_named_because_a_server_may_use_it(classes, is_named, tmp_path, caplog):
    """transformers trains the class of model_type."""
    folder = folder_with({**LLAMA, "architectures": classes}, tmp_path)
    resolve._warn_of_config(folder)
    assert ("MistralForCausalLM of another type" in caplog.text) is is_named


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_a_bundled_file_that_is_cut_off_is_refused_in_one_sentence(size, tmp_path, monkeypatch):
    """As an installation that was interrupted leaves it."""
    file, out = tmp_path / "cut.gguf", tmp_path / "out"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((300, 512), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    os.truncate(file, size)
    monkeypatch.setattr(resolve, "_bundled", lambda model: file)
    found = resolve.locate(Base(model="bundled:smollm2"), HashMemo(None))
    out.mkdir()
    config = {"source": found.source, "repack": None, "trust_remote_code": False, "dtype": "float32"}
    job = Job(stage="resolve_base", version=1, config=config, runtime={"origin": found.origin.model_dump()})
    with pytest.raises(BadModel, match="bundled model is damaged") as caught:
        resolve.run(job, Inputs({}), out, Progress())
    assert "force-reinstall" in caught.value.next_step


@pytest.mark.parametrize("error", [ValueError("a malformed number"), BadModel("Another file is damaged.")])
def test_an_error_in_the_use_of_bundled_settings_stays_as_it_is(error, tmp_path, monkeypatch):
    saved = SimpleNamespace(save_pretrained=lambda folder: None)
    for kind in (transformers.AutoConfig, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **options: saved)
    monkeypatch.setattr(resolve, "_bundled", lambda model: tmp_path / "model.gguf")
    with pytest.raises(type(error)) as caught, resolve.bundled_settings("bundled:smollm2"):
        raise error
    assert caught.value is error
