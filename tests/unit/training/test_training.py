"""The train stage on a tiny Phi-3, in this process: against an independent loop, itself in pieces, and trl's own loss."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

from loraflow.config import parse_recipe
from loraflow.config.stage_configs import FingerprintedTraining
from loraflow.config.training import BestCheckpoint
from loraflow.data.tokens import tokenization as tokens
from loraflow.data.tokens.token_files import TokenRows
from loraflow.failures import BadConfig, NonFiniteLoss, Preempted
from loraflow.hardware.process_group import ProcessGroup
from loraflow.job import Inputs, Progress
from loraflow.store import Ref
from loraflow.store.checkpoints import prune_to_newest_intact
from loraflow.training import collation, train
from loraflow.training.callbacks import PreemptionHandler
from loraflow.training.setup import _resume, count_steps, micro_batch_rows, row_order
from loraflow.training.trainer import LoraTrainer
from loraflow.training.validation_loss import Curves
from tests.conftest import build_phi3, chat
from tests.job_factory import make_job

REF = Ref(stage="s", fingerprint="f", digest="d", uri="", facets={"train": "d", "tokenizer": "d", "heldout": "d"})
SETTINGS = {
    "base.dtype": "float32", "training_config.bf16": False, "training_config.learning_rate": 1e-2,
    "training_config.max_steps": 6, "training_config.per_device_train_batch_size": 4, "training_config.max_length": 128,
    "training_config.gradient_checkpointing": False, "training_config.logging_steps": 1, "training_config.save_steps": 2,
    "training_config.warmup_steps": 2.0, "peft_config.r": 4, "peft_config.lora_dropout": 0.0, "runtime.device": "cpu",
    "peft_config.target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_phi3(tmp_path_factory.mktemp("b") / "phi3", dtype="float32")


def recipe(**overrides):
    settings = SETTINGS | {key.replace("__", "."): value for key, value in overrides.items()}
    return parse_recipe("name: t\nbase: {model: x}\n", overrides=settings)


def tokenize(base: Path, folder: Path, chats: int = 30, system: str = "", chat_of=None, **overrides) -> Path:
    rows, out = folder / "rows", folder / "tokens"
    rows.mkdir(parents=True)
    out.mkdir()
    first = [{"role": "system", "content": system}] if system else []
    rows_of = (
        {"id": str(i), "set": "train", "place": f"x:{i}", "messages": first + (chat_of or chat)(i)["messages"]}
        for i in range(chats)
    )
    lines = [json.dumps(row) + "\n" for row in rows_of]
    (rows / "train.jsonl").write_text("".join(lines))
    (rows / "validation.jsonl").write_text("".join(lines[:5]))
    job = make_job("tokenize", recipe(**overrides), {"rows": REF, "base": REF})
    tokens.run(job, Inputs({"rows": rows, "base": base}), out, Progress())
    return out


def run(base: Path, shards: Path, folder: Path, report=None, **overrides):
    """Train; return the adapter's tensors and the logged losses."""
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    job = make_job("train", recipe(**overrides), {"tokens": REF, "base": REF})
    train.run(job, Inputs({"tokens": shards, "base": base}), out, report or Progress(work / "progress.jsonl", work))
    curve = [json.loads(line) for line in (out / "telemetry" / "curves.jsonl").read_text().splitlines()]
    return load_file(out / "adapter" / "adapter_model.safetensors"), {
        r["step"]: r["loss"] for r in curve if "loss" in r
    }


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    shards = tokenize(base, folder)
    return shards, *run(base, shards, folder)


def same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    return all(torch.allclose(left[name], right[name], rtol=0, atol=tolerance) for name in left)


BEST_FIELDS = {*BestCheckpoint.model_fields, "save_steps"}


