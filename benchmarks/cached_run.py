"""A run in which every stage is cached, against an empty Prefect flow with as many cached tasks; `plan` and `--help`.

The two run in turns, so that other work on the machine slows both. The ratio is the median over the pairs.

python benchmarks/cached_run.py RECIPE      after `loraflow run RECIPE`; starts a server of its own
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from measure import measure_command, measure_median, print_row

EMPTY = """
from prefect import flow, task
from prefect.cache_policies import INPUTS
@task(cache_policy=INPUTS, result_serializer="json")
def nothing(i: int) -> int:
    return i
@flow
def empty() -> None:
    for i in range(14):
        nothing(i)
empty()
"""
PORT = 4291
PAIRS = 7


def main() -> None:
    """Print the table: whole processes, medians."""
    recipe = sys.argv[1]
    with tempfile.TemporaryDirectory() as home:
        env = {"PREFECT_HOME": home, "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api", "PREFECT_LOGGING_LEVEL": "WARNING",
               "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1",
               # empty is unset: else loraflow would be compiled in each run, and installed prefect would not
               "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(PORT), "--no-ui"],
            env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            script = Path(home, "empty.py")
            script.write_text(EMPTY)
            empty = [sys.executable, str(script)]
            loraflow = [sys.executable, "-c", "from loraflow.cli import main; main()"]
            run = [*loraflow, "run", recipe, "-q", "--json"]
            for command in (empty, run):  # warm: the first run fills Prefect's cache
                measure_command(command, env)
            pairs = [(measure_command(empty, env), measure_command(run, env)) for _ in range(PAIRS)]
            print_row("what", "seconds", "peak MiB")
            for name, side in (("empty flow, 14 cached tasks", 0), ("loraflow run, all cached", 1)):
                seconds, memory = zip(*(pair[side] for pair in pairs), strict=True)
                print_row(name, statistics.median(seconds), max(memory))
            for name, arguments in {"loraflow plan": ["plan", recipe], "loraflow --help": ["--help"]}.items():
                print_row(name, *measure_median([*loraflow, *arguments], PAIRS, env))
            ratios = [ran[0] / idle[0] for idle, ran in pairs]
            print_row("run / empty flow, median of the pairs", statistics.median(ratios))
            print_row("lowest and highest pair", min(ratios), max(ratios))
        finally:
            os.killpg(server.pid, 15)
            server.wait()


if __name__ == "__main__":
    main()
