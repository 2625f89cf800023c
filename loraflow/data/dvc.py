"""Read what a `.dvc` file pins and verify it without DVC; call DVC to add, push, pull and fetch.

DVC's id of a folder is the md5 of a JSON list of its files' md5s. Computing it here takes milliseconds, where
`dvc data status` takes most of a second.
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
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from loraflow.data.git import GitError, git, is_url
from loraflow.failures import BadConfig, BadData, DirtyData, Failure, MissingData, Network
from loraflow.store.files import HashMemo, files_below

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """What a `.dvc` file pins: one output, by path and md5."""

    dvc_file: str  # path of the .dvc file, relative to the repository
    path: str  # path of the output, relative to the repository
    md5: str  # ends in ".dir" for a folder

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.md5.endswith(".dir")


def read_pin(repo: str, dvc_file: str, rev: str | None) -> Pin:
    """Read a `.dvc` file from the work tree, or from a git revision.

    Raises:
        BadData: the file or the revision is missing, or the pin cannot be verified.
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
    return _parse_pin(text, dvc_file, where)


def _parse_pin(text: str, dvc_file: str, where: str) -> Pin:
    try:
        outs = yaml.safe_load(text)["outs"]
        (out,) = outs
        md5, path, algorithm = out["md5"], out["path"], out.get("hash")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadData(
            "The .dvc file does not pin exactly one output by md5.",
            where=where,
            expected="one entry under `outs` with `md5`, `hash: md5` and `path`",
            got=f"{type(error).__name__}: {error}",
            next_step="version the folder with `dvc add`",
        ) from error
    if algorithm != "md5":
        raise BadData(
            "The .dvc file was written by DVC 2 or older, whose md5 is not the md5 of the bytes.",
            where=where,
            expected="hash: md5",
            got=f"hash: {algorithm}",
            next_step=f"dvc add {path}   (rewrites the .dvc file)",
        )
    output = PurePosixPath(dvc_file).parent / path
    if output.is_absolute() or ".." in output.parts:
        raise BadData("The .dvc file names a path outside its repository.", where=where, got=str(output))
    return Pin(dvc_file, output.as_posix(), md5)


def resolve_commit(repo: str, rev: str) -> str:
    """Return the commit that a revision names, for provenance."""
    if is_url(repo):
        found = _git(["ls-remote", "--", repo, rev], None, repo).split()
        return found[0] if found else rev
    return _git(["rev-parse", "--verify", "--end-of-options", f"{rev}^{{commit}}"], repo, f"{rev} in {repo}").strip()


def dvc_md5(path: Path, memo: HashMemo | None = None) -> str:
    """Return DVC's id of a folder (`….dir`) or of a file.

    Raises:
        BadData: the folder contains a link, pipe or socket. DVC silently follows links to files and drops the others.
    """
    memo = memo or HashMemo(None)
    if path.is_file() and not path.is_symlink():
        return memo.hash(path, "md5")
    try:
        rows = [{"md5": memo.hash(file, "md5"), "relpath": name} for name, file in files_below(path)]
    except ValueError as error:
        raise BadData(
            "A dataset may contain only regular files.",
            where=str(error),
            next_step="replace it with a copy of the file, or remove it",
        ) from error
    rows = [row for row in rows if not row["relpath"].endswith(".gitignore")]
    rows.sort(key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(rows).encode(), usedforsecurity=False).hexdigest() + ".dir"


def refuse_modified(repo: str, pin: Pin, memo: HashMemo) -> None:
    """Refuse a work tree whose files differ from the pin. Files that are missing pass: `fetch` gets them from DVC.

    Raises:
        DirtyData: the files were changed and not versioned.
    """
    output = Path(repo, pin.path)
    if not output.exists():
        return
    got = dvc_md5(output, memo)
    if got != pin.md5:
        raise DirtyData(
            f"{pin.path} differs from the version that {pin.dvc_file} pins.",
            where=str(output),
            expected=f"md5 {pin.md5}",
            got=f"md5 {got}",
            next_step=f"`dvc add {pin.path}` to version the change, or `dvc checkout --force {pin.dvc_file}` to discard it",
        )


