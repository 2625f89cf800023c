"""`loraflow up` as a process: whatever ends it, it leaves no process behind."""

import signal
import subprocess
import sys
import time

import pytest

from tests.site import Site, build_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def processes_of(site) -> list[str]:
    """Return the processes that belong to a site."""
    rows = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True
    ).stdout.splitlines()
    mine = {str(site.process.pid)}
    found = []
    for _ in range(4):  # children of children
        found = [row for row in rows if row.split()[0] in mine or row.split()[1] in mine or str(site.folder) in row]
        mine |= {row.split()[0] for row in found}
    return [row for row in found if not row.split()[2].startswith("Z")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_leaves_no_process(tmp_path, quick_phi3, how):
    site = Site(build_project(tmp_path / "project", quick_phi3))
    run = site.start("finetune/local", settings={"training_config.max_steps": 4000})
    site.wait_for_step(3)
    pids = {int(row.split()[0]) for row in processes_of(site)}
    assert len(pids) >= 5, "up, server, worker, flow run, training"
    again = subprocess.run(
        [sys.executable, "-c", "from loraflow.cli import main; main()", "up", "--port", str(site.port)],
        cwd=site.folder, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 2 and f"cannot listen on port {site.port}" in again.stderr
    site.process.send_signal(how)
    code = site.process.wait(90)
    assert code == {signal.SIGINT: 0, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], site.log.read_text()
    for _ in range(600):
        alive = [row for row in subprocess.run(["ps", "-ww", "-eo", "pid=,stat="], capture_output=True, text=True).stdout.splitlines()
                 if int(row.split()[0]) in pids and not row.split()[1].startswith("Z")]  # fmt: skip
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []
    if how != signal.SIGKILL:
        site = Site(site.folder)
        assert site.api("GET", f"/flow_runs/{run}")["state"]["type"] == "CRASHED", (
            "the run reported its end before the server ended"
        )
        assert site.stop() == 0
