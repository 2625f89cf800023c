"""Deployments created by another version of loraflow than the worker's."""

import pytest
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.utilities.callables import parameter_schema

from loraflow.failures import BadConfig
from loraflow.flows.finetune import finetune
from loraflow.flows.server import project
from tests.flows.pools import online, wait_for, worker


@pytest.fixture
def deployed(client):
    """Return a function that deploys finetune with a changed schema, and starts a run."""

    def start(
        change,
        entrypoint="loraflow.flows.finetune.finetune",
        **parameters,
    ):
        schema = parameter_schema(finetune).model_dump()
        change(schema)
        client.create_work_pool(WorkPoolCreate(name="old", type="process"), overwrite=True)
        deployment_id = client.create_deployment(
            client.create_flow(finetune),
            "old",
            entrypoint=entrypoint,
            work_pool_name="old",
            parameter_openapi_schema=schema,
            enforce_parameter_schema=True,
            pull_steps=[{"loraflow.flows.server.project.enter": {}}],
        )
        return client.create_flow_run_from_deployment(deployment_id, parameters=parameters)

    return start


def unchanged(schema):
    pass


def renamed(schema):
    fields = schema["definitions"]["Overrides"]["properties"]
    fields["lora_rank"] = fields.pop("rank")
    schema["properties"]["speed"] = {"type": "integer", "title": "speed"}


def test_a_refused_run_names_what_changed_and_the_command_that_updates_the_deployment(deployed):
    run = deployed(renamed, recipe="quickstart", speed=3)
    with pytest.raises(BadConfig) as caught:
        project.refuse_outdated(run.id)
    message = str(caught.value)
    assert "removed: Overrides.lora_rank, speed; added: Overrides.rank" in message and "loraflow deploy" in message
    run = deployed(renamed, recipe="quickstart", overrides={"lora_rank": 8})
    with pytest.raises(BadConfig, match=r"overrides\.lora_rank"):
        project.refuse_outdated(run.id)


def test_an_old_deployment_runs_as_long_as_its_parameters_fit(deployed):
    project.refuse_outdated(deployed(renamed, recipe="quickstart").id)


def test_a_refused_run_names_changed_bounds(deployed):
    def unbounded(schema):
        schema["definitions"]["Overrides"]["properties"]["rank"] = {"type": "integer"}

    run = deployed(unbounded, recipe="quickstart", overrides={"rank": 0})
    with pytest.raises(BadConfig, match=r"changed: Overrides\.rank"):
        project.refuse_outdated(run.id)


def test_an_invalid_value_of_the_same_version_is_validated_by_the_flow(deployed, client):
    """A server that validates parameters refuses it. If the server does not, deploying again would not help."""
    run = deployed(unchanged, recipe="quickstart")
    client.update_deployment(run.deployment_id, DeploymentUpdate(enforce_parameter_schema=False))
    wrong = client.create_flow_run_from_deployment(run.deployment_id, parameters={"overrides": {"rank": 0}})
    project.refuse_outdated(wrong.id)


def test_a_parameter_that_the_flow_does_not_have_is_named(deployed, client):
    """Prefect's server accepts it, and its engine would end with "Process exited with status code: 1"."""
    run = deployed(unchanged, recipe="quickstart")
    wrong = client.create_flow_run_from_deployment(run.deployment_id, parameters={"learning_rate": 3e-4})
    with pytest.raises(BadConfig, match="parameters that its flow does not have") as caught:
        project.refuse_outdated(wrong.id)
    assert "learning_rate" in caught.value.got


def test_a_missing_flow_is_named_with_the_command_that_updates_the_deployment(deployed):
    run = deployed(unchanged, entrypoint="loraflow.flows.old_name.finetune", recipe="quickstart")
    with pytest.raises(BadConfig, match="does not exist in this worker's version") as caught:
        project.refuse_outdated(run.id)
    assert "loraflow.flows.old_name.finetune" in caught.value.expected and "loraflow deploy" in caught.value.next_step


def state_after_running(client, run, folder, project_folder):
    """Let a process worker take a run, and return the run's final state."""
    with worker("old", folder, LORAFLOW_HOME=str(project_folder)):
        assert online("old")
        wait_for(lambda: client.read_flow_run(run.id).state.is_final(), 120)
    return client.read_flow_run(run.id).state


@pytest.mark.slow
def test_a_refused_run_shows_the_reason_in_its_state(deployed, client, tmp_path):
    (tmp_path / "configs").mkdir()
    run = deployed(renamed, recipe="quickstart", speed=3)
    state = state_after_running(client, run, tmp_path / "worker", tmp_path)
    assert state.is_failed() or state.is_crashed()
    assert "another version of loraflow" in state.message, state.message
