"""Triggers as Prefect documents them work, and each has an automation of its own."""

from uuid import UUID, uuid4

import pytest
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.events.schemas.automations import Automation
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from prefect.exceptions import ObjectNotFound
from pydantic import TypeAdapter, ValidationError

from loraflow.flows.server.deployment_spec import DeploymentEntry, automation_of
from loraflow.flows.server.deployments import Deployer, _comparable_trigger

FLOW = {"prefect.resource.role": "flow", "prefect.resource.name": ["etl", "load"]}
ONE, TWO = UUID(int=1), UUID(int=2)


def read(*triggers):
    entry = {"name": "nightly", "entrypoint": "a.b", "work_pool": {"name": "local"}, "triggers": list(triggers)}
    return DeploymentEntry.model_validate(entry).triggers


@pytest.mark.parametrize(
    "trigger",
    [
        {"expect": ["a"], "match": {"prefect.resource.id": "prefect.flow-run.*"}, "match_related": FLOW},
        {"expect": ["a"], "match_related": [FLOW, {"prefect.resource.role": "tag"}]},
        {"match_related": FLOW},
        {"type": "compound", "require": "all", "within": 60,
         "triggers": [{"type": "event", "expect": ["a"], "match_related": FLOW}, {"type": "event", "expect": ["b"]}]},
        {"type": "sequence", "triggers": [{"type": "event", "expect": ["a"], "match_related": [FLOW]},
                                          {"type": "compound", "require": "any", "triggers": [
                                              {"type": "event", "match_related": FLOW}]}]},
        {"type": "metric", "match": {"a": "b"}, "match_related": FLOW,
         "metric": {"name": "lateness", "operator": ">", "threshold": 1, "range": 300, "firing_for": 300}},
    ],
    ids=["one", "a list", "as the only condition", "compound", "sequence of a compound", "metric"],
)  # fmt: skip
def test_labels_of_resources_are_no_keys_of_a_trigger(trigger):
    [found] = read(trigger)
    of_prefect = TypeAdapter(DeploymentTriggerTypes).validate_python(trigger)
    assert _comparable_trigger(found.model_dump(mode="json")) == _comparable_trigger(of_prefect.model_dump(mode="json"))


def test_an_unknown_key_beside_labels_is_refused_at_any_depth():
    inner = {"type": "event", "expect": ["a"], "match_related": FLOW, "match_relatd": FLOW}
    with pytest.raises(ValidationError, match=r"0\.triggers\.0\.match_relatd: unknown key"):
        read({"type": "sequence", "triggers": [inner]})


def test_triggers_without_a_name_are_called_as_prefect_deploy_calls_them():
    specs = [{"expect": ["a"]}, {"name": "mine", "expect": ["b"]}, {"expect": ["c"]}]
    found = [automation_of(trigger, i, "nightly", ONE).name for i, trigger in enumerate(read(*specs), 1)]
    assert found == [trigger.name for trigger in _initialize_deployment_triggers("nightly", specs)]


class Server:
    """The automations of a server, by Prefect's client's methods."""

    def __init__(self):
        self.automations = []

    def read_automations_by_name(self, name):
        return [automation for automation in self.automations if automation.name == name]

    def read_resource_related_automations(self, resource):
        return [
            automation
            for automation in self.automations
            if f"prefect.deployment.{automation.actions[0].deployment_id}" == resource
        ]

    def delete_automation(self, automation_id):
        self.automations = [automation for automation in self.automations if automation.id != automation_id]

    def read_deployment(self, deployment_id):
        if deployment_id not in (ONE, TWO):
            raise ObjectNotFound(LookupError())

    def create_automation(self, automation):
        self.automations.append(Automation(id=uuid4(), **automation.model_dump()))

    def request(self, method, path, *, path_params, json):
        assert (method, path) == ("PUT", "/automations/{id}")
        self.automations = [
            Automation(id=automation.id, **json) if automation.id == path_params["id"] else automation
            for automation in self.automations
        ]


@pytest.fixture
def server():
    return Server()


def deploy(server, deployment_id, *triggers):
    deployer = Deployer(server)
    deployer.deploy_triggers(read(*triggers), "nightly", deployment_id)
    return deployer.changes


def test_each_trigger_without_a_name_gets_an_automation_and_a_second_deploy_changes_nothing(server):
    triggers = ({"expect": ["a"]}, {"expect": ["b"]})
    assert len(deploy(server, ONE, *triggers)) == 2 and deploy(server, ONE, *triggers) == []
    assert [automation.trigger.expect for automation in server.automations] == [{"a"}, {"b"}]


def test_deployments_of_one_name_do_not_take_each_others_automations(server):
    """Those of two flows, or of two projects on a server."""
    for name in ({}, {"name": "on new data"}):
        server.automations = []
        deploy(server, ONE, {"expect": ["a"], **name})
        deploy(server, TWO, {"expect": ["b"], **name})
        assert [automation.actions[0].deployment_id for automation in server.automations] == [ONE, TWO]
        assert deploy(server, ONE, {"expect": ["a"], **name}) == deploy(server, TWO, {"expect": ["b"], **name}) == []


def test_a_trigger_that_is_removed_from_the_file_starts_no_more_runs(server):
    first, second = {"name": "first", "expect": ["a"]}, {"name": "second", "expect": ["b"]}
    deploy(server, ONE, first, second)
    deploy(server, TWO, second)
    [trigger] = read({"name": "of a person", "expect": ["c"]})
    trigger.set_deployment_id(ONE)
    server.create_automation(trigger.as_automation())
    assert deploy(server, ONE, first) == ["automation 'second' removed"]
    left = [(automation.name, automation.actions[0].deployment_id) for automation in server.automations]
    assert left == [("first", ONE), ("second", TWO), ("of a person", ONE)]


def test_a_removed_trigger_without_a_name_of_an_earlier_version_starts_no_more_runs(server):
    for name in (None, f"Automation for deployment {ONE}", "nightly__automation_3", "on new data"):
        [trigger] = read({"expect": ["a"]})
        trigger.set_deployment_id(ONE)
        made = trigger.as_automation()
        server.create_automation(made.model_copy(update={"name": name or made.name}))
    assert len(deploy(server, ONE)) == 3
    assert [automation.name for automation in server.automations] == ["on new data"], "a person may have made it"


def test_the_automation_of_a_deleted_deployment_is_taken_over(server):
    deploy(server, UUID(int=3), {"name": "on new data", "expect": ["a"]})
    assert deploy(server, ONE, {"name": "on new data", "expect": ["a"]}) == ["automation 'on new data' updated"]
    assert [automation.actions[0].deployment_id for automation in server.automations] == [ONE]


def test_the_automation_of_an_earlier_version_is_renamed_not_duplicated(server):
    [trigger] = read({"expect": ["a"]})
    trigger.set_deployment_id(ONE)
    server.create_automation(trigger.as_automation().model_copy(update={"enabled": False}))
    deploy(server, ONE, {"expect": ["a"]}, {"expect": ["b"]})
    assert [automation.name for automation in server.automations] == ["nightly__automation_1", "nightly__automation_2"]
    assert [automation.enabled for automation in server.automations] == [False, True], "as a person left it"
