"""Adapters as other programs save them: what peft would load in part, or onto other weights, is refused by every command."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from loraflow.adapters.convert import convert
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.validation import check_adapter
from loraflow.cli import cli
from loraflow.evaluation.generation import generate_answers
from loraflow.failures import BadModel
from loraflow.serving.models import Model, load
from tests.conftest import build_phi3
from tests.families.tiny import family_config, save_tiny
from tests.tiny_adapters import assert_same, by_peft, configured, make_adapter, read


def load_plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def saved(config, base, folder):
    torch.manual_seed(1)
    model = get_peft_model(load_plain(base), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    if isinstance(config, AdaLoraConfig):
        for step in range(1, config.total_step + 1):  # as a training does it: ranks are given up on the way
            ids = torch.arange(3, 30)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            model.base_model.update_and_allocate(step)
    model.save_pretrained(folder)
    return folder


NAMES = {
    "doubled": (lambda name: f"base_model.model.{name}", "remove 'base_model.model.'"),
    "unsloth": (lambda name: name.replace(".model.model.", ".model.model.model."), "remove 'model.' from"),
    "none": (lambda name: name.removeprefix("base_model.model."), "put 'base_model.model.' before"),
    "torch.compile": (lambda name: name.replace(".model.model.", ".model._orig_mod.model."), "remove '_orig_mod.'"),
    "DistributedDataParallel": (lambda name: f"module.{name}", "remove 'module.'"),
    "FSDP": (lambda name: name.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."), "remove '_fsdp_wrapped_module.'"),
    "vision": (lambda name: name.replace(".layers.", ".language_model.layers."), "remove 'language_model.'"),
    "another adapter's name": (lambda name: name.replace(".weight", ".sft.weight"), "remove '.sft', the adapter's name"),
    "bare decoder": (lambda name: name.replace(".model.model.", ".model."), "put 'model.' behind"),
}  # fmt: skip


@pytest.mark.parametrize("program", NAMES)
def test_names_that_peft_does_not_read_are_refused_with_their_correction(program, tmp_path, quick_phi3):
    """peft loads such a file with a warning, and answers as the base."""
    rename, correction = NAMES[program]
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor.clone() for name, tensor in load_file(file).items()}, file)
    (tmp_path / "out").mkdir()
    for command in (
        lambda: merge(quick_phi3, adapter, tmp_path / "out"),
        lambda: load(Model("x", quick_phi3, unmerged_adapter=adapter, base=quick_phi3), "float32"),
    ):
        with pytest.raises(BadModel, match="names that peft does not read") as caught:
            command()
        assert correction in caught.value.next_step


def test_names_of_a_model_s_own_state_that_peft_reads_are_read_as_peft_reads_them(tmp_path, quick_phi3):
    """Programs that save the tensors themselves write `.default.`, and `.weight` behind DoRA's magnitudes."""
    adapter = make_adapter(quick_phi3, tmp_path / "adapter", use_dora=True)
    file = adapter / "adapter_model.safetensors"
    own = get_peft_model(load_plain(quick_phi3), LoraConfig.from_pretrained(adapter)).state_dict()
    to_own = {name.replace(".default", "").removesuffix(".weight"): name for name in own}
    tensors = {to_own[name.removesuffix(".weight")]: tensor.clone() for name, tensor in load_file(file).items()}
    assert any(name.endswith("lora_magnitude_vector.default.weight") for name in tensors)
    expected = by_peft(quick_phi3, adapter)
    for names in (tensors, {name.replace(".default.", "."): tensor for name, tensor in tensors.items()}):
        save_file(names, file)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        assert merge(quick_phi3, adapter, out)["route"] == "streamed"
        assert_same(read(out), expected)
        convert(adapter, quick_phi3, out / "converted")
        assert_same(by_peft(quick_phi3, out / "converted"), expected)


