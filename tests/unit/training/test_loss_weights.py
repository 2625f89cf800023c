"""Weights of answers in the loss: both engines, packed and padded, against a loop with weights for each token."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from loraflow.data.tokens import tokenization as tokens
from loraflow.data.tokens.token_files import TokenRows
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.job import Inputs, Progress
from loraflow.training import batches, collation
from loraflow.training.loss_head import CHUNK, head_loss
from loraflow.training.setup import row_order
from tests.conftest import chat
from tests.job_factory import make_job
from tests.unit.training.test_batches import force_end_to_end
from tests.unit.training.test_training import REF, SETTINGS, base, recipe, run, same  # noqa: F401

WEIGHTS = [1.0, 0.5, 3.0, 0.1, 1.0, 0.001, 10.0]  # of row n: the one of n modulo 7
ROWS = 30


def tokenize(base, folder, weights=WEIGHTS, **overrides):  # noqa: F811
    rows, out = folder / "rows", folder / "tokens"
    rows.mkdir(parents=True)
    out.mkdir()
    records = []
    for n in range(ROWS):
        record = {"id": str(n), "set": "train", "place": f"x:{n}", "messages": chat(n)["messages"]}
        if weights[n % len(weights)] != 1:
            record |= {"learned": [len(record["messages"]) - 1], "weights": [weights[n % len(weights)]]}
        records.append(json.dumps(record) + "\n")
    (rows / "train.jsonl").write_text("".join(records))
    (rows / "validation.jsonl").write_text("".join(records[:5]))
    job = make_job("tokenize", recipe(**overrides), {"rows": REF, "base": REF})
    tokens.run(job, Inputs({"rows": rows, "base": base}), out, Progress())
    return out


def weighted_loop(base, rows: TokenRows, steps: int = 6):  # noqa: F811
    """Train as the stage does: one document at a time, each token's cross entropy times its weight, in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler, set_seed

    set_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=32, target_modules=SETTINGS["peft_config.target_modules"], task_type="CAUSAL_LM"),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 2, steps)
    order, losses = row_order(len(rows), 4 * steps, 0), {}
    model.train()
    for step in range(steps):
        total, weight_sum = torch.zeros(()), 0.0
        for row in order[4 * step : 4 * step + 4]:
            for number in rows.documents[rows.offsets[row] : rows.offsets[row + 1]]:
                ids, labels = (torch.tensor(part.astype("int64")) for part in rows.document(int(number)))
                logits = model(input_ids=ids[None]).logits[0]
                for at in range(1, len(ids)):
                    if labels[at] != IGNORED:
                        weight = WEIGHTS[int(number) % len(WEIGHTS)]
                        total = total + weight * cross_entropy(logits[at - 1], labels[at])
                        weight_sum += weight
        (total / weight_sum).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses[step + 1] = (total / weight_sum).item()
    adapter = {
        n.replace(".default.weight", ".weight"): t.detach() for n, t in model.state_dict().items() if "lora_" in n
    }
    return adapter, losses


@pytest.mark.parametrize("packing", [False, True])
def test_weighted_losses_and_adapters_equal_those_of_a_loop_over_single_tokens(base, tmp_path, monkeypatch, packing):  # noqa: F811
    options = {"training_config__packing": packing, "training_config__save_steps": 6}
    shards = tokenize(base, tmp_path, **options)
    rows = TokenRows(shards / "train", shards / "packing.parquet" if packing else None)
    adapter, losses = weighted_loop(base, rows)
    ways = {
        "fast": {}, "fast, accumulated": {"runtime__micro_batch": 1},
        "stock, accumulated": {"runtime__engine": "stock", "runtime__micro_batch": 1},
        "concatenated": {"runtime__micro_tokens": 150},
    }  # fmt: skip
    for name, how in ways.items():
        if name == "concatenated":
            force_end_to_end(monkeypatch)
            monkeypatch.setattr("loraflow.training.train.refuse_leaking_documents", lambda *a, **k: None)
        found, curve = run(base, shards, tmp_path / name, **options, **how)
        assert curve == pytest.approx(losses, abs=2e-4), name  # logged with four digits
        assert same(adapter, found, 1e-4), name


