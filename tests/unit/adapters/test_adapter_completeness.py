"""Merge, convert, chat, predict and publish take an adapter only if it is complete, and refuse it with the same sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraflow.adapters.convert import convert
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.validation import check_adapter
from loraflow.base.usable import refuse_unusable_folder
from loraflow.cli import from_system
from loraflow.failures import BadConfig, BadModel
from loraflow.serving.models import Model, find_model, load
from loraflow.serving.publish import package
from loraflow.store import open_store
from tests.conftest import build_phi3
from tests.families.tiny import save_tiny
from tests.tiny_adapters import TARGETS, by_peft, change_tensors, configured, make_adapter, read

FULL = {
    "plain": {},
    "regular expression": {"target_modules": r".*\.layers\.[01]\.(self_attn\.o_proj|mlp\.down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": ["layers.0.mlp.down_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"qkv_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"o_proj": 5}},
    "dora": {"use_dora": True},
    "tokens": {"trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
    "lora_bias": {"lora_bias": True},
}
BIASED = {"bias all": {"bias": "all"}, "bias lora_only": {"bias": "lora_only"}, "lora_bias": {"lora_bias": True}}


def missing_for_peft(base, adapter):
    """The oracle: what peft reports when it loads the adapter."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel(AutoModelForCausalLM.from_pretrained(base), PeftConfig.from_pretrained(str(adapter)))
    found = model.load_adapter(str(adapter), "default")
    return found.missing_keys, found.unexpected_keys


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return save_tiny("qwen2", tmp_path_factory.mktemp("biased") / "base")


