"""Calls of git: answers, errors, and a machine without git."""

import subprocess

import pytest

from loraflow.data.git import GitError, git, git_or_none, head_commit


@pytest.fixture
def repository(tmp_path):
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_the_checked_out_commit_is_found(repository):
    (repository / "sub").mkdir()
    commit = git(["rev-parse", "HEAD"], repository).strip()
    assert len(commit) == 40
    assert head_commit(repository) == head_commit(repository / "sub") == commit


def test_a_folder_without_a_commit_has_none(tmp_path):
    assert head_commit(tmp_path) is None
    git(["init", "-q"], tmp_path)
    assert head_commit(tmp_path) is None


def test_an_error_has_the_command_and_gits_own_message(repository):
    with pytest.raises(GitError, match="no-such-branch") as caught:
        git(["show", "no-such-branch:x"], repository)
    assert caught.value.command == "git show no-such-branch:x"
    assert git_or_none(["rev-parse", "--verify", "--quiet", "no-such-branch"], repository) is None


def test_a_machine_without_git_has_no_commit(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert head_commit(repository) is None
    with pytest.raises(GitError, match="git"):
        git(["status"], repository)
