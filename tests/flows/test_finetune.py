"""The flow on small real parts, through a real Prefect server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

import loraflow
from loraflow.failures import Failure
from loraflow.registry import PromotionLog
from loraflow.store import LocalStore
from tests.flows.conftest import states

STAGES = ["version_dataset", "check_dataset", "resolve_base", "tokenize", "evaluate base", "train", "merge", "verify",
          "evaluate tuned"]  # fmt: skip
ALL_CACHED = dict.fromkeys(STAGES, "cached")


def promote(project, merged: Path):
    """Promote a merged model by hand."""
    store = LocalStore(project.store)
    ref = next(ref for ref in store.artifacts() if ref.stage == "merge" and ref.digest == merged.name)
    log = PromotionLog(store.root, "tiny")
    log.append(log.head(), action="promote", merged=ref, adapter=None, inputs={}, reasons=["by hand"], actor="test")


def task_states(run_name: str) -> dict[str, list[str]]:
    """Return {task: its states} for the newest flow run that has started; nightly runs are only scheduled."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
    from prefect.states import StateType

    with get_client(sync_client=True) as client:
        begun = FlowRunFilterStateType(any_=[StateType.COMPLETED, StateType.FAILED, StateType.RUNNING])
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=begun)),
            limit=1,
            sort=FlowRunSort.START_TIME_DESC,
        )
        for _ in range(300):  # task runs reach the database later, on a loaded machine after half a minute
            tasks = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[runs[0].id])),
                sort=TaskRunSort.EXPECTED_START_TIME_DESC,
                limit=200,
            )
            complete = {"gate", "register", "report"} | set(STAGES) <= {task.name for task in tasks}
            if complete and all(task.state.is_final() for task in tasks):
                break
            time.sleep(0.2)
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(task.name, []).append(task.state.name)
    return found


def test_the_first_run_computes_all_stages(completed_project):
    project, summary = completed_project
    assert states(summary) == dict.fromkeys(STAGES, "computed")
    assert summary["decision"]["verdict"] in ("promote", "reject", "undecided")
    assert set(summary["metrics"]["tuned"]["heldout"]["token_loss"]) == {"value", "low", "high", "n"}
    assert summary["metrics"]["champion"] is None
    store = LocalStore(project.store)
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    assert not list((project.store / "staging").iterdir())
    assert not list((project.store / "work").glob("*/*"))
    assert (project.store / "runs" / f"{summary['run']}.md").read_text().startswith("# tiny: ")


def test_manifests_and_the_run_record_have_loraflows_version_and_the_state_of_its_code_and_of_git(completed_project):
    project, summary = completed_project
    store, record = (
        LocalStore(project.store),
        json.loads((project.store / "runs" / f"{summary['run']}.json").read_text()),
    )
    for ref in store.artifacts():
        provenance = store.manifest(ref).provenance
        assert provenance["versions"]["loraflow"] == loraflow.__version__ and provenance["code"], ref
        assert (provenance["commit"], provenance["uncommitted"]) == (record["commit"], record["uncommitted"]), ref
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"]).returncode == 1
    assert (record["loraflow"], record["commit"]) == (loraflow.__version__, head)
    assert record["uncommitted"] == (None if head is None else changed)


def test_the_second_run_is_fully_cached_and_prefect_shows_each_stage_once(completed_project):
    project, _ = completed_project
    assert project.plan() == ALL_CACHED | {k: v for k, v in project.plan().items() if k == "evaluate champion"}
    summary = project.run()
    for record in (project.store / "runs").glob(f"{summary['run']}*"):
        record.unlink()  # other tests copy this project, and count its runs
    assert set(states(summary).values()) == {"cached"}
    shown = task_states("tiny")
    for stage in states(summary):
        assert shown[stage] == ["Cached"], shown


def test_a_moved_store_is_fully_cached(project):
    """Its path differs, so that Prefect's own cache records do not match."""
    summary = project.run()
    assert set(states(summary).values()) == {"cached"}
    assert all(task_states("tiny")[stage] == ["Cached"] for stage in states(summary))
    assert all(stage["uri"].startswith(str(project.store)) for stage in summary["stages"])


