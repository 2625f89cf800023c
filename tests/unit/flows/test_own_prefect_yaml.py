"""Beside a prefect.yaml of somebody's own, `loraflow init` shows a deployment that can be pasted and deployed."""

import pytest
import yaml

from loraflow.failures import BadConfig
from loraflow.flows.server.new_prefect_yaml import deployment_to_add, write_prefect_yaml
from loraflow.flows.server.prefect_yaml import read_all

MINE = "- name: mine\n  entrypoint: own.py:nothing\n  work_pool: {name: theirs}\n"
INDENTED = MINE.replace("- name", "    - name").replace("  entry", "      entry").replace("  work", "      work")
EMPTY = (
    "- name: null\n  version: null\n  tags: []\n  schedule: {}\n  flow_name: null\n  entrypoint: null\n"
    "  parameters: {}\n  work_pool:\n    name: null\n    work_queue_name: null\n    job_variables: {}\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "tickets"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "tiny.yaml").write_text("name: tiny\n")
    (folder / "own.py").write_text("from prefect import flow\n\n\n@flow\ndef nothing():\n    return 1\n")
    monkeypatch.chdir(folder)
    return folder


def shown(folder, text):
    """Return what init says to do, and the lines to add."""
    (folder / "prefect.yaml").write_text(text)
    todo, lines = deployment_to_add(folder, "tiny").split("\n", 1)
    return todo, lines + "\n"


def added_to(folder, text):
    (folder / "prefect.yaml").write_text(text)
    assert deployment_to_add(folder, "tiny") is None, "it is there now"
    return next(spec for spec in read_all(folder / "prefect.yaml")[0] if spec.flow_name == "finetune")


@pytest.mark.parametrize("entries", [MINE, INDENTED, EMPTY], ids=["column 0", "column 4", "prefect init's"])
@pytest.mark.parametrize("name", ["name: theirs\n", "name: 007\n", "", "name: null\n"])
def test_the_lines_fit_at_the_end_of_the_deployments(folder, name, entries):
    before, after = f"{name}pull: []\ndeployments:\n{entries}", "definitions: {}\n"
    todo, lines = shown(folder, before + after)
    assert "at the end of its `deployments`" in todo
    new = before.removeprefix("name: null\n") + lines + after  # the comment says: instead of the empty name
    spec = added_to(folder, new)
    document = yaml.safe_load(new)
    assert spec.project == str(document["name"]) and spec.name == "tickets"
    assert spec.work_pool.name == ("tickets" if entries == EMPTY else "theirs")


@pytest.mark.parametrize("nothing", ["deployments: []\n", "deployments:\n", "deployments: null\n"])
def test_the_lines_replace_an_empty_list(folder, nothing):
    todo, lines = shown(folder, "name: theirs\n" + nothing)
    assert "replace its empty `deployments`" in todo
    assert added_to(folder, "name: theirs\n" + lines).project == "theirs"


def test_the_lines_are_a_section_of_their_own_in_a_file_without_deployments(folder):
    todo, lines = shown(folder, "prefect-version: 3.0.0\n")
    assert "add this to it, with the name of the project" in todo
    assert added_to(folder, "prefect-version: 3.0.0\n" + lines).project == "tickets"


def test_an_entry_for_a_list_in_brackets_is_in_braces(folder):
    mine = "{name: mine, entrypoint: 'own.py:nothing', work_pool: {name: theirs}}"
    todo, lines = shown(folder, f"name: p\ndeployments: [{mine}]\n")
    assert "in brackets" in todo
    assert added_to(folder, f"name: p\ndeployments: [{mine}, {lines}]\n").work_pool.name == "theirs"


@pytest.mark.parametrize("template", ["local", "gpu-team"])
def test_a_further_recipe_of_a_project_gets_a_schedule_of_its_own(folder, template):
    file = write_prefect_yaml(folder, "tiny", template, "shop")
    (folder / "configs" / "b_2.yaml").write_text("name: b_2\n")
    assert deployment_to_add(folder, "tiny") is None
    todo, lines = deployment_to_add(folder, "b_2").split("\n", 1)
    assert "retrain it on a schedule" in todo and "at the end of its `deployments`" in todo
    text = file.read_text()
    end = text.index("\n# Who is notified") if template == "gpu-team" else len(text)
    file.write_text(f"{text[:end]}{lines}\n{text[end:]}")
    specs = {spec.name: spec for spec in read_all(file)[0]}
    own, first = specs["shop-b-2-nightly"], specs["shop-nightly"]
    assert own.parameters["recipe"] == "b_2" and own.schedules[0].active is False
    for part in ("flow_name", "work_pool", "project", "concurrency_limit", "tags", "schedules"):
        assert getattr(own, part) == getattr(first, part), part
    assert deployment_to_add(folder, "b_2") is None


def test_only_a_deployment_that_runs_recipes_counts(folder):
    """One that evaluates has no form, and the recipe that it names is not run by it."""
    text = write_prefect_yaml(folder, "tiny", "local", "shop").read_text()
    (folder / "configs" / "b.yaml").write_text("name: b\n")
    for flow in ("finetune", "retrain", "evaluate_model"):
        document = yaml.safe_load(text)
        entries = [entry for entry in document["deployments"] if f"flows.{flow}." in entry["entrypoint"]]
        entries[0]["parameters"]["recipe"] = "configs/b.yaml"
        (folder / "prefect.yaml").write_text(yaml.safe_dump(document | {"deployments": entries[:1]}))
        advice = deployment_to_add(folder, "b")
        assert (advice is None) == (flow != "evaluate_model"), "it runs configs/b.yaml, whose name is b"
        other = deployment_to_add(folder, "other")
        is_form = flow == "finetune"
        assert ("form of its deployments" in other) == ("retrain.retrain" in other) == is_form
        assert ("finetune.finetune" in other) == (not is_form)


def test_a_file_whose_deployments_are_no_list_gets_no_advice(folder):
    (folder / "prefect.yaml").write_text("deployments: 3\n")
    assert deployment_to_add(folder, "tiny") is None


def test_the_empty_form_of_prefect_init_alone_is_no_deployment(folder):
    (folder / "prefect.yaml").write_text("name: p\ndeployments:\n" + EMPTY)
    with pytest.raises(BadConfig, match="no deployment with a name"):
        read_all(folder / "prefect.yaml")
    (folder / "prefect.yaml").write_text("name: p\ndeployments:\n" + EMPTY + MINE.replace("mine", "null"))
    with pytest.raises(BadConfig, match="not valid") as error:
        read_all(folder / "prefect.yaml")
    assert "deployments[1]" in error.value.where and "name" in error.value.got, (
        "an entrypoint without a name is a mistake"
    )


def test_a_file_in_another_encoding_is_refused_with_its_line(folder):
    (folder / "prefect.yaml").write_bytes("name: theirs\n# café\n".encode("latin-1"))
    with pytest.raises(BadConfig, match="cannot be read") as error:
        read_all(folder / "prefect.yaml")
    assert error.value.where.endswith("prefect.yaml:2") and error.value.next_step == "save it as UTF-8"
