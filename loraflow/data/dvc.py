"""What a `.dvc` file pins, checked without DVC; and the few calls of DVC that we make.

DVC's id of a folder is the md5 of a JSON list of its files' md5s, so that data can be verified, and dirt found,
in-process: `dvc data status` alone costs most of a second. DVC itself is used to fetch, add and push.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from loraflow.failures import BadConfig, BadData, DirtyData, Failure, MissingData, Network
from loraflow.store.files import HashMemo, files_below

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """What a `.dvc` file says: the md5 of its one output, and where that lies."""

    dvc_file: str  # relative to the repository
    path: str  # of the output, relative to the repository
    md5: str

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of files."""
        return self.md5.endswith(".dir")


def read_pin(repo: str, dvc_file: str, rev: str | None) -> Pin:
    """Read a `.dvc` file from the work tree, or from a git revision of a repository.

    Raises:
        BadData: the file or the revision is missing, or it pins something that cannot be verified.
    """
    where = f"{dvc_file}{f' at {rev}' if rev else ''} in {repo}"
    if rev is None and not is_url(repo):
        try:
            text = Path(repo, dvc_file).read_text(encoding="utf-8")
        except OSError as error:
            raise BadData(
                "The dataset's .dvc file cannot be read.",
                where=where,
                got=error.strerror or str(error),
                next_step="`loraflow data add FOLDER` versions a folder with DVC; data.source names its .dvc file",
            ) from error
    else:
        text = _git_show(repo, rev or "HEAD", dvc_file, where)
    try:
        outs = yaml.safe_load(text)["outs"]
        (out,) = outs
        md5, path, algorithm = out["md5"], out["path"], out.get("hash")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadData(
            "The .dvc file pins no single output by md5.",
            where=where,
            expected="one entry under `outs` with `md5`, `hash: md5` and `path`",
            got=f"{type(error).__name__}: {error}",
            next_step="version the folder with `dvc add`",
        ) from error
    if algorithm != "md5":
        raise BadData(
            "The .dvc file is of DVC 2 or older, whose md5 is not that of the bytes.",
            where=where,
            expected="hash: md5",
            got=f"hash: {algorithm}",
            next_step=f"dvc add {path}   (rewrites the .dvc file)",
        )
    place = PurePosixPath(dvc_file).parent / path
    if place.is_absolute() or ".." in place.parts:
        raise BadData("The .dvc file points out of its repository.", where=where, got=str(place))
    return Pin(dvc_file, place.as_posix(), md5)


def head_of(repo: str, rev: str) -> str:
    """Return the commit that a revision names, for provenance."""
    if is_url(repo):
        line = _git(["ls-remote", "--", repo, rev], None, repo).split()
        return line[0] if line else rev
    return _git(["rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}"], repo, f"{rev} in {repo}").strip()


def tree_md5(path: Path, memo: HashMemo | None = None) -> str:
    """Return DVC's id of a folder (`….dir`) or of a file.

    Raises:
        BadData: a link, pipe or socket below the folder; DVC follows the first silently and loses others.
    """
    memo = memo or HashMemo(None)
    if path.is_file() and not path.is_symlink():
        return memo.hash(path, "md5")
    try:
        rows = [{"md5": memo.hash(file, "md5"), "relpath": name} for name, file in files_below(path)]
    except ValueError as error:
        raise BadData(
            "A dataset holds regular files only.", where=str(error), next_step="copy the file there"
        ) from error
    rows = [row for row in rows if not row["relpath"].endswith(".gitignore")]
    rows.sort(key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(rows).encode(), usedforsecurity=False).hexdigest() + ".dir"


def refuse_dirt(repo: str, pin: Pin, memo: HashMemo) -> bool:
    """Return whether the pinned files are in the work tree.

    Raises:
        DirtyData: they are there with other content: training on it would be training on no version.
    """
    place = Path(repo, pin.path)
    if not place.exists():
        return False
    got = tree_md5(place, memo)
    if got != pin.md5:
        raise DirtyData(
            f"{pin.path} is not what {pin.dvc_file} pins.",
            where=str(place),
            expected=f"md5 {pin.md5}",
            got=f"md5 {got}",
            next_step=f"`dvc add {pin.path}` to make a version of it, or `dvc checkout --force {pin.dvc_file}` to go back",
        )
    return True


def fetch(repo: str, pin: Pin, rev: str | None, target: Path, memo: HashMemo, remote: str | None = None) -> None:
    """Write the pinned files below `target`: from the clean work tree, else from DVC's cache or remote, verified.

    Raises:
        MissingData: no cache or remote has them.
        BadConfig: there is no such remote.
        BadData: what came is not what is pinned.
    """
    place = Path(repo, pin.path)
    if not is_url(repo) and place.exists() and tree_md5(place, memo) == pin.md5:
        if place.is_file():
            shutil.copyfile(place, target / place.name)
        else:
            for name, file in files_below(place):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
    else:
        _fetch_through_dvc(repo, pin, rev, target, remote)
    got = tree_md5(target if pin.is_folder else target / PurePosixPath(pin.path).name)
    if got != pin.md5:
        raise BadData(
            "What DVC delivered is not what is pinned: an object in its cache or remote is damaged.",
            where=f"{pin.path} of {repo}",
            expected=f"md5 {pin.md5}",
            got=f"md5 {got}",
            next_step="delete the object from .dvc/cache and pull again, with `verify = true` on the remote",
        )