@pytest.mark.parametrize("name", [*FULL, *BIASED])
def test_a_complete_adapter_is_accepted_and_is_refused_without_any_one_of_its_tensors(
    name, tmp_path, quick_phi3, biased
):
    base, options = (biased, BIASED[name]) if name in BIASED else (quick_phi3, FULL[name])
    if name in BIASED:
        options = {"target_modules": ["q_proj", "v_proj"], **options}
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    check_adapter(adapter, base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kinds = {key.split(".layers.")[-1].lstrip("01."): key for key in tensors if ".base_layer.weight" not in key}
    for left_out in kinds.values():
        kept = {key: tensor for key, tensor in tensors.items() if key != left_out}
        save_file(kept, adapter / "adapter_model.safetensors")
        with pytest.raises(BadModel, match="does not fit the base") as caught:
            check_adapter(adapter, base)
        assert caught.value.got == f"1 missing, such as {left_out}" and "incomplete" in caught.value.next_step


@pytest.mark.parametrize("name", ["plain", "rank_pattern", "dora", "layers_to_transform"])
def test_what_is_missing_is_what_peft_itself_reports(name, tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter", **FULL[name])
    assert missing_for_peft(quick_phi3, adapter) == ([], [])
    change_tensors(adapter, lambda key, tensor: tensor if "layers.1.mlp" in key or "lora_A" in key else None)
    missing, unexpected = missing_for_peft(quick_phi3, adapter)
    with pytest.raises(BadModel) as caught:
        check_adapter(adapter, quick_phi3)
    assert not unexpected and caught.value.got.startswith(f"{len(missing)} missing, such as ")


DAMAGES = {
    "half": (lambda key, tensor: tensor if "layers.0." in key else None, "8 missing"),
    "empty": (lambda key, tensor: None, "no tensors"),
    "half a pair": (lambda key, tensor: tensor if "lora_A" in key else None, "8 missing"),
    "another layer": (lambda key, tensor: tensor if "o_proj" in key else tensor[:, :9], "of another shape"),
    "nan": (lambda key, tensor: tensor * float("nan"), ""),
    "infinity": (lambda key, tensor: tensor + float("inf"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_command_refuses_a_damaged_adapter_with_the_same_sentence(damage, tmp_path, quick_phi3):
    change, got = DAMAGES[damage]
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    change_tensors(adapter, change)
    (tmp_path / "out").mkdir()
    model = Model("half", quick_phi3, unmerged_adapter=adapter, base=quick_phi3)

    def publish():
        with package(None, model, "org/name", "adapter", "mit"):
            pytest.fail("it was packaged")

    refusals = []
    for command in (
        lambda: merge(quick_phi3, adapter, tmp_path / "out"),
        lambda: convert(adapter, quick_phi3, tmp_path / "converted"),
        lambda: load(model, "float32"),  # chat and predict
        publish,
    ):
        with pytest.raises(BadModel) as caught:
            command()
        refusals.append(str(caught.value))
    assert len(set(refusals)) == 1 and got in refusals[0]
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "converted").exists()


def test_half_an_adapter_for_other_projections_is_not_converted(tmp_path):
    """The base that it is converted for has fused projections; the tensors of a layer's v_proj are missing."""
    fused = build_phi3(tmp_path / "fused", dtype="float32")
    values = json.loads((fused / "config.json").read_text())
    split = save_tiny("llama", tmp_path / "split", vocab_size=values["vocab_size"])
    adapter = make_adapter(split, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "up_proj"])
    change_tensors(adapter, lambda key, tensor: None if "layers.1.self_attn.v_proj" in key else tensor)
    with pytest.raises(BadModel, match="does not fit the base") as caught:
        convert(adapter, fused, tmp_path / "converted")
    assert "2 missing" in caught.value.got and "layers.1.self_attn.v_proj" in caught.value.got
    back = make_adapter(fused, tmp_path / "back", target_modules=["qkv_proj"])
    change_tensors(back, lambda key, tensor: None if "layers.1." in key else tensor)
    with pytest.raises(BadModel, match="does not fit the base") as caught:
        convert(back, split, tmp_path / "converted")
    assert "2 missing" in caught.value.got and "layers.1.self_attn.qkv_proj" in caught.value.got


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["qkv_proj", "no_such_module", "o_proj"]},
        {"target_modules": "nothing.matches"},
        {"target_modules": ["qkv_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"use_dora": True},
    ],
)
def test_a_configuration_of_other_tensors_is_refused(values, tmp_path, quick_phi3):
    adapter = configured(make_adapter(quick_phi3, tmp_path / "adapter"), **values)
    with pytest.raises(BadModel, match="does not fit the base"):
        check_adapter(adapter, quick_phi3)


def test_settings_that_peft_does_not_know_are_named(tmp_path, quick_phi3, caplog):
    """A newer peft's may change the product: peft itself leaves them out, with a warning."""
    values = {"lora_scaling_override": 3.0, "enable_lora": None, "merge_weights": False}
    check_adapter(configured(make_adapter(quick_phi3, tmp_path / "adapter"), **values), quick_phi3)
    assert "left out: lora_scaling_override: 3.0. If" in caplog.text


def test_unexpected_tensors_are_refused(tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.extra.lora_A.weight": torch.ones(4, 64)}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(BadModel, match="does not fit the base") as caught:
        check_adapter(adapter, quick_phi3)
    assert "1 unexpected, such as base_model.model.extra" in caught.value.got


@pytest.mark.parametrize("suffix", ["bin", "sharded"])
def test_a_pickle_and_a_part_of_several_files_are_refused(suffix, tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    name = "adapter_model.bin" if suffix == "bin" else "adapter_model-00001-of-00002.safetensors"
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    model = Model("part", quick_phi3, unmerged_adapter=adapter)
    for command in (lambda: check_adapter(adapter, quick_phi3), lambda: load(model, "float32")):
        with pytest.raises(BadModel) as caught:
            command()
        assert ("pickle" in str(caught.value)) if suffix == "bin" else ("one file" in str(caught.value))


# -- a tokenizer or a template of its own ----------------------------------------------------------------------------

OTHER = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>[own]' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def own_tokenizer(base, adapter, *tokens, template=MARKED):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    return tokenizer


@pytest.mark.parametrize("how", ["template", "tokenizer", "folder of templates"])
def test_an_adapters_own_template_is_used_by_every_command(how, tmp_path, quick_phi3):
    from transformers import AutoTokenizer

    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    file = "chat_template.jinja"
    if how == "template":
        (adapter / file).write_text(MARKED)
    elif how == "folder of templates":
        file = "additional_chat_templates/default.jinja"
        (adapter / file).parent.mkdir()
        (adapter / file).write_text(MARKED)
        (adapter / file).with_name("tool_use.jinja").write_text("tools" + MARKED)
    else:
        own_tokenizer(quick_phi3, adapter)
    (tmp_path / "out").mkdir()
    merge(quick_phi3, adapter, tmp_path / "out")
    convert(adapter, quick_phi3, tmp_path / "converted")
    model = Model("own", quick_phi3, unmerged_adapter=adapter, base=quick_phi3)
    chat = [{"role": "user", "content": "red"}]
    expected = "<|user|>[own]red<|end|><|assistant|>"
    assert load(model, "float32").template.render([chat], prompt=True) == [expected]
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected
    assert (tmp_path / "converted" / file).read_text() == MARKED
    with package(open_store(str(tmp_path / "store")), model, "org/name", "adapter", "mit") as (folder, _):
        assert (folder / file).read_text() == MARKED
    if how == "folder of templates":
        assert merged.apply_chat_template(chat, tools=[{}], tokenize=False).startswith("tools<|user|>[own]red")
        assert (tmp_path / "converted" / file).with_name("tool_use.jinja").read_text() == "tools" + MARKED


def test_an_adapters_tokenizer_without_a_template_is_used_with_the_bases_template(tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    own_tokenizer(quick_phi3, adapter, template=None)
    for name in ("chat_template.jinja",):
        (adapter / name).unlink()
    (tmp_path / "out").mkdir()
    merge(quick_phi3, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (quick_phi3 / "chat_template.jinja").read_text()


def test_a_part_of_a_tokenizer_is_refused(tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    shutil.copyfile(quick_phi3 / "tokenizer_config.json", adapter / "tokenizer_config.json")
    with pytest.raises(BadModel, match="tokenizer is incomplete"):
        check_adapter(adapter, quick_phi3)


def test_a_tokenizer_with_other_ids_is_refused_with_the_first_difference(tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    own_tokenizer(quick_phi3, adapter)
    file = adapter / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = (next(key for key, index in vocabulary.items() if index == n) for n in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    file.write_text(json.dumps(values))
    with pytest.raises(BadModel, match="other ids") as caught:
        check_adapter(adapter, quick_phi3)
    assert caught.value.expected == f"{first!r} is 300, as in the base" and caught.value.got == "301, and 1 more"


def test_another_template_than_the_trained_one_is_refused(tmp_path, quick_phi3):
    from loraflow.adapters.tokenizer_files import write_origin

    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    write_origin(adapter, quick_phi3, None)
    check_adapter(adapter, quick_phi3)
    (adapter / "chat_template.jinja").write_text(OTHER)
    for command in (
        lambda: check_adapter(adapter, quick_phi3),
        lambda: load(Model("o", quick_phi3, unmerged_adapter=adapter), "float32"),
    ):
        with pytest.raises(BadModel, match="another chat template"):
            command()


# -- a vocabulary of another size ------------------------------------------------------------------------------------

GROWN = {
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings only": {"modules_to_save": ["embed_tokens"]},
    "tied explicitly": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved by peft": {},
    "tokens": {"trainable_token_indices": "new"},
    "lora": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
ADDED = ["<|extra1|>", "<|extra2|>", "<|extra3|>"]


def grown_adapter(base, folder, options, rows):
    """An adapter that was trained after resize_token_embeddings; B and whole modules are away from their start."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder.parent / "resized")
    if options.get("trainable_token_indices") == "new":
        options = {**options, "trainable_token_indices": list(range(before, rows))}
    wrapped = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", GROWN.values(), ids=GROWN)
def test_an_adapter_with_added_tokens_is_merged_as_in_peft_onto_the_plain_and_the_resized_base(
    options, tied, tmp_path, quick_phi3
):
    size = json.loads((quick_phi3 / "config.json").read_text())["vocab_size"]
    base = save_tiny("llama", tmp_path / "base", vocab_size=size, tie_word_embeddings=tied)
    for folder in (base, tmp_path / "resized"):
        folder.mkdir(exist_ok=True)
        for file in quick_phi3.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
        shutil.copyfile(quick_phi3 / "chat_template.jinja", folder / "chat_template.jinja")
    adapter = grown_adapter(base, tmp_path / "adapter", options, size + len(ADDED))
    tokenizer = own_tokenizer(base, adapter, *ADDED)
    assert tokenizer.convert_tokens_to_ids(ADDED[-1]) == size + 2
    expected = by_peft(tmp_path / "resized", adapter, untied=tied and options == GROWN["lora"])
    for kind, folder in (("plain", base), ("resized", tmp_path / "resized")):
        out = tmp_path / f"out-{kind}"
        out.mkdir()
        merge(folder, adapter, out)
        merged = read(out)
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected), kind
        assert json.loads((out / "config.json").read_text())["vocab_size"] == size + len(ADDED)
        loaded = load(Model("grown", folder, unmerged_adapter=adapter, base=folder), "float32")
        ids = loaded.tokenizer(ADDED[1], add_special_tokens=False)["input_ids"]
        assert ids == [size + 1]
        with torch.no_grad():
            found = loaded.model(torch.tensor([[5, size + 1, 7]])).logits
            merged_logits = load(Model("merged", out), "float32").model(torch.tensor([[5, size + 1, 7]])).logits
        if "embed_tokens" not in options.get("target_modules", []) or not tied:  # peft's merge changes a tied head too
            torch.testing.assert_close(found, merged_logits, rtol=1e-4, atol=1e-5)


def test_added_tokens_without_rows_are_refused(tmp_path, quick_phi3):
    """LoRA on the embeddings saves their new rows, but not those of the head."""
    size = json.loads((quick_phi3 / "config.json").read_text())["vocab_size"]
    base = save_tiny("llama", tmp_path / "base", vocab_size=size)
    adapter = grown_adapter(base, tmp_path / "adapter", {"target_modules": ["q_proj", "embed_tokens"]}, size + 3)
    for command in (lambda: check_adapter(adapter, base), lambda: merge(base, adapter, tmp_path)):
        with pytest.raises(BadModel, match="lacks embeddings of some tokens") as caught:
            command()
    assert "lm_head" in caught.value.where
    check_adapter(adapter, tmp_path / "resized")


def test_a_tokenizer_with_tokens_beyond_the_embeddings_is_refused_by_each_command(tmp_path, quick_phi3):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter", target_modules=TARGETS)
    own_tokenizer(quick_phi3, adapter, *ADDED)
    model = Model("beyond", quick_phi3, unmerged_adapter=adapter)
    for command in (lambda: check_adapter(adapter, quick_phi3), lambda: load(model, "float32")):
        with pytest.raises(BadModel, match="without an embedding"):
            command()


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff{}", b"[" * 100_000, b'{"base_model_name_or_path": 5}'])
def test_an_adapter_whose_configuration_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises((BadConfig, BadModel)) as refused:
        find_model(open_store(str(tmp_path / "store")), str(tmp_path))
    assert str(tmp_path) in refused.value.where and refused.value.next_step


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff{}", b"[" * 100_000, b'{"a": "cut off'])
def test_a_damaged_file_of_a_model_is_named_by_each_command_that_takes_its_folder(tmp_path, phi3, name, content):
    folder = shutil.copytree(phi3, tmp_path / "model")
    (folder / name).write_bytes(content)
    uses = (
        lambda: find_model(open_store(str(tmp_path / "store")), str(folder)),
        lambda: refuse_unusable_folder(folder, trust=False),
        lambda: merge(folder, adapter, tmp_path / "out"),
        lambda: convert(adapter, folder, tmp_path / "out"),
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    for use in uses:
        with pytest.raises(BadModel, match="not a JSON object") as refused:
            use()
        assert refused.value.got.startswith(name) and name in refused.value.next_step


@pytest.mark.parametrize("content", [b"{}", b'{"version": "1.0", "added_tokens": []}', b'{"added_tokens": [{"id": 5}'])
def test_a_tokenizer_without_its_parts_is_named_by_merge_and_convert(tmp_path, quick_phi3, content):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    base = shutil.copytree(quick_phi3, tmp_path / "base")
    (base / "tokenizer.json").write_bytes(content)
    for use in (lambda: merge(base, adapter, tmp_path / "out"), lambda: convert(adapter, base, tmp_path / "out")):
        with pytest.raises(BadModel, match="tokenizer cannot be read|not a JSON object") as refused:
            use()
        assert "tokenizer.json" in refused.value.where + refused.value.got


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, phi3):
    folder = shutil.copytree(phi3, tmp_path / "model")
    (folder / "added_tokens.json").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        find_model(open_store(str(tmp_path / "store")), str(folder))
    assert from_system(refused.value).what == "This is a folder, where a file is needed."


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b""), ("config.json", b""), ("chat_template.jinja", b"\xff"), ("tokenizer.json", b"{1}")],
)
def test_a_model_folder_that_transformers_cannot_open_is_refused_by_chat_and_predict(tmp_path, phi3, name, content):
    folder = shutil.copytree(phi3, tmp_path / "model")
    if name == "config.json":  # weights and config.json of two models
        config = json.loads((folder / name).read_text())
        content = json.dumps({**config, "hidden_size": 128}).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(BadModel) as refused:
        load(find_model(open_store(str(tmp_path / "store")), str(folder)), "float32", "cpu")
    assert refused.value.where == str(folder) and "again" in refused.value.next_step


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized already"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder"),
    ],
)
def test_an_intact_model_that_transformers_cannot_open_for_chat_is_not_called_damaged(tmp_path, phi3, config, says):
    folder = shutil.copytree(phi3, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    with pytest.raises(BadModel, match=says) as refused:
        load(find_model(open_store(str(tmp_path / "store")), str(folder)), "float32", "cpu")
    assert "again" not in refused.value.next_step


def test_a_mistake_after_the_model_is_loaded_is_not_reported_as_a_damaged_file(tmp_path, phi3, monkeypatch):
    folder = shutil.copytree(phi3, tmp_path / "model")

    def fail(path):
        raise AttributeError("a mistake")

    monkeypatch.setattr("loraflow.base.load.stop_ids", fail)
    with pytest.raises(AttributeError, match="a mistake"):
        load(find_model(open_store(str(tmp_path / "store")), str(folder)), "float32", "cpu")
