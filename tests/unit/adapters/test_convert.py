"""Adapters from loralib, and between split and fused projections: PEFT's own logits before and after are the oracle."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loraflow.adapters.convert import convert
from loraflow.adapters.loralib.model import prepare, state_of
from loraflow.adapters.loralib.swap import Settings
from loraflow.adapters.peft_folder import read_peft
from loraflow.cli.models import adapters
from loraflow.failures import BadConfig, BadModel, CorruptArtifact
from tests.conftest import build_phi3
from tests.unit.adapters.test_loralib import IDS, QV, perturb, pretrained


@pytest.fixture(scope="module", params=[2, 4], ids=["gqa", "mha"])
def twins(request, tmp_path_factory):
    """The same model twice: Llama with split projections, Phi-3 with fused ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("twins")
    fused = build_phi3(folder / "phi3", dtype="float32", num_key_value_heads=request.param)
    model = pretrained(fused)
    c = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, rms_norm_eps=c.rms_norm_eps,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, max_position_embeddings=512,
        num_key_value_heads=c.num_key_value_heads, pad_token_id=c.pad_token_id, tie_word_embeddings=False,
    ))  # fmt: skip
    kv = 16 * c.num_key_value_heads
    state = {}
    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            for part, piece in zip("qkv", tensor.split([64, kv, kv]), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = piece.clone()
        elif "gate_up_proj" in name:
            for part, piece in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{part}_proj")] = piece.clone()
        else:
            state[name] = tensor
    llama.load_state_dict(state)
    llama.save_pretrained(folder / "llama")
    with torch.no_grad():
        assert torch.allclose(llama.eval()(IDS).logits, model.eval()(IDS).logits, atol=1e-6)
    return fused, folder / "llama"


def make(base: Path, folder: Path, **options) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        pretrained(base), LoraConfig(**{"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", **options})
    )
    perturb(model).save_pretrained(folder)
    return folder


def logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(pretrained(base), str(adapter)).eval()(IDS).logits


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLITS = {
    "all": {"target_modules": ALL},
    "q-and-v": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "ranks": {"target_modules": ALL, "rank_pattern": {"q_proj": 5, "layers.1.self_attn.v_proj": 1}, "alpha_pattern": {"k_proj": 2}},
    "dora": {"target_modules": ALL, "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS)
def test_an_adapter_of_a_split_base_fits_the_fused_one(twins, tmp_path, options):
    fused, split = twins
    adapter = make(split, tmp_path / "a", **options)
    figures = convert(adapter, fused, tmp_path / "b")
    assert figures["fused"] == 4
    assert torch.allclose(logits(split, adapter), logits(fused, tmp_path / "b"), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_an_adapter_of_a_fused_base_fits_the_split_one_and_converts_back(twins, tmp_path, options):
    fused, split = twins
    adapter = make(fused, tmp_path / "a", target_modules=FUSED, **options)
    assert convert(adapter, split, tmp_path / "b")["split"] == 4
    assert torch.allclose(logits(fused, adapter), logits(split, tmp_path / "b"), atol=1e-5)
    convert(tmp_path / "b", fused, tmp_path / "c")
    first, second = read_peft(adapter).updates, read_peft(tmp_path / "c").updates
    for name in first:
        assert torch.equal(first[name].down, second[name].down) and torch.equal(first[name].up, second[name].up)
        assert first[name].scale == pytest.approx(second[name].scale, rel=1e-12)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "nested.pt"])
def test_a_loralib_checkpoint_becomes_a_peft_adapter(twins, tmp_path, suffix):
    from safetensors.torch import save_file

    fused, split = twins
    also = ["embed_tokens"] if suffix == "pt" else []
    settings = Settings(r=3, lora_alpha=7, targets=["qkv_proj", "o_proj", *also], enable_lora=QV)
    model = perturb(prepare(pretrained(fused), settings, 0))
    file = tmp_path / f"lora.{suffix}"
    state = dict(state_of(model))
    if suffix == "safetensors":
        save_file(state, file)
    else:
        torch.save({"model_state_dict": state} if "nested" in suffix else state, file)
    convert(file, fused, tmp_path / "b", lora_alpha=7, enable_lora={"qkv_proj": ["q", "v"]})
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    assert torch.allclose(expected, logits(fused, tmp_path / "b"), atol=1e-5)
    with pytest.raises(BadModel, match="does not say which"):
        convert(file, fused, tmp_path / "c", lora_alpha=7)
    if not also:  # and from there to the split base
        convert(tmp_path / "b", split, tmp_path / "d")
        assert torch.allclose(expected, logits(split, tmp_path / "d"), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "says"), [({"init_lora_weights": "pissa"}, "weight_conversion"), ({"r": 99}, "rank 99")]
)
def test_an_adapter_that_is_not_an_additive_update_of_the_base_is_refused(twins, tmp_path, values, says):
    adapter = make(twins[1], tmp_path / "a", target_modules=ALL)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(BadModel) as caught:
        convert(adapter, twins[0], tmp_path / "b")
    assert says in str(caught.value)


