"""Deployments on a real server: twice changes nothing, and what people did in the UI stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.schemas.actions import (
    DeploymentUpdate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL

from loraflow.config.project import PROJECT_ID
from loraflow.failures import BadConfig, Network

ONLY = ["finetune/local", "finetune/gpu", "retrain/nightly", "retrain/on-dataset-update", "evaluate/local"]
ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "prefect.yaml"


@pytest.fixture
def put(client):
    from loraflow.flows.server.automations import Notifications
    from loraflow.flows.server.deployments import Deployer
    from loraflow.flows.server.prefect_yaml import read_all

    def put(changes: dict[str, dict] | None = None, **notifications) -> list[str]:
        """Deploy prefect.yaml with changed fields: {deployment: {field: value}}."""
        specs = [spec.model_copy(update=(changes or {}).get(spec.full_name, {})) for spec in read_all(FILE, ONLY)[0]]
        return Deployer(client).deploy_all(specs, Notifications(**notifications))

    return put


def test_deploying_twice_changes_nothing_and_differences_are_reported(put, client):
    put()
    assert put() == []
    assert put({"finetune/local": {"parameters": {"recipe": "phi3-mini"}}}) == [
        "deployment finetune/local updated: parameters"
    ]
    assert client.read_deployment_by_name("finetune/local").parameters == {"recipe": "phi3-mini"}
    assert put() == ["deployment finetune/local updated: parameters"]


def test_an_updated_schedule_stays_paused_and_an_updated_trigger_stays_disabled(put, client):
    from loraflow.flows.server.prefect_yaml import read_all

    put()
    nightly = client.read_deployment_by_name("retrain/nightly")
    client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=False)
    trigger = client.read_automations_by_name("retrain on a new dataset")[0]
    client.pause_automation(trigger.id)
    specs = {spec.full_name: spec for spec in read_all(FILE, ONLY)[0]}
    schedule = specs["retrain/nightly"].schedules[0].model_copy(update={"cron": "30 3 * * *"})
    event = specs["retrain/on-dataset-update"].triggers[0].model_copy(update={"expect": {"another.event"}})
    changes = {"retrain/nightly": {"schedules": [schedule]}, "retrain/on-dataset-update": {"triggers": [event]}}

    assert put() == [], "a pause is no difference"
    assert put(changes) == [
        "deployment retrain/nightly updated: schedule nightly",
        "automation 'retrain on a new dataset' updated",
    ]
    schedule = client.read_deployment_by_name("retrain/nightly").schedules[0]
    assert (schedule.active, schedule.schedule.cron) == (False, "30 3 * * *")
    trigger = client.read_automations_by_name("retrain on a new dataset")[0]
    assert not trigger.enabled and trigger.trigger.expect == {"another.event"}


def test_schedules_of_a_person_stay_and_those_that_prefect_yaml_no_longer_has_are_removed(put, client):
    from loraflow.flows.server.schedules import Schedule

    put()
    nightly = client.read_deployment_by_name("retrain/nightly")
    client.create_deployment_schedules(nightly.id, [(CronSchedule(cron="0 5 * * 1"), True)])
    more = [Schedule(slug="hourly", interval=3600), Schedule(slug="weekly", rrule="FREQ=WEEKLY", active=False)]
    assert put({"retrain/nightly": {"schedules": more}}) == [
        "deployment retrain/nightly updated: schedule hourly created, schedule weekly created, schedule nightly removed"
    ]
    assert put({"retrain/nightly": {"schedules": more}}) == []
    found = {schedule.slug: schedule.active for schedule in client.read_deployment_by_name("retrain/nightly").schedules}
    assert found == {None: True, "hourly": True, "weekly": False}
    assert put({"retrain/nightly": {"schedules": []}})
    [left] = client.read_deployment_by_name("retrain/nightly").schedules
    assert left.schedule.cron == "0 5 * * 1"
    client.delete_deployment_schedule(nightly.id, left.id)


def test_the_deployment_of_another_project_is_not_overwritten(put, client):
    put()
    theirs = [{"loraflow.flows.server.project.enter": {"project": "theirs"}}]
    with pytest.raises(BadConfig, match="finetune/local on this server belongs to another project") as error:
        put({"finetune/local": {"pull_steps": theirs, "parameters": {"recipe": "phi3-mini"}}})
    assert (error.value.expected, error.value.got) == ("the project theirs", "the project loraflow")
    assert put() == []


def test_the_deployment_of_another_project_of_the_same_name_is_not_overwritten(put, client):
    from loraflow.flows.server.deployment_spec import WorkPool

    def pool(key: str) -> dict:
        return {"finetune/local": {"work_pool": WorkPool(name="local", job_variables={"env": {PROJECT_ID: key}})}}

    put()
    assert put(pool("0a")) == ["deployment finetune/local updated: job_variables"], "of an older file, without an id"
    with pytest.raises(BadConfig, match="another project of the same name") as error:
        put({**pool("0b"), "evaluate/local": {"parameters": {"recipe": "phi3-mini"}}})
    assert (error.value.expected, error.value.got) == ("0b", "0a")
    assert put(pool("0a")) == [], "nothing was changed"
    put()


def test_a_changed_queue_or_limit_is_updated(put, client):
    from loraflow.flows.server.deployment_spec import WorkPool

    put()
    old = client.read_deployment_by_name("evaluate/local")
    high = WorkPool(name="local", work_queue_name="high", job_variables=old.job_variables)
    assert put({"evaluate/local": {"work_pool": high, "version": "7"}}) == [
        "deployment evaluate/local updated: version, work_queue_name"
    ]
    assert client.read_deployment_by_name("evaluate/local").work_queue_name == "high"
    assert put() == ["deployment evaluate/local updated: work_queue_name"]


def test_job_variables_that_the_work_pool_would_ignore_are_refused(put, client):
    from loraflow.flows.server.deployment_spec import WorkPool

    put()
    for pool, kind in (("local", "process"), ("a-new-pool", "process"), ("containers", "docker")):
        if pool == "containers":
            template = json.loads((ROOT / "docs" / "deploy" / "docker-pool.json").read_text())
            client.create_work_pool(WorkPoolCreate(name=pool, type="docker", base_job_template=template))
        requested = WorkPool(name=pool, job_variables={"image": "python", "env": {}, "cpus": 2})
        with pytest.raises(BadConfig, match=f"The work pool {pool} has no such job variables") as error:
            put({"evaluate/local": {"work_pool": requested}})
        assert error.value.got == ("cpus" if kind == "docker" else "cpus, image")
        assert f"of a pool of type {kind}" in error.value.expected
    assert put() == []


@pytest.mark.parametrize("closed", [{"is_paused": True}, {"concurrency_limit": 0}])
def test_a_closed_work_pool_stays_closed_and_is_named(put, client, caplog, closed):
    put()
    client.update_work_pool("gpu", WorkPoolUpdate(**closed))
    assert put() == []
    [warning] = [record.message for record in caplog.records if "the work pool gpu" in record.message]
    assert "do not start: prefect work-pool" in warning
    client.update_work_pool("gpu", WorkPoolUpdate(is_paused=False, concurrency_limit=None))


def test_a_stage_that_waits_for_the_gpu_says_so(put, client, caplog, monkeypatch):
    from loraflow.tasks import gpu_lease

    put()
    caplog.set_level("INFO", "loraflow")
    name = gpu_lease.limit_name()
    gpu_lease._log_waiting(client)
    assert not caplog.records
    client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=1))
    gpu_lease._log_waiting(client)
    client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=0, active_slots=0))
    gpu_lease._log_waiting(client)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert f"prefect gcl update {name} --limit 1" in caplog.text
    client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=1))


def test_a_deployment_that_is_not_in_prefect_yaml_any_more_is_named(put, client, caplog):
    from loraflow.flows.server.deployments import Deployer
    from loraflow.flows.server.prefect_yaml import read_all

    put()
    left = [spec for spec in read_all(FILE, ONLY)[0] if spec.full_name != "retrain/nightly"]
    Deployer(client).warn_of_removed_deployments(left)
    [warning] = [record.message for record in caplog.records if "not in prefect.yaml" in record.message]
    assert warning.startswith("deployment retrain/nightly of this project")


def test_a_deployment_that_is_paused_in_the_ui_stays_paused(put, client):
    put()
    nightly = client.read_deployment_by_name("retrain/nightly")
    client.pause_deployment(nightly.id)
    assert put() == [] and put({"retrain/nightly": {"description": "another"}})
    assert client.read_deployment_by_name("retrain/nightly").paused
    client.resume_deployment(nightly.id)
    put()


def test_a_retraining_has_one_run_at_a_time_and_the_second_waits(put, client):
    put()
    deployment = client.read_deployment_by_name("retrain/nightly")
    assert deployment.global_concurrency_limit.limit == 1
    assert deployment.concurrency_options.collision_strategy.value == "ENQUEUE"


def test_the_server_can_schedule_the_nightly_run(put, client):
    """Prefect 3.8 with SQLAlchemy 2.1 cannot: no schedule ever fires, and only the server's log has the error."""
    put()
    nightly = client.read_deployment_by_name("retrain/nightly")
    client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
    client.request("POST", "/deployments/{id}/schedule", path_params={"id": nightly.id}, json={}).raise_for_status()
    ahead = client.request(
        "POST", "/flow_runs/filter", json={"deployments": {"id": {"any_": [str(nightly.id)]}}}
    ).json()
    assert [run["expected_start_time"][11:16] for run in ahead if run["auto_scheduled"]][:1] in (["02:00"], ["03:30"])


