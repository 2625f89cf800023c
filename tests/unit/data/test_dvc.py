"""A dataset under DVC: pins, uncommitted changes, revisions, remotes."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.config.data import Data
from loraflow.data.versions import dvc, version
from loraflow.data.versions.git import GitError, git
from loraflow.failures import BadConfig, BadData, DirtyData, MissingData
from loraflow.job import Inputs, Job, Progress
from loraflow.store.files import HashMemo
from tests.conftest import write_chats


def sh(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_dvc(*arguments: str, cwd: Path) -> None:
    """Run DVC in this process: its import takes longer than most of its commands."""
    from dvc.cli import main

    with chdir(cwd):
        assert main(["-q", *arguments]) == 0


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository with two committed versions of data/, and a DVC remote inside it."""
    repo = tmp_path_factory.mktemp("repo with späce")
    sh("git", "init", "-q", cwd=repo)
    sh("git", "config", "user.email", "a@b", cwd=repo)
    sh("git", "config", "user.name", "a", cwd=repo)
    run_dvc("init", cwd=repo)
    run_dvc("remote", "add", "-d", "inside", ".dvc/remote", cwd=repo)
    for tag, count in (("v1", 20), ("v2", 30)):
        write_chats(repo / "data" / "train.jsonl", range(count))
        write_chats(repo / "data" / "sub" / "more.jsonl", range(500, 505))
        run_dvc("add", "data", cwd=repo)
        run_dvc("push", cwd=repo)
        sh("git", "add", "-A", cwd=repo)
        sh("git", "commit", "-qm", tag, cwd=repo)
        sh("git", "tag", tag, cwd=repo)
    return repo


@pytest.fixture
def clone(repository, tmp_path) -> Path:
    sh("git", "clone", "-q", str(repository), str(tmp_path / "clone"), cwd=tmp_path)
    return tmp_path / "clone"


def fetch(data: Data, out: Path) -> Path:
    out.mkdir(parents=True)
    found = version.locate(data, HashMemo(None))
    runtime = {"origin": found.origin.model_dump()}
    job = Job(stage="version_dataset", version=1, config={"md5": found.md5}, runtime=runtime)
    version.run(job, Inputs({}), out, Progress())
    return out / "files"


def test_the_md5_of_a_folder_equals_dvcs(repository):
    pin = dvc.read_pin(str(repository), "data.dvc", None)
    assert dvc.dvc_md5(repository / "data") == pin.md5
    assert pin.is_folder and pin.path == "data"


def test_a_fresh_clone_gets_the_pinned_bytes_offline(clone, repository, tmp_path):
    assert not (clone / "data").exists()
    files = fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")
    assert dvc.dvc_md5(files) == dvc.read_pin(str(repository), "data.dvc", None).md5
    assert not (clone / "data").exists(), "the work tree is unchanged"


def test_any_revision_is_read_without_touching_the_work_tree(repository, tmp_path):
    before = dvc.dvc_md5(repository / "data")
    files = fetch(Data(source="data.dvc", repo=str(repository), rev="v1"), tmp_path / "out")
    assert len((files / "train.jsonl").read_text().splitlines()) == 20
    assert dvc.dvc_md5(repository / "data") == before
    found = version.locate(Data(source="data.dvc", repo=str(repository), rev="v1"), HashMemo(None))
    assert found.origin.commit == sh("git", "rev-parse", "v1", cwd=repository).strip()


def test_one_changed_byte_is_refused_with_the_command_to_run(clone, repository):
    shutil.copytree(repository / "data", clone / "data")
    data = Data(source="data.dvc", repo=str(clone))
    version.locate(data, HashMemo(None))
    file = clone / "data" / "train.jsonl"
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DirtyData) as caught:
        version.locate(data, HashMemo(None))
    assert "`loraflow data add data`" in str(caught.value) and "dvc checkout" in str(caught.value)


def test_hashes_are_cached_by_stat_and_a_change_is_detected(tmp_path):
    file = tmp_path / "data" / "a.jsonl"
    write_chats(file, range(3))
    os.utime(file, (1000, 1000))
    memo = HashMemo(tmp_path / "memo.json")
    first = dvc.dvc_md5(tmp_path / "data", memo)
    memo.save()
    again = HashMemo(tmp_path / "memo.json")
    assert again.known
    file.write_text(file.read_text().replace("1", "2", 1))
    assert dvc.dvc_md5(tmp_path / "data", again) != first


