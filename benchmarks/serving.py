"""Eight chat requests at once to `loraflow serve`, with and without continuous batching, in turns.

python -m benchmarks.serving FOLDER        # a merged model's folder
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REQUESTS, TOKENS = 8, 48


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(port: int, number: int) -> int:
    """Send one request; return the number of tokens of its answer."""
    messages = [{"role": "user", "content": f"Count to {number + 10} and explain why."}]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": TOKENS}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return int(json.loads(answer.read())["usage"]["completion_tokens"])


def _seconds(port: int) -> tuple[float, int]:
    """Return the time of all requests at once, and the tokens of their answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as threads:
        tokens = sum(threads.map(lambda number: _ask(port, number), range(REQUESTS)))
    return time.perf_counter() - started, tokens


def _start(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    port = _free_port()
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "serve", str(folder), "--name", "m"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                _ask(port, 0)  # loads and warms up
                return process, port
        time.sleep(0.5)
    raise SystemExit("the server did not start")


def main() -> None:
    """Print the median time of each, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    servers = {
        "together": _start(arguments.folder.absolute()),
        "one by one": _start(arguments.folder.absolute(), "--no-continuous-batching"),
    }
    times: dict[str, list[float]] = {name: [] for name in servers}
    tokens: dict[str, int] = {}
    try:
        for _ in range(arguments.rounds):
            for name, (_, port) in servers.items():
                seconds, tokens[name] = _seconds(port)
                times[name].append(seconds)
    finally:
        for process, _ in servers.values():
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:12} {seconds:6.2f} s for {REQUESTS} requests, {tokens[name]} tokens")
    ratio = medians["one by one"] / medians["together"]
    print(f"{ratio:.1f} x as fast, on {os.cpu_count()} cores, median of {arguments.rounds} rounds in turns")


if __name__ == "__main__":
    main()