def fetch(repo: str, pin: Pin, rev: str | None, target: Path, memo: HashMemo, remote: str | None = None) -> None:
    """Write the pinned files below `target` and verify them.

    They are copied from the work tree if it matches the pin, else read from DVC's cache or remote.

    Raises:
        MissingData: neither the cache nor a remote has the files.
        BadConfig: the remote does not exist.
        BadData: the files differ from the pin.
    """
    output = Path(repo, pin.path)
    if not is_url(repo) and output.exists() and dvc_md5(output, memo) == pin.md5:
        if output.is_file():
            shutil.copyfile(output, target / output.name)
        else:
            for name, file in files_below(output):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
    else:
        _fetch_through_dvc(repo, pin, rev, target, remote)
    got = dvc_md5(target if pin.is_folder else target / PurePosixPath(pin.path).name)
    if got != pin.md5:
        raise BadData(
            "The data from DVC does not match the pin: an object in its cache or remote is damaged.",
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
            file = target / _safe(str(relative), where)
            file.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(file))
    except Failure:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise Network("The DVC remote did not answer.", where=where, got=str(error)) from error
    except Exception as error:  # DVC and its file systems raise dozens of types; all mean that the data is unavailable
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
    """Return a file's name if it stays inside the target folder; DVC does not check the list that it downloads.

    Raises:
        BadData: the name is a path outside the folder.
    """
    if ".." in PurePosixPath(name).parts or "\0" in name or name.startswith("/"):
        raise BadData("The dataset's file list names a path outside its folder.", where=where, got=name)
    return name


def add(folder: str, *, push: bool = True, remote: str | None = None) -> Pin:
    """Version a folder or file: `dvc add`, and `dvc push` if there is a remote. Return the new pin.

    Args:
        folder: the folder or file to version.
        push: whether to push it.
        remote: the DVC remote to push to; None is the default remote.

    Raises:
        BadConfig: the remote does not exist; nothing was added.
        BadData: the folder does not exist, or DVC failed.
    """
    source = Path(folder)
    if not source.exists():
        raise BadData("There is nothing to add.", where=folder, next_step="pass an existing folder or file of chats")
    dvc_md5(source)  # refuses links before DVC follows them
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
        log.warning(
            "no DVC remote is set up: the data is versioned on this machine only (`dvc remote add -d NAME URL`)"
        )
    return pin


def pull(dvc_file: str, *, remote: str | None = None) -> None:
    """Pull pinned files into the work tree.

    Args:
        dvc_file: the `.dvc` file that pins them.
        remote: the DVC remote to pull from; None is the default remote.

    Raises:
        BadConfig: the remote does not exist.
        BadData: DVC failed.
    """
    if remote is not None:
        _check_remote(remote, ".")
    _dvc(["pull", *(["--remote", remote] if remote else []), dvc_file])


def _remotes(repo: str) -> list[str]:
    """Return the names of a repository's DVC remotes, including those of the user's and the system's configuration."""
    if not Path(repo, ".dvc").exists():
        return []
    settings = _dvc(["config", "--list"], repo)  # `dvc remote list` wraps its lines to fit the terminal
    return [match[1] for match in re.finditer(r"^remote\.(.+?)\.url=", settings, re.MULTILINE)]


def _check_remote(remote: str, repo: str) -> None:
    have = _remotes(repo)
    if remote not in have:
        raise BadConfig(
            "There is no such DVC remote.",
            where=str(Path(repo).absolute()),
            expected=f"one of {', '.join(have)}" if have else "a remote; this repository has none",
            got=remote,
            next_step=f"`dvc remote add {remote} URL` creates it",
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


def _git_show(repo: str, rev: str, name: str, where: str) -> str:
    """Return a file's text at a revision. A repository given by URL is cloned without its files first."""
    if is_url(repo):
        with tempfile.TemporaryDirectory() as folder:
            _git(["clone", "--quiet", "--bare", "--filter=blob:none", "--", repo, folder], None, where)
            return _git(["show", "--end-of-options", f"{rev}:{name}"], folder, where)
    return _git(["show", "--end-of-options", f"{rev}:{name}"], repo, where)


def _git(arguments: list[str], folder: str | None, where: str) -> str:
    try:
        return git(arguments, folder)
    except GitError as error:
        raise BadData(
            "Git cannot show the dataset's .dvc file.",
            where=where,
            got=str(error),
            next_step="`git log --oneline --all -- data.dvc` lists the revisions that have one",
        ) from error
