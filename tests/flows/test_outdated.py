"""A deployment that was made from other code than the worker has."""

import pytest
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.utilities.callables import parameter_schema

from loraflow.failures import BadConfig
from loraflow.flows.finetune import finetune
from loraflow.flows.server import project
from tests.flows.pools import online, wait_for, worker


@pytest.fixture
def deployed(client):
    """Return a function that deploys finetune by a schema, and starts a run of it."""

    def start(change, **parameters):
        from prefect.client.schemas.actions import WorkPoolCreate

        schema = parameter_schema(finetune).model_dump()
        change(schema)
        client.create_work_pool(WorkPoolCreate(name="old", type="process"), overwrite=True)
        id_ = client.create_deployment(
            client.create_flow(finetune), "old", entrypoint="loraflow.flows.finetune.finetune", work_pool_name="old",
            parameter_openapi_schema=schema, enforce_parameter_schema=True, pull_steps=[{"loraflow.flows.server.project.enter": {}}],
        )  # fmt: skip
        return client.create_flow_run_from_deployment(id_, parameters=parameters)

    return start


def renamed(schema):
    fields = schema["definitions"]["Overrides"]["properties"]
    fields["lora_rank"] = fields.pop("rank")
    schema["properties"]["speed"] = {"type": "integer", "title": "speed"}


def test_what_changed_is_said_with_the_command_that_mends_it(deployed):
    run = deployed(renamed, recipe="quickstart", speed=3)
    with pytest.raises(BadConfig) as caught:
        project.refuse_outdated(run.id)
    said = str(caught.value)
    assert "gone: Overrides.lora_rank, speed; new: Overrides.rank" in said and "loraflow deploy" in said
    run = deployed(renamed, recipe="quickstart", overrides={"lora_rank": 8})
    with pytest.raises(BadConfig, match=r"overrides\.lora_rank"):
        project.refuse_outdated(run.id)


def test_an_old_deployment_goes_on_as_long_as_its_parameters_fit(deployed):
    project.refuse_outdated(deployed(renamed, recipe="quickstart").id)


def test_bounds_that_changed_are_said(deployed):
    def unbounded(schema):
        schema["definitions"]["Overrides"]["properties"]["rank"] = {"type": "integer"}

    run = deployed(unbounded, recipe="quickstart", overrides={"rank": 0})
    with pytest.raises(BadConfig, match=r"changed: Overrides\.rank"):
        project.refuse_outdated(run.id)


def test_a_wrong_value_of_the_same_version_is_left_to_the_flow(deployed, client):
    """The server refuses it where it checks; where it does not, nobody is told to deploy again."""
    run = deployed(lambda schema: None, recipe="quickstart")
    client.update_deployment(run.deployment_id, DeploymentUpdate(enforce_parameter_schema=False))
    wrong = client.create_flow_run_from_deployment(run.deployment_id, parameters={"overrides": {"rank": 0}})
    project.refuse_outdated(wrong.id)


@pytest.mark.slow
def test_the_run_itself_says_so_in_the_ui(deployed, client, tmp_path):
    (tmp_path / "configs").mkdir()
    run = deployed(renamed, recipe="quickstart", speed=3)
    with worker("old", tmp_path / "worker", LORAFLOW_HOME=str(tmp_path)):
        assert online("old")
        wait_for(lambda: client.read_flow_run(run.id).state.is_final(), 120)
    state = client.read_flow_run(run.id).state
    assert state.is_failed() or state.is_crashed()
    assert "another version of loraflow" in state.message, state.message