def test_equal_weights_train_as_no_weights(base, tmp_path):  # noqa: F811
    """The loss of a step is divided by the sum of its weights, as torch's weighted mean is."""
    plain = tokenize(base, tmp_path / "plain", [1.0])
    half = tokenize(base, tmp_path / "half", [0.5])
    assert "loss_weights" not in (plain / "train" / "dataset_info.json").read_text()
    first, second = run(base, plain, tmp_path / "plain" / "t"), run(base, half, tmp_path / "half" / "t")
    assert first[1] == pytest.approx(second[1], abs=2e-4) and same(first[0], second[0], 2e-5)


def test_the_validation_loss_is_the_weighted_mean_over_all_batches_in_both_engines(base, tmp_path):  # noqa: F811
    options = {"data__validation_fraction": 0.1, "training_config__eval_strategy": "steps",
               "training_config__eval_steps": 6, "training_config__per_device_eval_batch_size": 2, "training_config__learning_rate": 1e-9}  # fmt: skip
    shards = tokenize(base, tmp_path, **options)
    found = []
    for engine in ("fast", "stock"):
        run(base, shards, tmp_path / engine, runtime__engine=engine, **options)
        curve = (tmp_path / engine / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()
        found += [json.loads(line)["eval_loss"] for line in curve if "eval_loss" in line]
    model = __import__("transformers").AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows, total, weights = TokenRows(shards / "validation"), 0.0, 0.0
    for number in range(len(rows)):
        ids, labels = (torch.tensor(part.astype("int64")) for part in rows.document(number))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        each = cross_entropy(logits, labels[1:], reduction="none", ignore_index=IGNORED).detach()
        total += WEIGHTS[number] * float(each.sum())
        weights += WEIGHTS[number] * int((labels[1:] != IGNORED).sum())
    assert found == pytest.approx([total / weights] * 2, abs=2e-4)


def test_load_from_disk_reads_the_weights_column(base, tmp_path):  # noqa: F811
    from datasets import load_from_disk

    rows = load_from_disk(str(tokenize(base, tmp_path) / "train"))
    for number, row in enumerate(rows):
        expected = [0.0 if label == IGNORED else np.float32(WEIGHTS[number % 7]) for label in row["labels"]]
        assert row["loss_weights"] == pytest.approx(expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n", [7, 2 * CHUNK + 3])
def test_a_weighted_head_loss_equals_torchs_cross_entropy(n, trained):
    head = torch.nn.Linear(12, 50, bias=False).requires_grad_(trained)
    hidden, targets, weights = torch.randn(n, 12), torch.randint(0, 50, (n,)), torch.rand(n) * 3
    first, second = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weighted_sum = (cross_entropy(head(first), targets, reduction="none") * weights).sum()
    weighted_sum.backward()
    expected = head.weight.grad.clone() if trained else None
    head.zero_grad()
    got = head_loss(head, second, targets, 1.0, weights)
    got.backward()
    torch.testing.assert_close(got, weighted_sum)
    torch.testing.assert_close(second.grad, first.grad)
    if trained:
        torch.testing.assert_close(head.weight.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, targets, 1.0, weights), weighted_sum)


def test_a_shared_prefix_keeps_the_weight_of_each_documents_tokens():
    rng = np.random.default_rng(0)
    documents = [(np.array([1, 2, 3, n, n]), np.array([IGNORED, 2, IGNORED, n, n])) for n in (4, 5)]
    weights = [[rng.random(5).astype(np.float32)] for _ in documents]
    shared = batches.share_prefix(documents, 3, weights)
    grid = collation.with_targets(collation.padded([[d] for d in documents], 0, weights))
    assert shared["targets"].tolist() == grid["targets"].tolist()
    assert torch.equal(shared["loss_weights"], grid["loss_weights"])
