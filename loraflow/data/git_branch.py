"""The newest dataset of a git branch, wherever that is: nobody has to pull on the machine that retrains.

Of the branch here and the one at the remote, the one that holds the other counts; where they parted, the remote's.
"""

from __future__ import annotations

import logging
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from loraflow.data.dvc import Pin, is_url
from loraflow.failures import BadConfig, Network
from loraflow.store.lock import flock

log = logging.getLogger("loraflow")
FOLDER = Path(".loraflow", "branches")
DAY = 24 * 3600


@dataclass(frozen=True)
class Newest:
    """Where the newest `.dvc` file is: what `data.repo` and `data.rev` shall be."""

    repo: str
    commit: str

    def settings(self) -> dict[str, str]:
        """Return the keys of the recipe that say so."""
        return {"data.repo": self.repo, "data.rev": self.commit}


def newest(repo: str, branch: str, remote: str = "origin") -> Newest:
    """Find the newest commit of a branch; fetched, but neither merged nor checked out.

    Raises:
        BadConfig: there is no such branch, or no repository.
        Network: the remote does not answer.
    """
    if is_url(repo):
        lines = _git(["ls-remote", "--", repo, f"refs/heads/{branch}"], None).split()
        if not lines:
            raise _no_branch(branch, repo)
        return Newest(repo, lines[0])
    if _ask(["rev-parse", "--git-dir"], repo) is None:
        raise BadConfig(
            "Retraining looks at a git branch, and here is no git repository.",
            where=str(Path(repo).absolute()),
            next_step="git init, or set data.repo to the repository that holds the .dvc file",
        )
    here = _ask(["rev-parse", "--verify", "--quiet", f"refs/heads/{branch}^{{commit}}"], repo)
    there = None
    if _ask(["remote", "get-url", remote], repo) is not None:
        kept = f"refs/loraflow/{remote}/{branch}"  # a ref of ours: FETCH_HEAD is anybody's
        if _git(["ls-remote", remote, f"refs/heads/{branch}"], repo):
            _git(["fetch", "--quiet", "--no-tags", remote, f"+refs/heads/{branch}:{kept}"], repo)
            there = _ask(["rev-parse", "--verify", "--quiet", kept], repo)
    if here is None and there is None:
        raise _no_branch(branch, repo)
    ahead = here and (there is None or _ask(["merge-base", "--is-ancestor", there, here], repo) is not None)
    commit = here if ahead else there
    assert commit is not None
    log.info("newest of %s is %s, of %s", branch, commit[:12], "this repository" if ahead else remote)
    return Newest(_carried(repo, commit), commit)


def commit(pin: Pin) -> None:
    """Commit a `.dvc` file, and nothing else that may be staged.

    Raises:
        BadConfig: git says no.
    """
    if committed(pin) is not None:
        return
    ignore = Path(pin.dvc_file).parent / ".gitignore"  # `dvc add` writes the folder's name into it
    names = [pin.dvc_file, *([str(ignore)] if ignore.exists() else [])]
    _git(["add", "--", *names], ".")
    _git(["commit", "--quiet", "-m", f"Dataset {pin.md5[:8]}", "--", *names], ".")


def committed(pin: Pin) -> str | None:
    """Return the commit that is checked out, if it pins this very dataset."""
    head = _ask(["rev-parse", "--verify", "--quiet", "HEAD"], ".")
    text = _ask(["show", f"HEAD:./{pin.dvc_file}"], ".")
    return head if text is not None and f"md5: {pin.md5}" in text else None


def push() -> None:
    """Push the branch that is checked out to where it follows.

    Raises:
        Network: the remote does not take it.
    """
    _git(["push", "--quiet"], ".")


def is_unpushed(made: str) -> bool:
    """Tell whether the branch follows one of a remote that does not have the commit yet."""
    upstream = _ask(["rev-parse", "--verify", "--quiet", "@{upstream}"], ".")
    return upstream is not None and _ask(["merge-base", "--is-ancestor", made, upstream], ".") is None


def _carried(repo: str, commit: str) -> str:
    """Return a checkout of the commit, if the repository carries its own DVC remote: DVC reads that from disk only."""
    if "/files/md5/" not in _git(["ls-tree", "-r", "--name-only", commit], repo):
        return repo
    place = Path(repo, FOLDER, commit[:12])
    with flock(Path(repo, FOLDER, "lock")):
        if not (place / ".git").exists():
            _git(["worktree", "add", "--quiet", "--force", "--detach", str(place.absolute()), commit], repo)
        for old in place.parent.iterdir():
            if old.is_dir() and old != place and time.time() - old.stat().st_mtime > DAY:
                _git(["worktree", "remove", "--force", str(old.absolute())], repo)
    return str(place)


def _no_branch(branch: str, repo: str) -> BadConfig:
    return BadConfig(
        "There is no such branch.", where=f"{branch} in {repo}", next_step="name it in retrain's `branch` parameter"
    )


def _ask(arguments: list[str], repo: str) -> str | None:
    """Return git's answer, or nothing where it says no."""
    done = _run(arguments, repo)
    return done.stdout.strip() if done.returncode == 0 else None


def _git(arguments: list[str], repo: str | None) -> str:
    done = _run(arguments, repo)
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    kind = Network if arguments[0] in ("fetch", "ls-remote", "push") else BadConfig
    raise kind(
        "Git cannot push the branch." if arguments[0] == "push" else "Git cannot look at the branch.",
        where=f"git {' '.join(arguments)}",
        got=said[0],
        next_step="the same command by hand, on the machine of the worker",
    )


def _run(arguments: list[str], repo: str | None) -> subprocess.CompletedProcess[str]:
    # No terminal is there to type a password into: a remote that wants one says no at once.
    env_command = ["git", "-c", "core.askPass=true", *arguments]
    return subprocess.run(env_command, cwd=repo, capture_output=True, text=True, stdin=subprocess.DEVNULL)