CHANGES = {
    # field → (new value, stages that it recomputes, reason in the plan)
    "training_config__seed": (7, {"train"}, "training_config.seed 0 → 7"),
    "training_config__learning_rate": (1e-3, {"train"}, "training_config.learning_rate 0.01 → 0.001"),
    "peft_config__r": (2, {"train"}, "peft_config.r 4 → 2"),
    "training_config__per_device_train_batch_size": (2, {"train"}, "training_config.global_batch 4 → 2"),
    "training_config__max_length": (100, {"tokenize"}, "max_length 128 → 100"),
    "data__loss_on": ("all", {"tokenize"}, "loss_on assistant → all"),
    "data__system": ("be brief", {"check_dataset"}, "system null → be brief"),
    "evaluation__max_new_tokens": (9, {"evaluate base", "evaluate tuned"}, "max_new_tokens 8 → 9"),
    "evaluation__metrics": (
        ["token_loss"],
        {"evaluate base", "evaluate tuned"},
        'metrics ["token_loss", "exact_match", "json_fields"] → ["token_loss"]',
    ),
    "merge__dtype": ("float32", {"merge"}, "dtype null → float32"),
    "merge__verify_prompts": (3, {"verify"}, "prompts 2 → 3"),
    "base__dtype": ("float32", {"train"}, "base.dtype bfloat16 → float32"),
}
# stage → the stages that depend on its output
DOWN = {
    "check_dataset": {"tokenize", "evaluate base", "train", "merge", "verify", "evaluate tuned"},
    "tokenize": {"train", "merge", "verify", "evaluate tuned"},
    "train": {"merge", "verify", "evaluate tuned"},
    "merge": {"verify", "evaluate tuned"},
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_plan_names_a_changed_field_and_the_stages_that_depend_on_it(project, field):
    value, stages, reason = CHANGES[field]
    verdicts = project.plan(**{field: value})
    verdicts.pop("evaluate champion", None)
    waiting = set().union(*(DOWN.get(stage, set()) for stage in stages))
    assert {label for label, verdict in verdicts.items() if verdict == "runs"} == stages
    assert {label for label, verdict in verdicts.items() if verdict == "depends"} == waiting
    for verdict in project.verdicts:
        if verdict.status == "runs":
            assert verdict.why[0] == reason, verdict


@pytest.mark.parametrize(
    "change",
    [
        {"runtime__micro_batch": 2}, {"runtime__threads": 2}, {"runtime__eval_batch_size": 3}, {"runtime__engine": "stock"},
        {"training_config__logging_steps": 3}, {"training_config__save_steps": 5}, {"training_config__gradient_checkpointing": True},
        {"training_config__per_device_train_batch_size": 2, "training_config__gradient_accumulation_steps": 2},
        {"gate__primary": "exact_match"}, {"data__max_quarantined": 0.5}, {"name": "other"},
    ],
)  # fmt: skip
def test_settings_without_effect_on_results_run_no_stage(project, change):
    verdicts = project.plan(**change)
    verdicts.pop("evaluate champion", None)
    assert verdicts == ALL_CACHED


def test_new_timestamps_and_a_moved_base_run_no_stage(project, tmp_path):
    moved = tmp_path / "moved base"
    shutil.copytree(project.phi3, moved)
    for file in [*moved.iterdir(), *(project.folder / "data").iterdir()]:
        os.utime(file, (1_000_000, 1_000_000))
    verdicts = project.plan(base__model=str(moved))
    verdicts.pop("evaluate champion", None)
    assert verdicts == ALL_CACHED


def test_a_corrected_heldout_row_does_not_retrain(project):
    file = project.folder / "data" / "heldout.jsonl"
    file.write_text(file.read_text().replace('\\"a\\": \\"red\\"', '\\"a\\": \\"blue\\"'))
    before = {stage["stage"]: stage["digest"] for stage in last_record(project)["stages"]}
    assert project.plan()["version_dataset"] == "runs"
    summary = project.run()
    shown = states(summary)
    assert shown["version_dataset"] == shown["check_dataset"] == "computed"
    assert shown["evaluate base"] == shown["evaluate tuned"] == "computed"
    assert shown["tokenize"] == shown["train"] == shown["merge"] == "cached"
    after = {stage["stage"]: stage["digest"] for stage in summary["stages"]}
    assert after["train"] == before["train"]


def last_record(project) -> dict:
    return json.loads(sorted((project.store / "runs").glob("*.json"))[-1].read_text())


def test_deleted_and_damaged_artifacts_are_recomputed_with_the_same_digest(project):
    before = {stage["stage"]: stage for stage in last_record(project)["stages"]}
    store = LocalStore(project.store)
    shards = store.find("tokenize", before["tokenize"]["fingerprint"])
    file = store.path(shards) / "train" / "data-00000-of-00001.arrow"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    shutil.rmtree(store.path(store.find("train", before["train"]["fingerprint"])))
    assert project.plan()["train"] == "runs"
    summary = project.run()
    after = {stage["stage"]: stage for stage in summary["stages"]}
    assert after["tokenize"]["state"] == after["train"]["state"] == "computed"
    assert {k: v["digest"] for k, v in after.items() if k in before} == {
        k: v["digest"] for k, v in before.items() if k in after
    }
    assert after["merge"]["state"] == "cached", "its input was recomputed with the same digest"
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    assert list((project.store / "set-aside").glob("tokenize-*.json"))


def test_prefect_retries_a_killed_training_from_its_checkpoint(project):
    def kill() -> None:
        for _ in range(6000):
            for progress in (project.store / "work" / "train").glob("*/progress.jsonl"):
                if any('"step": 4' in line for line in progress.read_text().splitlines()):
                    pid = subprocess.run(
                        ["pgrep", "-f", str(progress.parent)], capture_output=True, text=True
                    ).stdout.split()
                    os.kill(int(pid[0]), signal.SIGKILL)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = project.run(training_config__max_steps=40, training_config__save_steps=2)
    killer.join()
    assert task_states("tiny")["train"] == ["Completed"]
    train = next(stage for stage in summary["stages"] if stage["stage"] == "train")
    manifest = LocalStore(project.store).find("train", train["fingerprint"])
    figures = LocalStore(project.store).manifest(manifest).figures
    assert figures["resumed_at"] >= 2 and figures["steps"] == 40
    steps = [json.loads(line)["step"] for line in (Path(train["uri"]) / "telemetry" / "curves.jsonl").read_text().splitlines()
             if "loss" in line and "train_loss" not in line]  # fmt: skip
    assert steps == list(range(1, 41))


def test_a_rolled_back_model_is_not_promoted_again(project):
    """A promoted model stays the champion, and a rolled back model is not promoted by a rerun."""
    first = last_record(project)["summary"]
    log = PromotionLog(project.store, "tiny")
    if log.head() is None:
        promote(project, Path(first["merged"]))
    assert project.run()["decision"]["verdict"] == "unchanged"
    second = project.run(training_config__learning_rate=2e-2)
    assert "evaluate champion" in states(second)
    if second["decision"]["verdict"] != "promote":
        assert project.run(training_config__learning_rate=2e-2)["decision"]["verdict"] == "unchanged"
        promote(project, Path(second["merged"]))
    log.rollback("answers were rude", "test")
    again = project.run(training_config__learning_rate=2e-2)
    assert again["decision"]["verdict"] == "unchanged"
    assert "answers were rude" in again["decision"]["reasons"][0]
    assert project.run()["decision"]["verdict"] == "unchanged"
    assert log.head().merged.digest == next(s["digest"] for s in first["stages"] if s["stage"] == "merge")


def test_artifacts_open_without_loraflow(completed_project, tmp_path):
    """Open tokens, scores, adapter and merged model in a process that cannot import loraflow."""
    _, summary = completed_project
    uri = {stage["stage"]: stage["uri"] for stage in summary["stages"]}
    script = f"""
import sys
sys.modules["loraflow"] = None
import datasets, pandas, torch
tokens = datasets.load_from_disk({uri["tokenize"] + "/train"!r})
assert set(tokens.column_names) == {{"input_ids", "labels", "length"}} and len(tokens) == 80, tokens
assert len(pandas.read_parquet({uri["evaluate tuned"] + "/scores.parquet"!r})) == 8
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
tokenizer = AutoTokenizer.from_pretrained({uri["merge"]!r})
merged = AutoModelForCausalLM.from_pretrained({uri["merge"]!r}, dtype=torch.float32)
adapted = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained({uri["resolve_base"]!r}, dtype=torch.float32), {summary["adapter"]!r})
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "what is the red of dog"}}],
                                    add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    difference = (merged(**ids).logits - adapted(**ids).logits).abs().max()
assert difference < 0.05, difference
print(tokenizer.decode(merged.generate(**ids, max_new_tokens=5)[0]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def with_server() -> dict[str, str]:
    """Return the environment of a command that uses the tests' server: a temporary one takes seconds to start."""
    from prefect.settings import PREFECT_API_URL

    return {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}


def cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_the_command_prints_one_json_document(project):
    done = cli("run", str(project.recipe), "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert set(summary) >= {"run", "stages", "metrics", "decision", "adapter", "merged"}
    strict = cli("run", str(project.recipe), "--json", "--strict-gate", env=with_server())
    assert strict.returncode == (0 if json.loads(strict.stdout)["decision"]["verdict"] == "promote" else 3)


def test_a_cached_run_and_a_plan_import_no_torch(project):
    code = (
        "import sys\nsys.argv = ['loraflow', *{arguments!r}]\nfrom loraflow.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "bad = {{m for m in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'dvc') if m in sys.modules}}\n"
        "assert not bad, bad\n"
    )
    project.run()
    for command, also in (
        ("plan", "assert 'prefect' not in sys.modules"),
        ("run", "assert 'scipy.stats' not in sys.modules"),
    ):
        script = code.format(arguments=[command, str(project.recipe), *(["-q"] if command == "run" else [])]) + also
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=with_server())
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"peft_config.target_modules": "[q_proj]"}, 2, "name qkv_proj"),
        ({"data.source": "nowhere"}, 1, "dataset does not exist"),
        ({"base.model": "not-a-model"}, 1, "no such base model"),
        ({"training_config.learning_rte": "1"}, 2, "did you mean learning_rate"),
        ({"evaluation.metrics": "[bleu]"}, 2, "no such metric"),
    ],
)
def test_invalid_input_exits_with_its_status_a_message_and_a_next_step(project, change, code, says):
    sets = [part for key, value in change.items() for part in ("--set", f"{key}={value}")]
    done = cli("run", str(project.recipe), "-q", *sets, env=with_server())
    assert done.returncode == code, done.stderr[-3000:]
    tail = done.stderr[-3000:]
    assert says in tail and "next:" in tail
    assert_intact(LocalStore(project.store))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"base__quantization": "nf4"}, 2, "NF4 quantization needs"),
        ({"training_config__max_length": 5}, 1, "longer than max_length"),
    ],
)
def test_a_stage_that_refuses_its_input_ends_the_flow_with_its_failure(project, change, code, says):
    """What a command prints of a failure, and its exit status, is tested above."""
    with pytest.raises(Failure, match=says) as caught:
        project.run(**change)
    assert caught.value.exit_code == code and caught.value.next_step
    assert_intact(LocalStore(project.store))


