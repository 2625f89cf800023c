"""Verify pinned data without DVC; call DVC to add, push, pull and fetch.

DVC's id of a folder is the md5 of a JSON list of its files' md5s. Computing it here takes milliseconds, where
`dvc data status` takes most of a second.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path, PurePosixPath
from shlex import quote

from loraflow.data.files.dataset_files import IgnoreRules, cache_folder, dataset_file, dataset_files
from loraflow.data.versions.dvc_pin import Pin, check_names, read_pin, show_git
from loraflow.data.versions.dvc_storage import check_remote, copy_from_storage, prepare_pull, remotes, run_dvc
from loraflow.data.versions.git import git_or_none, is_url
from loraflow.failures import BadData, DirtyData
from loraflow.store.files import HashMemo
from loraflow.store.lock import flock

__all__ = ["Pin", "add", "dvc_md5", "fetch", "pull", "read_pin", "refuse_modified", "resolve_commit", "work_tree_md5"]
log = logging.getLogger(__name__)


def resolve_commit(repo: str, rev: str) -> str:
    """Return the commit that a revision names, for provenance."""
    if is_url(repo):
        found = show_git(["ls-remote", "--", repo, rev], None, repo).split()
        return found[0] if found else rev
    return show_git(["rev-parse", "--verify", f"{rev}^{{commit}}"], repo, f"{rev} in {repo}").strip()


def work_tree_md5(path: Path, memo: HashMemo | None = None) -> str:
    """Return DVC's id of a folder or file in a work tree, without what DVC ignores.

    Raises:
        BadData: as `dvc_md5`.
    """
    return dvc_md5(path, memo, IgnoreRules(path))


def dvc_md5(path: Path, memo: HashMemo | None = None, ignored: IgnoreRules | None = None) -> str:
    """Return DVC's id of a folder (`….dir`) or of a file.

    Args:
        ignored: which files of the folder do not belong to the dataset; None if all do.

    Raises:
        BadData: the folder contains a link to anything but DVC's cache, a pipe or a socket; or an object of the cache was
            changed through a link.
    """
    memo = memo or HashMemo(None)
    if not path.is_dir():
        return dataset_file(path).md5(memo)
    rows = [{"md5": file.md5(memo), "relpath": file.name} for file in dataset_files(path, ignored)]
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
    got = work_tree_md5(output, memo)
    if got != pin.md5:
        raise DirtyData(
            f"{pin.path} differs from the version that {pin.dvc_file} pins.",
            where=str(output),
            expected=f"md5 {pin.md5}",
            got=f"md5 {got}",
            next_step=f"`loraflow data add {quote(pin.path)}` to version the change, or "
            f"`dvc checkout --force {quote(pin.dvc_file)}` to discard it",
        )


def fetch(repo: str, pin: Pin, rev: str | None, target: Path, memo: HashMemo, remote: str | None = None) -> None:
    """Write the pinned files below `target` and verify them.

    They are copied from the work tree if it matches the pin, else read from DVC's cache or remote.

    Raises:
        DirtyData: a folder without a `.dvc` file was changed after its md5 was computed.
        MissingData: neither the cache nor a remote has the files.
        BadConfig: the remote does not exist.
        BadData: the files differ from the pin.
    """
    output = Path(repo, pin.path)
    if not is_url(repo) and output.exists() and _has_pinned_content(output, pin, rev, memo):
        if output.is_file():
            shutil.copyfile(output, target / output.name)
        else:
            for file in dataset_files(output, _ignored(output, pin)):
                copy = target / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.path, copy)
    elif not pin.dvc_file:
        raise DirtyData(
            "The dataset was changed or removed while the run was starting.",
            where=str(output),
            expected=f"md5 {pin.md5}",
            next_step="run again when nothing writes to it",
        )
    else:
        copy_from_storage(repo, pin, rev, target, remote)
    got = dvc_md5(target if pin.is_folder else target / PurePosixPath(pin.path).name)
    if got != pin.md5:
        raise BadData(
            "The data from DVC does not match the pin: an object in its cache or remote is damaged.",
            where=f"{pin.path} of {repo}",
            expected=f"md5 {pin.md5}",
            got=f"md5 {got}",
            next_step="delete the object from .dvc/cache and pull again, with `verify = true` on the remote",
        )


def _ignored(output: Path, pin: Pin) -> IgnoreRules | None:
    """Return which files do not belong to a dataset. A plain folder, which DVC does not know, is used as it is."""
    return IgnoreRules(output) if pin.dvc_file else None


def _has_pinned_content(output: Path, pin: Pin, rev: str | None, memo: HashMemo) -> bool:
    """Tell whether the work tree has the pinned files. A revision may differ from it, so links are not an error then."""
    try:
        return dvc_md5(output, memo, _ignored(output, pin)) == pin.md5
    except BadData:
        if rev is None:
            raise
        return False


def add(folder: str, *, push: bool = True, remote: str | None = None) -> Pin:
    """Version a folder or file: `dvc add`, and `dvc push` if there is a remote. Return the new pin.

    Raises:
        BadConfig: the remote does not exist; nothing was added.
        BadData: the folder does not exist, or DVC failed.
    """
    source = Path(folder)
    if not source.exists():
        raise BadData("There is nothing to add.", where=folder, next_step="pass an existing folder or file of chats")
    work_tree_md5(source)  # refuses links before DVC follows them
    names = [file.name for file in dataset_files(source, IgnoreRules(source))] if source.is_dir() else [source.name]
    check_names(names, folder, "rename the file")  # a pull would refuse it
    if push and remote is not None:
        check_remote(remote, ".")
    make_repository()
    run_dvc(["add", "--", folder])
    pin = read_pin(".", f"{folder.rstrip('/')}.dvc", None)
    if push:
        push_pin(pin, remote)
    return pin


def push_pin(pin: Pin, remote: str | None = None) -> None:
    """Push a pinned dataset; without any remote, or if the default one is in git, only warn.

    Raises:
        BadData: DVC failed.
    """
    if not remotes("."):
        log.warning(
            "no DVC remote is set up: the data is versioned on this machine only (`dvc remote add -d NAME URL`)"
        )
    elif remote is None and (folder := _remote_in_git()):
        log.warning(
            "not pushed: git would keep your data, because the DVC remote %s is in this repository "
            "(`dvc remote add -f -d NAME URL` outside of it, or add it to .gitignore)",
            folder,
        )
    else:
        run_dvc(["push", *(["--remote", remote] if remote else []), "--", pin.dvc_file])


def _remote_in_git() -> Path | None:
    """Return the folder of the default remote if git would add its files, as in a clone of loraflow."""
    from dvc.config import Config

    config, top = Config(".dvc"), git_or_none(["rev-parse", "--show-toplevel"])
    url = config["remote"].get(config["core"].get("remote"), {"url": "s3://"})["url"].removeprefix("file://")
    folder = Path(url).resolve()
    if not top or "://" in url or not folder.is_relative_to(top) or ".git" in folder.parts:
        return None
    return None if git_or_none(["check-ignore", "--", f"{folder}/files/md5/00/x"]) else folder


def cache_objects(folder: Path) -> list[Path]:
    """Return the files in the cache of the current repository that `dvc add` of a folder writes, if they are not there.

    Raises:
        BadData: as `dvc_md5`.
    """
    cache = cache_folder(Path.cwd())
    if cache is None:
        return []
    ignored = IgnoreRules(folder)
    hashes = {file.md5(HashMemo(None)) for file in dataset_files(folder, ignored)} | {work_tree_md5(folder)}
    return [cache / "files" / "md5" / md5[:2] / md5[2:] for md5 in sorted(hashes)]


def make_repository() -> None:
    """Make the current folder a repository of DVC if it is not one, in one process at a time."""
    repo = Path.cwd()
    if (repo / ".dvc" / "config").exists():
        return
    ignored_by_git = repo / (".git" if (repo / ".git").is_dir() else ".loraflow")
    with flock(lock := ignored_by_git / "loraflow-dvc.lock"):
        try:
            if not (repo / ".dvc").exists():
                run_dvc(["init", *([] if (repo / ".git").exists() else ["--no-scm"])])
        finally:
            lock.unlink(missing_ok=True)


def pull(dvc_file: str, *, remote: str | None = None) -> Pin:
    """Pull pinned files into the work tree, and verify them. Return the pin.

    Raises:
        BadConfig: the remote does not exist.
        BadData: the `.dvc` file or its list of files is damaged or unsafe, or DVC failed.
    """
    if remote is not None:
        check_remote(remote, ".")
    pin = read_pin(".", dvc_file, None)
    prepare_pull(".", pin, remote)
    run_dvc(["pull", *(["--remote", remote] if remote else []), "--", pin.dvc_file])
    refuse_modified(".", pin, HashMemo(None))
    return pin
