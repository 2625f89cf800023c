"""Micro-batches in the packed layout (documents end to end) and the padded one: same tokens, same training."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.data.tokens.token_files import TokenRows
from loraflow.failures import BadConfig
from loraflow.hardware.attention import DOCUMENTS, Attention
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training import attention, batches, choices, train
from tests.unit.training.test_training import base, run, same, straight, tokenize  # noqa: F401


@settings(max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=8, max_size=40), st.integers(1, 8), st.integers(1, 200), st.integers(1, 4))
def test_every_row_of_a_step_is_in_one_micro_batch_of_one_device(lengths, width, budget, devices):
    rows = TokenRows.__new__(TokenRows)
    rows.lengths, rows.row_length = np.array(lengths), None
    rows.documents, rows.offsets, rows.tokens = np.arange(len(lengths)), np.arange(len(lengths) + 1), np.array(lengths)
    steps = np.arange(len(lengths) // width * width).reshape(-1, width)
    layout = batches.concatenated_layout(rows, steps, budget, devices)
    assert all(length % batches.ROUND == 0 for length in layout.lengths)
    assert layout.lengths[-1] <= max(budget * 1.05, max(lengths)) + batches.ROUND
    shards = [batches.StepDataset(rows, steps, layout, 0, group=ProcessGroup(r, devices)) for r in range(devices)]
    for step in range(len(steps)):
        dealt = shards[0].assignment(step)
        assert sorted(place for places in dealt for place in places) == list(range(width))
        assert all(rows.tokens[steps[step]][places].sum() <= layout.lengths[-1] for places in dealt)


@pytest.mark.parametrize(
    ("devices", "rounds", "rows_each", "before", "after"),
    [(4, 1, 8, 0.14, 0.021), (4, 2, 4, 0.17, 0.021), (8, 2, 4, 0.23, 0.032), (4, 4, 2, 0.17, 0.021)],
)
def test_devices_attend_to_about_equally_many_pairs_of_tokens_in_a_step(devices, rounds, rows_each, before, after):
    """Documents of lognormal length in packed rows of 2,048 tokens; a device has `rounds` micro-batches in a step."""
    generator = np.random.default_rng(0)
    width = devices * rounds * rows_each
    packed: list[list[int]] = [[] for _ in range(8 * width)]
    for row in packed:
        while sum(row) < 2048:
            row.append(min(int(np.exp(generator.normal(np.log(350), 0.8))) + 1, 2048 - sum(row)))
    rows = TokenRows.__new__(TokenRows)
    rows.lengths, rows.row_length = np.concatenate(packed), 2048
    rows.documents, rows.offsets = np.arange(len(rows.lengths)), np.cumsum([0, *map(len, packed)])
    rows.tokens = np.full(len(packed), 2048)
    steps = generator.permutation(len(packed)).reshape(8, width)
    layout = batches.concatenated_layout(rows, steps, 2048 * rows_each, devices)
    dataset = batches.StepDataset(rows, steps, layout, 0, group=ProcessGroup(0, devices))

    def excess(step, dealt):
        """Return by how much the slowest device exceeds the mean in a step: devices wait for each other only at its end."""
        sums = [
            sum(n * n for i in chain(*dealt[device::devices]) for n in packed[step[i]]) for device in range(devices)
        ]
        return max(sums) / np.mean(sums) - 1

    dealt = [dataset.assignment(number) for number in range(8)]
    assert all(len(found) == devices * rounds and sorted(chain(*found)) == list(range(width)) for found in dealt)
    in_order = [batches.assign(rows.tokens[step], layout.lengths[-1]) for step in steps]
    new, old = ([excess(step, found) for step, found in zip(steps, how, strict=True)] for how in (dealt, in_order))
    assert all(new_ <= old_ for new_, old_ in zip(new, old, strict=True)), "never slower than without the exchange"
    assert np.mean(old) > before and np.mean(new) < after
    alone = batches.StepDataset(rows, steps, layout, 0)
    assert [alone.assignment(number) for number in range(8)] == in_order, "one device: in order"


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9999)), min_size=2, max_size=30),
    st.integers(2, 4),
    st.integers(1, 3),
)
def test_balancing_keeps_rows_and_capacities_and_never_makes_the_slowest_device_slower(rows, devices, rounds):
    tokens, costs = np.array(rows).T
    given_ = [part.tolist() for part in np.array_split(np.arange(len(rows)), min(devices * rounds, len(rows)))]
    capacities = [int(tokens[part].sum()) + 5 for part in given_]
    found = batches.balance(given_, tokens, costs, capacities, devices)
    assert len(found) == len(given_) and all(found)
    assert sorted(chain(*found)) == list(range(len(rows)))
    assert all(tokens[part].sum() <= most for part, most in zip(found, capacities, strict=True))
    slowest = [
        max(costs[list(chain(*how[device::devices]))].sum() for device in range(min(devices, len(how))))
        for how in (found, given_)
    ]
    assert slowest[0] <= slowest[1]


@pytest.mark.parametrize("devices", [1, 2])
def test_packed_and_padded_layouts_contain_the_same_tokens(base, tmp_path, devices):  # noqa: F811
    shards = tokenize(base, tmp_path)
    rows = TokenRows(shards / "train")
    steps = np.arange(24).reshape(3, 8)
    layout = batches.concatenated_layout(rows, steps, 200, devices)
    flat = [
        batches.StepDataset(rows, steps, layout, 0, dropout=True, group=ProcessGroup(rank, devices))
        for rank in range(devices)
    ]
    grid = batches.StepDataset(rows, steps, batches.GridRows(3), 0, dropout=True)
    for step in range(3):
        seen = []
        for items in ([device[step] for device in flat], [grid[step]]):
            pairs, borders, item = set(), 0, items[0]
            for micro in chain(*(item["micro_batches"] for item in items)):
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
def test_packed_and_padded_layouts_give_the_same_result(base, tmp_path, monkeypatch, packing):  # noqa: F811
    options = {
        "peft_config__lora_dropout": 0.1, "training_config__packing": packing, "training_config__save_steps": 6,
    }  # fmt: skip
    shards = tokenize(base, tmp_path, **options)
    adapter, losses = run(base, shards, tmp_path / "grid", **options)
    force_end_to_end(monkeypatch)
    calls, counted, by_document = [], {}, attention.by_document
    monkeypatch.setattr(attention, "by_document", lambda *a: calls.append(1) or by_document(*a))
    for check in ("refuse_leaking_documents", "refuse_seeing_later_tokens"):  # they call the kernel as well
        monkeypatch.setattr(train, check, lambda *a, **k: None)
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


@pytest.mark.slow
def test_compiled_layers_give_the_same_result(base, straight, tmp_path, monkeypatch):  # noqa: F811
    from torch._dynamo.utils import counters

    force_end_to_end(monkeypatch)
    monkeypatch.setattr(attention, "by_document", _compilable)
    counters.clear()
    other, found = run(base, straight[0], tmp_path, runtime__compile="on", peft_config__lora_dropout=0.1)
    assert counters["stats"]["unique_graphs"] <= 2, "all layers share a graph, and a small model's rows have one length"
    monkeypatch.undo()
    plain, losses = run(base, straight[0], tmp_path / "plain", peft_config__lora_dropout=0.1)
    assert same(plain, other, 1e-4)
    assert losses == pytest.approx(found, abs=3e-4)


def _compilable(q, k, v, begins, longest, scaling, window):
    at = torch.searchsorted(begins.long(), torch.arange(q.shape[0]), right=True)
    seen = (at[:, None] == at[None]) & torch.ones(len(at), len(at), dtype=torch.bool).tril()
    parts = [tensor.transpose(0, 1) for tensor in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(
        *parts, attn_mask=seen, scale=scaling, enable_gqa=True
    ).transpose(0, 1)


def test_training_continues_if_compiling_fails(base, straight, tmp_path, monkeypatch, caplog):  # noqa: F811
    force_end_to_end(monkeypatch)  # its loop over documents cannot be one graph
    _, found = run(base, straight[0], tmp_path, runtime__compile="on")
    assert "compiling failed; training continues without it" in caplog.text
    assert found == pytest.approx(straight[2], abs=2e-4)


def test_unsupported_precisions_and_kernels_are_refused(base, straight, tmp_path):  # noqa: F811
    with pytest.raises(BadConfig, match="fp8"):
        run(base, straight[0], tmp_path, base__quantization="fp8", base__dtype="bfloat16", training_config__bf16=True)
    with pytest.raises(BadConfig, match="no GPU"):
        run(base, straight[0], tmp_path / "a", runtime__attn_implementation="fa4")