def test_predict_refuses_an_adapter_without_peft_s_weights_in_one_sentence(tmp_path, quick_phi3):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(64, 4)}, adapter / "adapters.safetensors")
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "red"}]}')
    options = ["--base", quick_phi3, "--store", tmp_path / "store"]
    caught = CliRunner().invoke(
        cli, [*map(str, ("predict", adapter, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", *options))]
    )
    assert "adapter of mlx-lm" in str(caught.exception)


@pytest.mark.parametrize("how", ["lora_ga", "pissa_niter_4", "corda", "loftq"])
def test_an_adapter_of_changed_weights_that_nothing_can_compute_again_is_refused_by_every_command(
    how, tmp_path, quick_phi3
):
    """peft adds a LoRA-GA adapter to the original weights without a word, which is another model than the trained one."""
    adapter = configured(make_adapter(quick_phi3, tmp_path / "adapter"), init_lora_weights=how)
    (tmp_path / "out").mkdir()
    for command in (
        lambda: merge(quick_phi3, adapter, tmp_path / "out"),
        lambda: convert(adapter, quick_phi3, tmp_path / "converted"),
        lambda: load(Model("x", quick_phi3, unmerged_adapter=adapter, base=quick_phi3), "float32"),
    ):
        with pytest.raises(BadModel, match="changed the base's weights, and the adapter does not contain"):
            command()


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)],
    ids=["prompt", "prefix"],
)  # fmt: skip
def test_adapters_that_put_tokens_before_a_prompt_are_refused(config, tmp_path, quick_phi3):
    """Answers would be those of another prompt, or end in an error of the cache."""
    adapter = saved(config, quick_phi3, tmp_path / "adapter")
    with pytest.raises(BadModel, match="adds tokens before each prompt"):
        load(Model("x", quick_phi3, unmerged_adapter=adapter, base=quick_phi3), "float32")


@pytest.mark.parametrize(
    "config",
    [IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
     AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, target_modules=["o_proj"], total_step=4)],
    ids=["ia3", "adalora"],
)  # fmt: skip
def test_adapters_that_are_not_lora_answer_as_in_peft_and_are_not_merged_or_converted(
    config, tmp_path, quick_phi3, caplog
):
    adapter = saved(config, quick_phi3, tmp_path / "adapter")
    if isinstance(config, AdaLoraConfig):
        pattern = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
        assert {True, False} == {kept for ranks in pattern.values() for kept in ranks}
    (tmp_path / "out").mkdir()
    for command in (
        lambda: merge(quick_phi3, adapter, tmp_path / "out"),
        lambda: convert(adapter, quick_phi3, tmp_path / "converted"),
    ):
        with pytest.raises(BadModel, match="not a LoRA adapter") as caught:
            command()
        assert caught.value.got == config.peft_type.value

    loaded = load(Model("x", quick_phi3, unmerged_adapter=adapter, base=quick_phi3), "float32")
    prompts = [[*range(3, 30), 40], [*range(3, 30), 50, 60]]
    found = generate_answers(loaded.model, loaded.tokenizer, prompts, stop_ids=[499], max_new_tokens=6, batch_size=2)
    theirs = PeftModel.from_pretrained(load_plain(quick_phi3), str(adapter)).eval()
    theirs.get_base_model().generation_config = GenerationConfig()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                              eos_token_id=499, pad_token_id=0)  # fmt: skip
        assert answer["text"] == loaded.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert "does not know these settings" not in caplog.text


