"""The prefect.yaml that `loraflow init`, `up` and `deploy` write for a project."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import loraflow
from loraflow.cli import cli
from loraflow.failures import BadConfig
from loraflow.flows.server.new_prefect_yaml import slug, write_prefect_yaml
from loraflow.flows.server.prefect_yaml import find_prefect_yaml, read_all
from tests.conftest import write_chats
from tests.unit.data.test_git_branch import git

ROOT = Path(__file__).parents[3]


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
    assert "configs/x.yaml   at its end, the team's store and placement: replace BUCKET" in done.output
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


@pytest.mark.parametrize("first", ["master", "main"])
def test_a_new_project_is_retrained_from_the_branch_that_its_repository_has(tmp_path, monkeypatch, caplog, first):
    """git calls the first branch master, where nothing else is configured: the nightly run failed each night."""

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("name: tiny\nbase: {model: x}\ndata: {train: [a.jsonl]}\n")
    git(tmp_path, "init", "-q", "-b", first)  # `loraflow init` comes before the first commit, or after it
    write_prefect_yaml(tmp_path)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    retrains = [spec for spec in read_all(tmp_path / "prefect.yaml")[0] if spec.flow_name == "retrain"]
    assert [spec.parameters.get("branch", "main") for spec in retrains] == [first] * 2
    assert not caplog.records
    git(tmp_path, "branch", "-q", "-m", "trunk")
    read_all(tmp_path / "prefect.yaml")
    assert caplog.records[0].message.endswith(
        f"parameters: the repository has no branch {first}, so this retraining will fail; it has: trunk "
        "(next: `branch: trunk` there)"
    )


def test_the_gpu_team_template_is_deployable_and_its_commented_settings_are_a_valid_recipe(tmp_path, monkeypatch):
    """The names in the recipe are those of the file, and no flow waits for a stage in its own pool."""
    from loraflow.config.load import load_recipe
    from loraflow.flows.server.new_prefect_yaml import team_recipe_lines

    project_folder = tmp_path / "my team ü"
    (project_folder / "configs").mkdir(parents=True)
    monkeypatch.chdir(project_folder)
    text = re.sub(r"^runtime:.*?(?=^\S|\Z)", "", (ROOT / "configs/quickstart.yaml").read_text(), flags=re.M | re.S)
    lines = team_recipe_lines("my-team-u")
    Path("configs/chats.yaml").write_text(text + lines)
    unchanged = load_recipe(Path("configs/chats.yaml")).runtime
    assert unchanged.placement == {}, "commented out"
    settings = re.sub(r"^# (?=runtime:|  )", "", lines, flags=re.M)
    Path("configs/chats.yaml").write_text(text + settings)
    runtime = load_recipe(Path("configs/chats.yaml")).runtime
    file = write_prefect_yaml(Path(), "chats", "gpu-team")
    specs = {spec.full_name: spec for spec in read_all(file)[0]}
    assert str(runtime.store).startswith("s3://") and set(runtime.placement) == {"train", "evaluate"}
    pools = {specs[f"stage/{name}"].work_pool.name for name in runtime.placement.values()}
    assert not pools & {spec.work_pool.name for spec in specs.values() if spec.flow_name != "stage"}
    assert {spec.project for spec in specs.values()} == {"my-team-u"}
