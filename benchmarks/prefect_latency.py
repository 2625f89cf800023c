"""From a click to a running worker, a retraining with nothing to do, many in a row and many at once, on SQLite.

python benchmarks/prefect_latency.py [ROW] [AT_ONCE]      starts `loraflow up` in a folder of its own
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from measure import row

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.conftest import build_phi3
from tests.site import Site, build_project


def seconds(later: str, earlier: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def main() -> None:
    """Print the table. Times are the server's own."""
    in_a_row, at_once = (int(number) for number in (sys.argv[1:] + ["50", "20"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        site = Site(build_project(Path(folder, "project"), build_phi3(Path(folder, "base"), dtype="float32")))
        try:
            row("what", "median s", "max s", "runs")
            up = time.monotonic() - started
            row("loraflow up, a new database, until the worker is there", up, up, 1)
            site.wait(site.start("finetune/local"))
            site.wait(site.start("retrain/nightly"))
            show(site, "one after the other", [one(site) for _ in range(in_a_row)])
            ids = [site.start("finetune/local") for _ in range(at_once)]
            show(site, f"{at_once} at once, 4 of them at a time", [site.wait(id_, seconds=1800) for id_ in ids])
        finally:
            site.stop()


def one(site: Site) -> dict:
    return site.wait(site.start("retrain/nightly"))


def show(site: Site, what: str, runs: list[dict]) -> None:
    bad = [run["state"] for run in runs if run["state"]["name"] not in ("UpToDate", "Completed")]
    for name, times in {
        f"{what}: click to running": [seconds(run["start_time"], run["created"]) for run in runs],
        f"{what}: running to done": [seconds(run["end_time"], run["start_time"]) for run in runs],
    }.items():
        row(name, statistics.median(times), max(times), len(times))
    row(f"{what}: lost or failed", len(bad), "", len(runs))


if __name__ == "__main__":
    main()