def test_an_invalid_parameter_is_refused_before_the_run_starts(put, client):
    from prefect.exceptions import PrefectHTTPStatusError

    put()
    deployment = client.read_deployment_by_name("finetune/local")
    with pytest.raises(PrefectHTTPStatusError, match="0 is less than the minimum of 1"):
        client.create_flow_run_from_deployment(deployment.id, parameters={"overrides": {"rank": 0}})


def test_credentials_in_a_setting_are_refused_before_the_server_stores_them(put, client):
    from prefect.exceptions import PrefectHTTPStatusError

    put()
    deployment = client.read_deployment_by_name("finetune/local")
    settings = {"data.repo": "https://someone:c4nary-0f-16-token@host/data.git"}
    with pytest.raises(PrefectHTTPStatusError, match="a text without a password or token") as caught:
        client.create_flow_run_from_deployment(deployment.id, parameters={"settings": settings})
    assert "c4nary" not in caught.value.response.text
    assert "c4nary" not in client.request("POST", "/flow_runs/filter", json={}).text


def test_notifications_use_existing_blocks(put, client, caplog):
    from prefect.blocks.webhook import Webhook

    Webhook(url="http://127.0.0.1:1/hook").save("ops", overwrite=True)
    put()
    created = put(blocks=["webhook/ops", "slack-webhook/missing"])
    assert [line.split(": ")[1].split(" →")[0] for line in created] == [
        "retraining failed", "challenger rejected", "old champion",
    ]  # fmt: skip
    assert "no notifications to slack-webhook/missing" in caplog.text
    assert put(blocks=["webhook/ops"]) == []
    with pytest.raises(BadConfig, match="named by type and name"):
        put(blocks=["ops"])


