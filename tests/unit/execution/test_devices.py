"""Several devices, as processes on a CPU with gloo: the same losses and adapter as one, and one end for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas
import psutil
import pytest
from safetensors.torch import load_file

from loraflow.execution import launcher as launch
from loraflow.execution.device_group import _first_summary, _own_address, needs_group
from loraflow.execution.job_file import JobFile
from loraflow.failures import BadConfig, Crashed, Failure, Killed, Network, OutOfMemory, Preempted
from loraflow.hardware.process_group import ProcessGroup
from loraflow.store import LocalStore, Ref
from loraflow.training import choices
from tests.conftest import chat
from tests.job_factory import make_job
from tests.unit.training.test_training import base, recipe, same, tokenize  # noqa: F401


@pytest.fixture(scope="module")
def shards(base, tmp_path_factory):  # noqa: F811
    return tokenize(base, tmp_path_factory.mktemp("shards"))


class Folders(LocalStore):
    """A store whose inputs are folders of this test."""

    folders: dict[str, Path] = {}

    def path(self, ref):
        return self.folders.get(ref.stage) or super().path(ref)


def store_of(tmp_path, base, shards):  # noqa: F811
    store = Folders(str(tmp_path / "store"))
    store.folders = {"tokens": shards, "base": base}
    return store


def job_of(**overrides):
    from loraflow.store import Ref

    inputs = {
        name: Ref(stage=name, fingerprint="f", digest="d", uri="", facets={"train": "d"}) for name in ("tokens", "base")
    }
    return make_job("train", recipe(**overrides), inputs)


def result(store, ref):
    folder = store.path(ref)
    curve = [json.loads(line) for line in (folder / "telemetry" / "curves.jsonl").read_text().splitlines()]
    engine = json.loads((folder / "telemetry" / "engine.json").read_text())
    losses = {row["step"]: row["loss"] for row in curve if "loss" in row}
    return load_file(folder / "adapter" / "adapter_model.safetensors"), losses, engine


# Of three rows to a step one process gets two and the other one.
UNEVEN = {"peft_config__lora_dropout": 0.1, "training_config__per_device_train_batch_size": 3}


@pytest.fixture(scope="module")
def alone(base, shards, tmp_path_factory):  # noqa: F811
    store = store_of(tmp_path_factory.mktemp("alone"), base, shards)
    return result(store, launch.run_job(job_of(**UNEVEN), store))


def test_two_processes_match_one(base, shards, alone, tmp_path):  # noqa: F811
    store = store_of(tmp_path, base, shards)
    pair_job = job_of(**UNEVEN, runtime__devices=2, runtime__micro_batch=1)
    pair = result(store, launch.run_job(pair_job, store))
    assert pair_job.fingerprint == job_of(**UNEVEN).fingerprint, "devices are no part of identity"
    assert pair[2]["devices"] == 2
    assert same(alone[0], pair[0], 5e-5)
    assert alone[1] == pytest.approx(pair[1], abs=2e-4)


@pytest.mark.parametrize("engine", ["fast", "stock"])
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(base, shards, tmp_path, engine):  # noqa: F811
    store = store_of(tmp_path, base, shards)
    job = job_of(
        training_config__max_steps=100000,
        training_config__save_steps=100000,
        runtime__devices=2,
        runtime__engine=engine,
    )
    signalled = []

    def signal_second(figures):
        if figures.get("step", 0) < 3 or signalled:
            return
        for process in psutil.process_iter():
            if _rank(process) == "1" and str(tmp_path) in _line(process):
                process.terminate()
                signalled.append(figures["step"])

    with pytest.raises(Preempted, match="asked to stop"):
        launch.run_job(job, store, signal_second)
    (saved,) = (store.work_folder(job.stage, job.fingerprint) / "checkpoints").glob("checkpoint-*")
    assert signalled[0] <= int(saved.name.removeprefix("checkpoint-")) < 5000 and (saved / "complete.json").exists()


def free_port():
    with socket.socket() as socket_:
        socket_.bind(("localhost", 0))
        return socket_.getsockname()[1]


@pytest.mark.slow
def test_two_nodes_match_one_process_and_the_first_node_commits(base, shards, tmp_path):  # noqa: F811
    one, two = (store_of(tmp_path / str(n), base, shards) for n in (1, 2))
    alone = result(one, launch.run_job(job_of(), one))
    nodes = {"runtime__rendezvous__nodes": 2, "runtime__rendezvous__endpoint": f"localhost:{free_port()}"}
    job = job_of(**nodes, runtime__rendezvous__wait_minutes=1.5, runtime__micro_batch=1)
    assert job.fingerprint == job_of().fingerprint, "nodes are no part of identity"
    job_file = two.work_folder(job.stage, job.fingerprint) / "job.json"
    codes = []

    def other_node():
        while not job_file.exists():
            time.sleep(0.05)
        command = [sys.executable, "-m", "loraflow.execution.worker", str(job_file)]
        codes.append(subprocess.run(command, env={**os.environ, "LORAFLOW_NODE": "1"}, timeout=150).returncode)

    thread = threading.Thread(target=other_node)
    thread.start()
    pair = result(two, launch.run_job(job, two))
    thread.join()
    assert codes == [0] and pair[2]["devices"] == 2
    assert same(alone[0], pair[0], 5e-5)
    assert alone[1] == pytest.approx(pair[1], abs=2e-4)


@pytest.mark.slow
def test_a_node_without_peers_reports_how_to_start_them(base, shards, tmp_path):  # noqa: F811
    store = store_of(tmp_path, base, shards)
    nodes = {"runtime__rendezvous__nodes": 2, "runtime__rendezvous__endpoint": f"localhost:{free_port()}"}
    job = job_of(**nodes, runtime__rendezvous__wait_minutes=0.05)
    with pytest.raises(Network, match="Not all nodes joined") as caught:
        launch.run_job(job, store)
    assert caught.value.retryable and "2 nodes within 0.05 minutes" in str(caught.value)
    assert (
        "LORAFLOW_NODE=1 python -P -m loraflow.execution.worker"
        in (store.work_folder("train", job.fingerprint) / "log.txt").read_text()
    )


def test_a_node_is_identified_by_the_address_from_which_it_reaches_the_first():
    assert _own_address("127.0.0.1:29400") == "127.0.0.1"
    with pytest.raises(Network, match="cannot be resolved here") as caught:
        _own_address("no-such-node.invalid:29400")
    assert "no-such-node.invalid:29400" in caught.value.got


def test_a_surplus_node_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFLOW_NODE", "2")
    job = job_of(runtime__rendezvous={"nodes": 2, "endpoint": "a:1"})
    file = JobFile(job, tmp_path, {}, tmp_path)
    with pytest.raises(BadConfig, match="node.s number is too large for the job"):
        needs_group(file)
    monkeypatch.setenv("LORAFLOW_NODE", "1")
    assert needs_group(file)
    monkeypatch.setenv("LORAFLOW_NODE", "0")
    refs = {
        name: Ref(stage="s", fingerprint="f", digest="d", uri="", facets={"heldout": "d"}) for name in ("model", "rows")
    }
    scoring = make_job("evaluate", recipe(runtime__rendezvous={"nodes": 2, "endpoint": "a:1"}), refs)
    assert not needs_group(JobFile(scoring, tmp_path, {}, tmp_path)), "nodes share training alone"


def test_two_processes_with_a_sharded_base_match_one(base, shards, alone, tmp_path):  # noqa: F811
    """Both must ask for each layer as often, the one with a row less as well."""
    store = store_of(tmp_path, base, shards)
    together = job_of(**UNEVEN, runtime__devices=2, runtime__micro_batch=1, runtime__shard_base="on")
    pair = result(store, launch.run_job(together, store))
    assert together.fingerprint == job_of(**UNEVEN).fingerprint, "who holds the base is no part of identity"
    assert pair[2]["base_sharded"] and not alone[2]["base_sharded"]
    layers = alone[2]["frozen_bytes"] - pair[2]["replicated_bytes"]
    assert pair[2]["frozen_bytes"] == pytest.approx(pair[2]["replicated_bytes"] + layers / 2, rel=0.01)
    assert alone[0].keys() == pair[0].keys()
    assert same(alone[0], pair[0], 5e-5)
    assert alone[1] == pytest.approx(pair[1], abs=2e-4)


@pytest.mark.parametrize(
    "change",
    [{"base__quantization": "nf4", "base__dtype": "bfloat16"}, {"method": "loralib"}, {"peft_config__use_dora": True}, {"runtime__engine": "stock"},
     {"peft_config__init_lora_weights": "pissa"}, {"peft_config__modules_to_save": ["lm_head"]},
     {"peft_config__bias": "all"}, {"peft_config__trainable_token_indices": [5]}],
    ids=str,
)  # fmt: skip
def test_settings_incompatible_with_a_sharded_base_are_refused(change):
    job = job_of(**change)
    with pytest.raises(BadConfig) as caught:
        choices.refuse_unshardable(job.config, job.runtime.engine)
    assert caught.value.where == "runtime.shard_base" and "runtime.shard_base to off" in caught.value.next_step


def test_gpus_of_several_types_are_refused(monkeypatch):
    monkeypatch.setattr(ProcessGroup, "all_gather", lambda self, name: ["NVIDIA L4", "NVIDIA H100"])
    with pytest.raises(BadConfig, match="several types"):
        choices.refuse_mixed_devices(ProcessGroup(0, 2), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "again", [{}, {"runtime__devices": 2}, {"runtime__devices": 2, "runtime__shard_base": "on"}], ids=str
)
def test_a_killed_rank_ends_the_group_and_training_resumes_with_any_number_of_ranks(base, shards, tmp_path, again):  # noqa: F811
    store = store_of(tmp_path, base, shards)
    long = {"training_config__max_steps": 40, "training_config__save_steps": 4}
    job = job_of(**long, runtime__devices=2, runtime__shard_base="on" if not again else "off")
    killed = []

    def kill_second():
        work = store.work_folder(job.stage, job.fingerprint)
        while not list(work.glob("checkpoints/checkpoint-*/complete.json")):
            time.sleep(0.1)
        ranks = [p for p in psutil.process_iter() if _rank(p) == "1" and str(tmp_path) in _line(p)]
        for process in ranks:
            process.send_signal(signal.SIGKILL)
        killed.append(time.monotonic())

    thread = threading.Thread(target=kill_second)
    thread.start()
    with pytest.raises(Killed):
        launch.run_job(job, store)
    thread.join()
    assert time.monotonic() - killed[0] < 30
    assert not [p for p in psutil.process_iter() if _rank(p) is not None and str(tmp_path) in " ".join(p.cmdline())]
    ref = launch.run_job(job_of(**long, **again), store)
    assert store.manifest(ref).figures["resumed_at"] >= 4
    _, losses, engine = result(store, ref)
    assert engine["devices"] == again.get("runtime__devices", 1) and sorted(losses) == list(range(1, 41)), (
        "each step once, over both attempts"
    )


def evaluation_of(model, folder, **overrides):
    """Return a store whose inputs are a model and 33 rows in order of no length, and the job that scores them."""
    from loraflow.store import Ref

    folder.mkdir()
    rows = [
        {"id": str(i), "set": "heldout", "messages": chat(7**i % 10007 ** (1 + i % 3))["messages"]} for i in range(33)
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Folders(str(folder / "store"))
    store.folders = {"model": model, "rows": folder}
    options = {
        "evaluation__metrics": ["exact_match", "token_loss"],
        "evaluation__dtype": "float32",
        "evaluation__max_new_tokens": 24,
        "runtime__threads": 1,
        "runtime__eval_batch_size": 4,
    }
    inputs = {
        name: Ref(stage=name, fingerprint="f", digest="d", uri="", facets={"heldout": "d"})
        for name in ("model", "rows")
    }
    return store, make_job("evaluate", recipe(**{**options, **overrides}), inputs)


@pytest.fixture(scope="module")
def scores(base, tmp_path_factory):  # noqa: F811
    store, job = evaluation_of(base, tmp_path_factory.mktemp("scores") / "one")
    return job, launch.run_job(job, store), store


def test_two_processes_give_the_scores_of_one_row_for_row(base, scores, tmp_path):  # noqa: F811
    alone, one, store = scores
    other, job = evaluation_of(base, tmp_path / "two", runtime__devices=2)
    assert job.fingerprint == alone.fingerprint, "devices are no part of identity"
    lines = []
    two = launch.run_job(job, other, lines.append)
    tables = [
        pandas.read_parquet(LocalStore.path(s, ref) / "scores.parquet") for s, ref in ((store, one), (other, two))
    ]
    pandas.testing.assert_frame_equal(*tables)
    assert tables[0]["id"].tolist() == [str(i) for i in range(33)] and (tables[0]["nll"] > 0).all()
    assert two.digest == one.digest
    assert lines[-1]["done"] <= 33 and {line["total"] for line in lines} == {33}


@pytest.mark.slow
def test_a_killed_rank_ends_an_evaluation_that_resumes_with_another_number_of_ranks(base, scores, tmp_path):  # noqa: F811
    store, job = evaluation_of(base, tmp_path / "two", runtime__devices=2)
    work = store.work_folder(job.stage, job.fingerprint)
    killed = []

    def kill_second():
        while not (work / "answers-1.jsonl").exists():
            time.sleep(0.01)
        for process in psutil.process_iter():
            if _rank(process) == "1" and str(tmp_path) in _line(process):
                process.kill()
                killed.append(time.monotonic())

    thread = threading.Thread(target=kill_second)
    thread.start()
    with pytest.raises(Killed) as caught:
        launch.run_job(job, store)
    thread.join()
    assert caught.value.retryable and time.monotonic() - killed[0] < 30
    assert not [p for p in psutil.process_iter() if _rank(p) is not None and str(tmp_path) in _line(p)]
    _, alone = evaluation_of(base, tmp_path / "one")
    lines = []
    assert launch.run_job(alone, store, lines.append).digest == scores[1].digest
    # A batch of four is one line of progress: those that the killed group had answered are not answered again.
    assert len([line for line in lines if line["done"]]) < 9


def _rank(process):
    try:
        env = process.environ()
    except psutil.Error:
        return None
    return env.get("RANK") if "loraflow.execution.worker" in " ".join(process.cmdline()) else None


def outcome(folder, rank, failure=None):
    outcome = (
        {"status": "failed", "failure": failure.to_dict()}
        if failure
        else {"status": "done", "summary": {"figures": {"rank": rank}}}
    )
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))


def test_the_failure_that_ended_the_group_is_reported(tmp_path):
    outcome(tmp_path, 0)
    outcome(tmp_path, 1)
    assert _first_summary(tmp_path, {}).figures["rank"] == 0
    outcome(tmp_path, 0, Preempted("ended with the others"))
    outcome(tmp_path, 1, OutOfMemory("too much", retry_with={"micro_tokens": 5}))
    with pytest.raises(OutOfMemory) as caught:
        _first_summary(tmp_path, {1: 1})
    assert caught.value.details["retry_with"] == {"micro_tokens": 5}
    outcome(tmp_path, 0, Crashed("connection closed by peer"))
    with pytest.raises(OutOfMemory):
        _first_summary(tmp_path, {1: 1})
    (tmp_path / "outcome-1.json").unlink()
    with pytest.raises(Killed, match="without an outcome") as caught:
        _first_summary(tmp_path, {0: 1, 1: -9})
    assert "rank 1: -9; another rank: connection closed by peer" in caught.value.got
    outcome(tmp_path, 1, Preempted("ended with the others"))
    with pytest.raises(Crashed, match="closed by peer"):
        _first_summary(tmp_path, {0: 1})
    outcome(tmp_path, 0, Preempted("ended with the others"))
    (tmp_path / "outcome-1.json").unlink()
    with pytest.raises(Killed, match="without an outcome"):
        _first_summary(tmp_path, {1: -9})
    with pytest.raises(Preempted):
        _first_summary(tmp_path, {0: 1})
    (tmp_path / "outcome-0.json").unlink()
    with pytest.raises(Failure):
        _first_summary(tmp_path, {0: 7})


@pytest.mark.slow
def test_ending_the_launcher_ends_every_rank(base, shards, tmp_path):  # noqa: F811
    script = f"""
from pathlib import Path
from tests.unit.execution.test_devices import *
store = store_of(Path({str(tmp_path)!r}), Path({str(base)!r}), Path({str(shards)!r}))
launch.run_job(job_of(training_config__max_steps=100000, runtime__devices=2), store)
"""
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    work = store_of(tmp_path, base, shards).work_folder("train", job_of(training_config__max_steps=100000).fingerprint)
    started = time.monotonic()
    while not (work / "checkpoints").exists() and time.monotonic() - started < 120:
        time.sleep(0.2)
    process.kill()
    process.wait()
    while time.monotonic() - started < 200:
        if not [
            p for p in psutil.process_iter() if "loraflow.execution.worker" in _line(p) and str(tmp_path) in _line(p)
        ]:
            return
        time.sleep(0.5)
    pytest.fail("a process was left")


def _line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
