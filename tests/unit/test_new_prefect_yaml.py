"""The prefect.yaml that `loraflow init`, `up` and `deploy` write for a project."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import loraflow
from loraflow.cli import cli
from loraflow.failures import BadConfig
from loraflow.flows.server.new_prefect_yaml import slug, write_prefect_yaml
from loraflow.flows.server.prefect_yaml import find_prefect_yaml, read_all
from tests.conftest import write_chats
from tests.unit.test_git_branch import git


@pytest.mark.parametrize("folder", ["tickets", "Meine Tickets ü", "2026", "on", "Prefect demo", "日本"])
def test_a_project_gets_deployments_of_its_own_name_for_recipes_that_exist(tmp_path, monkeypatch, folder):
    (tmp_path / folder / "configs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    (Path("configs") / "7.yaml").write_text("name: x\n")
    specs = read_all(find_prefect_yaml())[0]
    name = slug(folder)
    assert {spec.full_name for spec in specs} == {
        f"finetune/{name}", f"retrain/{name}-nightly", f"retrain/{name}-on-dataset-update", f"evaluate/{name}",
    }  # fmt: skip
    assert {(spec.project, spec.work_pool.name, spec.parameters["recipe"]) for spec in specs} == {(name, name, "7")}
    assert not any(schedule.active for spec in specs for schedule in spec.schedules)
    Path("prefect.yaml").write_text("mine")
    assert write_prefect_yaml(Path()) is None and Path("prefect.yaml").read_text() == "mine"


def test_a_folder_without_recipes_is_told_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loraflow, "__file__", str(tmp_path / "site" / "loraflow" / "__init__.py"))
    with pytest.raises(BadConfig, match="no recipes") as error:
        find_prefect_yaml()
    assert "loraflow init" in error.value.next_step and not Path("prefect.yaml").exists()


def test_folders_without_latin_letters_are_projects_of_their_own():
    assert slug("日本") != slug("中国") and slug("日本") == slug("日本")
    assert slug("Größe é") == "grosse-e"


def test_init_takes_a_name_of_the_project(tmp_path, monkeypatch, phi3):
    (tmp_path / "chats").mkdir()
    monkeypatch.chdir(tmp_path / "chats")
    write_chats(Path("x.jsonl"), range(30))
    git(Path(), "init", "-q")
    Path(".gitignore").write_text("/x.jsonl\n")
    arguments = ["init", "--data", "x.jsonl", "--base", str(phi3), "--template", "gpu-team", "--project"]
    refused = CliRunner().invoke(cli, [*arguments, "Team A"], catch_exceptions=True)
    assert isinstance(refused.exception, BadConfig) and refused.exception.next_step == "--project team-a"
    empty = CliRunner().invoke(cli, [*arguments, ""]).exception
    assert isinstance(empty, BadConfig) and empty.next_step == "write a name after --project, or omit it"
    assert not Path("prefect.yaml").exists()
    done = CliRunner().invoke(cli, [*arguments, "team-a"], catch_exceptions=False)
    assert "deployments of the project team-a" in done.output
    assert "x.jsonl   runs do not read it any more\n" in done.output, "git ignores it, so `git add -A` is no danger"
    found = read_all(Path("prefect.yaml"))[0]
    assert {(spec.project, spec.work_pool.name.removesuffix("-gpu")) for spec in found} == {("team-a", "team-a")}
    assert "placement: {train: team-a-gpu" in Path("configs/x.yaml").read_text()
    again = CliRunner().invoke(cli, ["init", *arguments[1:5], "--name", "y", "--project", "b"])
    assert isinstance(again.exception, BadConfig) and again.exception.where == "--project b"
    both = CliRunner().invoke(cli, [*arguments, "b", "--name", "y"]).exception
    assert isinstance(both, BadConfig) and both.where == "--template gpu-team --project b"
    assert both.next_step.startswith("omit --template and --project, or")
    assert Path("README.md").read_text().startswith("# team-a\n")
