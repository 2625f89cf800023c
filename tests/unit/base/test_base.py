"""Base models: pinned, copied, repacked, refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loraflow.base import hub, resolve
from loraflow.base.load import load_tokenizer, stop_ids
from loraflow.base.resolve import describe_files
from loraflow.cli import cli
from loraflow.config.recipe import Base
from loraflow.data.templates.tokenizer_config import RECORD
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.failures import BadModel, MissingExtra, Network
from loraflow.job import Inputs, Job, Progress
from loraflow.store.files import HashMemo
from tests.conftest import PHI3_TEMPLATE, build_tokenizer


def resolve_base(folder: Path, out: Path, **base):
    out.mkdir()
    settings = Base(model=str(folder), **base)
    found = resolve.locate(settings, HashMemo(None))
    config = {"source": found.source, "repack": settings.repack, "trust_remote_code": settings.trust_remote_code}
    runtime = {"origin": found.origin.model_dump()}
    if found.chat_template is not None:
        runtime["chat_template"] = found.chat_template
    job = Job(stage="resolve_base", version=1, config={**config, "dtype": settings.dtype}, runtime=runtime)
    return resolve.run(job, Inputs({}), out, Progress())


def build_llama(folder: Path, **config) -> Path:
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    values = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "says", "got"),
    [
        (lambda weights: {n: w for n, w in weights.items() if n != K_PROJ}, "lack weights", K_PROJ),
        (lambda weights: {**weights, K_PROJ: torch.zeros(16, 64)}, "another shape than config.json says", "[16, 64]"),
    ],
    ids=["missing", "another shape"],
)
def test_weights_that_do_not_fit_the_config_are_refused_before_training(tmp_path, change, says, got):
    """transformers would train on random numbers in their place, with a warning in the log."""
    llama = build_llama(tmp_path / "llama")
    change_weights(llama, change)
    with pytest.raises(BadModel, match=says) as caught:
        resolve_base(llama, tmp_path / "out")
    assert caught.value.got == got
    with pytest.raises(BadModel, match=says):
        describe_files(llama)


def tie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def test_two_weights_that_are_one_by_the_config_are_refused_if_they_differ(tmp_path):
    """transformers trains them as two; a server that follows the config would answer with the embeddings as the head."""
    llama = build_llama(tmp_path / "llama", tie_word_embeddings=False)
    tie(llama)
    with pytest.raises(BadModel, match="ties two weights") as caught:
        resolve_base(llama, tmp_path / "out")
    assert "lm_head.weight, model.embed_tokens.weight" in caught.value.where
    change_weights(llama, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    resolve_base(llama, tmp_path / "equal")


def test_weights_that_the_model_does_not_use_are_named(tmp_path, caplog):
    """A config.json with fewer layers than the files makes another model of them; predictors of later tokens are unused too."""
    llama = build_llama(tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    resolve_base(llama, tmp_path / "out")
    assert "9 weights that its model does not use, such as model.layers.1.input_layernorm.weight" in caplog.text


@pytest.mark.parametrize("tie", [True, False])
def test_a_repacked_llama_has_the_same_logits(tmp_path, tie):
    from transformers import AutoModelForCausalLM

    llama = build_llama(tmp_path / "llama", tie_word_embeddings=tie)
    resolve_base(llama, tmp_path / "out", repack="phi3", dtype="float32")
    first, second = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (llama, tmp_path / "out")
    )
    assert second.config.model_type == "phi3"
    assert "model.layers.0.self_attn.qkv_proj.weight" in dict(second.named_parameters())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert stop_ids(tmp_path / "out") == stop_ids(llama)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"attention_bias": True}, "attention biases"),
        ({"head_dim": 32}, "head size"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "type linear"),
    ],
)
def test_a_model_without_a_phi3_equivalent_is_not_repacked(tmp_path, config, says):
    llama = build_llama(tmp_path / "llama", **config)
    with pytest.raises(BadModel, match="cannot be repacked") as caught:
        resolve_base(llama, tmp_path / "out", repack="phi3")
    assert says in str(caught.value)


def test_a_base_is_identified_by_its_content_not_its_path(tmp_path, phi3):
    shutil.copytree(phi3, tmp_path / "copy")
    first, second = (resolve.locate(Base(model=str(f)), HashMemo(None)) for f in (phi3, tmp_path / "copy"))
    assert first.source == second.source and first.origin != second.origin
    file = tmp_path / "copy" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert resolve.locate(Base(model=str(tmp_path / "copy")), HashMemo(None)).source != first.source


def test_the_bases_template_has_a_fixed_date_and_may_be_named_by_the_recipe(tmp_path, phi3):
    from transformers import AutoTokenizer

    own = resolve_base(phi3, tmp_path / "own")
    assert "template_date" not in own.figures
    assert (tmp_path / "own" / "chat_template.jinja").read_bytes() == (phi3 / "chat_template.jinja").read_bytes()
    file = tmp_path / "dated.jinja"
    file.write_text("{{ '<|system|>' + strftime_now('%d %b %Y') + '<|end|>' }}" + PHI3_TEMPLATE)
    dated = resolve_base(phi3, tmp_path / "dated", chat_template=str(file))
    assert dated.figures["template_date"] == "2024-07-26"
    served = AutoTokenizer.from_pretrained(tmp_path / "dated")
    chat = [{"role": "user", "content": "one"}]
    assert served.apply_chat_template(chat, tokenize=False).startswith("<|system|>26 Jul 2024<|end|><|user|>")


def test_special_tokens_of_a_tokenizers_class_are_recorded_in_the_base(tmp_path, phi3):
    from transformers import AutoTokenizer

    base = shutil.copytree(phi3, tmp_path / "base")
    values = json.loads((base / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        values.pop(name, None)
    (base / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "GPT2TokenizerFast"}))
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + PHI3_TEMPLATE)
    summary = resolve_base(base, tmp_path / "out")
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (encoded,) = ChatTemplate(tmp_path / "out").encode([chat], "assistant")
    assert (
        encoded.ids.tolist()
        == AutoTokenizer.from_pretrained(base).apply_chat_template(chat, return_dict=True)["input_ids"]
    )
    assert any(RECORD.startswith(prefix) for prefix in summary.facets["tokenizer"]), "part of tokenize's fingerprint"


OTHER_ENDS = (  # earlier answers are closed by another token than the last one, as gpt-oss's
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{{ '<|endoftext|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "is_other"), [(OTHER_ENDS, True), (PHI3_TEMPLATE, False)])
def test_tokenize_depends_on_the_stop_ids_where_the_template_makes_chats_depend_on_them(
    tmp_path, phi3, template, is_other
):
    """Two-turn chats are refused if generation would not stop at the end of the first answer."""
    facets, refused = [], []
    for name, tokens in (("one", ["<|endoftext|>"]), ("two", ["<|endoftext|>", "<|end|>"])):
        base = shutil.copytree(phi3, tmp_path / name)
        (base / "chat_template.jinja").write_text(template)
        ids = [ChatTemplate(base).tokenizer.token_to_id(token) for token in tokens]
        for file in ("generation_config.json", "config.json"):
            values = json.loads((base / file).read_text())
            (base / file).write_text(json.dumps({**values, "eos_token_id": ids}))
        facets.append(resolve_base(base, tmp_path / f"{name}-out").facets["tokenizer"])
        chat = [{"role": role, "content": "one"} for role in ("user", "assistant") * 2]
        try:
            ChatTemplate(tmp_path / f"{name}-out").encode([chat], "assistant")
        except BadModel:
            refused.append(name)
    assert refused == (["one"] if is_other else [])
    assert all(("generation_config.json" in facet) == is_other for facet in facets)


def harm(folder: Path, what: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if what == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "no language model":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    elif what == "no json":
        (folder / "config.json").write_text("{")
    elif what == "damaged":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    elif what == "no template":
        (folder / "chat_template.jinja").unlink()
    elif what == "missing shard":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("pickle", "pickle can run code"),
        ("no config", "does not contain a model"),
        ("no language model", "not a causal language model"),
        ("no json", "JSON object"),
        ("damaged", "damaged"),
        ("no template", "no chat template"),
        ("missing shard", "file of weights is missing"),
    ],
)
def test_an_unusable_model_folder_is_refused(tmp_path, phi3, what, says):
    shutil.copytree(phi3, tmp_path / "base")
    harm(tmp_path / "base", what)
    with pytest.raises(BadModel, match=says):
        resolve_base(tmp_path / "base", tmp_path / "out")


def test_auto_map_is_removed_from_the_config(tmp_path, phi3):
    shutil.copytree(phi3, tmp_path / "base")
    config = json.loads((phi3 / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    resolve_base(tmp_path / "base", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_branch_is_resolved_to_the_commit_in_the_lock_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commit = "a" * 40
    pinned = resolve.locate(Base(model="microsoft/Phi-3-mini-4k-instruct", revision=commit), HashMemo(None))
    assert pinned.source == {"hub": "microsoft/Phi-3-mini-4k-instruct", "commit": commit}
    branch = Base(model="microsoft/Phi-3-mini-4k-instruct", revision="main")
    with pytest.raises(Network, match="the commit of the branch") as caught:  # HF_HUB_OFFLINE is set for all tests
        resolve.locate(branch, HashMemo(None))
    assert "40 hex digits" in str(caught.value)
    (tmp_path / "loraflow.lock").write_text(json.dumps({"microsoft/Phi-3-mini-4k-instruct@main": commit}))
    assert resolve.locate(branch, HashMemo(None)) == pinned


COMMIT = "c" * 40
HASH_OF_GIT = ["git", "hash-object", "--no-filters"]


def cache_of_the_hub(folder: Path, model: Path, git: list[str], monkeypatch) -> Path:
    """Return the snapshot of acme/tiny in a cache with the layout of the hub's library."""
    home = folder / "models--acme--tiny"
    blobs, snapshot = home / "blobs", home / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    for file in model.iterdir():
        command = ["sha256sum"] if file.suffix == ".safetensors" else git
        blob = blobs / subprocess.run([*command, file], check=True, capture_output=True, text=True).stdout.split()[0]
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return snapshot