def test_losses_equal_those_of_an_independent_training_loop(base, straight):
    """peft's adapter, torch's AdamW, one padded batch after another, the loss from transformers' full logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler, set_seed

    shards, adapter, losses = straight
    set_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=32, target_modules=SETTINGS["peft_config.target_modules"], task_type="CAUSAL_LM"),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 2, 6)
    rows, order = TokenRows(shards / "train"), row_order(30, 24, 0)
    model.train()
    for step in range(6):
        batch = collation.padded([rows[int(i)] for i in order[step * 4 : step * 4 + 4]], 0)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert losses[step + 1] == pytest.approx(loss.item(), abs=2e-4), step  # logged with four digits
    trained = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    saved = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    assert same(trained, saved, 1e-4)


def test_the_micro_batch_does_not_change_the_result(base, straight, tmp_path):
    shards, adapter, losses = straight
    for rows in (1, 2):
        other, found = run(base, shards, tmp_path / str(rows), runtime__micro_batch=rows)
        assert same(adapter, other, 2e-5)
        assert losses == pytest.approx(found, abs=2e-4)


def test_the_stock_engine_gives_the_same_result(base, straight, tmp_path):
    shards, adapter, losses = straight
    other, found = run(base, shards, tmp_path, runtime__engine="stock")
    assert same(adapter, other, 2e-5)
    assert losses == pytest.approx(found, abs=2e-4)


def test_activation_checkpointing_does_not_change_the_result(base, straight, tmp_path):
    shards, adapter, _ = straight
    other, _ = run(base, shards, tmp_path, training_config__gradient_checkpointing=True)
    assert same(adapter, other, 2e-5)


def test_a_signal_while_the_model_is_loaded_stops_the_training_before_its_first_step():
    before = signal.getsignal(signal.SIGTERM)
    try:
        handler = PreemptionHandler(ProcessGroup(), "cpu")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted, match="asked to stop"):
            handler.on_train_begin(None, TrainerState(), None)
    finally:
        signal.signal(signal.SIGTERM, before)


class StopAt(Progress):
    """Ask the training to end at a step, as a preempted machine does."""

    def __init__(self, step: int, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        super().__init__(work / "progress.jsonl", work)
        self.step = step

    def __call__(self, **figures):
        if figures.get("step") == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_run(base, straight, tmp_path, at):
    shards, adapter, losses = straight
    with pytest.raises(Preempted, match="asked to stop"):
        run(base, shards, tmp_path, StopAt(at, tmp_path / "work"))
    assert prune_to_newest_intact(tmp_path / "work" / "checkpoints").name == f"checkpoint-{at + (at == 0)}"
    other, found = run(base, shards, tmp_path)
    assert same(adapter, other), "bit for bit"
    assert found == losses, "the curve has every step once"


def test_a_signal_in_the_last_step_does_not_discard_the_training(base, straight, tmp_path):
    shards, adapter, losses = straight
    finished, found = run(base, shards, tmp_path, StopAt(6, tmp_path / "work"))
    assert same(adapter, finished) and found == losses


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_are_asked_to_stop_in_the_last_step_all_finish(monkeypatch, rank):
    """The question of the last step has no step after it that reads its answer."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ProcessGroup, "any_later", lambda group, value, device: lambda: value or group.rank == 1)
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda group, value: [value, True])
    try:
        handlers = [PreemptionHandler(ProcessGroup(rank, 2), "cpu") for _ in range(2)]
    finally:
        signal.signal(signal.SIGTERM, before)
    for handler, steps in zip(handlers, (1, 2), strict=True):
        handler.is_requested = True
        for _ in range(steps):
            handler.on_step_end(None, TrainerState(), TrainerControl())
    assert [handler.has_stopped for handler in handlers] == [False, True]


