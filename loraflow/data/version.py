"""Stage version_dataset: store the pinned files, verified, as an artifact.

The md5 of the files is their identity. The git revision is provenance.
"""

from __future__ import annotations

from pathlib import Path

from loraflow.config.data import Data
from loraflow.config.data_sources import DataSource
from loraflow.config.locations import DatasetLocation, DvcOrigin, FolderOrigin, SourcesOrigin
from loraflow.config.stage_configs import VersionDatasetConfig
from loraflow.data import dvc
from loraflow.data.git import is_url
from loraflow.data.source_files import locate_sources, refuse_other_sources
from loraflow.failures import BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.files import HashMemo


def locate(data: Data, memo: HashMemo) -> DatasetLocation:
    """Return the dataset that a recipe names: its md5, and where to read its files.

    Raises:
        DirtyData: the files in the work tree differ from the pin.
        BadData: the dataset does not exist, or its `.dvc` file cannot be read.
    """
    if data.sources:
        return locate_sources(data.sources, memo, locate_one)
    return locate_one(data, memo)


def locate_one(data: Data | DataSource, memo: HashMemo, key: str = "data.source") -> DatasetLocation:
    """Return a single dataset: see `locate`. `key` is the recipe's, for messages."""
    if data.source.endswith(".dvc"):
        pin = dvc.read_pin(data.repo, data.source, data.rev, key)
        if data.rev is None and not is_url(data.repo):
            dvc.refuse_modified(data.repo, pin, memo)
        commit = dvc.resolve_commit(data.repo, data.rev) if data.rev else None
        name = Path(pin.path).name
        origin = DvcOrigin(
            dvc_file=pin.dvc_file,
            path=pin.path,
            md5=pin.md5,
            repo=data.repo,
            rev=data.rev,
            commit=commit,
            remote=data.remote,
        )
        return DatasetLocation(md5=pin.md5, name=name, origin=origin)
    source = Path(data.source)
    if not source.exists():
        raise BadData(
            "The dataset does not exist.",
            where=data.source,
            expected="a .dvc file, or a folder or file of chats",
            next_step="correct data.source" if isinstance(data, Data) else "correct source",
        )
    origin_folder = FolderOrigin(folder=str(source.absolute()))
    return DatasetLocation(md5=dvc.dvc_md5(source, memo), name=source.name, origin=origin_folder)


def run(job: Job[VersionDatasetConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write the pinned files to `out/files/`.

    Raises:
        MissingData: neither DVC's cache nor a remote has the files.
        BadData: the files differ from the pin.
    """
    origin, md5 = job.runtime.origin, job.config.md5
    files = out / "files"
    files.mkdir()
    memo = HashMemo(None)
    if isinstance(origin, SourcesOrigin):
        refuse_other_sources(origin, job.config)
        for name, parts in origin.sources.items():
            for part in parts:
                target = (files / name / part.path).parent if part.path else files / name
                target.mkdir(parents=True, exist_ok=True)
                fetch_one(part.origin, part.md5, target, memo)
    elif isinstance(origin, FolderOrigin | DvcOrigin):
        fetch_one(origin, md5, files, memo)
    else:
        raise TypeError(f"not the origin of a dataset: {origin!r}")
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    size = sum((files / name).stat().st_size for name in names)
    return Summary(figures={"md5": md5, "files": len(names), "bytes": size})


def fetch_one(origin: FolderOrigin | DvcOrigin, md5: str, target: Path, memo: HashMemo) -> None:
    """Write the files of a single dataset to a folder. It raises what `run` raises."""
    if isinstance(origin, FolderOrigin):
        source = Path(origin.folder)
        dvc.fetch(str(source.parent), dvc.Pin("", source.name, md5), None, target, memo)
    else:
        pin = dvc.Pin(origin.dvc_file, origin.path, md5)
        dvc.fetch(origin.repo, pin, origin.commit or origin.rev, target, memo, origin.remote)
