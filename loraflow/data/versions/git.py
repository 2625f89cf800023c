"""Calls of git."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from loraflow.credentials import git_environment


class GitError(Exception):
    """A git command failed. The message is git's own; `next_step` is what to do, where that is known."""

    def __init__(self, arguments: Sequence[str], message: str, next_step: str | None = None):
        self.command = f"git {' '.join(arguments)}"
        self.next_step = next_step
        super().__init__(message)


def git(
    arguments: Sequence[str], folder: str | Path | None = None, variables: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Run a git command and return its standard output.

    Args:
        arguments: the command and its arguments, such as `["rev-parse", "HEAD"]`.

    Raises:
        GitError: git exits with an error, or is not installed.
    """
    # core.askPass and an empty standard input: a remote that asks for a password fails at once instead of waiting.
    command = ["git", "-c", "core.askPass=true", *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # the file of a revision may hold any bytes
            stdin=subprocess.DEVNULL,
            env={**git_environment(os.environ), **variables},
        )
    except FileNotFoundError as error:
        if error.filename != command[0]:  # the folder
            raise GitError(arguments, str(error)) from error
        raise GitError(arguments, "git is not installed, or not on PATH", "install git") from error
    except (OSError, ValueError) as error:  # ValueError: an argument has a NUL
        raise GitError(arguments, str(error)) from error
    if done.returncode:
        raise _error_of(arguments, done)
    return done.stdout


def _error_of(arguments: Sequence[str], done: subprocess.CompletedProcess[str]) -> GitError:
    """Return git's first line that says what failed. Hints may follow it; a repository of another user's has a command."""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    message = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[-1])
    return GitError(arguments, message, lines[-1].strip() if "dubious ownership" in message else None)


def git_or_none(arguments: Sequence[str], folder: str | Path | None = None) -> str | None:
    """Run a git command and return its output without surrounding white space, or None if it fails."""
    try:
        return git(arguments, folder).strip()
    except GitError:
        return None


def head_commit(folder: str | Path) -> str | None:
    """Return the commit that is checked out; None outside a repository, before the first commit, or without git."""
    return git_or_none(["rev-parse", "--verify", "--quiet", "HEAD"], folder)


def folder_in_repository(folder: str | Path) -> str:
    """Return a folder's path below the top of its repository, with a slash at its end; empty for the top itself."""
    return git_or_none(["rev-parse", "--show-prefix"], folder) or ""


def has_uncommitted_changes(folder: str | Path) -> bool | None:
    """Return whether tracked files differ from the commit that is checked out; None outside a repository, or without git."""
    changed = git_or_none(["status", "--porcelain", "--untracked-files=no"], folder)
    return None if changed is None else bool(changed)


def is_url(repo: str) -> bool:
    """Tell whether a repository is given as a URL, not as a folder."""
    return "://" in repo or (repo.startswith("git@") and ":" in repo)