@pytest.mark.parametrize("git", [HASH_OF_GIT, ["sha1sum"]])  # the hub's names, and a mirror's
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_hubs_cache_that_was_damaged_is_refused(tmp_path, phi3, monkeypatch, name, git):
    """The names of the cache's files are those of git and sha256sum."""
    snapshot = cache_of_the_hub(tmp_path, phi3, git, monkeypatch)
    folder = hub.download("acme/tiny", COMMIT, trust=False)
    assert (folder / "model.safetensors").read_bytes() == (phi3 / "model.safetensors").read_bytes()
    damaged = (snapshot / name).resolve()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(BadModel, match="damaged in the hub's cache") as caught:
        hub.download("acme/tiny", COMMIT, trust=False)
    assert str(damaged) in caught.value.next_step


def test_a_file_that_was_removed_from_the_hubs_cache_is_a_network_failure_if_it_is_needed(tmp_path, phi3, monkeypatch):
    """Without a network, the hub's library returns the snapshot as it is. Files that nobody asked for may be missing."""
    snapshot = cache_of_the_hub(tmp_path, phi3, HASH_OF_GIT, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("pytorch_model.bin", "original/params.json.gz"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to("../../blobs/" + "d" * 64)
    assert hub.download("acme/tiny", COMMIT, trust=False) == snapshot
    (snapshot / "model.safetensors").resolve().unlink()
    assert hub.download("acme/tiny", COMMIT, trust=False, with_weights=False) == snapshot
    with pytest.raises(Network, match="could not be downloaded") as caught:
        hub.download("acme/tiny", COMMIT, trust=False)
    assert "model.safetensors was removed from the hub's cache" in caught.value.got


@pytest.mark.parametrize("cached", ["pytorch_model.bin", "training_args.bin", "model.safetensors.index.json"])
def test_doctor_does_not_judge_a_hub_model_by_the_weights_that_are_in_the_cache(cached, tmp_path, phi3, monkeypatch):
    """Other programs fetch other files of the same commit into the snapshot."""
    snapshot = cache_of_the_hub(tmp_path, phi3, HASH_OF_GIT, monkeypatch)
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    (snapshot / "model.safetensors").unlink()
    (snapshot / cached).write_text('{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(cli, ["doctor", "--base", "acme/tiny"])
    assert result.exit_code == 0, result.exception
    assert "answers end at" in result.output


def test_an_unreachable_hub_is_a_network_failure(tmp_path):
    """In a process of its own: the hub's library reads its address once. Its own errors are no OSError."""
    code = """
from loraflow.base import resolve
from loraflow.config.recipe import Base
from loraflow.failures import Network
from loraflow.store.files import HashMemo
try:
    resolve.locate(Base(model="a/b", revision="main"), HashMemo(None))
except Network as failure:
    print(failure.got)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "ConnectError" in done.stdout, done.stderr


def test_an_unknown_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BadModel, match="no such base model"):
        resolve.locate(Base(model="nothing"), HashMemo(None))
    with pytest.raises(BadModel, match="bundled"):
        resolve.locate(Base(model="bundled:gpt9"), HashMemo(None))
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        resolve.locate(Base(model="bundled:smollm2"), HashMemo(None))
    assert "loraflow base install smollm2" in str(caught.value)


def test_the_pad_token_is_not_the_stop_token(phi3):
    tokenizer = load_tokenizer(phi3)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("repack", [None, "phi3"])
def test_an_old_llama_tokenizer_keeps_its_spaces_behind_special_tokens(tmp_path, repack):
    """transformers' save_pretrained leaves out `legacy`, and so gives chats other ids than the base has."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer, LlamaTokenizer

    llama = build_llama(tmp_path / "llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    tokenizer = LlamaTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[("▁", "a")])
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    )
    tokenizer.save_pretrained(llama)
    values = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps({**values, "legacy": True}))
    chat = [{"role": "user", "content": "a a"}, {"role": "assistant", "content": "a"}]
    expected = AutoTokenizer.from_pretrained(llama).apply_chat_template(chat, return_dict=True)["input_ids"]
    assert expected != tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"], "legacy makes a difference"
    resolve_base(llama, tmp_path / "out", repack=repack, dtype="float32")
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert served.apply_chat_template(chat, return_dict=True)["input_ids"] == expected
    (encoded,) = ChatTemplate(tmp_path / "out").encode([chat], "assistant")
    assert encoded.ids.tolist() == expected
