"""Workers that are forked from a process that has imported the libraries once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from loraflow import failures
from loraflow.config import parse_recipe
from loraflow.config.stage_configs import TrainGroupConfig
from loraflow.execution import launcher, start_worker
from loraflow.execution.fork_server import MODULES
from loraflow.execution.runner import run_stage
from loraflow.execution.worker_process import import_ahead
from loraflow.execution.workspace import Workspace
from loraflow.stages import STAGES
from tests.conftest import build_phi3, chat

ROOT = Path(__file__).parents[3]
RECIPE = """\
name: forked
data: {{source: {data}, train: [train.jsonl], heldout: [heldout.jsonl]}}
base: {{model: {base}}}
training_config: {{max_steps: {steps}, per_device_train_batch_size: 4, max_length: 128, logging_steps: 1, save_steps: 2}}
peft_config: {{target_modules: [qkv_proj, o_proj]}}
evaluation: {{metrics: [token_loss], max_rows: 4, max_new_tokens: 4}}
runtime: {{store: {store}, grace_seconds: 5, threads: 1, {runtime}}}
"""
LONG = 100_000  # steps


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, numbers in (("train.jsonl", range(24)), ("heldout.jsonl", range(100, 106))):
        (folder / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    build_phi3(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def no_server_is_left():
    yield
    start_worker.end_fork_server()


def workspace(parts, store, steps=4, runtime="worker_start: fork"):
    text = RECIPE.format(data=parts, base=parts / "base", store=store, steps=steps, runtime=runtime)
    return Workspace(parse_recipe(text))


def walk(space, until="evaluate"):
    """Run the stages up to one; return their artifacts by stage."""
    refs = {}

    def stage(name, **inputs):
        refs[name] = run_stage(space, STAGES[name], **inputs)
        return refs[name]

    rows, base = stage("check_dataset", dataset=stage("version_dataset")), stage("resolve_base")
    tokens = stage("tokenize", rows=rows, base=base)
    adapter = stage("train", tokens=tokens, base=base)
    if until == "evaluate":
        stage("evaluate", model=stage("merge", base=base, adapter=adapter), rows=rows)
    return refs


def test_the_server_that_starts_ahead_in_a_new_store_forks_the_first_workers(parts, tmp_path):
    space = workspace(parts, tmp_path / "store")
    import_ahead(space.recipe)
    ahead = start_worker._server.process.pid
    walk(space, until="tokenize")
    assert start_worker._server.process.pid == ahead
    start_worker.end_fork_server()
    import_ahead(space.recipe)
    assert start_worker._server is None, "the store has a base: the next run may be cached"


def server():
    assert start_worker._server is not None
    return psutil.Process(start_worker._server.process.pid)


def test_every_listed_module_exists():
    """The server ignores a module that cannot be imported, so a wrong name would only cost time."""
    from importlib.util import find_spec

    assert [name for names in MODULES.values() for name in names if find_spec(name) is None] == []


def test_artifacts_of_forked_workers_equal_those_of_new_processes(parts, tmp_path, monkeypatch):
    imported = tmp_path / "imported"
    package = tmp_path / "packages" / "bitsandbytes" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text(f"open({str(imported)!r}, 'w').close()\n")  # the real one starts CUDA
    (tmp_path / "project").mkdir()
    for name in ("datasets", "evaluate", "peft", "random"):  # files of the user, in the project's folder
        (tmp_path / "project" / f"{name}.py").write_text("raise RuntimeError('imported in place of a library')\n")
    monkeypatch.chdir(tmp_path / "project")
    with monkeypatch.context() as patch:
        before = (
            [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        )  # an empty entry is the current folder
        paths = [
            str(tmp_path / "project"),
            str(package.parent.parent),
            *before,
        ]  # Prefect puts the project's folder there
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forked = walk(workspace(parts, tmp_path / "forked"))
        again = walk(workspace(parts, tmp_path / "again"))  # by the same server, after all other stages
    assert not imported.exists(), "a process that has started CUDA cannot be forked"
    new = walk(workspace(parts, tmp_path / "new", runtime="worker_start: spawn"), until="train")
    assert {name: ref.digest for name, ref in again.items()} == {name: ref.digest for name, ref in forked.items()}
    assert {name: ref.digest for name, ref in new.items()} == {name: forked[name].digest for name in new}


def training_of(store):
    """Return the process of a training that has saved a checkpoint."""
    for _ in range(900):
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            is_training = "loraflow.execution.worker" in line and f"{store}/work/train" in line
            if is_training and any(Path(line.split()[-1]).parent.glob("checkpoints/checkpoint-*/complete.json")):
                return process
        time.sleep(0.1)
    raise AssertionError("no training came that far")


SCRIPT = """
import sys
from tests.unit.execution.test_fork_server import LONG, walk, workspace
from pathlib import Path
from loraflow.failures import Failure
try:
    walk(workspace(Path(sys.argv[1]), Path(sys.argv[2]), LONG))
except Failure as failure:
    sys.exit(f"{type(failure).__name__}: {failure}")
"""


@pytest.fixture
def running(parts, tmp_path):
    """A launcher in a process of its own, whose training has saved a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(parts), str(tmp_path / "store")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process, training_of(tmp_path / "store")
    process.kill()
    process.wait()


