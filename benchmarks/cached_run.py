"""A run in which every stage is cached, against an empty Prefect flow with as many cached tasks; `plan` and `--help`.

python benchmarks/cached_run.py RECIPE      after `loraflow run RECIPE`; starts a server of its own
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from measure import measure_median, print_row

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


def main() -> None:
    """Print the table: whole processes, medians of five."""
    recipe = sys.argv[1]
    with tempfile.TemporaryDirectory() as home:
        env = {"PREFECT_HOME": home, "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api", "PREFECT_LOGGING_LEVEL": "WARNING",
               "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}  # fmt: skip
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
            loraflow = [sys.executable, "-c", "from loraflow.cli import main; main()"]
            commands = {
                "empty flow, 14 cached tasks": [sys.executable, str(script)],
                "loraflow run, all cached": [*loraflow, "run", recipe, "-q", "--json"],
                "loraflow plan": [*loraflow, "plan", recipe],
                "loraflow --help": [*loraflow, "--help"],
            }
            found = {}
            print_row("what", "seconds", "peak MiB")
            for name, command in commands.items():
                measure_median(command, 1, env)  # warm: the first run fills Prefect's cache
                found[name], memory = measure_median(command, 5, env)
                print_row(name, found[name], memory)
            print_row("run / empty flow", found["loraflow run, all cached"] / found["empty flow, 14 cached tasks"])
        finally:
            os.killpg(server.pid, 15)
            server.wait()


if __name__ == "__main__":
    main()