def test_equal_adapters_have_equal_bytes(twins, tmp_path):
    adapter = make(twins[1], tmp_path / "a", target_modules=ALL)
    for name in "bc":
        convert(adapter, twins[0], tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_an_adapter_that_cannot_fit_is_refused_and_nothing_is_written(twins, tmp_path):
    fused, split = twins
    run = lambda *args: CliRunner().invoke(adapters, ["convert", *map(str, args)])  # noqa: E731
    pickle = tmp_path / "evil.pt"

    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    torch.save({"a.lora_A": Canary()}, pickle)
    nan = make(fused, tmp_path / "nan", target_modules=["o_proj"])
    from safetensors.torch import load_file, save_file

    tensors = load_file(nan / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, nan / "adapter_model.safetensors")
    other = make(
        build_phi3(tmp_path / "wide", hidden_size=128, dtype="float32"), tmp_path / "a-wide", target_modules=FUSED
    )
    qkv = make(tmp_path / "wide", tmp_path / "a-qkv", target_modules=["qkv_proj"])
    more = make(fused, tmp_path / "more", target_modules=["o_proj"], modules_to_save=["lm_head"])
    cases = [
        ((pickle, fused, tmp_path / "o", "--alpha", 8), "contains more than tensors"),
        ((nan, fused, tmp_path / "o"), "not finite"),
        ((other, fused, tmp_path / "o"), "of another shape"),
        ((qkv, split, tmp_path / "o"), "of another shape"),
        ((more, fused, tmp_path / "o"), "modules_to_save"),
        ((more, fused, tmp_path / "o", "--alpha", 8), "loralib checkpoint"),
        ((pickle, fused, tmp_path / "o"), "--alpha"),
        ((nan, fused, nan), "exists"),
    ]
    for arguments, says in cases:
        result = run(*arguments)
        assert result.exit_code != 0 and says in str(result.exception), (arguments, result.exception)
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.unfinished").exists()
    assert not (tmp_path / "opened").exists()
    fine = run(make(fused, tmp_path / "fine", target_modules=FUSED), split, tmp_path / "o")
    assert fine.exit_code == 0 and "4 split" in fine.output
    assert json.loads((tmp_path / "o" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_two_commands_never_write_one_folder(tmp_path):
    from loraflow.cli.models import _written_whole

    out = tmp_path / "o"
    (tmp_path / "o.unfinished" / "new").mkdir(parents=True)
    (tmp_path / "o.unfinished" / "new" / "left.txt").write_text("by a process that was killed")
    with _written_whole(out) as unfinished:
        unfinished.mkdir()
        (unfinished / "a.txt").write_text("first")
        with pytest.raises(BadConfig, match="Another process is writing this folder"), _written_whole(out):
            pass
        assert (unfinished / "a.txt").read_text() == "first"
    assert [file.name for file in out.iterdir()] == ["a.txt"] and not (tmp_path / "o.unfinished").exists()


def test_a_folder_that_another_command_wrote_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    from loraflow.cli.models import _written_whole

    out = tmp_path / "o"

    @contextmanager
    def after_another(path, **_):
        out.mkdir()
        yield

    monkeypatch.setattr("loraflow.store.lock.flock", after_another)
    with pytest.raises(BadConfig, match="exists already"), _written_whole(out) as unfinished:
        unfinished.mkdir(parents=True)
        (unfinished / "a.txt").write_text("second")
    assert not any(out.iterdir()) and not (tmp_path / "o.unfinished").exists()


def test_an_existing_target_or_a_damaged_input_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """The folder may allow no new file, so the lock could not be made."""
    from loraflow.cli.models import _written_whole

    def refuse(*_, **__):
        raise PermissionError("the folder is read-only")

    def damaged(*_):
        raise CorruptArtifact("An artifact is damaged.")

    monkeypatch.setattr("loraflow.store.lock.flock", refuse)
    with pytest.raises(BadConfig, match="exists already"), _written_whole(tmp_path):
        pass
    monkeypatch.setattr("loraflow.serving.models.require_intact_files", damaged)
    with pytest.raises(CorruptArtifact), _written_whole(tmp_path / "new" / "o", tmp_path):
        pass
    assert not any(tmp_path.iterdir())
