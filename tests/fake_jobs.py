"""Jobs of the fake stage (`fake_worker.py`), for tests of the launcher."""

import subprocess
import sys
import time
from pathlib import Path

from loraflow.config import Runtime
from loraflow.job import Job
from loraflow.store import LocalStore
from tests.fake_worker import FAKE_STAGE

FAKE = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]


def job(how: str, **runtime) -> Job:
    values = Runtime().model_dump() | {"grace_seconds": 1.0} | runtime
    return Job(stage=FAKE_STAGE.name, version=1, config={"how": how}, runtime=values)


def work_of(store: LocalStore, submitted: Job) -> Path:
    return store.root / "work" / submitted.stage / submitted.fingerprint


def wait_for(path: Path) -> str:
    for _ in range(1200):  # a minute: on a loaded machine a process takes many seconds to start
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def alive_in_group(group: int) -> list[str]:
    rows = subprocess.run(["ps", "-eo", "pgid,stat,cmd"], capture_output=True, text=True).stdout.splitlines()
    return [row for row in rows if row.split()[0] == str(group) and not row.split()[1].startswith("Z")]