@pytest.mark.parametrize(
    ("name", "after", "seconds", "state"),
    [("crashed runs", {"heartbeat"}, 540, "CRASHED"), ("runs that died at once", {"Running"}, 540, "CRASHED"),
     ("runs that did not start", {"Pending", "Submitting", "InfrastructurePending"}, 3600, "CRASHED"),
     ("runs that nobody cancels", {"Cancelling"}, 540, "CANCELLED")],
)  # fmt: skip
def test_automations_end_runs_without_a_heartbeat(put, client, name, after, seconds, state):
    put()
    automation = client.read_automations_by_name(f"loraflow: {name}")[0]
    assert automation.trigger.after == {f"prefect.flow-run.{event}" for event in after}
    assert automation.trigger.within.total_seconds() == seconds and automation.actions[0].state.value == state


def test_exactly_the_deployments_with_the_heartbeat_tag_send_heartbeats():
    from loraflow.flows.server.automations import HEARTBEAT_TAG
    from loraflow.flows.server.prefect_yaml import read_all

    for spec in read_all(FILE)[0]:
        environment = spec.work_pool.job_variables["env"]
        assert ("PREFECT_FLOWS_HEARTBEAT_FREQUENCY" in environment) == (HEARTBEAT_TAG in spec.tags), spec.full_name


