"""Calls of the `dvc` command."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from loraflow.failures import BadConfig, BadData

log = logging.getLogger(__name__)
_LOCKED = "nable to acquire lock"


def run_dvc(arguments: list[str], repo: str = ".") -> str:
    """Run a DVC command and return its standard output. Wait for another DVC process that uses the repository.

    Raises:
        BadData: DVC failed.
    """
    done = _call(arguments, repo)
    if done.returncode and _LOCKED in done.stderr:
        log.warning("waiting for another DVC process in %s", Path(repo).absolute())
        done = _call(["--wait-for-lock", *arguments], repo)
    if done.returncode:
        is_locked = _LOCKED in done.stderr
        raise BadData(
            f"dvc {' '.join(arguments)} failed.",
            where=str(Path(repo).absolute()),
            got=done.stderr.strip()[-800:],
            next_step="wait until the other DVC process has ended, then repeat the command" if is_locked else "",
        )
    return done.stdout


def _call(arguments: list[str], repo: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # -P: a module of the repository, such as token.py, must not replace one of Python
        [sys.executable, "-P", "-m", "dvc", *arguments],
        cwd=repo,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )


def remotes(repo: str) -> list[str]:
    """Return the names of a repository's DVC remotes, including those of the user's and the system's configuration."""
    if not Path(repo, ".dvc").exists():
        return []
    settings = run_dvc(["config", "--list"], repo)  # `dvc remote list` wraps its lines to fit the terminal
    return [match[1] for match in re.finditer(r"^remote\.(.+?)\.url=", settings, re.MULTILINE)]


def check_remote(remote: str, repo: str) -> None:
    """Refuse a DVC remote that is not configured.

    Raises:
        BadConfig: there is no such remote.
    """
    have = remotes(repo)
    if remote not in have:
        raise BadConfig(
            "There is no such DVC remote.",
            where=str(Path(repo).absolute()),
            expected=f"one of {', '.join(have)}" if have else "a remote; this repository has none",
            got=remote,
            next_step=f"`dvc remote add {remote} URL` creates it",
        )
