"""A prefix that documents share is computed once: against the same documents as rows of their own."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from loraflow.data.tokens.packing import common_prefix_length
from loraflow.training import batches
from loraflow.training.collation import padded
from loraflow.training.memory import shape_of
from tests.conftest import build_phi3
from tests.unit.training.test_training import base, recipe, run, same, tokenize  # noqa: F401

SYSTEM = "please answer what is the red of the house and the tree of the cat " * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_phi3(tmp_path_factory.mktemp("m") / "phi3", dtype="float32")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()


@settings(max_examples=25)
@given(st.data())
def test_loss_and_gradients_equal_those_of_complete_documents(model, data):
    prefix = data.draw(st.integers(1, 9))
    head = data.draw(st.lists(st.integers(0, 499), min_size=prefix, max_size=prefix))
    documents = []
    for _ in range(data.draw(st.integers(1, 4))):
        ids = np.array(head + data.draw(st.lists(st.integers(0, 499), min_size=0, max_size=7)))
        learned = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
        documents.append((ids, np.where(learned, ids, -100)))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    grid = padded([[document] for document in documents], 0)
    labels = grid.pop("labels")
    logits = model(**grid).logits
    rows = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    expected = gradients(rows + 0 * logits.sum())
    line = batches.share_prefix(documents, prefix)
    assert line["input_ids"].shape[1] == prefix + sum(len(ids) - prefix for ids, _ in documents)
    index, targets = line.pop("loss_index"), line.pop("targets")
    logits = model(**line).logits
    once = cross_entropy(logits[0, index], targets, reduction="sum")
    torch.testing.assert_close(once, rows, rtol=1e-5, atol=1e-5)
    found = gradients(once + 0 * logits.sum())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=4), st.none() | st.integers(-1, 8))
def test_the_common_prefix_is_the_longest_prefix_of_all_rows(rows, longest):
    most = min(map(len, rows), default=0)
    most = most if longest is None else max(0, min(most, longest))
    expected = max(n for n in range(most + 1) if all(row[:n] == rows[0][:n] for row in rows))
    assert common_prefix_length(rows, longest) == expected
    assert common_prefix_length([np.array(row, np.int32) for row in rows], longest) == expected


def test_a_prefix_is_shared_only_if_it_saves_arithmetic():
    costs = batches.PrefixSharing(per_token=12 * 64**2, per_pair=128)
    same_head = [np.arange(50), np.concatenate([np.arange(40), np.arange(9)])]
    assert costs.shared_length(same_head) == 40
    assert costs.shared_length([np.arange(50), np.arange(50) + 1]) == 0, "nothing in common"
    assert costs.shared_length([np.arange(50), np.concatenate([[0], np.arange(100, 149)])]) == 0, (
        "one token saves nothing"
    )
    assert costs.shared_length([np.arange(50)]) == 0, "alone"
    long = [np.concatenate([np.arange(500), np.full(9000, i)]) for i in range(8)]
    assert costs.shared_length(long) == 0, "a dense mask over all of it costs more than the prefix saves"


def test_a_run_with_a_system_prompt_equals_the_stock_engine_with_fewer_tokens(base, tmp_path, monkeypatch):  # noqa: F811
    shards = tokenize(base, tmp_path, system=SYSTEM)
    seen = []
    real = batches.share_prefix
    monkeypatch.setattr("loraflow.training.batches.share_prefix", lambda *a: seen.append(a[1]) or real(*a))
    adapter, losses = run(base, shards, tmp_path / "fast")
    assert len(seen) >= 6 and min(seen) > 20
    choices = json.loads((tmp_path / "fast" / "out" / "telemetry" / "engine.json").read_text())
    assert choices["shared_prefix"].startswith("computed once")
    stock, expected = run(base, shards, tmp_path / "stock", runtime__engine="stock")
    assert losses.keys() == expected.keys()
    assert max(abs(losses[step] - expected[step]) for step in expected) < 2e-4
    assert same(adapter, stock, 2e-3)
    seen.clear()
    run(base, shards, tmp_path / "one", runtime__micro_batch=1)
    assert seen == [], "a single document has nothing to share"


@pytest.mark.parametrize(
    ("why", "change", "settings"),
    [
        ("dropout", {}, {"peft_config__lora_dropout": 0.1}),
        ("does not see exactly the tokens before it", {"sliding_window": 16}, {}),
        ("takes no custom mask", {}, {"runtime__attn_implementation": "eager"}),
    ],
)
def test_inexact_sharing_is_disabled_and_the_telemetry_gives_the_reason(tmp_path, monkeypatch, why, change, settings):
    folder = build_phi3(tmp_path / "phi3", dtype="float32", **change)
    shards = tokenize(folder, tmp_path, system=SYSTEM)
    monkeypatch.setattr("loraflow.training.batches.share_prefix", lambda *_: pytest.fail("shared"))
    run(folder, shards, tmp_path / "run", training_config__max_steps=1, **settings)
    choices = json.loads((tmp_path / "run" / "out" / "telemetry" / "engine.json").read_text())
    assert why in choices["shared_prefix"]


def test_the_costs_come_from_the_models_configuration(base):  # noqa: F811
    shape = shape_of(json.loads((base / "config.json").read_text()))
    assert batches.PrefixSharing.of(shape) == batches.PrefixSharing(64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96, 128)