def test_a_missing_server_or_deployment_is_reported_with_a_next_step(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from loraflow.flows.server.connection import require_server
    from loraflow.flows.server.prefect_yaml import read_all

    require_server()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), pytest.raises(Network) as error:
        require_server()
    assert "loraflow up" in error.value.next_step
    with pytest.raises(BadConfig, match="no such deployment") as error:
        read_all(FILE, ["finetune/nowhere"])
    assert "finetune/local" in error.value.expected


def test_settings_removed_from_prefect_yaml_are_removed_from_the_deployment(put, client):
    put()
    deployment = client.read_deployment_by_name("finetune/local")
    schema = deployment.parameter_openapi_schema
    schema["properties"]["speed"] = {"type": "integer", "title": "speed"}
    client.update_deployment(
        deployment.id,
        DeploymentUpdate(
            parameters={**deployment.parameters, "approval": True},
            job_variables={"env": {**deployment.job_variables["env"], "OLD": "1"}},
            parameter_openapi_schema=schema,
        ),
    )
    assert put() == ["deployment finetune/local updated: job_variables, parameter_openapi_schema, parameters"]
    updated = client.read_deployment_by_name("finetune/local")
    assert updated.parameters == {"recipe": "quickstart"}
    assert "OLD" not in updated.job_variables["env"] and "speed" not in updated.parameter_openapi_schema["properties"]
    assert put() == []


def test_deployments_with_old_module_names_are_updated(put, client, caplog):
    """Until flows and tasks became parts of loraflow, deployments named `flows.project.enter` and `flows.…`."""
    put()
    names = ["finetune/local", "retrain/nightly", "evaluate/local"]
    for name in names:
        deployment = client.read_deployment_by_name(name)
        old = DeploymentUpdate(
            entrypoint=deployment.entrypoint.removeprefix("loraflow."), pull_steps=[{"flows.project.enter": {}}]
        )
        client.update_deployment(deployment.id, old)
    outside = client.create_deployment(deployment.flow_id, "mine", pull_steps=[{"flows.project.enter": {}}])
    try:
        assert sorted(put()) == sorted(f"deployment {name} updated: entrypoint, pull_steps" for name in names)
    finally:
        client.delete_deployment(outside)
    for name in names:
        deployment = client.read_deployment_by_name(name)
        assert deployment.entrypoint.startswith("loraflow.flows.")
        assert deployment.pull_steps == [{"loraflow.flows.server.project.enter": {"project": "loraflow"}}]
    [warning] = [record.message for record in caplog.records if "earlier version" in record.message]
    assert warning.startswith("deployment mine was created by an earlier version of loraflow")


def test_a_changed_automation_is_updated_under_its_existing_name(put, client):
    put()
    automation = client.read_automations_by_name("loraflow: crashed runs")[0]
    body = automation.model_dump(mode="json", exclude={"owner_resource", "id"}) | {"description": "as it was"}
    client.request("PUT", "/automations/{id}", path_params={"id": automation.id}, json=body)
    assert put() == ["automation 'loraflow: crashed runs' updated"]
    [updated] = client.read_automations_by_name("loraflow: crashed runs")
    assert updated.id == automation.id and updated.description == automation.description
    assert put() == []


@pytest.mark.slow
def test_prefect_deploy_accepts_the_same_file(put, client):
    for name in ("local", "cpu", "gpu"):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"), overwrite=True)
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=FILE.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in [*ONLY, "stage/cpu", "stage/gpu"]:
        assert client.read_deployment_by_name(name).entrypoint.startswith("loraflow.flows."), name
    assert client.read_deployment_by_name("retrain/nightly").schedules[0].slug == "nightly"
    assert client.read_automations_by_name("retrain on a new dataset")
    put()
    assert put() == [], "and loraflow deploy has nothing to change"
