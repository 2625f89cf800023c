"""Time from a run's creation to its start and end: retrainings without new data in a row, and fine-tunings at once.

python benchmarks/prefect_latency.py [ROW] [AT_ONCE]           under `loraflow up`, in a folder of its own, on SQLite
python benchmarks/prefect_latency.py [ROW] [AT_ONCE] --team    Postgres, a store in a bucket, two workers
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from measure import print_row

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.conftest import build_phi3
from tests.local_deployment import Api, LocalDeployment, build_project
from tests.multi_machine import MultiMachineDeployment

SERVER_ERRORS = ("database is locked", "deadlock", "TimeoutError", "Traceback")


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def main() -> None:
    """Print the table. Times are taken from the server's records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("in_a_row", nargs="?", type=int, default=50)
    parser.add_argument("at_once", nargs="?", type=int, default=20)
    parser.add_argument("--team", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        base = build_phi3(Path(folder, "base"), dtype="float32")
        deployment: MultiMachineDeployment | LocalDeployment = (
            MultiMachineDeployment(Path(folder), base)
            if arguments.team
            else LocalDeployment(build_project(Path(folder, "mine"), base))
        )
        log = (
            deployment.log("server")
            if isinstance(deployment, MultiMachineDeployment)
            else deployment.folder / ".loraflow" / "prefect" / "server.log"
        )
        try:
            print_row("what", "median s", "max s", "runs")
            up = time.monotonic() - started
            print_row("start of database, server, deployments and workers", up, up, 1)
            deployment.wait(deployment.start("finetune/local"))
            deployment.wait(deployment.start("retrain/nightly"))
            print_latencies("in a row", [run_retraining(deployment) for _ in range(arguments.in_a_row)])
            ids = [deployment.start("finetune/local") for _ in range(arguments.at_once)]
            runs = [deployment.wait(id_, seconds=1800) for id_ in ids]
            print_latencies(f"{arguments.at_once} at once, 4 of them at a time", runs)
            text = log.read_text(errors="replace")
            for message in SERVER_ERRORS:
                print_row(f"lines of the server's log with {message!r}", "", "", text.count(message))
        finally:
            deployment.stop()


def run_retraining(deployment: Api) -> dict:
    return deployment.wait(deployment.start("retrain/nightly"))


def print_latencies(what: str, runs: list[dict]) -> None:
    failed = [run["state"] for run in runs if run["state"]["name"] not in ("UpToDate", "Completed")]
    for name, times in {
        f"{what}: created to running": [seconds_between(run["created"], run["start_time"]) for run in runs],
        f"{what}: running to done": [seconds_between(run["start_time"], run["end_time"]) for run in runs],
    }.items():
        print_row(name, statistics.median(times), max(times), len(times))
    print_row(f"{what}: lost or failed", len(failed), "", len(runs))


if __name__ == "__main__":
    main()
