"""Find the newest commit of a dataset's git branch, and commit and push new pins.

The machine that retrains does not have to pull: the local branch is compared with the remote's branch. If one of them
contains the other, the newer one is used. If they have diverged, the remote's branch wins.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from loraflow.data.versions.dvc import Pin
from loraflow.data.versions.git import GitError, folder_in_repository, git, git_or_none, head_commit, is_url
from loraflow.failures import BadConfig, Network
from loraflow.store.lock import flock

if TYPE_CHECKING:
    from loraflow.config.data import Data

log = logging.getLogger("loraflow")
FOLDER = Path(".loraflow", "branches")
DAY = 24 * 3600
MAIN = "main"  # the default of retrain's parameter `branch`


@dataclass(frozen=True)
class DatasetCommit:
    """Repository and commit of the newest `.dvc` file: the values for `data.repo` and `data.rev`."""

    repo: str
    commit: str

    def settings(self) -> dict[str, str]:
        """Return the recipe settings that select this commit."""
        return {"data.repo": self.repo, "data.rev": self.commit}


def newest_settings(data: Data, branch: str) -> dict[str, JsonValue]:
    """Return the recipe settings that select the newest dataset of a branch.

    Of a mixture, each `.dvc` file is read from the branch of its repository, unless it names a revision of its own. Sources
    that are files or folders are read as they are, and so are `.dvc` files of a project that is in no git repository.

    Raises:
        BadConfig: the branch does not exist, or `repo` is not a git repository.
        Network: the remote does not answer.
    """
    here = Path.cwd()
    without_git = not any((folder / ".git").exists() for folder in (here, *here.parents))
    if not data.sources:
        if data.repo == "." and without_git:
            log.info("%s is in no git repository: %s is used as it is", here, data.source)
            return {}
        return {**find_newest_commit(data.repo, branch).settings()}
    newest: dict[str, DatasetCommit] = {}  # by repository, which several sources may share
    sources: list[JsonValue] = []
    for source in data.sources:
        values = source.model_dump(mode="json", exclude_defaults=True)
        if source.source.endswith(".dvc") and source.rev is None and not (source.repo == "." and without_git):
            found = newest.get(source.repo) or find_newest_commit(source.repo, branch)
            newest[source.repo] = found
            values |= {"repo": found.repo, "rev": found.commit}
        sources.append(values)
    return {"data.sources": sources} if newest else {}


def find_newest_commit(repo: str, branch: str, remote: str = "origin") -> DatasetCommit:
    """Find the newest commit of a branch. The remote's branch is fetched, but neither merged nor checked out.

    Raises:
        BadConfig: the branch does not exist, or the folder is not a git repository.
        Network: the remote does not answer.
    """
    if is_url(repo):
        found = _git(["ls-remote", "--", repo, f"refs/heads/{branch}"], None).split()
        if not found:
            raise _no_branch(branch, repo)
        return DatasetCommit(repo, found[0])
    if git_or_none(["rev-parse", "--git-dir"], repo) is None:
        raise BadConfig(
            "Retraining reads a git branch, but this folder is not a git repository.",
            where=str(Path(repo).absolute()),
            next_step="git init, or set data.repo to the repository that holds the .dvc file",
        )
    local = git_or_none(["rev-parse", "--verify", "--quiet", f"refs/heads/{branch}^{{commit}}"], repo)
    fetched = _fetch_branch(repo, branch, remote)
    if local is not None and (fetched is None or _contains(repo, local, fetched)):
        commit, source = local, "this repository"
    elif fetched is not None:
        commit, source = fetched, remote
    else:
        raise _no_branch(branch, repo)
    log.info("newest commit of %s is %s, of %s", branch, commit[:12], source)
    return DatasetCommit(_checkout_with_data(repo, commit), commit)


def _fetch_branch(repo: str, branch: str, remote: str) -> str | None:
    if git_or_none(["remote", "get-url", remote], repo) is None:
        return None
    if not _git(["ls-remote", remote, f"refs/heads/{branch}"], repo):
        return None
    ref = f"refs/loraflow/{remote}/{branch}"  # a ref of our own: any other git process may overwrite FETCH_HEAD
    folder = Path(repo, _git(["rev-parse", "--git-common-dir"], repo).strip())
    with flock(folder / "loraflow-fetch.lock"):  # git refuses to write a ref that another process has just written
        _git(["fetch", "--quiet", "--no-tags", "--refmap=", remote, f"+refs/heads/{branch}:{ref}"], repo)
        return git_or_none(["rev-parse", "--verify", "--quiet", ref], repo)


def _contains(repo: str, commit: str, ancestor: str) -> bool:
    """Tell whether a commit is, or descends from, another commit."""
    return git_or_none(["merge-base", "--is-ancestor", ancestor, commit], repo) is not None


def commit(pin: Pin) -> None:
    """Commit a `.dvc` file. Other staged changes stay out of the commit.

    Raises:
        BadConfig: git failed.
    """
    if committed(pin) is not None:
        return
    ignore = Path(pin.dvc_file).parent / ".gitignore"  # `dvc add` writes the folder's name into it
    names = [pin.dvc_file, *([str(ignore)] if ignore.exists() else [])]
    _git(["add", "--", *names], ".")
    _git(["commit", "--quiet", "-m", f"Dataset {pin.md5[:8]}", "--", *names], ".")


def committed(pin: Pin) -> str | None:
    """Return HEAD if its commit contains this pin, else None."""
    head = head_commit(".")
    text = git_or_none(["show", f"HEAD:./{pin.dvc_file}"], ".")
    return head if text is not None and f"md5: {pin.md5}" in text else None


def push() -> None:
    """Push the branch that is checked out to its upstream.

    Raises:
        Network: the push failed.
    """
    _git(["push", "--quiet"], ".")


def is_unpushed(commit: str) -> bool:
    """Tell whether the branch has an upstream, and the upstream does not have the commit yet."""
    upstream = git_or_none(["rev-parse", "--verify", "--quiet", "@{upstream}"], ".")
    return upstream is not None and not _contains(".", upstream, commit)


def _checkout_with_data(repo: str, commit: str) -> str:
    """Return a checkout of the commit if the repository contains its own DVC remote, which DVC reads from disk only.

    Otherwise return the repository itself. A project in a folder of the repository is in the same folder of the checkout.
    """
    if "/files/md5/" not in _git(["ls-tree", "-r", "--full-tree", "--name-only", commit], repo):
        return repo
    checkout = Path(repo, FOLDER, commit[:12])
    with flock(Path(repo, FOLDER, "lock")):
        if not (checkout / ".git").exists():
            _git(["worktree", "add", "--quiet", "--force", "--detach", str(checkout.absolute()), commit], repo)
        for old in checkout.parent.iterdir():
            if old.is_dir() and old != checkout and time.time() - old.stat().st_mtime > DAY:
                _git(["worktree", "remove", "--force", str(old.absolute())], repo)
    return str(checkout / folder_in_repository(repo))


def branch_for_retraining(folder: str | Path) -> str:
    """Return the branch from which a new project is retrained: main; without it, the branch that is checked out.

    git calls the first branch of a repository master, unless `init.defaultBranch` says otherwise.
    """
    checked_out = git_or_none(["symbolic-ref", "--quiet", "--short", "HEAD"], folder)
    return checked_out if checked_out and MAIN not in branches(folder) else MAIN


def branches(repo: str | Path, remote: str = "origin") -> list[str]:
    """Return the names of a repository's branches, its own and those of a remote; none before the first commit."""
    patterns = ["refs/heads", f"refs/remotes/{remote}"]
    listed = git_or_none(["for-each-ref", "--format=%(refname)", *patterns], repo) or ""
    names = (line.removeprefix("refs/heads/").removeprefix(f"refs/remotes/{remote}/") for line in listed.split())
    return sorted(set(names) - {"HEAD"})


