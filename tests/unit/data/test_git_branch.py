"""The newest dataset of a branch, of real repositories."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraflow.config.load import parse_recipe
from loraflow.data.versions import dvc
from loraflow.data.versions import git_branch as branch
from loraflow.failures import BadConfig, Network
from loraflow.store.files import HashMemo
from tests.unit.data.test_dvc import run_dvc


def git(where: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=where, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repos(tmp_path) -> tuple[Path, Path, Path]:
    """A remote, the clone of somebody who adds data, and that of a worker."""
    git(tmp_path, "init", "-q", "--bare", "-b", "main", "remote.git")
    git(tmp_path, "clone", "-q", "remote.git", "mine")
    git(tmp_path / "mine", "checkout", "-q", "-b", "main")
    (tmp_path / "mine" / "x").write_text("1")
    git(tmp_path / "mine", "add", "-A")
    git(tmp_path / "mine", "commit", "-qm", "one")
    git(tmp_path / "mine", "push", "-q", "-u", "origin", "main")
    git(tmp_path, "clone", "-q", "remote.git", "worker")
    return tmp_path / "remote.git", tmp_path / "mine", tmp_path / "worker"


def commit(where: Path, text: str) -> str:
    (where / "x").write_text(text)
    git(where, "commit", "-qam", text)
    return git(where, "rev-parse", "HEAD")


def test_the_remote_branch_is_read_without_a_checkout(repos):
    _, clone, worker = repos
    new = commit(clone, "2")
    git(clone, "push", "-q")
    before = git(worker, "rev-parse", "HEAD")
    assert branch.find_newest_commit(str(worker), "main") == branch.DatasetCommit(str(worker), new)
    assert git(worker, "rev-parse", "HEAD") == before and (worker / "x").read_text() == "1"
    assert branch.find_newest_commit(str(repos[0].as_uri()), "main").commit == new, "a repository by URL"


def test_a_mixture_reads_each_pin_from_the_branch_of_its_repository(repos, monkeypatch):
    _, clone, worker = repos
    monkeypatch.chdir(worker)  # the recipe without sources reads the branch of the working folder
    new = commit(clone, "2")
    git(clone, "push", "-q")
    text = f"""
name: mix
base: {{model: bundled:smollm2}}
register: {{model: mix}}
data:
  sources:
    - {{source: x.dvc, repo: {worker}, weight: 2}}
    - {{source: y.dvc, repo: {worker}, rev: v1, name: replay}}
    - {{source: faq.db, query: faq, columns: {{prompt: question}}}}
"""
    recipe = parse_recipe(text, name="mix.yaml")
    found = parse_recipe(text, name="mix.yaml", overrides=branch.newest_settings(recipe.data, "main")).data
    pinned = recipe.data.sources[0].model_copy(update={"rev": new})
    assert found.sources == [pinned, *recipe.data.sources[1:]], "a revision of its own stays, and so do files"
    files = recipe.data.model_copy(update={"sources": recipe.data.sources[1:]})
    assert branch.newest_settings(files, "no such branch") == {}
    assert branch.newest_settings(parse_recipe(text.split("data:")[0], name="x").data, "main").keys() == {
        "data.repo",
        "data.rev",
    }


def test_retrainings_that_fetch_the_same_new_commit_at_once_all_find_it(repos):
    _, clone, worker = repos
    for number in range(3):
        new = commit(clone, f"at once {number}")
        git(clone, "push", "-q")
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda _: branch.find_newest_commit(str(worker), "main"), range(4))
        assert [pin.commit for pin in found] == [new] * 4


def test_a_local_branch_that_is_ahead_is_used_and_a_diverged_branch_is_not(repos):
    _, clone, worker = repos
    local = commit(worker, "mine alone")
    assert branch.find_newest_commit(str(worker), "main").commit == local
    remote = commit(clone, "2")
    git(clone, "push", "-q")
    assert branch.find_newest_commit(str(worker), "main").commit == remote
    only_here = commit(worker, "more")
    git(worker, "branch", "-q", "aside")
    assert branch.find_newest_commit(str(worker), "aside").commit == only_here, "the remote has no such branch"


def test_failures_name_the_branch_the_folder_and_the_remote(repos, tmp_path):
    _, _, worker = repos
    with pytest.raises(BadConfig, match="no such branch"):
        branch.find_newest_commit(str(worker), "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(BadConfig, match="not a git repository"):
        branch.find_newest_commit(str(tmp_path / "bare"), "main")
    git(worker, "remote", "set-url", "origin", str(tmp_path / "gone.git"))
    with pytest.raises(Network, match="cannot look at the branch"):
        branch.find_newest_commit(str(worker), "main")


def test_a_project_in_no_git_repository_is_retrained_on_its_own_pins(tmp_path, monkeypatch, repos):
    """`loraflow init` needs no git. The schedule that it writes would fail every night."""
    monkeypatch.chdir(tmp_path)
    alone = parse_recipe("name: t\nbase: {model: x}", name="t").data
    assert branch.newest_settings(alone, "main") == {}
    text = f"name: t\nbase: {{model: x}}\ndata:\n  sources: [{{source: data.dvc}}, {{source: more.dvc, repo: {repos[1]}}}]\n"
    mixture = branch.newest_settings(parse_recipe(text, name="mix.yaml").data, "main")["data.sources"]
    assert "rev" not in mixture[0] and mixture[1]["rev"] == git(repos[1], "rev-parse", "main")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".git").write_text("gitdir: of a repository that git refuses to read")
    monkeypatch.chdir(tmp_path / "folder")
    with pytest.raises(BadConfig, match="not a git repository"):
        branch.newest_settings(alone, "main")


def add_data(where: Path, rows: int) -> dvc.Pin:
    (where / "data").mkdir(exist_ok=True)
    (where / "data" / "train.jsonl").write_text("".join(json.dumps({"i": i}) + "\n" for i in range(rows)))
    return dvc.add("data")


def test_a_commit_contains_only_the_pin_and_a_dataset_in_git_is_read_without_a_pull(repos, monkeypatch, tmp_path):
    """The repository carries its own DVC remote, as the quickstart's does."""
    _, clone, worker = repos
    for key, value in (("user.name", "a"), ("user.email", "a@b.c")):
        git(clone, "config", key, value)
    monkeypatch.chdir(clone)
    run_dvc("init", cwd=clone)
    run_dvc("remote", "add", "-d", "here", ".dvc/remote", cwd=clone)
    pin = add_data(clone, 3)
    dvc.push_pin(pin, "here")  # named: the default remote is not pushed into git
    (clone / "x").write_text("not to be committed")
    assert branch.committed(pin) is None
    branch.commit(pin)
    commit = branch.committed(pin)
    assert commit and git(clone, "status", "--short", "x") == "M x", "other changes are untouched"
    assert branch.is_unpushed(commit)
    git(clone, "add", "-f", ".dvc")
    git(clone, "commit", "-qm", "remote")
    git(clone, "push", "-q")
    assert not branch.is_unpushed(commit)

    found = branch.find_newest_commit(str(worker), "main")
    assert found == branch.find_newest_commit(str(worker), "main"), "a second look finds the checkout"
    assert dvc.read_pin(found.repo, "data.dvc", found.commit).md5 == pin.md5
    (tmp_path / "out").mkdir()
    dvc.fetch(found.repo, pin, found.commit, tmp_path / "out", HashMemo(None))
    assert (tmp_path / "out" / "train.jsonl").read_text().count("\n") == 3
    assert not (worker / "data.dvc").exists()