@pytest.mark.parametrize("harm", ["torn", "flipped", "not finalized"])
def test_a_damaged_checkpoint_is_not_used(base, straight, tmp_path, harm):
    shards, adapter, _ = straight
    with pytest.raises(Preempted):
        run(base, shards, tmp_path, StopAt(4, tmp_path / "work"))
    newest = tmp_path / "work" / "checkpoints" / "checkpoint-4"
    file = newest / "adapter_model.safetensors"
    if harm == "torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "flipped":
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)
    else:
        (newest / "complete.json").unlink()
    assert prune_to_newest_intact(tmp_path / "work" / "checkpoints").name == "checkpoint-2"
    other, _ = run(base, shards, tmp_path)
    assert same(adapter, other)


def test_packed_documents_have_the_loss_of_single_documents(base, tmp_path):
    from transformers import AutoModelForCausalLM

    shards = tokenize(base, tmp_path, training_config__packing=True)
    rows = TokenRows(shards / "train", shards / "packing.parquet")
    assert len(rows) < 30
    assert sorted(d for i in range(len(rows)) for d in rows.documents[rows.offsets[i] : rows.offsets[i + 1]]) == list(
        range(30)
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def losses(batch):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )

    with torch.no_grad():
        for i in range(len(rows)):
            together = losses(collation.packed([rows[i]], rows.row_length, 0))
            alone = sum(losses(collation.padded([[document]], 0)) for document in rows[i])
            assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    run(base, shards, tmp_path, training_config__packing=True)