def test_a_remote_without_the_object_is_named(clone, tmp_path):
    shutil.rmtree(clone / ".dvc" / "remote")
    with pytest.raises(MissingData, match="its remote does not have it") as caught:
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")
    assert "dvc push" in str(caught.value)


def test_a_damaged_object_is_refused(clone, tmp_path):
    objects = [p for p in (clone / ".dvc" / "remote").rglob("*") if p.is_file() and not p.name.endswith(".dir")]
    for path in objects:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"cat", b"dog"))
    with pytest.raises((BadData, MissingData)):
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("outs: []", "not pin exactly one output"),
        ("- a", "not pin exactly one output"),
        ("deps:\n- path: a\nouts:\n- hash: md5\n  path: data\n", "imported with `--no-download`"),
        ("outs:\n- md5: abc.dir\n  path: data\n", "DVC 2"),
        ("outs:\n- md5: abc.dir\n  path: ../../etc\n  hash: md5\n", "a path outside"),
        (": [", "not pin exactly one output"),
        ("<<<<<<< HEAD\nouts: []\n=======\nouts: [1]\n>>>>>>> theirs\n", "conflict markers"),
    ],
)
def test_dvc_files_without_a_usable_pin_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "data.dvc").write_text(text)
    with pytest.raises(BadData, match=message):
        dvc.read_pin(str(tmp_path), "data.dvc", None)


def test_a_pin_that_is_not_committed_yet_is_told_to_be(tmp_path):
    def next_step() -> str:
        with pytest.raises(BadData, match="Git cannot show") as error:
            dvc.read_pin(str(tmp_path), "data.dvc", "HEAD")
        return error.value.next_step

    (tmp_path / "data.dvc").write_text("outs: []\n")
    assert next_step().startswith("git init; then `loraflow data add")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert next_step().startswith("`loraflow data add"), "before the first commit"
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    assert next_step().startswith("`loraflow data add"), "the commit does not have it"


def test_a_revision_that_does_not_exist_is_a_failure(repository):
    with pytest.raises(BadData, match="Git cannot"):
        dvc.read_pin(str(repository), "data.dvc", "no-such-branch")


OLD_GIT = """#!/bin/sh
# what git 2.20 says of options that it does not know
for argument; do case $argument in
  --end-of-options) echo "fatal: unrecognized argument: $argument" >&2; exit 128;;
  --show-current|--path-format=*|--pathspec-from-file=*|--initial-branch=*|--no-write-fetch-head|--porcelain=v2)
    echo "error: unknown option $argument" >&2; exit 129;;
esac; done
exec GIT "$@"
"""