def _fetch_through_dvc(repo: str, pin: Pin, rev: str | None, target: Path, remote: str | None) -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.api import DVCFileSystem

    where = f"{pin.path}{f' at {rev}' if rev else ''} of {repo}"
    try:
        fs = DVCFileSystem(repo, rev=rev, remote=remote)
        for name in fs.find(pin.path):
            relative = PurePosixPath(name).relative_to(pin.path) if pin.is_folder else PurePosixPath(name).name
            place = target / _safe(str(relative), where)
            place.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(place))
    except Failure:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise Network("The DVC remote did not answer.", where=where, got=str(error)) from error
    except (
        Exception
    ) as error:  # DVC and its file systems raise dozens of kinds; all mean that the data is not to be had
        if remote is not None and not is_url(repo):
            _check_remote(remote, repo)
        raise MissingData(
            "The pinned data is neither in the work tree nor in DVC's cache, and its remote does not have it.",
            where=where,
            expected=f"md5 {pin.md5}",
            got=f"{type(error).__name__}: {error}".splitlines()[0][:300],
            next_step="`dvc remote list` shows the remotes; `dvc push` where the data was added; then run again",
        ) from error


def _safe(name: str, where: str) -> str:
    """Refuse a name that would be written outside of the target; DVC does not check the list that it downloads."""
    if ".." in PurePosixPath(name).parts or "\0" in name or name.startswith("/"):
        raise BadData("The dataset's file list holds a name that leads out of its folder.", where=where, got=name)
    return name


def add(folder: str, *, push: bool = True, remote: str | None = None) -> Pin:
    """Version a folder or file: `dvc add`, and `dvc push` if there is a remote. Return the new pin.

    Args:
        folder: what to version.
        push: whether to push it.
        remote: to which remote, if not to the default one.

    Raises:
        BadConfig: there is no such remote; nothing was added.
        BadData: DVC says no.
    """
    place = Path(folder)
    if not place.exists():
        raise BadData("There is nothing to add.", where=folder, next_step="name a folder or file of chats")
    tree_md5(place)  # refuses links before DVC follows them
    repo = Path.cwd()
    if push and remote is not None:
        _check_remote(remote, ".")
    if not (repo / ".dvc").exists():
        _dvc(["init", *([] if (repo / ".git").exists() else ["--no-scm"])])
    _dvc(["add", folder])
    pin = read_pin(".", f"{folder.rstrip('/')}.dvc", None)
    if push and _remotes("."):
        _dvc(["push", *(["--remote", remote] if remote else []), pin.dvc_file])
    elif push:
        log.warning("no DVC remote is set up: the data is versioned here only (`dvc remote add -d NAME URL`)")
    return pin


def pull(dvc_file: str, *, remote: str | None = None) -> None:
    """Bring pinned files into the work tree, from a remote if not from the default one.

    Raises:
        BadConfig: there is no such remote.
        BadData: DVC says no.
    """
    if remote is not None:
        _check_remote(remote, ".")
    _dvc(["pull", *(["--remote", remote] if remote else []), dvc_file])


def _remotes(repo: str) -> list[str]:
    """Return the names of a repository's remotes, those of the user's and the machine's configuration among them."""
    if not Path(repo, ".dvc").exists():
        return []
    found = _dvc(["config", "--list"], repo)  # `remote list` breaks its lines to fit a terminal
    return re.findall(r"^remote\.(.+?)\.url=", found, re.MULTILINE)


def _check_remote(remote: str, repo: str) -> None:
    have = _remotes(repo)
    if remote not in have:
        raise BadConfig(
            "There is no such DVC remote.",
            where=str(Path(repo).absolute()),
            expected=f"one of {', '.join(have)}" if have else "a remote; this repository has none",
            got=remote,
            next_step=f"`dvc remote add {remote} URL` makes it",
        )


def _dvc(arguments: list[str], repo: str = ".") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=repo,
        capture_output=True,
        text=True,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )
    if done.returncode:
        raise BadData(
            f"dvc {' '.join(arguments)} failed.", where=str(Path(repo).absolute()), got=done.stderr.strip()[-800:]
        )
    return done.stdout


def is_url(repo: str) -> bool:
    """Tell whether a repository is named by URL."""
    return "://" in repo or (repo.startswith("git@") and ":" in repo)


def _git_show(repo: str, rev: str, name: str, where: str) -> str:
    if is_url(repo):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _git(["clone", "--quiet", "--bare", "--filter=blob:none", "--", repo, folder], None, where)
            return _git(["show", "--end-of-options", f"{rev}:{name}"], folder, where)
    return _git(["show", "--end-of-options", f"{rev}:{name}"], repo, where)


def _git(arguments: list[str], cwd: str | None, where: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise BadData(
            "Git cannot show the dataset's .dvc file.",
            where=where,
            got=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}",
            next_step="`git log --oneline --all -- data.dvc` lists the revisions that have one",
        )
    return done.stdout
