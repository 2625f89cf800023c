"""`loraflow up` as a process: no signal leaves a child process behind."""

import signal
import subprocess
import sys
import time

import pytest

from tests.local_deployment import LocalDeployment, build_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def processes_of(deployment) -> list[str]:
    """Return the processes that belong to a deployment."""
    rows = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True
    ).stdout.splitlines()
    mine = {str(deployment.process.pid)}
    found = []
    for _ in range(4):  # children of children
        found = [
            row for row in rows if row.split()[0] in mine or row.split()[1] in mine or str(deployment.folder) in row
        ]
        mine |= {row.split()[0] for row in found}
    return [row for row in found if not row.split()[2].startswith("Z")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_process(tmp_path, quick_phi3, signum):
    deployment = LocalDeployment(build_project(tmp_path / "project", quick_phi3))
    run = deployment.start("finetune/local", settings={"training_config.max_steps": 4000})
    deployment.wait_for_step(3)
    pids = {int(row.split()[0]) for row in processes_of(deployment)}
    assert len(pids) >= 5, "up, server, worker, flow run, training"
    again = subprocess.run(
        [sys.executable, "-c", "from loraflow.cli import main; main()", "up", "--port", str(deployment.port)],
        cwd=deployment.folder, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 2 and f"cannot listen on port {deployment.port}" in again.stderr
    deployment.process.send_signal(signum)
    code = deployment.process.wait(90)
    assert code == {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum], deployment.log.read_text()
    for _ in range(600):
        alive = [row for row in subprocess.run(["ps", "-ww", "-eo", "pid=,stat="], capture_output=True, text=True).stdout.splitlines()
                 if int(row.split()[0]) in pids and not row.split()[1].startswith("Z")]  # fmt: skip
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []
    if signum != signal.SIGKILL:
        deployment = LocalDeployment(deployment.folder)
        assert deployment.api("GET", f"/flow_runs/{run}")["state"]["type"] == "CRASHED", (
            "the run reported its end before the server ended"
        )
        assert deployment.stop() == 0