def test_the_validation_loss_selects_the_best_checkpoint(base, tmp_path):
    settings = {
        "data__validation_fraction": 0.1, "training_config__eval_strategy": "steps", "training_config__eval_steps": 2,
        "training_config__load_best_model_at_end": True, "training_config__early_stopping_patience": 3,
    }  # fmt: skip
    run(base, tokenize(base, tmp_path), tmp_path, **settings)
    curve = [json.loads(line) for line in (tmp_path / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve if "eval_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize("save_steps", [1, 2])
def test_a_training_that_stopped_early_is_not_continued_after_an_interruption(
    base, straight, tmp_path, monkeypatch, save_steps
):
    """The reference is transformers: the uninterrupted training. With two steps, the best loss has no checkpoint."""
    settings = {
        "data__validation_fraction": 0.1, "training_config__eval_strategy": "steps", "training_config__eval_steps": 1,
        "training_config__save_steps": save_steps, "training_config__load_best_model_at_end": True, "training_config__max_steps": 6,
        "training_config__early_stopping_patience": 1, "training_config__learning_rate": 30.0, "training_config__warmup_steps": 0,
    }  # fmt: skip

    def measured(folder: Path) -> dict[int, float]:
        curve = [json.loads(line) for line in (folder / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]
        return {row["step"]: row["eval_loss"] for row in curve if "eval_loss" in row}

    uninterrupted, _ = run(base, straight[0], tmp_path / "a", **settings)
    losses = measured(tmp_path / "a")
    stopped = max(losses)
    assert 1 < stopped < 6 and losses[stopped] > min(losses.values())
    asked, _ = run(base, straight[0], tmp_path / "c", StopAt(stopped, tmp_path / "c" / "work"), **settings)
    assert same(uninterrupted, asked), "it ended by itself in the step in which it was asked to"
    trained = LoraTrainer.train

    def then_ask(*arguments, **settings):
        try:
            return trained(*arguments, **settings)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # it goes on to the adapter after the signal
        patch.setattr(LoraTrainer, "train", then_ask)
        patch.setattr(train, "_save_adapter", killed)
        run(base, straight[0], tmp_path / "b", **settings)
    job = make_job("train", recipe(**settings), {"tokens": REF, "base": REF})
    out, work = tmp_path / "b" / "out", tmp_path / "b" / "work"
    summary = train.run(
        job, Inputs({"tokens": straight[0], "base": base}), out, Progress(work / "progress.jsonl", work)
    )
    assert same(uninterrupted, load_file(out / "adapter" / "adapter_model.safetensors"))
    assert measured(tmp_path / "b") == losses and summary.figures["steps"] == stopped


BEST = {
    "data__validation_fraction": 0.1, "training_config__eval_strategy": "steps", "training_config__eval_steps": 2,
    "training_config__load_best_model_at_end": True, "training_config__learning_rate": 3.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "losses", [[5, 4, 3, 2], [5, 2, 3, 4], [5, 4, 1, 2], [1, 2, 3, 4], [5, 4, 3, 3], [5, 4, 6, 6, 3], [3, 3, 3, 1]]
)
def test_the_loss_of_the_best_checkpoint_is_of_the_one_that_transformers_loads(tmp_path, losses):
    """A sweep compares trials by it. transformers' Trainer gets these losses, and loads a checkpoint at its end."""
    from transformers import Trainer, TrainingArguments

    class Scripted(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(losses[self.state.global_step - 1])}
            self.log(metrics)
            return metrics

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            return {"loss": (self.weight * x).mean()}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=len(losses), eval_strategy="steps", eval_steps=1, save_steps=2, use_cpu=True,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False, report_to="none",
        per_device_train_batch_size=1, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    rows = [{"x": torch.ones(1)}] * len(losses)
    trainer = Scripted(model=Line(), args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    loaded = int(Path(best).name.removeprefix("checkpoint-")) if best else len(losses)
    lines = "".join(json.dumps(row) + "\n" for row in trainer.state.log_history)
    settings = recipe(**BEST | {"training_config__eval_steps": 1}).training_config
    config = FingerprintedTraining.model_validate({**settings.model_dump(include=BEST_FIELDS), "global_batch": 1})
    assert Curves.parse(lines.encode()).validation_loss(config) == losses[loaded - 1]


def test_the_best_checkpoint_is_found_in_a_moved_folder(base, straight, tmp_path, monkeypatch):
    """transformers keeps its absolute path, and where that is gone finds it again only when it saves once more."""
    uninterrupted, _ = run(base, straight[0], tmp_path / "uninterrupted", **BEST)
    curve = [
        json.loads(line) for line in (tmp_path / "uninterrupted" / "work" / "curves.jsonl").read_text().splitlines()
    ]
    losses = {row["step"]: row["eval_loss"] for row in curve if "eval_loss" in row}
    assert min(losses, key=losses.get) == 2, losses

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_save_adapter", killed)  # after the last checkpoint
        run(base, straight[0], tmp_path / "here", **BEST)
    (tmp_path / "here").rename(tmp_path / "there")
    assert same(uninterrupted, run(base, straight[0], tmp_path / "there", **BEST)[0])


def test_a_checkpoint_contains_evas_initialization(base, straight, tmp_path):
    """Its ranks are part of the result, and a second computation differs in the last bits."""
    eva, file = {"peft_config__init_lora_weights": "eva"}, tmp_path / "work" / "eva.safetensors"
    with pytest.raises(Preempted):
        run(base, straight[0], tmp_path, StopAt(4, tmp_path / "work"), **eva)
    found = file.read_bytes()
    file.write_bytes(b"another attempt's")
    run(base, straight[0], tmp_path, **eva)
    assert file.read_bytes() == found


def test_what_an_attempt_left_without_a_checkpoint_is_computed_again(tmp_path):
    """Nothing says whether it is intact."""
    left = [tmp_path / "curves.jsonl", tmp_path / "eva.safetensors"]
    for file in left:
        file.write_bytes(b"of another attempt")
    alone = SimpleNamespace(is_main=True, broadcast=lambda value: value, barrier=lambda: None)
    assert _resume(alone, tmp_path, left) is None
    assert not any(file.exists() for file in left)


class EditAt(Progress):
    """Raise each loss in the training log while the training runs."""

    def __call__(self, **figures):
        if figures.get("step") in (3, 6):  # before a checkpoint, and at the end
            file = self.work / "curves.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            file.write_text("".join(json.dumps({**row, "loss": 9.0, "eval_loss": 9.0}) + "\n" for row in rows))


def test_a_training_log_that_is_edited_during_the_training_changes_nothing(base, straight, tmp_path):
    """A sweep chooses by it."""
    shards, _, losses = straight
    work = tmp_path / "work"
    assert run(base, shards, tmp_path, EditAt(work / "progress.jsonl", work))[1] == losses


def test_a_checkpoint_with_a_damaged_best_checkpoint_is_not_used(base, straight, tmp_path):
    with pytest.raises(Preempted):
        run(base, straight[0], tmp_path, StopAt(4, tmp_path / "work"), **BEST)
    checkpoints = tmp_path / "work" / "checkpoints"
    (checkpoints / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"torn")
    assert prune_to_newest_intact(checkpoints) is None, "step 4 would end with a best one that is not there"


def test_a_nan_loss_ends_training(base, straight, tmp_path):
    with pytest.raises(NonFiniteLoss):
        run(base, straight[0], tmp_path, training_config__learning_rate=1e30, training_config__max_grad_norm=0.0,
            training_config__warmup_steps=0.0)  # fmt: skip
    assert not (tmp_path / "out" / "adapter").exists()


def test_an_unmatched_target_is_an_error_that_suggests_the_right_name(base, straight, tmp_path):
    with pytest.raises(BadConfig) as caught:
        run(base, straight[0], tmp_path, peft_config__target_modules=["q_proj", "o_proj"])
    assert "name qkv_proj" in str(caught.value)


def test_a_polynomial_schedule_without_a_step_after_its_warm_up_is_refused(base, straight, tmp_path):
    """transformers divides by the number of these steps."""
    from transformers import get_scheduler

    with pytest.raises(ZeroDivisionError):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = get_scheduler("polynomial", optimizer, 6, 6)
        for _ in range(6):
            scheduler.step()
    with pytest.raises(BadConfig, match="takes all steps"):
        run(
            base,
            straight[0],
            tmp_path,
            training_config__lr_scheduler_type="polynomial",
            training_config__warmup_steps=6.0,
        )


def test_nf4_without_cuda_reports_what_is_missing(base, straight, tmp_path):
    from loraflow.failures import MissingExtra

    with pytest.raises(MissingExtra, match="NF4"):
        run(base, straight[0], tmp_path, base__quantization="nf4", base__dtype="bfloat16")


def test_equal_runs_write_equal_bytes(base, straight, tmp_path):
    shards, _, _ = straight
    names = []
    for i in range(2):
        run(base, shards, tmp_path / str(i))
        folder = tmp_path / str(i) / "out"
        names.append({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
                      if p.is_file() and "telemetry" not in p.parts})  # fmt: skip
    assert names[0] == names[1]
    assert not list(tmp_path.rglob("README.md")), "no time is spent on model cards"
    assert not any(b"/" + str(tmp_path).encode() in content for content in names[0].values()), "no path of this machine"


def test_the_row_order_depends_only_on_seed_and_epoch():
    order = row_order(10, 25, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert (row_order(10, 15, seed=3) == order[:15]).all()
    assert (row_order(10, 25, seed=4) != order).any()
    assert count_steps(10, 4, 2.0, -1) == (5, 3)
    assert count_steps(10, 4, 2.0, 7) == (7, 3)
    assert [micro_batch_rows(12, n) for n in (1, 5, 7, 12, 99)] == [1, 4, 6, 12, 12]
    assert isinstance(order, np.ndarray)


def test_a_training_whose_only_step_has_a_rate_of_0_says_that_nothing_was_trained(base, tmp_path, caplog):
    settings = {"training_config__max_steps": 1, "training_config__warmup_steps": 1}
    adapter, _ = run(base, tokenize(base, tmp_path), tmp_path, **settings)
    assert not any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    assert "No step changed the adapter" in caplog.text and "exclude_modules" not in caplog.text
