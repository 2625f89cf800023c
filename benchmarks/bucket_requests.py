"""Count and time the bucket requests of a run in which every stage is cached, for delayed responses.

python benchmarks/bucket_requests.py [MILLISECONDS ...]      delay of each response; 0 and 30 by default. Needs SeaweedFS.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import print_row

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests import object_server, s3_proxy
from tests.conftest import build_phi3
from tests.local_deployment import build_project

RECIPE = "configs/tiny.yaml"
COLUMNS = ("store", "requests", "seconds of a run in which every stage is cached", "of these in requests, by the delay")


def measure(store: str, project: Path, proxy: s3_proxy.Proxy, delays: list[float]) -> None:
    """Run once to fill the store, then print a row for each delay in milliseconds."""
    from loraflow.flows.finetune import finetune

    os.chdir(project)
    finetune(recipe=RECIPE)
    for delay in delays:
        proxy.requests.clear()
        proxy.fault = lambda request, seconds=delay / 1000: time.sleep(seconds)
        started = time.perf_counter()
        finetune(recipe=RECIPE)
        seconds = time.perf_counter() - started
        proxy.fault = lambda request: None
        operations = Counter(proxy.operations())
        total = operations.total()
        print_row(
            f"bucket, {delay:g} ms" if store.startswith("s3://") else "folder",
            f"{total} ({', '.join(f'{count} {name}' for name, count in operations.most_common())})",
            f"{seconds:.1f}",
            f"{total * delay / 1000:.1f}",
        )


def main() -> None:
    """Print a table: a folder, then the bucket with each delay."""
    delays = [float(word) for word in sys.argv[1:]] or [0.0, 30.0]
    folder = Path(tempfile.mkdtemp())
    os.environ |= {"PREFECT_HOME": str(folder / "prefect"), "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    base = build_phi3(folder / "base", dtype="float32")
    from prefect.testing.utilities import prefect_test_harness

    with (
        object_server.running(folder / "server") as server,
        s3_proxy.running(server.url) as proxy,
        prefect_test_harness(server_startup_timeout=300),
    ):
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.url
        print_row(*COLUMNS)
        for store, store_delays in ((".loraflow/store", [0.0]), (server.new_store_uri(), delays)):
            project = build_project(folder / f"project {len(store)}", base, store)
            measure(store, project, proxy, store_delays)


if __name__ == "__main__":
    main()
