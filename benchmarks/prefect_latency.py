"""From a click to a running worker, a retraining with nothing to do, many in a row and many at once.

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

from measure import row

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.conftest import build_phi3
from tests.local_deployment import Api, LocalDeployment, build_project
from tests.multi_machine import MultiMachineDeployment

TROUBLE = ("database is locked", "deadlock", "TimeoutError", "Traceback")


def seconds(later: str, earlier: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def main() -> None:
    """Print the table. Times are the server's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("in_a_row", nargs="?", type=int, default=50)
    parser.add_argument("at_once", nargs="?", type=int, default=20)
    parser.add_argument("--team", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        base = build_phi3(Path(folder, "base"), dtype="float32")
        site: MultiMachineDeployment | LocalDeployment = MultiMachineDeployment(Path(folder), base) if asked.team else LocalDeployment(build_project(Path(folder, "mine"), base))
        log = site.log("server") if isinstance(site, MultiMachineDeployment) else site.folder / ".loraflow" / "prefect" / "server.log"
        try:
            row("what", "median s", "max s", "runs")
            up = time.monotonic() - started
            row("a new database, server, deployments, until the workers are there", up, up, 1)
            site.wait(site.start("finetune/local"))
            site.wait(site.start("retrain/nightly"))
            show(site, "one after the other", [one(site) for _ in range(asked.in_a_row)])
            ids = [site.start("finetune/local") for _ in range(asked.at_once)]
            runs = [site.wait(id_, seconds=1800) for id_ in ids]
            show(site, f"{asked.at_once} at once, 4 of them at a time", runs)
            text = log.read_text(errors="replace")
            for words in TROUBLE:
                row(f"lines of the server's log with {words!r}", "", "", text.count(words))
        finally:
            site.stop()


def one(site: Api) -> dict:
    return site.wait(site.start("retrain/nightly"))


def show(site: Api, what: str, runs: list[dict]) -> None:
    bad = [run["state"] for run in runs if run["state"]["name"] not in ("UpToDate", "Completed")]
    for name, times in {
        f"{what}: click to running": [seconds(run["start_time"], run["created"]) for run in runs],
        f"{what}: running to done": [seconds(run["end_time"], run["start_time"]) for run in runs],
    }.items():
        row(name, statistics.median(times), max(times), len(times))
    row(f"{what}: lost or failed", len(bad), "", len(runs))


if __name__ == "__main__":
    main()
