"""What a run with nothing to do asks of a bucket: how often, and how long that takes where an answer takes its time.

python benchmarks/bucket_requests.py [MILLISECONDS ...]      delays of an answer; 0 and 30 by default. Needs SeaweedFS.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from measure import row

sys.path.insert(0, str(Path(__file__).parent.parent))
from loraflow.store import bucket
from tests.conftest import build_phi3
from tests.object_server import running
from tests.site import build_project

RECIPE = "configs/tiny.yaml"


class Far(bucket.Bucket):
    """A bucket whose answers come later, and are counted."""

    asked: Counter[str] = Counter()
    delay = 0.0

    def _call(self, do: Any, key: str, **arguments: Any) -> Any:
        self.asked[do.__name__] += 1
        time.sleep(self.delay)
        return super()._call(do, key, **arguments)


def main() -> None:
    """Print a table: a folder, then the bucket with each delay."""
    delays = [float(word) for word in sys.argv[1:]] or [0.0, 30.0]
    here = Path(tempfile.mkdtemp())
    os.environ |= {"PREFECT_HOME": str(here / "prefect"), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    base = build_phi3(here / "base", dtype="float32")
    from prefect.testing.utilities import prefect_test_harness

    from loraflow.flows.finetune import finetune
    from loraflow.store import s3

    s3.Bucket = Far  # type: ignore[misc]
    with running(here / "server") as server, prefect_test_harness(server_startup_timeout=300):
        row(
            "store", "requests", "seconds of a run in which every stage is cached", "of these in requests, by the delay"
        )
        for store, all_delays in ((".loraflow/store", [0.0]), (server.place(), delays)):
            os.chdir(build_project(here / f"project {len(store)}", base, store))
            finetune(recipe=RECIPE)
            for delay in all_delays:
                Far.asked.clear()
                Far.delay = delay / 1000
                started = time.perf_counter()
                finetune(recipe=RECIPE)
                seconds, asked = time.perf_counter() - started, sum(Far.asked.values())
                Far.delay = 0.0
                name = f"bucket, {delay:g} ms" if asked else "folder"
                row(name, f"{asked} ({', '.join(f'{n} {what}' for what, n in Far.asked.most_common())})", f"{seconds:.1f}",
                    f"{asked * delay / 1000:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