def assert_gone(*processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_killed_launcher_takes_its_server_and_the_worker_with_it(running):
    launcher_process, worker = running
    fork_server = worker.parent()
    assert fork_server.ppid() == launcher_process.pid and os.getpgid(worker.pid) == worker.pid
    launcher_process.kill()
    assert_gone(fork_server, worker)


IMPORTS = """
import os, signal, sys, time
from loraflow.execution import start_worker
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as a program may that launches runs; children inherit it
start_worker.SERVER = [sys.executable, "-c", "import sys; from loraflow.execution import fork_server;"
    "fork_server.MODULES = {'train': ('takes_long',)}; sys.exit(fork_server.main(sys.argv[1:]))"]
server = start_worker._ForkServer(dict(os.environ))
print(server.process.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_launcher_takes_a_server_with_it_that_is_importing(tmp_path):
    """Importing torch and transformers took up to 35 s beside other processes."""
    (tmp_path / "takes_long.py").write_text(
        "import pathlib\npathlib.Path('importing').touch()\nwhile True:\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    fork_server = psutil.Process(int(process.stdout.readline()))
    try:
        while not (tmp_path / "importing").exists():
            assert fork_server.is_running() and fork_server.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.05)
        process.kill()
        process.communicate()
        assert_gone(fork_server)
    finally:
        if fork_server.is_running():
            fork_server.kill()


def test_a_server_that_ends_after_its_launcher_is_not_killed_by_its_timer(tmp_path, monkeypatch):
    """Python removes the handler of SIGALRM before it takes the modules apart, which takes seconds with torch."""
    (tmp_path / "ends_slowly.py").write_text(
        "import time\nclass Slow:\n    def __del__(self, sleep=time.sleep):\n        sleep(1.5)\nslow = Slow()\n"
        "open('imported', 'w').close()\n"
    )
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys; from loraflow.execution import fork_server;"
        "fork_server.MODULES = {'train': ('ends_slowly',)}; sys.exit(fork_server.main(sys.argv[1:]))"
    )
    monkeypatch.setattr(start_worker, "SERVER", [sys.executable, "-c", code])
    started = start_worker._ForkServer({**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"})
    while not (tmp_path / "imported").exists():
        assert started.process.poll() is None
        time.sleep(0.05)
    started._socket.close()
    assert started.process.wait(timeout=20) == 0


def test_a_killed_server_ends_its_worker_and_the_run_says_that_it_was_killed(running):
    launcher_process, worker = running
    worker.parent().kill()
    _, errors = launcher_process.communicate(timeout=60)
    assert "Killed: " in errors and launcher_process.returncode == 1
    assert_gone(worker)


def test_an_interrupted_launcher_saves_and_leaves_no_process(running, tmp_path):
    launcher_process, worker = running
    fork_server = worker.parent()
    launcher_process.send_signal(signal.SIGINT)
    launcher_process.communicate(timeout=60)
    assert_gone(fork_server, worker)
    assert "Training was asked to stop." in next((tmp_path / "store" / "work" / "train").glob("*/log.txt")).read_text()


def test_jobs_share_a_server_until_the_environment_changes(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_stage(workspace(parts, tmp_path / "one"), STAGES["resolve_base"])
    first = server()
    run_stage(workspace(parts, tmp_path / "two"), STAGES["resolve_base"])
    assert server() == first
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    run_stage(workspace(parts, tmp_path / "three"), STAGES["resolve_base"])
    assert server() != first
    assert_gone(first)


@pytest.mark.parametrize(
    "key, value, stages",
    [
        ("base.quantization", "nf4", {"train", "merge", "verify"}),
        ("training_config.optim", "paged_adamw_8bit", {"train"}),
        ("base.quantization", "fp8", set()),
    ],
)
def test_a_stage_that_needs_bitsandbytes_starts_as_a_new_python(parts, tmp_path, key, value, stages):
    text = RECIPE.format(data=parts, base=parts / "base", store=tmp_path, steps=4, runtime="")
    space = Workspace(parse_recipe(text, overrides={key: value}))
    names = ("resolve_base", "tokenize", "train", "merge", "verify", "evaluate")
    configs = {name: STAGES[name].config.from_recipe(space.recipe, space) for name in names}
    assert {name for name in names if not start_worker._can_fork(configs[name])} == stages
    assert start_worker._can_fork(TrainGroupConfig(trials=[configs["train"]])) == ("train" not in stages)


def test_a_server_that_ends_at_its_start_is_replaced_by_a_new_python(parts, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(start_worker, "SERVER", [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert run_stage(workspace(parts, tmp_path / "store"), STAGES["resolve_base"])
    assert "no worker can be forked" in caplog.text


def test_a_failure_of_a_forked_worker_is_the_stages_own(parts, tmp_path):
    space = workspace(parts, tmp_path / "store")
    base = run_stage(space, STAGES["resolve_base"])
    (space.store.path(base) / "tokenizer.json").write_text("{}")
    rows = run_stage(space, STAGES["check_dataset"], dataset=run_stage(space, STAGES["version_dataset"]))
    job = space.job(STAGES["tokenize"], {"rows": rows, "base": base})
    with pytest.raises(failures.Failure) as caught:
        launcher.run_job(job, space.store)
    assert "log.txt" in str(caught.value) or caught.value.next_step


def test_a_request_to_end_that_reaches_all_processes_leaves_the_worker_time_to_save(running, tmp_path):
    launcher_process, worker = running
    for process in (worker.parent(), worker):
        process.send_signal(signal.SIGTERM)
    _, errors = launcher_process.communicate(timeout=60)
    assert "Preempted: " in errors, "not Killed"
    assert "Training was asked to stop." in next((tmp_path / "store" / "work" / "train").glob("*/log.txt")).read_text()
