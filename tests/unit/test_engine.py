"""The parts that make training fast, against slow and obvious versions: LoRA's passes, attention, loss, batches, memory."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear

from loraflow.data.token_rows import TokenRows
from loraflow.failures import BadConfig, OutOfMemory
from loraflow.hardware.attention import DOCUMENTS, Attention
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training import attention, batches, choices, memory
from loraflow.training.frozen_linear import fp8, rowwise
from loraflow.training.lora_kernels import LoraProduct, accelerate_loras, keep_mask, set_token_keys, to_fp8
from loraflow.training.loss_head import CHUNK, head_loss
from loraflow.training.out_of_memory import MicroBatchSize, explain_out_of_memory
from tests.unit.test_training import base, recipe, run, same, straight, tokenize  # noqa: F401


def lora(rate=0.0, bias=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias, dtype=dtype))
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=rate, target_modules=["0"], init_lora_weights=False, **options),
    )
    return model.train()


def gradients(model, x, dy):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, named


@pytest.mark.parametrize("bias", [False, True])
def test_the_passes_are_pefts(bias):
    model, x, dy = lora(bias=bias), torch.randn(3, 7, 24), torch.randn(3, 7, 40)
    wanted = gradients(model, x, dy)
    assert len(accelerate_loras(model, torch.float32)) == 1
    got = gradients(model, x, dy)
    for one, two in zip(wanted[:2], got[:2], strict=True):
        torch.testing.assert_close(one, two)
    assert wanted[2].keys() == got[2].keys()
    for name in wanted[2]:
        torch.testing.assert_close(wanted[2][name], got[2][name])


def test_in_16_bits_the_error_is_not_larger_than_pefts():
    x, dy = torch.randn(64, 24), torch.randn(64, 40)
    exact = gradients(lora(), x, dy)
    peft_model, ours = lora(dtype=torch.bfloat16), lora(dtype=torch.bfloat16)
    for model in (peft_model, ours):
        for name, p in model.named_parameters():
            p.data = dict(lora().named_parameters())[name].data.to(p.dtype)
    accelerate_loras(ours, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(peft_model, x.bfloat16(), dy.bfloat16())
    mine = gradients(ours, x.bfloat16(), dy.bfloat16())

    def error(found):
        return sum(((found[2][n].float() - exact[2][n]) ** 2).sum() for n in exact[2]).sqrt().item()

    assert error(mine) <= error(theirs) * 1.1
    assert all(grad.dtype == torch.float32 for grad in mine[2].values()), "masters stay fp32"


def test_only_plain_lora_is_replaced():
    assert accelerate_loras(lora(use_dora=True), torch.float32) == []
    assert accelerate_loras(lora(), torch.bfloat16) == [], "another dtype is autocast's matter"
    model = lora()
    accelerate_loras(model, torch.float32)
    x = torch.randn(5, 24)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), linear(x, model.base_model.model[0].base_layer.weight))
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_dropout_is_the_mask_and_its_gradient():
    model, x, dy = lora(rate=0.25), torch.randn(50, 24), torch.randn(50, 40)
    (module,) = accelerate_loras(model, torch.float32)
    keys = torch.randint(-(2**31), 2**31 - 1, (50,), dtype=torch.int32)
    set_token_keys([module], keys)
    y, dx, grads = gradients(model, x, dy)
    keep = keep_mask(keys, module.module_key, 24, module.keep_from)
    down = module.lora_A["default"].weight.detach().requires_grad_()
    up = module.lora_B["default"].weight.detach().requires_grad_()
    leaf = x.clone().requires_grad_()
    wanted = linear(leaf, module.base_layer.weight) + linear(linear(leaf * keep / 0.75, down), up) * 2
    wanted.backward(dy)
    torch.testing.assert_close(y, wanted.detach())
    torch.testing.assert_close(dx, leaf.grad)
    torch.testing.assert_close(grads["base_model.model.0.lora_A.default.weight"], down.grad)
    torch.testing.assert_close(grads["base_model.model.0.lora_B.default.weight"], up.grad)
    model.eval()
    torch.testing.assert_close(model(x), linear(x, module.base_layer.weight) + linear(linear(x, down), up) * 2)


def test_masks_are_fair_and_independent():
    keys = torch.from_numpy(batches.mix(np.arange(4000, dtype=np.uint64)).astype(np.int32))
    one = keep_mask(keys, torch.tensor(1, dtype=torch.int32), 256, round(0.05 * 65536)).float()
    two = keep_mask(keys, torch.tensor(2, dtype=torch.int32), 256, round(0.05 * 65536)).float()
    deviation = math.sqrt(0.05 * 0.95 / one.numel())
    assert abs(one.mean() - 0.95) < 5 * deviation
    assert (one.mean(0) - 0.95).abs().max() < 6 * math.sqrt(0.05 * 0.95 / 4000)
    for left, right in ((one, two), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])):
        product = ((left - left.mean()) * (right - right.mean())).mean() / (0.05 * 0.95)
        assert abs(product) < 5 / math.sqrt(left.numel()), "masks of neighbours have nothing in common"


def test_gradcheck_of_the_product():
    x, w, down, up = (torch.randn(*s, dtype=torch.float64) for s in ((6, 5), (7, 5), (2, 5), (7, 2)))
    leaves = [t.requires_grad_() for t in (x, down, up)]
    assert torch.autograd.gradcheck(lambda a, b, c: LoraProduct.apply(a, b, c, None, None, 0, "dense", w), leaves)
    keys = torch.arange(6, dtype=torch.int32), torch.tensor(9, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b, c: LoraProduct.apply(a, b, c, *keys, 20000, "dense", w), leaves)


def test_fp8_weights_are_close_both_ways_round():
    module = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    codes, scales, codes_t, scales_t = fp8(module).tensors
    w = module.weight.detach().float()
    assert torch.equal((codes.float() * scales.t()).amax(1), (codes.float() * scales.t()).amax(1))
    for back in (codes.float() * scales.t(), (codes_t.float() * scales_t.t()).t()):
        assert ((back - w).norm() / w.norm()) < 0.03, "e4m3 has three bits of mantissa"
    zeros, scale = rowwise(torch.zeros(2, 16))
    assert zeros.float().abs().max() == 0 and scale.isfinite().all()


def test_an_fp8_base_gives_nearly_the_same_gradients():
    x, dy = torch.randn(128, 24).bfloat16(), torch.randn(128, 40).bfloat16()
    exact = gradients(lora(), x.float(), dy.float())
    model = lora(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        p.data = dict(lora().named_parameters())[name].data.to(p.dtype)
    loras = accelerate_loras(model, torch.bfloat16)
    to_fp8(loras)
    assert model.base_model.model[0].base_layer.weight.is_meta, "the original is let go"
    y, dx, _ = gradients(model, x, dy)
    assert ((y - exact[0]).norm() / exact[0].norm()) < 0.06
    assert ((dx - exact[1]).norm() / exact[1].norm()) < 0.06


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n", [1, 7, CHUNK, 2 * CHUNK + 3])
def test_the_loss_is_torchs(n, trained):
    head = torch.nn.Linear(12, 50, bias=False).requires_grad_(trained)
    hidden, targets = torch.randn(n, 12), torch.randint(0, 50, (n,))
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    wanted = cross_entropy(head(one), targets, reduction="sum")
    (wanted / 3).backward()
    expected = head.weight.grad.clone() if trained else None
    head.zero_grad()
    got = head_loss(head, two, targets)
    (got / 3).backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(two.grad, one.grad)
    if trained:
        torch.testing.assert_close(head.weight.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, targets), wanted)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1, 3, 20]), st.sampled_from([1, 2]))
def test_attention_stays_inside_a_document_and_its_window(lengths, window, groups):
    tokens, heads, width = sum(lengths), 4, 8
    torch.manual_seed(tokens)
    q = torch.randn(1, heads, tokens, width)
    k, v = (torch.randn(1, heads // groups, tokens, width) for _ in range(2))
    begins = torch.tensor([0, *np.cumsum(lengths), tokens, tokens], dtype=torch.int32)
    got, _ = attention.attend(
        None, q, k, v, scaling=0.3, sliding_window=window, cu_seq_lens_q=begins, max_length_q=max(lengths)
    )
    wanted = torch.zeros(tokens, heads, width)
    for start, end in itertools.pairwise(begins.tolist()):
        for i in range(int(start), int(end)):
            for h in range(heads):
                first = max(int(start), i - window + 1) if window else int(start)
                p = (k[0, h // groups, first : i + 1] @ q[0, h, i] * 0.3).softmax(0)
                wanted[i, h] = p @ v[0, h // groups, first : i + 1]
    torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=8, max_size=40), st.integers(1, 8), st.integers(1, 200), st.integers(1, 4))
def test_every_row_of_a_step_is_in_one_micro_batch_of_one_device(lengths, width, budget, devices):
    rows = TokenRows.__new__(TokenRows)
    rows.lengths, rows.row_length = np.array(lengths), None
    rows.offsets, rows.tokens = np.arange(len(lengths) + 1), np.array(lengths)
    steps = np.arange(len(lengths) // width * width).reshape(-1, width)
    layout = batches.concatenated_layout(rows, steps, budget, devices)
    assert all(length % batches.ROUND == 0 for length in layout.lengths)
    assert layout.lengths[-1] <= max(budget * 1.05, max(lengths)) + batches.ROUND
    shards = [batches.StepDataset(rows, steps, layout, 0, group=ProcessGroup(r, devices)) for r in range(devices)]
    for step in range(len(steps)):
        dealt = shards[0].assignment(step)
        assert sorted(place for places in dealt for place in places) == list(range(width))
        assert all(rows.tokens[steps[step]][places].sum() <= layout.lengths[-1] for places in dealt)


def test_documents_end_to_end_hold_what_the_grid_holds(base, tmp_path):  # noqa: F811
    shards = tokenize(base, tmp_path)
    rows = TokenRows(shards / "train")
    steps = np.arange(24).reshape(3, 8)
    flat = batches.StepDataset(rows, steps, batches.concatenated_layout(rows, steps, 200), 0, dropout=True)
    grid = batches.StepDataset(rows, steps, batches.GridRows(3), 0, dropout=True)
    for step in range(3):
        seen = []
        for item in (flat[step], grid[step]):
            pairs, borders = set(), 0
            for micro in item["micro_batches"]:
                ids = micro["input_ids"].flatten()
                assert (micro["token_keys"].shape[0]) == len(ids)
                for at, target in zip(micro["loss_index"].tolist(), micro["targets"].tolist(), strict=True):
                    pairs.add((int(micro["token_keys"][at]), int(ids[at]), target))
                borders += int((micro["position_ids"] == 0).sum()) if "position_ids" in micro else 0
            seen.append((pairs, item["num_supervised_tokens"], item["tokens"]))
        assert seen[0] == seen[1]
        assert len(seen[0][0]) == seen[0][1], "every learned token has a key of its own"


def force_end_to_end(monkeypatch):
    """Put documents end to end on a CPU too, as on a GPU."""
    attention.register()
    chosen = Attention(DOCUMENTS, True, "by document", "test")
    monkeypatch.setattr(choices, "choose", lambda *a: chosen)


@pytest.mark.parametrize("packing", [False, True])
def test_documents_end_to_end_give_what_rows_give(base, tmp_path, monkeypatch, packing):  # noqa: F811
    options = {"peft_config__lora_dropout": 0.1, "training_config__packing": packing}
    shards = tokenize(base, tmp_path, **options)
    adapter, losses = run(base, shards, tmp_path / "grid", **options)
    force_end_to_end(monkeypatch)
    calls, counted, by_document = [], {}, attention.by_document
    monkeypatch.setattr(attention, "by_document", lambda *a: calls.append(1) or by_document(*a))
    for name, how in {
        "one": {}, "small": {"runtime__micro_tokens": 150}, "full": {"runtime__checkpointing": "full"},
        "half": {"runtime__checkpointing": "selective"},
    }.items():  # fmt: skip
        calls.clear()
        other, found = run(base, shards, tmp_path / name, **options, **how)
        counted[name] = len(calls)
        assert same(adapter, other, 5e-5), name
        assert losses == pytest.approx(found, abs=2e-4)
    assert counted["full"] == 2 * counted["one"], "each of the two layers is computed twice"
    assert counted["half"] == 1.5 * counted["one"]


def test_dropout_does_not_depend_on_the_micro_batch(base, straight, tmp_path):  # noqa: F811
    results = [
        run(base, straight[0], tmp_path / str(rows), peft_config__lora_dropout=0.3, runtime__micro_batch=rows)
        for rows in (1, 4)
    ]
    assert same(results[0][0], results[1][0], 5e-5)
    assert not same(results[0][0], straight[1], 1e-3), "it does drop"


@pytest.mark.slow
def test_compiled_layers_give_the_same(base, straight, tmp_path, monkeypatch):  # noqa: F811
    from torch._dynamo.utils import counters

    force_end_to_end(monkeypatch)
    monkeypatch.setattr(attention, "by_document", _compilable)
    counters.clear()
    other, found = run(base, straight[0], tmp_path, runtime__compile="on", peft_config__lora_dropout=0.1)
    assert counters["stats"]["unique_graphs"] <= 2 * batches.SHAPES, "all layers share a graph"
    monkeypatch.undo()
    plain, losses = run(base, straight[0], tmp_path / "plain", peft_config__lora_dropout=0.1)
    assert same(plain, other, 1e-4)
    assert losses == pytest.approx(found, abs=3e-4)


def _compilable(q, k, v, begins, longest, scaling, window):
    at = torch.searchsorted(begins.long(), torch.arange(q.shape[0]), right=True)
    seen = (at[:, None] == at[None]) & torch.ones(len(at), len(at), dtype=torch.bool).tril()
    parts = [one.transpose(0, 1) for one in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(
        *parts, attn_mask=seen, scale=scaling, enable_gqa=True
    ).transpose(0, 1)


def test_a_compiler_that_fails_is_left_out(base, straight, tmp_path, monkeypatch, caplog):  # noqa: F811
    force_end_to_end(monkeypatch)  # its loop over documents cannot be one graph
    _, found = run(base, straight[0], tmp_path, runtime__compile="on")
    assert "compiling failed; training continues without it" in caplog.text
    assert found == pytest.approx(straight[2], abs=2e-4)


PHI3 = memory.ModelShape(3072, 8192, 32, 32, 32, 96, 32064, False)


def test_the_estimate_is_near_what_was_measured():
    """One H100, Phi-3 mini's shape, r=16: 35.1 GiB with 8,192 tokens, 56.8 with 16,384, 17.5 with 32,768 recomputed."""
    assert PHI3.linear_weights + PHI3.embedding_weights == pytest.approx(3.82e9, rel=0.01)
    assert memory.lora_weights(PHI3, 16) == 25_165_824
    for tokens, how, measured in ((8192, "none", 35.1), (16384, "none", 56.8), (32768, "full", 17.5)):
        estimate = (memory.fixed_bytes(PHI3, "bfloat16", 16) + tokens * memory.token_bytes(PHI3, how)) / memory.GIB
        assert measured * 0.9 < estimate < measured * 1.35
    least, fast = (size / memory.GIB for size in memory.needed(PHI3, "bfloat16", 16, 2048))
    assert 10 < least < 12.5 and 22 < fast < 26


