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

from tests.local_deployment import ENDED

pytestmark = [pytest.mark.ui, pytest.mark.timeout(900)]


def picture(page, name: str, **options) -> None:
    if folder := os.environ.get("LORAFLOW_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", **options)


def open_form(page, deployment, name: str = "finetune/local") -> None:
    page.goto(f"{deployment.url}/v2/deployments/deployment/{deployment.read_deployment(name)['id']}/run")
    page.get_by_text("Changes to the recipe, for this run only.").wait_for()


def write_settings(page, text: str) -> None:
    """Write into the JSON editor of `settings`, whose schema refers to itself."""
    page.locator(".cm-content, .p-code-input__textarea").fill(text)


def menu(page, deployment, run: str, item: str) -> None:
    page.goto(f"{deployment.url}/v2/runs/flow-run/{run}")
    page.locator("button:has(svg.lucide-ellipsis-vertical)").first.click()
    page.get_by_role("menuitem", name=item, exact=True).click()


def stages(deployment, run: str, *names: str) -> dict[str, dict]:
    """Return the newest task run of each stage; wait for these, since the server records them after the run has ended."""
    query = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
    for _ in range(300):
        found = {row["name"]: row for row in deployment.api("POST", "/task_runs/filter", query)}
        if all(name in found and found[name]["state"]["type"] in ENDED for name in names):
            return found
        time.sleep(0.2)
    raise AssertionError(f"the server has no ended task runs {names}: {found}")