def test_a_commit_without_an_author_says_how_to_name_one(repos, monkeypatch):
    _, clone, _ = repos
    monkeypatch.chdir(clone)
    for variable, value in {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "EMAIL": ""}.items():
        monkeypatch.setenv(variable, value)
    git(clone, "config", "user.useConfigOnly", "true")
    (clone / "data.dvc").write_text("outs:\n- md5: 0123\n  path: data\n")
    with pytest.raises(BadConfig, match="cannot commit the dataset's version") as caught:
        branch.commit(dvc.Pin(path="data", md5="0123", dvc_file="data.dvc"))
    assert "git config user.name" in str(caught.value)


def test_a_missing_branch_is_refused_with_those_that_exist(repos):
    _, clone, worker = repos
    git(clone, "push", "-q", "origin", "main:next")
    git(worker, "fetch", "-q")
    with pytest.raises(BadConfig, match="no such branch") as error:
        branch.find_newest_commit(str(worker), "master")
    assert error.value.expected == "one of main, next" and "branch: main" in error.value.next_step


def test_a_project_in_a_folder_of_a_repository_reads_its_own_pin_of_a_revision(tmp_path, monkeypatch):
    """git takes REVISION:PATH from the top of the repository, where another project has a dataset of the same name."""
    repository, project = tmp_path / "repository", tmp_path / "repository" / "project"
    project.mkdir(parents=True)
    git(repository, "init", "-q", "-b", "main")
    for key, value in (("user.name", "a"), ("user.email", "a@b.c")):
        git(repository, "config", key, value)
    run_dvc("init", cwd=repository)
    for folder, rows in ((repository, 1), (project, 2)):
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text('{"text": "a"}\n' * rows)
        run_dvc("add", "data", cwd=folder)
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "two projects")
    expected = dvc.work_tree_md5(project / "data")
    monkeypatch.chdir(project)
    settings = branch.newest_settings(parse_recipe("name: t\nbase: {model: x}", name="t").data, "main")
    newest = (settings["data.repo"], settings["data.rev"])
    for repo, rev in ((".", None), (".", "main"), (str(project), "HEAD"), newest):
        assert dvc.read_pin(repo, "data.dvc", rev).md5 == expected
    assert dvc.read_pin(str(repository), "project/data.dvc", "main").md5 == expected
    shutil.rmtree(project / "data")
    for number, (repo, rev) in enumerate([(".", None), newest]):
        out = tmp_path / str(number)
        out.mkdir()
        dvc.fetch(repo, dvc.read_pin(repo, "data.dvc", rev), rev, out, HashMemo(None))
        assert (out / "train.jsonl").read_text().count("\n") == 2
