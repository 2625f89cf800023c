"""Prefect's temporary server ends with the command that it was started for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-P", "-c", "from loraflow.cli import set_default_environment; set_default_environment();"
           "from loraflow.flows.server.temporary_server import start_temporary_server; start_temporary_server(); print('up', flush=True); input()"]  # fmt: skip


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def child_with(process: subprocess.Popen, word: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if any(word in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # also when it ends between two questions
        return True


def own_modules(folder: Path) -> None:
    """Write files that are called like modules: Python would import them if it was started with the folder in its path."""
    for name in ("random", "uvicorn"):
        (folder / f"{name}.py").write_text("raise RuntimeError('imported in place of a module')\n")


@pytest.fixture
def command(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"} | {
        "PREFECT_HOME": str(tmp_path)
    }
    own_modules(tmp_path)
    process = subprocess.Popen(COMMAND, env=env, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_sigkill_to_the_command_ends_a_starting_server(command):
    """The end of a running server is tested with complete runs, in test_finetune."""
    (server,) = wait_for(lambda: child_with(command, "uvicorn"), 120)
    time.sleep(0.3)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    wait_for(lambda: ended(server), 20)


def test_the_server_is_out_of_reach_of_signals_for_the_command_and_ends_with_it(command):
    """An interrupted run tells the server how it ended, so the server must still be there."""
    assert command.stdout.readline() == "up\n"
    (server,) = psutil.Process(command.pid).children()
    assert os.getpgid(server.pid) == os.getsid(server.pid) == server.pid != os.getpgid(command.pid)
    command.communicate("\n", timeout=60)
    assert command.returncode == 0
    wait_for(lambda: ended(server), 10)


def refused_start(folder: Path, **env: str) -> str:
    """Start a command whose temporary server cannot start; return the failure."""
    script = (
        "from loraflow.failures import Failure\n"
        "from loraflow.flows.server.temporary_server import start_temporary_server\n"
        "try:\n    start_temporary_server()\nexcept Failure as failure:\n    print(failure)"
    )
    base = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    env = {**base, "PREFECT_HOME": str(folder), **env}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True
    ).stdout


def test_a_home_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    assert refused_start(tmp_path / "file" / "home").startswith("Prefect's folder cannot be written.")


@pytest.mark.slow
def test_a_server_that_cannot_open_its_database_is_not_waited_for(tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/no/such/folder/x.db"
    message = refused_start(tmp_path, PREFECT_API_DATABASE_CONNECTION_URL=url)
    assert message.startswith("Prefect's temporary server ended while it started.")
    assert "unable to open database file" in message and len(message.splitlines()) == 4


def test_the_processes_of_up_import_nothing_from_the_projects_folder(tmp_path, monkeypatch):
    from loraflow.flows.server.local_server import Processes

    own_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Processes(tmp_path) as processes:
        log = processes.start("worker", "version")
        code = processes.running["worker"].wait(120)
    assert code == 0 and "Version:" in log.read_text(), log.read_text()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_no_server_is_started_if_one_is_configured():
    from loraflow.flows.server.temporary_server import start_temporary_server

    before = psutil.Process().children()
    start_temporary_server()  # the fixture of all flow tests configures one
    assert psutil.Process().children() == before


STUBBORN = """
import os, signal, sys, time
from loraflow.flows.server import prefect_process
signal.signal(signal.SIGTERM, signal.SIG_IGN)
prefect_process.TEMPORARY_GRACE_SECONDS = 1.0
prefect_process.write_in_turn = lambda: None
prefect_process.runpy.run_module = lambda *_, **__: (print(os.getpid(), flush=True), time.sleep(60))
sys.argv[1:] = [str(os.getppid()), "uvicorn"]
prefect_process.main()
"""


def test_a_temporary_server_that_ignores_sigterm_is_killed_after_its_parent():
    start = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    time.sleep(0.3)
    assert not ended(server), "it ignores SIGTERM"
    wait_for(lambda: ended(server), 20)