def assert_intact(store):
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    assert not list((Path(store.root) / "staging").iterdir())


def processes_with(text: str) -> list[str]:
    rows = subprocess.run(["ps", "-eo", "pid,stat,args"], capture_output=True, text=True).stdout.splitlines()
    return [row for row in rows if text in row and " Z" not in row and "ps -eo" not in row]


def processes_of_session(session: int) -> list[str]:
    rows = subprocess.run(["ps", "-eo", "sid,stat,args"], capture_output=True, text=True).stdout.splitlines()
    return [row for row in rows if row.split()[0] == str(session) and not row.split()[1].startswith("Z")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_worker_and_an_intact_store(project, signum):
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(project.recipe),
               "--set", "training_config.max_steps=2000", "--set", "training_config.save_steps=5"]  # fmt: skip
    log = project.folder / "output.txt"
    # SIGTERM reaches a run that uses a server which is there already; the others have a temporary one.
    env = with_server() if signum == signal.SIGTERM else None
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True, env=env)
    for _ in range(6000):  # five minutes, for a loaded machine
        if any('"step": 6' in p.read_text() for p in (project.store / "work" / "train").glob("*/progress.jsonl")):
            break
        time.sleep(0.05)
    else:
        process.kill()
        raise AssertionError(log.read_text())
    process.send_signal(signum)
    process.wait(timeout=60)
    output = log.read_text()
    for _ in range(200):
        if not processes_with(str(project.store / "work")):
            break
        time.sleep(0.1)
    assert processes_with(str(project.store / "work")) == []
    for _ in range(100):  # after SIGKILL Prefect's server ends by itself
        if not processes_of_session(process.pid):
            break
        time.sleep(0.1)
    assert not processes_of_session(process.pid), "Prefect's server has ended too"
    if signum == signal.SIGINT:
        assert process.returncode == 130, output
        assert re.search("interrupted; finished stages are kept", output)
    store = LocalStore(project.store)
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    assert list((project.store / "work" / "train").glob("*/checkpoints/checkpoint-*/complete.json")), (
        "a checkpoint to resume from"
    )


def test_scores_open_with_pandas_and_have_a_row_per_example(completed_project):
    uri = next(stage["uri"] for stage in completed_project[1]["stages"] if stage["stage"] == "evaluate tuned")
    table = pd.read_parquet(Path(uri) / "scores.parquet")
    assert table["id"].is_unique and set(table["finish"]) <= {"stop", "length"}
    assert {"token_loss", "exact_match", "json_valid", "field_f1"} <= set(table.columns)
