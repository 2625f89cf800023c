"""Calls of git: answers, errors, and a machine without git."""

import os
import subprocess

import pytest

from loraflow.data.versions.dvc_pin import read_pin
from loraflow.data.versions.git import GitError, git, git_or_none, head_commit
from loraflow.failures import BadData


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
    with pytest.raises(GitError, match="git is not installed") as caught:
        git(["status"], repository)
    assert caught.value.next_step == "install git"
    with pytest.raises(BadData) as refused:  # as `data.rev` reads it
        read_pin(str(repository), "data.dvc", "HEAD")
    assert (refused.value.got, refused.value.next_step) == ("git is not installed, or not on PATH", "install git")


def test_a_failure_is_gits_error_and_not_its_last_hint(repository, tmp_path):
    git(["clone", "-q", ".", str(tmp_path / "other")], repository)
    for folder in (repository, tmp_path / "other"):
        (folder / "new").write_text(str(folder))
        git(["add", "new"], folder)
        git(["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "new"], folder)
    with pytest.raises(GitError, match=r"^error: failed to push some refs to ") as caught:
        git(["push", "-q", "origin", "HEAD"], tmp_path / "other")
    assert caught.value.next_step is None


def test_a_repository_of_another_user_has_gits_command_as_the_next_step(tmp_path, monkeypatch):
    shows = (
        "fatal: detected dubious ownership in repository at '/r'\nTo add an exception, call:\n\n\tgit config --global x"
    )
    script = tmp_path / "git"
    script.write_text(f'#!/bin/sh\necho "{shows}" >&2\nexit 128\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(GitError, match=r"^fatal: detected dubious ownership") as caught:
        git(["status"], tmp_path)
    assert caught.value.next_step == "git config --global x"
