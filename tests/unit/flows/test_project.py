"""The project that a folder's runs belong to."""

import subprocess
import sys
from pathlib import Path

import pytest

from loraflow.config.project import PROJECT_VARIABLE, served_project
from loraflow.failures import BadConfig
from loraflow.flows.server import project
from loraflow.flows.server.new_prefect_yaml import write_prefect_yaml
from loraflow.flows.server.prefect_yaml import read_all
from tests.unit.data.test_git_branch import git


def test_decisions_of_a_worker_without_prefect_yaml_name_the_project_of_its_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(PROJECT_VARIABLE, raising=False)
    assert served_project(tmp_path) is None
    monkeypatch.setenv(PROJECT_VARIABLE, " tickets ")
    assert served_project(tmp_path) == "tickets"
    (tmp_path / "prefect.yaml").write_text("name: support\n")
    assert served_project(tmp_path) == "support", "the file comes first"


def test_a_worker_refuses_the_run_of_another_project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: ours\n")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert project.enter(project="ours") == project.enter() == {"directory": str(tmp_path)}
    with pytest.raises(BadConfig, match="serves another project") as error:
        project.enter(project="theirs")
    assert (error.value.expected, error.value.got.split(",")[0]) == ("the project theirs", "the project ours")


def test_a_project_may_be_named_by_a_number(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: 2026\n")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert project.enter(project=2026) == project.enter(project="2026") == {"directory": str(tmp_path)}


def test_a_worker_refuses_the_run_of_another_project_of_the_same_name(tmp_path, monkeypatch):
    """Two folders named alike: the run would be computed with the recipes and the store of the other one."""
    from loraflow.config.project import PROJECT_ID, project_id

    for folder in ("a/tickets", "b/tickets"):
        (tmp_path / folder / "configs").mkdir(parents=True)
        write_prefect_yaml(tmp_path / folder, "r")
    own, other = project_id(tmp_path / "a/tickets"), project_id(tmp_path / "b/tickets")
    assert own and other and own != other
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path / "a/tickets"))
    monkeypatch.setenv(PROJECT_ID, own)
    assert project.enter(project="tickets") == {"directory": str(tmp_path / "a/tickets")}
    monkeypatch.setenv(PROJECT_ID, other)
    with pytest.raises(BadConfig, match="another project of the same name") as error:
        project.enter(project="tickets")
    assert other in error.value.expected and own in error.value.got
    (tmp_path / "a/tickets/prefect.yaml").write_text("name: tickets\n")
    project.enter(project="tickets")  # of an earlier version, without an id


def test_a_worker_names_the_other_project_if_both_name_and_id_differ(tmp_path, monkeypatch):
    """One pool of two projects: the advice to replace the name of one of them was false."""
    from loraflow.config.project import PROJECT_ID

    (tmp_path / "ours" / "configs").mkdir(parents=True)
    write_prefect_yaml(tmp_path / "ours", "r")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv(PROJECT_ID, "0a")
    with pytest.raises(BadConfig, match="serves another project than the run's") as error:
        project.enter(project="theirs")
    assert "a work pool of its own" in error.value.next_step