def test_an_activated_adapter_answers_as_in_peft_where_all_prompts_begin_with_its_tokens(tmp_path, quick_phi3):
    """aLoRA applies behind certain tokens, so the prompts' common beginning must not be computed without the rest."""
    lora = LoraConfig(r=4, target_modules=["qkv_proj", "o_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    model = get_peft_model(load_plain(quick_phi3), lora)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(Model("x", quick_phi3, unmerged_adapter=tmp_path / "adapter", base=quick_phi3), "float32")
    prompts = [[*range(3, 40), 40], [*range(3, 40), 50, 60], [*range(3, 40), 70, 80, 90, 100], [*range(3, 40), 9]]
    found = generate_answers(loaded.model, loaded.tokenizer, prompts, stop_ids=[499], max_new_tokens=6, batch_size=2)
    theirs = PeftModel.from_pretrained(load_plain(quick_phi3), str(tmp_path / "adapter")).eval()
    theirs.get_base_model().generation_config = GenerationConfig()
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        greedy = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False,
                  "eos_token_id": 499, "pad_token_id": 0}  # fmt: skip
        out = theirs.generate(**greedy)
        with theirs.disable_adapter():
            assert not torch.equal(theirs.generate(**greedy), out), "the adapter applies"
        assert answer["text"] == loaded.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_monteclora_is_merged_and_answers_as_in_peft(tmp_path, quick_phi3):
    """Its file also has the parameters of noise that it adds in training, which peft does not load to answer."""
    config = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(config, "MontecloraConfig"):
        pytest.skip("this peft has no MonteCLoRA")
    adapter = make_adapter(quick_phi3, tmp_path / "adapter", monteclora_config=config.MontecloraConfig())
    assert any("monteclora_sampler" in name for name in load_file(adapter / "adapter_model.safetensors"))
    (tmp_path / "out").mkdir()
    merge(quick_phi3, adapter, tmp_path / "out")
    assert_same(read(tmp_path / "out"), by_peft(quick_phi3, adapter))
    ours = load(Model("x", quick_phi3, unmerged_adapter=adapter, base=quick_phi3), "float32").model
    theirs, ids = PeftModel.from_pretrained(load_plain(quick_phi3), str(adapter)).eval(), torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_embeddings_saved_beside_an_adapter_of_a_tied_base_are_merged_as_in_peft(tmp_path):
    """`save_embedding_layers=True`: the file has the head too, which the base's files do not have."""
    base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    model = get_peft_model(load_plain(base), LoraConfig(r=4, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert {"base_model.model.lm_head.weight"} < load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    check_adapter(tmp_path / "adapter", base)
    (tmp_path / "out").mkdir()
    merge(base, tmp_path / "adapter", tmp_path / "out")
    expected = PeftModel.from_pretrained(load_plain(base), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    found = read(tmp_path / "out")
    assert found and all(torch.equal(found[name], expected[name]) for name in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_square_matrix_of_gpt2_is_merged_as_peft_merges_it_though_the_file_does_not_say_that_it_is_transposed(
    dora, checked, tmp_path
):
    """peft sets fan_in_fan_out for Conv1D when it loads an adapter; scripts and older files leave it false or out."""
    base = save_tiny("gpt2", tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["attn.c_proj"], use_dora=dora, fan_in_fan_out=True, init_lora_weights=False)
    adapter = saved(lora, base, tmp_path / "adapter")
    configured(adapter, fan_in_fan_out=False)
    with pytest.raises(BadModel, match="are converted(.|\n)*fan_in_fan_out"):  # as if the file said it
        convert(adapter, base, tmp_path / "converted")
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", checked=checked)
    expected = PeftModel.from_pretrained(load_plain(base), str(adapter)).merge_and_unload().state_dict()
    found = load_plain(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("checked", [False, True])
def test_an_adapter_of_gpt2_and_of_its_head_is_merged_as_peft_merges_it(checked, tmp_path):
    """peft writes fan_in_fan_out: false then, because the head was the last module."""
    base = save_tiny("gpt2", tmp_path / "base", tie_word_embeddings=False)
    lora = LoraConfig(r=4, target_modules=["attn.c_proj", "lm_head"], fan_in_fan_out=True, init_lora_weights=False)
    adapter = saved(lora, base, tmp_path / "adapter")
    assert not json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"]
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", checked=checked)
    expected = PeftModel.from_pretrained(load_plain(base), str(adapter)).merge_and_unload().state_dict()
    found = load_plain(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_of_gemma3_with_vision_that_an_older_transformers_saved_is_merged_as_peft_merges_it(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family_config("Gemma 3, with vision")).save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], exclude_modules=".*vision.*", init_lora_weights=False
    )
    adapter, base = saved(lora, tmp_path / "base", tmp_path / "adapter"), tmp_path / "base"
    expected = PeftModel.from_pretrained(load_plain(base), str(adapter)).merge_and_unload().state_dict()
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name.replace(".model.language_model.", ".language_model.model."): t for name, t in load_file(file).items()
    }
    assert all(".model.language_model.model.layers." in name for name in tensors)
    save_file(tensors, file)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    found = load_plain(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    del tensors[next(iter(tensors))]
    save_file(tensors, file)
    with pytest.raises(BadModel, match="1 missing"):
        merge(base, adapter, tmp_path / "out")
