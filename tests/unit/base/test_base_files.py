"""The files of bases as people bring them: indexes, types of weights, stop and pad tokens, an adapter beside the model."""

import json
import shutil
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from loraflow.adapters.merge_folders import merge
from loraflow.base import hub
from loraflow.base.load import load_model, load_tokenizer, stop_ids
from loraflow.base.resolve import describe_files
from loraflow.base.stored_weights import model_without_weights
from loraflow.base.usable import refuse_unusable_folder
from loraflow.base.weight_checks import check_fits_config
from loraflow.cli import cli
from loraflow.evaluation.generation import generate_answers
from loraflow.failures import BadModel
from tests.conftest import build_phi3
from tests.families.tiny import save_tiny
from tests.unit.adapters.test_merge import make_adapter
from tests.unit.base.test_base import build_llama, change_weights, resolve_base
from tests.unit.training.test_training import recipe

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama_once(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def llama(llama_once, tmp_path):
    """A base of its own for each test."""
    return shutil.copytree(llama_once, tmp_path / "llama")


def change_json(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def shard(folder):
    """Write the weights as two files, and return what their index says."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number in (1, 2):
        names = list(weights)[number - 1 :: 2]
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    return {"metadata": {}, "weight_map": where}


NORM = "model.norm.weight"
INDEXES = {
    "no weight_map": (lambda index: {"metadata": {}}, "index of the weights is damaged"),
    "empty": (lambda index: {"weight_map": {}}, "index of the weights is damaged"),
    "null": (lambda index: {"weight_map": None}, "index of the weights is damaged"),
    "a list": (lambda index: [], "index of the weights is damaged"),
    "null file": (lambda index: {"weight_map": {**index["weight_map"], NORM: None}}, "outside of its folder"),
    "lacks a tensor": (lambda index: {"weight_map": {k: v for k, v in index["weight_map"].items() if k != NORM}},
                       "does not match the tensors"),
    "one too many": (lambda index: {"weight_map": {**index["weight_map"], "x": "model-00001-of-00002.safetensors"}},
                     "does not match the tensors"),
    "missing file": (lambda index: {"weight_map": {**index["weight_map"], "x": "model-00003-of-00002.safetensors"}},
                     "file of weights is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_a_merge_would_refuse_is_refused_before_training(kind, llama, tmp_path):
    change, says = INDEXES[kind]
    (llama / INDEX).write_text(json.dumps(change(shard(llama))))
    for check in (lambda: resolve_base(llama, tmp_path / "out"), lambda: describe_files(llama)):
        with pytest.raises(BadModel, match=says) as caught:
            check()
        assert caught.value.where == str(llama / INDEX), "the base's own file, not that of a copy"


def test_shards_without_an_index_are_refused_and_files_that_no_index_names_are_not_read(llama, tmp_path):
    index = shard(llama)
    with pytest.raises(BadModel, match="finds no weights") as caught:
        resolve_base(llama, tmp_path / "refused")
    assert INDEX in caught.value.expected
    (llama / INDEX).write_text(json.dumps(index))
    save_file({"layers.0.attention.wq.weight": torch.full((2, 2), torch.nan)}, llama / "consolidated.safetensors")
    resolve_base(llama, tmp_path / "out")
    copied = {file.name for file in (tmp_path / "out").glob("*.safetensors*")}
    assert copied == {*index["weight_map"].values(), INDEX}


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_weights_that_transformers_does_not_load_may_be_damaged_and_are_not_copied(sharded, llama, tmp_path):
    """A clone without git-lfs has pointers; which of these files a hub snapshot has depends on earlier downloads."""
    if sharded:
        (llama / INDEX).write_text(json.dumps(shard(llama)))
    resolve_base(llama, tmp_path / "without")
    (llama / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    resolve_base(llama, tmp_path / "with")
    assert describe_files(llama)
    left, right = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("without", "with"))
    assert left == right


BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("kind", ["index lists the tied head", "file holds a buffer", "index lists a buffer"])
def test_an_index_may_differ_from_its_files_in_what_the_model_does_not_load(kind, tmp_path, caplog):
    """transformers opens such bases, and peft merges into them: both are the reference."""
    llama = build_llama(tmp_path / "llama", tie_word_embeddings=True)
    index = shard(llama)
    first = "model-00001-of-00002.safetensors"
    if kind == "file holds a buffer":
        save_file(load_file(llama / first) | {BUFFER: torch.ones(8)}, llama / first, {"format": "pt"})
    else:
        index["weight_map"]["lm_head.weight" if "head" in kind else BUFFER] = first
    (llama / INDEX).write_text(json.dumps(index))
    resolve_base(llama, tmp_path / "out")
    assert describe_files(llama)
    assert "differ in 1 tensors that the model does not load" in caplog.text
    adapter = make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    merge(tmp_path / "out", adapter, tmp_path / "merged", checked=True)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).merge_and_unload()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert torch.equal(found, by_peft(ids).logits)


def test_an_untied_head_that_only_the_index_has_is_refused(llama, tmp_path):
    index = shard(llama)
    for name in set(index["weight_map"].values()):
        kept = {key: value for key, value in load_file(llama / name).items() if key != "lm_head.weight"}
        save_file(kept, llama / name, {"format": "pt"})
    (llama / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadModel, match="does not match") as caught:
        resolve_base(llama, tmp_path / "out")
    assert "lm_head.weight" in caught.value.got


def test_an_index_beside_a_single_file_is_not_read_as_transformers_does_not_read_it(llama, tmp_path):
    (llama / INDEX).write_text("{}")
    resolve_base(llama, tmp_path / "out")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found, expected = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tmp_path / "out", llama)
        )
    assert torch.equal(found, expected)


OTHER_TYPES = [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int64]


@pytest.mark.parametrize(
    ("dtype", "prefix"), [*product(OTHER_TYPES, ["model.", ""]), (torch.bool, "model.")]
)  # masks of older transformers are of booleans, and have names that the model lacks
def test_weights_of_other_types_without_a_configuration_are_refused_before_training(dtype, prefix, llama, tmp_path):
    """transformers loads such numbers as if they were the weights; a merge refuses them."""
    name = f"{prefix}norm.weight"

    def change(weights):
        plain = {key.replace("model.", prefix, 1): weight for key, weight in weights.items()}
        return {**plain, name: (plain[name] * 10).to(dtype)}

    change_weights(llama, change)
    found = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).model.norm.weight
    assert found.is_floating_point() and found.abs().max() == (1 if dtype is torch.bool else 10)
    kind = (
        "quantized, and config.json does not" if dtype.itemsize == 1 and dtype is not torch.bool else "an integer type"
    )
    for check in (lambda: resolve_base(llama, tmp_path / "out"), lambda: describe_files(llama)):
        with pytest.raises(BadModel, match=kind) as caught:
            check()
        assert caught.value.where.endswith(f"{llama.name}/model.safetensors: {name}")


def test_experts_in_integers_are_refused_though_the_model_has_other_names_for_them(tmp_path):
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    check_fits_config(folder)
    change_weights(folder, lambda w: {k: v.int() if ".experts." in k else v for k, v in w.items()})
    stored = load_file(folder / "model.safetensors")
    names = AutoModelForCausalLM.from_pretrained(folder).state_dict().keys()
    assert not any(name in names for name, weight in stored.items() if weight.dtype == torch.int32)
    with pytest.raises(BadModel, match="A weight of the base has an integer type"):
        check_fits_config(folder)


@pytest.mark.skipif("deepseek_v4" not in CONFIG_MAPPING, reason="no deepseek_v4 here")
def test_integers_that_the_model_has_as_integers_are_accepted_under_a_stored_name(tmp_path):
    """DeepSeek-V4 has a table of experts by token."""
    folder = save_tiny(
        "deepseek_v4", tmp_path / "base", head_dim=64, q_lora_rank=32, o_lora_rank=32, o_groups=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, index_n_heads=2, index_head_dim=64, qk_rope_head_dim=32,
    )  # fmt: skip
    table = "model.layers.0.ffn.gate.tid2eid"
    assert load_file(folder / "model.safetensors")[table].dtype == torch.int64
    assert table not in model_without_weights(folder).state_dict()
    assert check_fits_config(folder) == []


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 0},
        {"rope_theta": -1e4},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 0.0},
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "attention_factor": float("inf")},
    ],
    ids=["zero", "negative", "factor", "scale"],
)
def test_rotary_angles_that_are_not_finite_are_refused_before_training(rope, llama, tmp_path):
    """Each logit would be NaN."""
    change_json(llama / "config.json", rope_parameters={"rope_type": "default", **rope})
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")  # sdpa hides it on some CPUs
        assert plain(torch.arange(9)[None]).logits.isnan().any()
    for check in (lambda: resolve_base(llama, tmp_path / "out"), lambda: describe_files(llama)):
        with pytest.raises(BadModel, match="rotary angles are not finite"):
            check()


def test_a_mask_of_bytes_that_the_model_does_not_load_is_accepted(llama, tmp_path):
    change_weights(llama, lambda w: {**w, "model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.uint8)})
    resolve_base(llama, tmp_path / "out")


def test_a_pickle_is_refused_by_doctor_as_by_resolve_base(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    for check in (lambda: resolve_base(llama, tmp_path / "out"), lambda: describe_files(llama)):
        with pytest.raises(BadModel, match="A pickle can run code"):
            check()


@pytest.mark.parametrize("eos", ["</s>", ["</s>"], True, {"id": 2}])
def test_stop_tokens_that_are_not_ids_are_refused_before_training(eos, llama, tmp_path):
    """`generate` of the merged model would fail with them."""
    change_json(llama / "generation_config.json", eos_token_id=eos)
    with pytest.raises(BadModel, match="not named by its id") as caught:
        resolve_base(llama, tmp_path / "out")
    assert caught.value.where == f"{llama / 'generation_config.json'}: eos_token_id"


def test_a_negative_stop_token_means_none(llama, tmp_path):
    """Configurations of the first Llamas have -1."""
    expected = stop_ids(llama)
    change_json(llama / "generation_config.json", eos_token_id=-1)
    resolve_base(llama, tmp_path / "out")
    assert stop_ids(tmp_path / "out") == expected
    (tmp_path / "merged").mkdir()
    merge(tmp_path / "out", make_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"]), tmp_path / "merged")
    assert min(json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]) > 0


@pytest.mark.parametrize("change", [{"pad_token": "[PAD]"}, {"pad_token": ..., "unk_token": ..., "eos_token": ...}])
def test_answers_are_padded_with_a_token_that_has_an_embedding(change, llama, tmp_path):
    """A token that was added to the tokenizer only has an id behind the embeddings; a tokenizer may name none at all."""
    change_json(llama / "tokenizer_config.json", **change)
    resolve_base(llama, tmp_path / "out")
    tokenizer, model = load_tokenizer(tmp_path / "out"), load_model(tmp_path / "out", "float32", recipe().runtime)
    assert 0 <= tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings
    prompts = [[3, 4, 5], [6, 7], [8]]
    options = {"stop_ids": stop_ids(tmp_path / "out"), "max_new_tokens": 4}
    together = generate_answers(model, tokenizer, prompts, batch_size=3, **options)
    alone = [generate_answers(model, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert together == alone


def test_a_tokenizer_without_any_token_for_padding_is_refused(llama, tmp_path):
    change_json(llama / "tokenizer_config.json", pad_token=..., unk_token=..., eos_token=..., bos_token=...)
    for name in ("config.json", "generation_config.json"):
        change_json(llama / name, eos_token_id=None)
    with pytest.raises(BadModel, match="no token for padding"):
        resolve_base(llama, tmp_path / "out")


def test_a_pad_token_behind_the_embeddings_in_the_configuration_is_refused_in_one_sentence(llama, tmp_path):
    change_json(llama / "config.json", pad_token_id=99999)
    with pytest.raises(BadModel, match="cannot open the base's weights"):
        resolve_base(llama, tmp_path / "out")


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_named_as_the_base_is_refused_with_how_to_merge_it(has_model, tmp_path):
    """transformers opens a folder with an adapter as base and adapter together."""
    phi3 = build_phi3(tmp_path / "phi3", dtype="float32")
    adapter = make_adapter(phi3, tmp_path / "adapter")
    if has_model:
        for file in phi3.iterdir():
            shutil.copyfile(file, adapter / file.name)
    with pytest.raises(
        BadModel, match="adapter beside the model" if has_model else "adapter without its model"
    ) as caught:
        refuse_unusable_folder(adapter, trust=False)
    assert "loraflow merge" in caught.value.next_step


@pytest.mark.parametrize(
    ("values", "says"),
    [({"rms_norm_eps": float("nan")}, "rms_norm_eps: NaN"),
     ({"rope_parameters": {"rope_type": "default", "rope_theta": [1.0, float("nan")]}}, "rope_parameters.rope_theta.1: NaN"), ({"return_dict": False}, "return_dict"), ({"output_attentions": True}, "remove")],
)  # fmt: skip
def test_a_configuration_that_training_cannot_compute_with_is_refused(values, says, llama):
    change_json(llama / "config.json", **values)
    with pytest.raises(BadModel) as caught:
        refuse_unusable_folder(llama, trust=False)
    assert says in str(caught.value)


def test_infinity_in_a_configuration_is_accepted(llama):
    """Mamba-2's time_step_limit."""
    change_json(llama / "config.json", time_step_limit=[0.0, float("inf")])
    refuse_unusable_folder(llama, trust=False)


@pytest.mark.parametrize(
    ("file", "content", "package"),
    [("tekken.json", "{}", "mistral-common"), ("tokenizer.model", "\n", "sentencepiece"), (None, "", "download")],
)
def test_a_tokenizer_in_another_form_is_named_with_the_package_that_reads_it(file, content, package, llama, tmp_path):
    (llama / "tokenizer.json").unlink()
    if file:
        (llama / file).write_text(content)
    with pytest.raises(BadModel, match="cannot open the base's tokenizer") as caught:
        resolve_base(llama, tmp_path / "out")
    assert package in caught.value.next_step
    if file:  # transformers' own words are about other packages and files
        assert caught.value.got == file
    else:
        assert len(caught.value.got.splitlines()) == 1 and len(caught.value.got) > 100


def test_a_kernel_in_the_configuration_that_is_not_installed_is_named_as_what_to_remove(llama, tmp_path):
    change_json(llama / "config.json", _attn_implementation="flash_attention_2")
    for check in (lambda: resolve_base(llama, tmp_path / "out"), lambda: describe_files(llama)):
        with pytest.raises(BadModel, match="cannot open the base's weights") as caught:
            check()
        assert caught.value.next_step.startswith("remove _attn_implementation from config.json")
    change_json(llama / "config.json", _attn_implementation=...)
    assert describe_files(llama)


def test_the_hubs_download_leaves_out_weights_that_transformers_does_not_load(monkeypatch, tmp_path):
    """Mistral's repositories have all weights twice."""
    from fnmatch import fnmatch

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: asked.update(options) or tmp_path)
    hub.download("org/name", "0" * 40, trust=False)

    def is_listed(name):
        listed = (
            any(fnmatch(name, pattern) for pattern in asked[key]) for key in ("allow_patterns", "ignore_patterns")
        )
        return next(listed) and not next(listed)

    assert is_listed("model-00001-of-00002.safetensors") and is_listed("spiece.model") and is_listed("qwen.tiktoken")
    assert not any(map(is_listed, ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin")))


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "of_its_own"

class Model(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        {more}
"""


def with_code(folder, more="pass"):
    (folder / "own.py").write_text(CODE.format(more=more))
    mapped = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Model"}
    change_json(folder / "config.json", model_type="of_its_own", auto_map=mapped)
    return folder


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_a_model_with_code_of_its_own_are_checked_before_training(change, llama, tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = with_code(llama)
    resolve_base(folder, tmp_path / "complete", trust_remote_code=True)
    change_weights(
        folder, lambda w: {k: v[:16] if k == name else v for k, v in w.items() if k != name or change == "shape"}
    )
    with pytest.raises(BadModel, match="lack weights" if change == "missing" else "another shape") as caught:
        resolve_base(folder, tmp_path / "out", trust_remote_code=True)
    assert name in str(caught.value)


def test_code_that_does_not_run_without_weights_leaves_names_and_shapes_to_the_training(llama, tmp_path, caplog):
    folder = with_code(llama, "assert self.lm_head.weight.device.type == 'cpu'")
    change_weights(llama, lambda w: {**w, "model.layers.0.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)})
    resolve_base(folder, tmp_path / "out", trust_remote_code=True)
    assert "only the training checks" in caplog.text
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(llama, lambda weights: {**weights, name: (weights[name] * 10).to(torch.int8)})
    with pytest.raises(BadModel, match="quantized, and config.json does not say how"):
        resolve_base(folder, tmp_path / "refused", trust_remote_code=True)


def test_doctor_names_the_bases_own_folder(llama):
    (llama / "chat_template.jinja").unlink()
    caught = CliRunner().invoke(cli, ["doctor", "--base", str(llama)]).exception
    assert isinstance(caught, BadModel) and caught.where == str(llama) and "base.chat_template" in caught.next_step


def test_a_tokenizer_with_a_class_of_its_own_is_loaded_after_resolve_base_without_its_code(llama, tmp_path):
    """Training, evaluation and serving failed with a ValueError, and asked a question on a terminal."""
    (llama / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    file = llama / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    resolve_base(llama, tmp_path / "out", trust_remote_code=True)
    text = "<|user|>\nred 你好<|end|>"
    loaded, expected = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(llama, trust_remote_code=True)
    assert type(expected).__name__ == "Own" and loaded(text)["input_ids"] == expected(text)["input_ids"]
    assert (loaded.eos_token, loaded.pad_token) == (expected.eos_token, expected.pad_token)


def test_doctor_names_what_is_not_used_and_stop_tokens_without_an_embedding(llama):
    for name, change in (("config.json", {"num_hidden_layers": 1}), ("generation_config.json", {"eos_token_id": 9999})):
        values = json.loads((llama / name).read_text())
        (llama / name).write_text(json.dumps({**values, **change}))
    text = "\n".join(describe_files(llama))
    assert "the model does not use: 9, such as model.layers.1." in text and "complete, finite" in text
    assert "no answer ends at 9999: eos_token_id is beyond the 507 embeddings" in text and "(9999)" not in text
    (llama / "model.safetensors").unlink()
    assert "not checked: the weights, which are not in the folder" in "\n".join(describe_files(llama))
