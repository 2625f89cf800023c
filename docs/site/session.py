"""Record a terminal session in the tutorial's project as docs/tutorial/session.cast (asciinema v2; `asciinema play FILE`).

python docs/site/session.py FOLDER        FOLDER is the one of docs/tutorial/write.py, which has to be run first

The commands are really run, in a terminal of their own. A pause is cut to PAUSE seconds, so that minutes of training
take seconds to watch. The folder's own path is replaced.
"""

from __future__ import annotations

import json
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

CAST = Path(__file__).parent.parent / "tutorial" / "session.cast"
COLUMNS, ROWS = 110, 32
PAUSE = 1.5  # seconds, the longest without output
KEY = 0.04  # seconds between two letters that are typed
COMMANDS = [
    "loraflow plan configs/tickets.yaml --set training_config.max_steps=12",
    "loraflow run configs/tickets.yaml --set training_config.max_steps=12 --quiet",
    "loraflow show champion",
]


def output_of(command: str, folder: Path) -> Iterator[tuple[float, str]]:
    """Run a command in a terminal; yield what it prints, with the seconds since its start.

    Raises:
        SystemExit: the command failed.
    """
    started = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(
            "sh", ["sh", "-c", command], {**os.environ, "TERM": "xterm-256color", "PREFECT_LOGGING_LEVEL": "WARNING"}
        )
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    pending = b""
    while True:
        select.select([terminal], [], [])
        try:
            pending += os.read(terminal, 65536)
        except OSError:  # EIO: the command has closed its terminal
            break
        text = pending.decode("utf-8", "ignore")  # a character may be cut off at the end
        pending = pending[len(text.encode()) :]
        yield time.monotonic() - started, text
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"{command} ended with {status}")


def events(folder: Path) -> Iterator[tuple[float, str]]:
    """Yield the output of the session, with the seconds since its start as a viewer sees them."""
    now = 0.5
    for command in COMMANDS:
        yield now, "\x1b[1;32m$\x1b[0m "
        for letter in command:
            now += KEY
            yield now, letter
        now += 0.5
        yield now, "\r\n"
        before = 0.0
        for seconds, text in output_of(command, folder):
            now += min(seconds - before, PAUSE)
            before = seconds
            yield now, text.replace(str(folder), "~/tickets")
        now += PAUSE
    yield now, "\x1b[1;32m$\x1b[0m "


def main() -> None:
    """Write the recording."""
    folder = Path(sys.argv[1]).absolute() / "tickets"
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "loraflow", "env": {"TERM": "xterm-256color"}}
    lines = [header, *([round(seconds, 3), "o", text] for seconds, text in events(folder))]
    CAST.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{CAST.name}  {CAST.stat().st_size / 1000:.0f} kB, {lines[-1][0]:.0f} s")


if __name__ == "__main__":
    main()