def _no_branch(branch: str, repo: str) -> BadConfig:
    known = [] if is_url(repo) else branches(repo)
    return BadConfig(
        "There is no such branch.",
        where=f"{branch} in {repo}",
        expected=f"one of {', '.join(known)}" if known else "",
        next_step=f"set `branch` in the parameters of the deployment in prefect.yaml, such as branch: {known[0]}, then "
        "`loraflow deploy`"
        if known
        else "correct retrain's `branch` parameter",
    )


def _git(arguments: list[str], folder: str | None) -> str:
    try:
        return git(arguments, folder)
    except GitError as error:
        failure = Network if arguments[0] in ("fetch", "ls-remote", "push") else BadConfig
        raise failure(
            CANNOT.get(arguments[0], "Git cannot look at the branch."),
            where=error.command,
            got=str(error),
            next_step=error.next_step or _next_step(str(error)),
        ) from error


CANNOT = {
    "push": "Git cannot push the branch.",
    "add": "Git cannot commit the dataset's version.",
    "commit": "Git cannot commit the dataset's version.",
}


def _next_step(error: str) -> str:
    """Return what to do about an error of git. It does not know who commits in a new account or a container."""
    if any(sign in error for sign in ("auto-detect", "tell me who you are", "empty ident", " was given and ")):
        return "git config user.name NAME; git config user.email ADDRESS; then run it again"
    return "run the same command by hand on the worker's machine"
