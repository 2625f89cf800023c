"""What a person does in Prefect's UI: fill the form, run, watch, open the report, cancel, pause a schedule.

make test-ui      with LORAFLOW_SCREENSHOTS=folder it also keeps pictures
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ui, pytest.mark.timeout(900)]


def picture(page, name: str, **options) -> None:
    if folder := os.environ.get("LORAFLOW_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", **options)


def open_form(page, site, name: str = "finetune/local") -> None:
    page.goto(f"{site.url}/v2/deployments/deployment/{site.deployment(name)['id']}/run")
    page.get_by_text("What this run does differently.").wait_for()


def menu(page, site, run: str, item: str) -> None:
    page.goto(f"{site.url}/v2/runs/flow-run/{run}")
    page.locator("button:has(svg.lucide-ellipsis-vertical)").first.click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def test_a_person_fills_the_form_watches_the_run_and_opens_the_report(page, site):
    open_form(page, site)
    page.get_by_label("LoRA rank").fill("0")
    page.get_by_role("button", name="Submit").click()
    time.sleep(2)
    assert site.runs() == [], "a wrong value is refused before anything runs"
    page.get_by_label("LoRA rank").fill("2")
    page.get_by_label("LoRA alpha").fill("4")
    page.get_by_label("Learning rate").fill("2e-2")
    picture(page, "form")
    page.get_by_role("button", name="Submit").click()
    for _ in range(100):
        if runs := site.runs():
            break
        time.sleep(0.2)
    (run,) = [one["id"] for one in runs]
    found = site.wait(run, "RUNNING")
    assert found["parameters"]["overrides"] == {"rank": 2, "alpha": 4, "learning_rate": "2e-2"}
    page.goto(f"{site.url}/v2/runs/flow-run/{run}")
    page.get_by_text("Running", exact=True).first.wait_for()
    site.wait(run, "COMPLETED")
    page.get_by_text("Completed", exact=True).first.wait_for()
    name = site.api("GET", f"/flow_runs/{run}")["name"]
    assert name.split()[0] == "tiny" and [len(part) for part in name.split()[1:]] == [8, 8]
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("evaluate tuned").first.wait_for()
    picture(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("train-progress").wait_for()
    assert "tokens/s" in page.get_by_text("train 6/6").inner_text()
    for ui in ("/v2", ""):  # both UIs
        (report,) = site.api("POST", "/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["tiny-report"]}}})
        page.goto(f"{site.url}{ui}/artifacts/artifact/{report['latest_id']}")
        curve = page.get_by_alt_text("training loss")
        curve.wait_for()
        assert curve.evaluate("image => image.naturalWidth") == 640
        picture(page, f"report{ui.replace('/', '-')}", full_page=True)


def test_a_run_that_is_cancelled_leaves_no_process(page, site):
    run = site.start("finetune/local", settings={"training_config.max_steps": 4000, "training_config.seed": 5})
    site.wait_for_step(3)
    assert site.workers() != []
    menu(page, site, run, "Cancel")
    page.get_by_role("button", name="Cancel").last.click()
    site.wait(run, "CANCELLED", seconds=90)
    for _ in range(300):
        if not site.workers():
            break
        time.sleep(0.1)
    assert site.workers() == []


def test_a_schedule_is_paused_by_its_switch(page, site):
    page.goto(f"{site.url}/v2/deployments/deployment/{site.deployment('retrain/nightly')['id']}")
    switch = page.get_by_role("switch").first
    switch.wait_for()
    assert site.deployment("retrain/nightly")["schedules"][0]["active"]
    switch.click()
    for _ in range(50):
        if not site.deployment("retrain/nightly")["schedules"][0]["active"]:
            break
        time.sleep(0.2)
    assert not site.deployment("retrain/nightly")["schedules"][0]["active"]
