"""What a person does in Prefect's UI: fill the form, run, watch, open the report, cancel, retry, approve, pause a schedule.

make test-ui      with LORAFLOW_SCREENSHOTS=folder it also keeps pictures
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ui, pytest.mark.timeout(900)]


def picture(page, name: str, **options) -> None:
    if folder := os.environ.get("LORAFLOW_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", **options)


def open_form(page, site, name: str = "finetune/local") -> None:
    page.goto(f"{site.url}/v2/deployments/deployment/{site.deployment(name)['id']}/run")
    page.get_by_text("Changes to the recipe, for this run only.").wait_for()


def menu(page, site, run: str, item: str) -> None:
    page.goto(f"{site.url}/v2/runs/flow-run/{run}")
    page.locator("button:has(svg.lucide-ellipsis-vertical)").first.click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def stages(site, run: str) -> dict[str, dict]:
    """Return the newest task run of each stage."""
    rows = site.api(
        "POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
    )
    return {row["name"]: row for row in rows}


def figures(site, fingerprint_glob: str = "*") -> list[dict]:
    files = (site.folder / ".loraflow" / "store" / "train").glob(f"{fingerprint_glob}/*/manifest.json")
    return [json.loads(file.read_text())["figures"] for file in sorted(files, key=lambda file: file.stat().st_mtime)]


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


def test_a_run_with_nothing_new_is_up_to_date_and_stages_are_cached(page, site):
    site.wait(site.start("finetune/local"))
    retrained = site.wait(site.start("retrain/nightly"))
    assert retrained["state"]["name"] == "UpToDate" and "Every stage is cached" in retrained["state"]["message"]
    page.goto(f"{site.url}/v2/runs/flow-run/{retrained['id']}")
    page.get_by_text("UpToDate").first.wait_for()
    picture(page, "up-to-date")
    again = site.wait(site.start("finetune/local"))["id"]
    assert {row["state"]["name"] for name, row in stages(site, again).items() if name in ("train", "merge")} == {
        "Cached"
    }
    page.goto(f"{site.url}/v2/runs/flow-run/{again}")
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("Cached").first.wait_for()
    picture(page, "cached")


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


def test_retry_goes_on_from_the_failed_stage_and_its_checkpoint(page, site):
    more = {"training_config.max_steps": 120, "training_config.save_steps": 5, "training_config.seed": 6}
    run = site.start("finetune/local", settings=more)
    site.wait_for_step(8)
    os.kill(site.workers()[0], signal.SIGABRT)  # what a crash in native code looks like; Prefect does not retry that
    failed = site.wait(run, "FAILED")
    assert "worker ended without an outcome" in failed["state"]["message"]
    menu(page, site, run, "Retry")
    page.get_by_role("button", name="Retry").last.click()
    site.wait(run, "SCHEDULED", "PENDING", "RUNNING", seconds=60)
    site.wait(run, "COMPLETED")
    assert stages(site, run)["tokenize"]["state"]["name"] == "Cached"
    assert figures(site)[-1]["resumed_at"] >= 5 and figures(site)[-1]["steps"] == 120


@pytest.mark.parametrize("ui", ["new", "classic"])
def test_a_person_approves_a_promotion_in_the_form(page, site, ui):
    settings = {"training_config.max_steps": 9, "register.model": f"asked-{ui}"}
    run = site.start("finetune/local", approval=True, settings=settings)
    found = site.wait(run, "PAUSED", "COMPLETED")
    if found["state"]["type"] == "COMPLETED":
        pytest.fail(f"the gate did not promote: {found['state']}")
    assert found["state"]["name"] == "Suspended" and site.workers() == []
    if ui == "new":
        menu(page, site, run, "Resume")
    else:
        page.goto(f"{site.url}/runs/flow-run/{run}")
        page.get_by_role("button", name="Resume").first.click()
    page.get_by_text("promote?").wait_for()
    picture(page, f"approval-{ui}")
    page.get_by_role("switch").last.click()
    page.locator("textarea").last.fill("answers are better")
    picture(page, f"approval-{ui}-filled")
    page.get_by_role("button", name="Resume" if ui == "new" else "Submit").last.click()
    site.wait(run, "SCHEDULED", "PENDING", "RUNNING", seconds=60)
    site.wait(run, "COMPLETED")
    log = sorted((site.folder / ".loraflow" / "store" / "registry" / f"asked-{ui}" / "log").glob("*.json"))[-1]
    assert "approved by hand: answers are better" in json.loads(log.read_text())["reasons"]


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
