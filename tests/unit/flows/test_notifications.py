"""Notifications are about one project of a server, as Prefect's own trigger matches events."""

from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.events import Event as ClientEvent
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from loraflow.flows.server.automations import NotificationBlock, Project, notification_automations
from loraflow.tasks import events

BLOCK = NotificationBlock("slack-webhook/ops", uuid4())


def notifications(project):
    """Return the triggers of a project's notifications, by the name of the automation, as the server has them."""
    found = notification_automations(BLOCK, timedelta(days=30), project)
    return {each.name: ServerTrigger.model_validate(each.trigger.model_dump(mode="json")) for each in found}


def matches(trigger, name, resource, related=()):
    event = ReceivedEvent(
        event=name, resource=resource, related=list(related), occurred="2026-01-01T00:00:00Z", id=uuid4(),
        received="2026-01-01T00:00:01Z", payload={},
    )  # fmt: skip
    return trigger.covers(event) and trigger.expects(name)


def related(deployment, flow="retrain"):
    yield {
        "prefect.resource.id": f"prefect.flow.{uuid4()}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": flow,
    }
    yield {"prefect.resource.id": f"prefect.deployment.{uuid4()}", "prefect.resource.role": "deployment",
           "prefect.resource.name": deployment}  # fmt: skip


def test_a_failed_retraining_of_another_project_is_not_reported():
    trigger = notifications(Project("team-a", ("team-a-nightly", "team-a-on-dataset-update")))[
        "loraflow: team-a: retraining failed → slack-webhook/ops"
    ]
    run = {"prefect.resource.id": f"prefect.flow-run.{uuid4()}"}
    assert matches(trigger, "prefect.flow-run.Failed", run, related("team-a-nightly"))
    assert not matches(trigger, "prefect.flow-run.Failed", run, related("team-b-nightly"))
    assert not matches(trigger, "prefect.flow-run.Failed", run, related("team-a-nightly", flow="finetune"))


@pytest.mark.parametrize("kind", ["challenger rejected", "old champion"])
def test_a_decision_of_another_project_is_not_reported(tmp_path, monkeypatch, kind):
    """The events are those that a run in a project's folder emits."""
    name = events.REJECTED if kind == "challenger rejected" else events.CHAMPION
    decision = SimpleNamespace(verdict="reject", reasons=["worse"])
    sent: list[ClientEvent] = []
    monkeypatch.setattr(
        events, "emit_event", lambda event, resource, payload: sent.append(ClientEvent(event=event, resource=resource))
    )
    monkeypatch.chdir(tmp_path)
    entry = None if kind == "challenger rejected" else 1
    events.announce_decision("chats", SimpleNamespace(decision=decision, entry=entry))
    for project in ("team-a", "team-b"):
        (tmp_path / "prefect.yaml").write_text(f"name: {project}\n")
        events.announce_decision("chats", SimpleNamespace(decision=decision, entry=entry))
    assert [event.event for event in sent] == [name] * 3
    trigger = notifications(Project("team-a", ()))[f"loraflow: team-a: {kind} → slack-webhook/ops"]
    assert [matches(trigger, name, dict(event.resource)) for event in sent] == [False, True, False]
    of_all = notifications(None)[f"loraflow: {kind} → slack-webhook/ops"]
    assert all(matches(of_all, name, dict(event.resource)) for event in sent), "an older prefect.yaml has no name"


@pytest.mark.parametrize(
    ("content", "problem"),
    [("name: [", "cannot be read as YAML"), ("name: \x00", "cannot be read as YAML"), (None, "cannot be read")],
)
def test_a_prefect_yaml_that_cannot_be_read_does_not_fail_a_run_after_its_promotion(
    tmp_path, monkeypatch, caplog, content, problem
):
    sent = []
    monkeypatch.setattr(events, "emit_event", lambda event, resource, payload: sent.append((event, resource)))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prefect.yaml"
    file.mkdir() if content is None else file.write_text(content)
    decision = SimpleNamespace(verdict="promote", reasons=["better"])
    events.announce_decision("chats", SimpleNamespace(decision=decision, entry=1))
    assert [event for event, _ in sent] == [events.CHAMPION] and events.PROJECT_LABEL not in sent[0][1]
    assert f"prefect.yaml {problem}" in caplog.text


def test_two_projects_have_automations_of_their_own():
    names = [set(notifications(Project(name, (name,)))) for name in ("team-a", "team-b")]
    assert len(names[0] | names[1]) == 6
