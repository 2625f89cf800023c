"""Take the pictures of docs/tutorial, of the tutorial's project, in a browser in front of `loraflow up`.

python docs/site/pictures.py FOLDER        FOLDER is the one of docs/tutorial/write.py, which has to be run first

Needs the extra `ui` and chromium (another one: CHROMIUM=path). A run is started from the form, so the first call takes
as long as a short training; a later one finds its stages cached. `loraflow` must be on PATH.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent.parent / "tutorial"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SIDEBAR = 256  # CSS pixels of Prefect's UI that are left out
WIDTH = 1024 + SIDEBAR  # CSS pixels; the pages of the site show them at about this size
LARGEST = 150_000  # bytes of a picture
MINUTES = 40  # that the run may take on a busy machine
TERMINAL = (
    "font: 14px/1.45 monospace; color: #e6e6e6; background: #1e1e1e; padding: 16px; margin: 0; white-space: pre-wrap"
)


class Server:
    """Prefect's server under `loraflow up`, and its API."""

    def __init__(self, project: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log = project.parent / "up.log"
        env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["loraflow", "up", "--port", self.url.rpartition(":")[2]], cwd=project, stdout=log, stderr=log, env=env
            )

    def wait(self) -> None:
        """Wait until the deployments and the worker are there.

        Raises:
            SystemExit: `loraflow up` ended.
        """
        while "Ctrl-C stops" not in self.log.read_text(encoding="utf-8"):
            if self.process.poll() is not None:
                sys.exit(self.log.read_text(encoding="utf-8"))
            time.sleep(0.5)

    def read(self, path: str, body: object = None) -> Any:
        """Call Prefect's API: GET, or POST with a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, {"content-type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs that a person started, newest first."""
        found = self.read("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 50})
        return [run for run in found if not run["auto_scheduled"]]

    def wait_for_run(self, before: set[str]) -> dict[str, Any]:
        """Return the run that is not one of those before, when it has ended.

        Raises:
            SystemExit: it failed, or took too long.
        """
        for _ in range(MINUTES * 60):
            run: dict[str, Any] = next((run for run in self.runs() if run["id"] not in before), {})
            if run and run["state"]["type"] == "COMPLETED":
                return run
            if run and run["state"]["type"] in {"FAILED", "CRASHED", "CANCELLED"}:
                break
            time.sleep(1)
        sys.exit(f"the run did not complete: {run.get('state')}")


@contextmanager
def served(project: Path) -> Iterator[Server]:
    """Run `loraflow up` in a project."""
    server = Server(project)
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()  # a background job of a shell ignores SIGINT, and so would `loraflow up`
        server.process.wait(120)


def keep(page: Page, name: str, height: int, *, top: str | None = None, left: int = 0) -> None:
    """Write the visible part of a page, right of `left`; with `top`, from the heading of that name on.

    Raises:
        SystemExit: the file is too large for the repository.
    """
    page.set_viewport_size({"width": WIDTH, "height": height})
    if top is not None:
        heading = page.get_by_role("heading", name=top, exact=True).first
        heading.evaluate("heading => heading.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(700)  # animations of the UI
    file = IMAGES / f"{name}.png"
    clip = {"x": left, "y": 0, "width": WIDTH - left, "height": height}
    page.screenshot(path=file, animations="disabled", clip=clip)
    print(f"{file.name}  {file.stat().st_size / 1000:.0f} kB")
    if file.stat().st_size > LARGEST:
        sys.exit(f"{file} has {file.stat().st_size} bytes; {LARGEST} are allowed")


def terminal(page: Page, project: Path, command: str, name: str) -> None:
    """Write a picture of a command and its output."""
    done = subprocess.run(command, shell=True, cwd=project, text=True, check=True, capture_output=True)
    page.set_content(f'<body style="margin:0"><pre style="{TERMINAL}">$ {escape(command)}\n{escape(done.stdout)}</pre>')
    keep(page, name, round(page.locator("pre").bounding_box()["height"]))


def take(page: Page, server: Server, project: Path) -> None:
    """Start a run from the form, and take a picture of every page that a person sees then."""
    deployment = server.read("/deployments/name/finetune/tickets")["id"]
    page.goto(f"{server.url}/v2/deployments/deployment/{deployment}/run")
    page.get_by_label("Epochs").fill("1")
    page.get_by_label("Learning rate").fill("5e-4")
    keep(page, "form", 900, left=SIDEBAR)
    before = {run["id"] for run in server.runs()}
    page.get_by_role("button", name="Submit").click()
    run = server.wait_for_run(before)
    page.goto(f"{server.url}/v2/runs/flow-run/{run['id']}")
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("evaluate tuned").first.wait_for()
    keep(page, "run", 800, left=SIDEBAR)
    reports = {"artifacts": {"key": {"any_": ["tickets-report"]}}}
    [report] = server.read("/artifacts/latest/filter", reports)
    page.goto(f"{server.url}/v2/artifacts/artifact/{report['latest_id']}")
    page.get_by_alt_text("training loss").wait_for()
    keep(page, "report", 900, left=SIDEBAR)
    keep(page, "report-answers", 700, top="Sample answers", left=SIDEBAR)
    keep(page, "report-rows", 900, top="Rows", left=SIDEBAR)
    terminal(page, project, "loraflow data show configs/tickets.yaml", "data-show")
    comparison = project.parent / "comparison.html"
    command = ["loraflow", "compare", "champion", run["id"], "--html", str(comparison)]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
    page.goto(comparison.as_uri())
    keep(page, "compare", 900)


def main() -> None:
    """Take all pictures."""
    project = Path(sys.argv[1]).absolute() / "tickets"
    with sync_playwright() as playwright, served(project) as server:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.set_default_timeout(60_000)
        take(page, server, project)
        browser.close()


if __name__ == "__main__":
    main()