def test_a_module_of_the_project_that_runs_would_import_in_place_of_a_library_is_refused(tmp_path, monkeypatch):
    """Prefect starts runs with the project's folder in PYTHONPATH: they crashed, and only the worker's log said why."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "r.yaml").write_text("name: r\n")
    for own in ("os", "sys", "evaluate_faq", "__main__"):  # never imported from there, or no library's
        (tmp_path / f"{own}.py").write_text("raise RuntimeError\n")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    write_prefect_yaml(tmp_path, "r")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    assert project.enter() == {"directory": str(tmp_path)}
    (tmp_path / "pydantic").mkdir()
    for shadow in ("random.py", "pydantic/__init__.py", "pandas.py"):  # pandas is imported at the gate
        file = tmp_path / shadow
        file.touch()
        for check in (lambda: read_all(Path("prefect.yaml")), lambda: project.enter()):
            with pytest.raises(BadConfig, match=r"in place of the module (random|pydantic|pandas)\.") as error:
                check()
            assert Path(error.value.where).resolve() == file
        file.unlink()


def test_the_projects_folder_is_not_searched_while_loraflows_flows_are_imported(tmp_path):
    """Prefect puts the working directory in front: `loraflow deploy` ended with the traceback of a foreign statistics.py."""
    (tmp_path / "statistics.py").write_text("raise RuntimeError('own')\n")
    code = (
        "from loraflow.flows.server.project import import_own_flow\n"
        "from prefect.utilities.importtools import import_object\n"
        "name = 'loraflow.flows.finetune.finetune'\n"
        "import_own_flow(name)\n"
        "print(import_object(name).name)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "finetune\n", done.stderr


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "in no commit"])
def test_a_prefect_yaml_that_is_written_again_has_the_id_before(tmp_path, is_committed):
    """`loraflow deploy` refused the project as a foreign one of the same name."""
    from loraflow.config.project import project_id

    def written(folder):
        (folder / "prefect.yaml").unlink(missing_ok=True)
        write_prefect_yaml(folder, "r")
        return project_id(folder)

    repository = tmp_path / "a"
    for name in ("chat", "mail"):
        (repository / name / "configs").mkdir(parents=True)
        (repository / name / "configs" / "r.yaml").touch()
    git(repository, "init", "-q")
    without_commits = written(repository / "chat")
    assert without_commits and written(repository / "chat") == without_commits
    git(repository, "add", "chat" if is_committed else "chat/configs")
    git(repository, "commit", "-qm", "one")
    assert written(repository / "chat") == without_commits
    git(tmp_path, "clone", "-q", "a", "b")
    git(tmp_path, "clone", "-q", "a", "c")
    cloned = written(tmp_path / "b" / "chat")
    assert written(tmp_path / "c" / "chat") == cloned == written(tmp_path / "b" / "chat"), (
        "every clone has the same one"
    )
    assert (cloned == without_commits) is is_committed
    assert written(repository / "mail") not in (without_commits, cloned, None)


@pytest.mark.parametrize("content", [b"", b'a"b\nc: d', b"\xff\xfe", b"0123abcd /another/folder"])
def test_a_damaged_or_foreign_file_of_the_last_id_is_not_used(tmp_path, content):
    from loraflow.config.project import project_id

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "r.yaml").touch()
    write_prefect_yaml(tmp_path, "r")
    known = project_id(tmp_path)
    (tmp_path / "prefect.yaml").unlink()
    (tmp_path / ".loraflow" / "project-id").write_bytes(content)
    write_prefect_yaml(tmp_path, "r")
    assert project_id(tmp_path) == known


@pytest.mark.parametrize(("value", "found"), [(12345678, "12345678"), ("0a", "0a"), (None, None), (True, BadConfig)])
def test_an_id_of_digits_without_quotes_is_compared_as_text(value, found):
    from loraflow.config.project import PROJECT_ID, id_of

    variables = {"env": {PROJECT_ID: value}}
    if found is BadConfig:
        with pytest.raises(BadConfig, match="is not a text"):
            id_of(variables)
    else:
        assert id_of(variables) == found


@pytest.mark.parametrize("text", [None, "deployments: []\n", "name:\n", ""])
def test_a_worker_that_does_not_know_its_project_refuses_the_run_of_a_named_one(tmp_path, monkeypatch, text):
    """Its folder would be used for any project's run, with other recipes and another store."""
    (tmp_path / "configs").mkdir()
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("LORAFLOW_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert project.enter() == {"directory": str(tmp_path)}, "deployments of older files name no project"
    with pytest.raises(BadConfig, match="does not say which project") as error:
        project.enter(project="team")
    assert "LORAFLOW_PROJECT=team" in error.value.next_step
    monkeypatch.setenv("LORAFLOW_PROJECT", "team")
    assert project.enter(project="team") == {"directory": str(tmp_path)}
    with pytest.raises(BadConfig, match="serves another project"):
        project.enter(project="theirs")


def test_a_worker_is_not_talked_out_of_its_folders_project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: ours\n")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("LORAFLOW_PROJECT", "theirs")
    monkeypatch.chdir(tmp_path)
    for asked in ("ours", "theirs"):
        with pytest.raises(BadConfig, match="serves another project"):
            project.enter(project=asked)
