"""Write docs/tutorial/index.md: run the tutorial's commands in a new folder, and put their output under them.

python docs/tutorial/write.py FOLDER        `loraflow` must be on PATH, with the bundled base; about ten minutes on two cores

FOLDER is created. An interrupted call resumes where it stopped: outputs of finished commands are in FOLDER/outputs.json,
and finished stages are cached. A line with a single … stands for lines of an output that the text leaves out.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "index.md"
TEXT = Path(__file__).parent / "text.md"
RUNS = re.compile(r"^\{\{ (?P<command>.+?)(?: \| lines (?P<first>\d+)-(?P<last>\d+))? \}\}$", re.MULTILINE)
QUESTIONS = {
    "delivery": ["Where is my {p}?", "My {p} has not arrived.", "The parcel with the {p} is late."],
    "refund": ["I want my money back for the {p}.", "Please refund the {p}.", "You charged me twice for the {p}."],
    "damage": ["The {p} came broken.", "My {p} has a crack.", "The {p} stopped working after a day."],
}
PRODUCTS = ("kettle", "lamp", "jacket", "tent", "bike", "radio", "chair", "scarf", "mixer", "camera", "desk", "watch")
ENDS = ["", " Please help.", " What now?", " Thank you.", " This is the second time I write."]


def write_csv(file: Path, rows: int = 180) -> None:
    """Write questions of customers with their category, none twice."""
    chosen = random.Random(1)
    every = [
        (question.format(p=product) + end, category)
        for category, questions in QUESTIONS.items()
        for question in questions
        for product in PRODUCTS
        for end in ENDS
    ]
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["text", "category"])
        table.writerows(chosen.sample(every, rows))


def output_of(command: str, folder: Path) -> str:
    """Run a command in the folder; return what it prints, without the folder's own path.

    Raises:
        SystemExit: the command failed.
    """
    memo = folder.parent / "outputs.json"
    known = json.loads(memo.read_text(encoding="utf-8")) if memo.exists() else {}
    if command in known:
        return str(known[command])
    print(f"$ {command}", file=sys.stderr)
    env = {**os.environ, "COLUMNS": "110", "PREFECT_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}")
    output = done.stdout.replace(str(folder), "~/tickets").rstrip()
    memo.write_text(json.dumps({**known, command: output}, ensure_ascii=False, indent=1), encoding="utf-8")
    return output


def page(folder: Path) -> str:
    """Return the text, with each command run and its output below it."""

    def run(found: re.Match[str]) -> str:
        lines = output_of(found["command"], folder).splitlines()
        if found["first"]:
            first, last = int(found["first"]) - 1, int(found["last"])
            lines = [*(["…"] if first else []), *lines[first:last], *(["…"] if last < len(lines) else [])]
        return "\n".join(["```", f"$ {found['command']}", *(line.rstrip() for line in lines), "```"])

    return RUNS.sub(run, TEXT.read_text(encoding="utf-8"))


def main() -> None:
    """Write the page."""
    folder = Path(sys.argv[1]).absolute() / "tickets"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tickets.csv").exists():
        write_csv(folder / "tickets.csv")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
    PAGE.write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
