"""Ctrl-C goes to the whole process group of a terminal: the run says one sentence, and a second one stops at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # the test process may have been started with SIGINT ignored
from loraflow.cli import stop_at_second_interrupt
stop_at_second_interrupt()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("first", flush=True)
    time.sleep({rest})
"""


def interruptible(rest: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(rest=rest)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    return process


def test_a_second_interrupt_stops_at_once():
    process = interruptible(rest=60)
    time.sleep(1.2)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 130 and printed.strip().startswith("stopped at once")


def test_an_interrupt_that_is_sent_twice_counts_once():
    process = interruptible(rest=2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_to_the_group_ends_a_run_with_one_sentence(recipe, tmp_path, number, code, says):
    """The temporary server is in a session of its own, so Prefect can report the end and prints no ConnectError."""
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(recipe)],
            env={**env, "PREFECT_HOME": str(tmp_path / "home")}, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + 240
    while "resolve_base runs" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == code
    printed = log.read_text()
    assert printed.count(says) == 1 and "Traceback" not in printed and "ConnectError" not in printed, printed
