"""What `loraflow data diff` compares: a file, a folder, a run, or a git revision of a dataset's `.dvc` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.compare import Version
    from loraflow.store import Store


def version_of(name: str | None, source: str, store: Store) -> Version:
    """Read the rows of a version.

    Args:
        name: a file, a folder, a run's id, or a git revision of `source`; None is the work tree.
        source: the dataset's `.dvc` file.
        store: where runs are.

    Raises:
        BadConfig: a revision is named, and `source` is no `.dvc` file.
        BadData: the version cannot be read.
    """
    from loraflow.config.recipe import Data
    from loraflow.data.compare import read_files, read_revision
    from loraflow.data.readers import match_files
    from loraflow.registry.runs import RUN_ID

    if name is not None and Path(name).exists() and not name.endswith(".dvc"):
        path = Path(name)
        folder, patterns = (path, ["*"]) if path.is_dir() else (path.parent, [path.name])
        return read_files(folder, match_files(folder, patterns), "auto", {})
    if name is not None and RUN_ID.fullmatch(name):
        return _of_run(name, store)
    if not source.endswith(".dvc"):
        raise BadConfig(
            "Only a dataset with a .dvc file has revisions.", where=f"--source {source}", expected="data.dvc"
        )
    return read_revision(Data(source=source, rev=name))


def _of_run(name: str, store: Store) -> Version:
    """Read the dataset of a run, as the run read it."""
    from loraflow.data.compare import read_files
    from loraflow.data.readers import match_files
    from loraflow.registry.runs import read_run

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
    data = record.section("data")
    columns, form = data.get("columns"), data.get("format")
    folder = store.path(ref) / "files"
    used = {key: str(value) for key, value in columns.items()} if isinstance(columns, dict) else {}
    return read_files(folder, match_files(folder, ["*"]), form if isinstance(form, str) else "auto", used)