def test_what_goes_in_follows_the_memory():
    def fit(gib, **options):
        return memory.fit_memory(
            PHI3, gib * memory.GIB, options.pop("weights", "bfloat16"), 16, least=512, wanted=40_000, **options
        )

    big, small, tiny = fit(78), fit(20), fit(12)
    assert (big.recompute, big.tokens) == ("none", 16384)
    assert small.recompute == "selective" and 0 < small.share < 1 and small.tokens >= 4096
    assert tiny.recompute == "full" and tiny.tokens >= 512
    assert fit(12, weights="nf4").tokens > tiny.tokens
    assert fit(78, recompute="full").recompute == "full"
    assert fit(1).tokens == 512, "never less than the longest document"


def test_out_of_memory_proposes_less_until_nothing_is_left():
    proposed = []
    for size in (MicroBatchSize(512, tokens=4096), MicroBatchSize(512, tokens=512, recompute="none"),
                 MicroBatchSize(512, rows=3), MicroBatchSize(512, tokens=512, recompute="full"),
                 MicroBatchSize(512, rows=1, tokens=4096, recompute="none"), MicroBatchSize(512, rows=1)):  # fmt: skip
        with pytest.raises(OutOfMemory) as caught, explain_out_of_memory("a test", size.retry_with()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        proposed.append(caught.value.details["retry_with"])
    assert proposed == [
        {"micro_tokens": 2048},
        {"checkpointing": "full"},
        {"micro_batch": 1},
        {},
        {"checkpointing": "full"},
        {},
    ]


def test_what_this_machine_cannot_do_is_refused_with_what_it_can(base, straight, tmp_path):  # noqa: F811
    with pytest.raises(BadConfig, match="fp8"):
        run(base, straight[0], tmp_path, base__quantization="fp8", base__dtype="bfloat16", training_config__bf16=True)
    with pytest.raises(BadConfig, match="no GPU"):
        run(base, straight[0], tmp_path / "a", runtime__attn_implementation="fa4")