def figures(deployment, fingerprint_glob: str = "*") -> list[dict]:
    files = (deployment.folder / ".loraflow" / "store" / "train").glob(f"{fingerprint_glob}/*/manifest.json")
    return [json.loads(file.read_text())["figures"] for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def test_a_run_is_started_from_the_form_and_its_report_opens(page, deployment):
    open_form(page, deployment)
    page.get_by_label("LoRA rank").fill("0")
    page.get_by_role("button", name="Submit").click()
    time.sleep(2)
    assert deployment.runs() == [], "a wrong value is refused before anything runs"
    page.get_by_label("LoRA rank").fill("2")
    page.get_by_label("LoRA alpha").fill("4")
    page.get_by_label("Learning rate").fill("2e-2")
    write_settings(page, '{"evaluation.max_rows": 3}')
    picture(page, "form")
    page.get_by_role("button", name="Submit").click()
    for _ in range(100):
        if runs := deployment.runs():
            break
        time.sleep(0.2)
    (run,) = [found["id"] for found in runs]
    found = deployment.wait(run, "RUNNING")
    assert found["parameters"]["overrides"] == {"rank": 2, "alpha": 4, "learning_rate": "2e-2"}
    assert found["parameters"]["settings"] == {"evaluation.max_rows": 3}
    page.goto(f"{deployment.url}/v2/runs/flow-run/{run}")
    page.get_by_text("Running", exact=True).first.wait_for()
    deployment.wait(run, "COMPLETED")
    page.get_by_text("Completed", exact=True).first.wait_for()
    name = deployment.api("GET", f"/flow_runs/{run}")["name"]
    assert name.split()[0] == "tiny" and [len(part) for part in name.split()[1:]] == [8, 8]
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("evaluate tuned").first.wait_for()
    picture(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("train-progress").wait_for()
    assert "tokens/s" in page.get_by_text("train 6/6").inner_text()
    for ui in ("/v2", ""):  # both UIs
        (report,) = deployment.api(
            "POST", "/artifacts/latest/filter", {"artifacts": {"key": {"any_": ["tiny-report"]}}}
        )
        page.goto(f"{deployment.url}{ui}/artifacts/artifact/{report['latest_id']}")
        curve = page.get_by_alt_text("training loss")
        curve.wait_for()
        assert curve.evaluate("image => image.naturalWidth") == 640
        picture(page, f"report{ui.replace('/', '-')}", full_page=True)


@pytest.mark.parametrize("ui", ["/v2", ""])
def test_settings_with_credentials_are_refused_in_the_form(page, deployment, ui):
    number = len(deployment.runs())
    page.goto(f"{deployment.url}{ui}/deployments/deployment/{deployment.read_deployment('finetune/local')['id']}/run")
    page.get_by_text("Changes to the recipe, for this run only.").wait_for()
    write_settings(page, '{"data.repo": "https://me:s3cret-passw0rd@host/x.git"}')
    with page.expect_response(lambda answer: answer.request.url.endswith("/create_flow_run")) as answer:
        page.get_by_role("button", name="Submit").click()
    assert answer.value.status == 409 and "s3cret" not in answer.value.text()
    page.get_by_text("without a password or token").first.wait_for()
    picture(page, f"refused{ui.replace('/', '-')}")
    assert len(deployment.runs()) == number


def test_a_run_with_nothing_new_is_up_to_date_and_stages_are_cached(page, deployment):
    deployment.wait(deployment.start("finetune/local"))
    retrained = deployment.wait(deployment.start("retrain/nightly"))
    assert retrained["state"]["name"] == "UpToDate" and "Every stage is cached" in retrained["state"]["message"]
    page.goto(f"{deployment.url}/v2/runs/flow-run/{retrained['id']}")
    page.get_by_text("UpToDate").first.wait_for()
    picture(page, "up-to-date")
    again = deployment.wait(deployment.start("finetune/local"))["id"]
    found = stages(deployment, again, "train", "merge")
    assert {found[name]["state"]["name"] for name in ("train", "merge")} == {"Cached"}
    page.goto(f"{deployment.url}/v2/runs/flow-run/{again}")
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("Cached").first.wait_for()
    picture(page, "cached")


def test_a_cancelled_run_leaves_no_process(page, deployment):
    run = deployment.start("finetune/local", settings={"training_config.max_steps": 4000, "training_config.seed": 5})
    deployment.wait_for_step(3)
    assert deployment.workers() != []
    menu(page, deployment, run, "Cancel")
    page.get_by_role("button", name="Cancel").last.click()
    deployment.wait(run, "CANCELLED", seconds=90)
    for _ in range(300):
        if not deployment.workers():
            break
        time.sleep(0.1)
    assert deployment.workers() == []


def test_retry_resumes_the_failed_stage_from_its_checkpoint(page, deployment):
    more = {"training_config.max_steps": 120, "training_config.save_steps": 5, "training_config.seed": 6}
    run = deployment.start("finetune/local", settings=more)
    deployment.wait_for_step(8)
    os.kill(
        deployment.workers()[0], signal.SIGABRT
    )  # what a crash in native code looks like; Prefect does not retry that
    failed = deployment.wait(run, "FAILED")
    assert "worker ended without an outcome" in failed["state"]["message"]
    menu(page, deployment, run, "Retry")
    page.get_by_role("button", name="Retry").last.click()
    deployment.wait(run, "SCHEDULED", "PENDING", "RUNNING", seconds=60)
    deployment.wait(run, "COMPLETED")
    assert stages(deployment, run, "tokenize")["tokenize"]["state"]["name"] == "Cached"
    assert figures(deployment)[-1]["resumed_at"] >= 5 and figures(deployment)[-1]["steps"] == 120


@pytest.mark.parametrize("ui", ["new", "classic"])
def test_a_promotion_is_approved_in_the_form(page, deployment, ui):
    settings = {"training_config.max_steps": 9, "register.model": f"asked-{ui}"}
    run = deployment.start("finetune/local", approval=True, settings=settings)
    found = deployment.wait(run, "PAUSED", "COMPLETED")
    if found["state"]["type"] == "COMPLETED":
        pytest.fail(f"the gate did not promote: {found['state']}")
    assert found["state"]["name"] == "Suspended" and deployment.workers() == []
    if ui == "new":
        menu(page, deployment, run, "Resume")
    else:
        page.goto(f"{deployment.url}/runs/flow-run/{run}")
        page.get_by_role("button", name="Resume").first.click()
    page.get_by_text("promote?").wait_for()
    picture(page, f"approval-{ui}")
    page.get_by_role("switch").last.click()
    page.locator("textarea").last.fill("answers are better")
    picture(page, f"approval-{ui}-filled")
    page.get_by_role("button", name="Resume" if ui == "new" else "Submit").last.click()
    deployment.wait(run, "SCHEDULED", "PENDING", "RUNNING", seconds=60)
    deployment.wait(run, "COMPLETED")
    log = sorted((deployment.folder / ".loraflow" / "store" / "registry" / f"asked-{ui}" / "log").glob("*.json"))[-1]
    assert "approved by hand: answers are better" in json.loads(log.read_text())["reasons"]


def test_the_switch_pauses_a_schedule(page, deployment):
    page.goto(f"{deployment.url}/v2/deployments/deployment/{deployment.read_deployment('retrain/nightly')['id']}")
    switch = page.get_by_role("switch").first
    switch.wait_for()
    assert deployment.read_deployment("retrain/nightly")["schedules"][0]["active"]
    switch.click()
    for _ in range(50):
        if not deployment.read_deployment("retrain/nightly")["schedules"][0]["active"]:
            break
        time.sleep(0.2)
    assert not deployment.read_deployment("retrain/nightly")["schedules"][0]["active"]
