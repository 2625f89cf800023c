"""Read pinned files from DVC's cache or remote. The list of a folder's files is checked before anything is written."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loraflow.credentials import reveal
from loraflow.data.versions.dvc_pin import MAX_LIST_BYTES, ListedFile, Pin, check_names, parse_listing
from loraflow.data.versions.git import folder_in_repository, is_url
from loraflow.failures import (
    BadConfig,
    BadData,
    Failure,
    MissingData,
    Network,
    StorageError,
    first_line,
    from_library_error,
)

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.hashfile.db import HashFileDB


log = logging.getLogger(__name__)


def copy_from_storage(repo: str, pin: Pin, rev: str | None, target: Path, remote: str | None) -> None:
    """Copy the pinned files from DVC's cache or remote into a folder. Their contents are not verified here.

    Raises:
        MissingData: neither the cache nor a remote has the files.
        BadConfig: the remote does not exist.
        BadData: the list of the files is damaged, or names a file outside its folder.
    """
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.api import DVCFileSystem

    with _translate_errors(repo, pin, rev, remote) as where:
        fs = DVCFileSystem(reveal(repo), rev=rev, remote=remote)
        path = _path_in(fs.repo, repo, pin, rev)
        if not pin.is_folder:
            fs.get_file(path, str(target / PurePosixPath(path).name))
            return
        listing = _find_listing(fs.repo, pin, remote)
        if listing is None:  # `dvc import`: the list is in the other repository, and DVC builds it while it reads
            found = [str(PurePosixPath(name).relative_to(path)) for name in fs.find(path)]
            check_names(found, where, "add the dataset again from its source")
        else:
            found = [file.name for file in listing[0]]
        for name in found:
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{path}/{name}", str(file))


def _path_in(opened: Repo, repo: str, pin: Pin, rev: str | None) -> str:
    """Return the path of a pin's output from the top of DVC's repository, which may be above the project's folder.

    DVC takes the top of git's repository for that of a revision.
    """
    if is_url(repo):
        return pin.path
    folder = folder_in_repository(repo) if rev is not None else os.path.relpath(Path(repo).resolve(), opened.root_dir)
    return posixpath.normpath(f"/{Path(folder).as_posix()}/{pin.path}")


def prepare_pull(repo: str, pin: Pin, remote: str | None) -> None:
    """Check what `dvc pull` would write. The list of the files is put into the cache first, where DVC looks first.

    Raises:
        MissingData: neither the cache nor a remote has the list.
        BadData: the list is damaged or names a file outside its folder, or the output is a link to another place.
    """
    root = Path(repo).resolve()
    output = Path(repo, pin.path)
    links = [path for path in (output, *output.parents) if path.is_symlink() and path != Path(repo)]
    if not output.resolve().is_relative_to(root):
        raise BadData(
            "The dataset's folder is a link to a place outside the project, where DVC would write.",
            where=str(links[0] if links else output),
            expected=f"a folder inside {root}",
            got=str(output.resolve()),
            next_step="remove the link, then pull again",
        )
    if not pin.is_folder:
        return
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.repo import Repo

    with _translate_errors(repo, pin, None, remote) as where:
        with Repo(repo) as opened:
            found = _find_listing(opened, pin, remote)
            if found is not None:
                _cache_listing(opened, pin, found[1])
            # DVC remembers lists by md5, also those of objects that were damaged when it read them.
            opened.drop_data_index()
        if found is not None:
            return
        run_dvc(["fetch", *(["--remote", remote] if remote else []), "--", pin.dvc_file], repo)  # `dvc import`
        with Repo(repo) as opened:
            if _find_listing(opened, pin, remote) is None:
                raise BadData(
                    "DVC has no list of the dataset's files.",
                    where=where,
                    expected=f"md5 {pin.md5}",
                    next_step="run `dvc push` where the data was added, then run again",
                )


def _find_listing(repo: Repo, pin: Pin, remote: str | None) -> tuple[list[ListedFile], bytes] | None:
    """Return the checked list of a folder's files and its bytes; None if it has to come from another repository."""
    raw = _read_object(repo.cache.local, pin.md5)
    if raw is not None:
        path = repo.cache.local.oid_to_path(pin.md5)
        return parse_listing(raw, pin.md5, path, f"rm -f '{path}'; then `loraflow data pull`"), raw
    outputs = [out for out in repo.index.outs if out.hash_info and out.hash_info.value == pin.md5]
    for out in outputs:
        name = remote or out.remote or repo.config["core"].get("remote")
        source = repo.cloud.get_remote(name) if name else None
        if source is None or source.fs.version_aware or source.worktree:
            continue
        raw = _read_object(source.odb, pin.md5)
        if raw is not None:
            where = f"{source.odb.oid_to_path(pin.md5)} of the remote {name}"
            step = "delete the object there, then `dvc push` on a machine that has the data"
            return parse_listing(raw, pin.md5, where, step), raw
    if any(out.stage.is_import for out in outputs):
        return None
    raise FileNotFoundError(f"no object {pin.md5} in the cache or the remote")


def _read_object(odb: HashFileDB, oid: str) -> bytes | None:
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            raw: bytes = file.read(MAX_LIST_BYTES + 1)
            return raw
    except FileNotFoundError:
        return None


def _cache_listing(repo: Repo, pin: Pin, raw: bytes) -> None:
    cache = repo.cache.local
    if cache.exists(pin.md5):
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "listing")
        file.write_bytes(raw)
        cache.add(str(file), cache.fs, pin.md5)


@contextmanager
def _translate_errors(repo: str, pin: Pin, rev: str | None, remote: str | None) -> Iterator[str]:
    where = f"{pin.path}{f' at {rev}' if rev else ''} of {repo}"
    try:
        yield where
    except Failure:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise Network(
            "The DVC remote did not answer.",
            where=where,
            got=str(error),
            next_step="check the network and `dvc remote list`, then run again",
        ) from error
    except sqlite3.OperationalError as error:
        raise StorageError(
            "DVC cannot use its database.",
            where=where,
            got=str(error),
            next_step="free space on the disks of the project and of DVC's cache, then run again",
        ) from error
    except Exception as error:  # DVC and its file systems raise dozens of types; all mean that the data is unavailable
        if known := from_library_error(error, where):
            raise known from error
        if remote is not None and not is_url(repo):
            check_remote(remote, repo)
        raise MissingData(
            "The pinned data is neither in the work tree nor in DVC's cache, and its remote does not have it.",
            where=where,
            expected=f"md5 {pin.md5}",
            got=first_line(error),
            next_step="`dvc remote list` shows the remotes; `dvc push` where the data was added; then run again",
        ) from error


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
        first = "wait until the other DVC process has ended" if is_locked else "correct what DVC names"
        raise BadData(
            f"dvc {' '.join(arguments)} failed.",
            where=str(Path(repo).absolute()),
            got=done.stderr.strip()[-800:],
            next_step=f"{first}, then repeat the command",
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