def test_revisions_are_read_with_an_old_git(repository, tmp_path, monkeypatch):
    """`--end-of-options` needs git 2.24, and in rev-parse 2.30; Ubuntu 20.04 has 2.25."""
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(OLD_GIT.replace("GIT", shutil.which("git")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    with pytest.raises(GitError, match="unrecognized argument"):
        git(["show", "--end-of-options", "HEAD:data.dvc"], repository)
    commit = dvc.resolve_commit(str(repository), "v1")
    assert dvc.read_pin(str(repository), "data.dvc", commit) == dvc.read_pin(str(repository), "data.dvc", "v1")
    assert dvc.read_pin(f"file://{repository}".replace(" ", "%20"), "data.dvc", "v2").md5 != dvc.read_pin(
        str(repository), "data.dvc", "v1").md5  # fmt: skip


@pytest.mark.parametrize("rev", ["--output=found", "-h", "--upload-pack=touch found", "-"])
def test_an_option_is_no_revision(repository, tmp_path, monkeypatch, rev):
    monkeypatch.chdir(tmp_path)
    for repo in (str(repository), f"file://{repository}".replace(" ", "%20")):
        with pytest.raises(BadData, match="no revision begins with a hyphen"):
            dvc.read_pin(repo, "data.dvc", rev)
        with pytest.raises(BadData, match="no revision begins with a hyphen"):
            dvc.resolve_commit(repo, rev)
    assert not list(tmp_path.iterdir()) and not (repository / "found").exists()


def test_links_in_a_dataset_are_refused(tmp_path):
    write_chats(tmp_path / "data" / "a.jsonl", range(3))
    (tmp_path / "data" / "link.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(BadData, match="regular files"):
        dvc.dvc_md5(tmp_path / "data")


def test_a_named_remote_is_pushed_to_and_fetched_from(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(clone)
    run_dvc("remote", "add", "second", str(tmp_path / "second"), cwd=clone)
    write_chats(clone / "data" / "train.jsonl", range(44))
    with pytest.raises(BadConfig) as caught:
        dvc.add("data", remote="third")
    assert "one of inside, second" in str(caught.value) and "third" in str(caught.value)
    assert "data.dvc" not in sh("git", "status", "--short", cwd=clone), "nothing was added"
    before = sorted((clone / ".dvc" / "remote").rglob("*"))
    pin = dvc.add("data", remote="second")
    assert sorted((clone / ".dvc" / "remote").rglob("*")) == before, "the default remote is unchanged"
    assert list((tmp_path / "second").rglob("*.dir"))

    shutil.rmtree(clone / "data")
    shutil.rmtree(clone / ".dvc" / "cache")
    with pytest.raises(MissingData):
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "without")
    files = fetch(Data(source="data.dvc", repo=str(clone), remote="second"), tmp_path / "out")
    assert dvc.dvc_md5(files) == pin.md5
    shutil.rmtree(clone / ".dvc" / "cache", ignore_errors=True)
    with pytest.raises(BadConfig, match="no such DVC remote"):
        fetch(Data(source="data.dvc", repo=str(clone), remote="third"), tmp_path / "none")


def test_files_that_dvcignore_names_are_no_part_of_the_dataset(clone, tmp_path, monkeypatch):
    """DVC itself says what is unchanged: `dvc status`."""
    monkeypatch.chdir(clone)
    run_dvc("pull", cwd=clone)
    (clone / ".dvcignore").write_text("# system files\n.DS_Store\n*.bak\n!keep.bak\ndata/tmp/\n")
    pinned = dvc.read_pin(".", "data.dvc", None).md5
    for name in (".DS_Store", "sub/.DS_Store", "old.bak", "tmp/x.jsonl"):
        (clone / "data" / name).parent.mkdir(exist_ok=True)
        (clone / "data" / name).write_text("x")
    assert json.loads(sh(sys.executable, "-m", "dvc", "status", "--json", cwd=clone)) == {}
    assert dvc.work_tree_md5(Path("data")) == pinned
    files = fetch(Data(source="data.dvc"), tmp_path / "out")
    assert dvc.dvc_md5(files) == pinned, "ignored files are not copied"
    (clone / "data" / "keep.bak").write_text("x")
    assert dvc.work_tree_md5(Path("data")) != pinned
    with pytest.raises(DirtyData):
        version.locate(Data(source="data.dvc"), HashMemo(None))
    assert dvc.add("data", push=False).md5 == dvc.work_tree_md5(Path("data"))
    monkeypatch.chdir(tmp_path)
    assert dvc.work_tree_md5(clone / "data") == dvc.read_pin(str(clone), "data.dvc", None).md5


def test_a_module_of_the_repository_replaces_none_of_python_in_dvc(tmp_path):
    from loraflow.data.versions.dvc_storage import run_dvc

    (tmp_path / "token.py").write_text("raise SystemExit('the module of the user')")
    assert run_dvc(["--version"], str(tmp_path))[0].isdigit()


def test_a_dataset_is_pulled_by_the_name_of_its_folder_or_of_its_dvc_file(clone, monkeypatch):
    monkeypatch.chdir(clone)
    write_chats(clone / "datasets" / "tiny" / "a.jsonl", range(3))
    pinned = dvc.add("datasets/tiny", push=False).md5
    for name in ("datasets/tiny", "datasets/tiny/", "datasets/tiny.dvc"):
        shutil.rmtree(clone / "datasets" / "tiny")
        done = CliRunner().invoke(cli, ["data", "pull", name])
        assert done.exit_code == 0 and pinned in done.output, done.output
        assert dvc.work_tree_md5(Path("datasets/tiny")) == pinned
