"""What `loraflow data diff` compares: a file, a folder, a run, or a git revision of a dataset's `.dvc` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.compare import Version
    from loraflow.store import Store


def read_versions(old: str, new: str | None, source: str, store: str) -> tuple[Version, Version]:
    """Read the rows of two versions. The store is opened only if one of them is a run.

    Args:
        old: as in version_of.
        new: as in version_of.
        source: the dataset's `.dvc` file.
        store: location of the store.
    """
    from loraflow.store import open_store

    if not any(map(_is_run, (old, new))):
        return version_of(old, source, None), version_of(new, source, None)
    opened = open_store(store)
    with opened.reader_lock():
        return version_of(old, source, opened), version_of(new, source, opened)


def _is_path(name: str | None) -> TypeGuard[str]:
    return name is not None and Path(name).exists() and not name.endswith(".dvc")


def _is_run(name: str | None) -> TypeGuard[str]:
    from loraflow.registry.runs import RUN_ID

    return name is not None and not _is_path(name) and RUN_ID.fullmatch(name) is not None


def version_of(name: str | None, source: str, store: Store | None) -> Version:
    """Read the rows of a version.

    Args:
        name: a file, a folder, a run's id, or a git revision of `source`. None is the dataset in the work tree, as it is
            there; the pinned version, if the work tree does not have it.
        source: the dataset's `.dvc` file.
        store: where runs are; None if the name is no run's.

    Raises:
        BadConfig: a revision is named, and `source` is no `.dvc` file.
        BadData: the version cannot be read.
    """
    from loraflow.config.data import Data
    from loraflow.data.compare import read_files, read_revision
    from loraflow.data.dvc_pin import read_pin
    from loraflow.data.readers import match_files

    if name is None and source.endswith(".dvc") and Path(pinned := read_pin(".", source, None).path).exists():
        name = pinned
    if _is_path(name):
        path = Path(name)
        folder, patterns = (path, ["*"]) if path.is_dir() else (path.parent, [path.name])
        return read_files(folder, match_files(folder, patterns), "auto", {})
    if store is not None and _is_run(name):
        return _of_run(name, store)
    if not source.endswith(".dvc"):
        raise BadConfig(
            "Only a dataset with a .dvc file has revisions.",
            where=f"--source {source}",
            expected="data.dvc",
            next_step="name its .dvc file with --source, or compare files, folders or runs",
        )
    return read_revision(Data(source=source, rev=name))


def _of_run(name: str, store: Store) -> Version:
    """Read the dataset of a run, as the run read it."""
    from loraflow.data.compare import read_files
    from loraflow.data.readers import match_files
    from loraflow.registry.runs import read_run
    from loraflow.store import hash_memo, require_intact

    record = read_run(store, name)
    if record is None:
        raise BadConfig("There is no such run.", where=name, next_step="`loraflow runs` lists them")
    stage = record.stage("version_dataset")
    ref = store.find("version_dataset", stage.fingerprint) if stage is not None else None
    if ref is None:
        raise BadData(
            "The dataset of this run is not in the store any more.",
            where=name,
            next_step="name the git revision of its .dvc file instead",
        )
    require_intact(store, ref, hash_memo(store))
    data = record.section("data")
    columns, form = data.get("columns"), data.get("format")
    folder = store.path(ref) / "files"
    used = {key: str(value) for key, value in columns.items()} if isinstance(columns, dict) else {}
    ignore = data.get("ignore")
    ignored = [str(key) for key in ignore] if isinstance(ignore, list) else []
    return read_files(folder, match_files(folder, ["*"]), form if isinstance(form, str) else "auto", used, ignored)
