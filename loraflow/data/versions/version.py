"""Stage version_dataset: store the pinned files, verified, as an artifact.

The md5 of the files is their identity. The git revision is provenance. The files of `data.sources` are found here, too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from loraflow.config.data import Data
from loraflow.config.data_sources import DataSource
from loraflow.config.locations import (
    DatasetLocation,
    DvcOrigin,
    FolderOrigin,
    RemoteOrigin,
    SourcePart,
    SourcesOrigin,
)
from loraflow.config.stage_configs import VersionDatasetConfig
from loraflow.data.files.dataset_files import is_hidden
from loraflow.data.files.table_readers import plain_query, refuse_unsaved
from loraflow.data.versions import dvc
from loraflow.data.versions.git import is_url
from loraflow.failures import BadData, Failure
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
        return locate_sources(data.sources, memo, locate_dataset)
    return locate_dataset(data, memo)


def locate_dataset(data: Data | DataSource, memo: HashMemo, key: str = "data.source") -> DatasetLocation:
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
            next_step=_way(data),
        )
    origin_folder = FolderOrigin(folder=str(source.absolute()))
    return DatasetLocation(md5=dvc.dvc_md5(source, memo), name=source.name, origin=origin_folder)


def _way(data: Data | DataSource) -> str:
    """Return what to do about a source that does not exist."""
    if isinstance(data, DataSource):
        return "correct source"
    if data.source.startswith(("hf://", "s3://")):
        return "name it in data.sources, instead of data.source"
    return "correct data.source"


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
                if isinstance(part.origin, RemoteOrigin):
                    from loraflow.data.versions.remote_files import fetch_remote

                    fetch_remote(part.origin.url, part.md5, files / name / part.path)
                else:
                    fetch_dataset(part.origin, part.md5, target, memo)
    elif isinstance(origin, FolderOrigin | DvcOrigin):
        fetch_dataset(origin, md5, files, memo)
    else:
        raise TypeError(f"not the origin of a dataset: {origin!r}")
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    size = sum((files / name).stat().st_size for name in names)
    return Summary(figures={"md5": md5, "files": len(names), "bytes": size})


def fetch_dataset(origin: FolderOrigin | DvcOrigin, md5: str, target: Path, memo: HashMemo) -> None:
    """Write the files of a single dataset to a folder. It raises what `run` raises."""
    if isinstance(origin, FolderOrigin):
        source = Path(origin.folder)
        dvc.fetch(str(source.parent), dvc.Pin("", source.name, md5), None, target, memo)
    else:
        pin = dvc.Pin(origin.dvc_file, origin.path, md5)
        dvc.fetch(origin.repo, pin, origin.commit or origin.rev, target, memo, origin.remote)


_Locate = Callable[[DataSource, HashMemo], DatasetLocation]


def locate_sources(sources: list[DataSource], memo: HashMemo, locate_dataset: _Locate) -> DatasetLocation:
    """Return a mixture: the md5 over its sources' names and contents, and where to read each of them.

    Raises:
        Failure: as `locate_dataset`, with the number and name of the source; or a pattern matches no file.
    """
    found: dict[str, list[SourcePart]] = {}
    places: dict[str, str] = {}  # file → the source that has it
    for number, source in enumerate(sources, 1):
        label = f"source {number} ({source.key})"
        try:
            parts = _parts(source, memo, locate_dataset)
        except Failure as failure:
            failure.what = f"{label[0].upper()}{label[1:]}: {failure.what}"
            raise
        for part in parts:
            place = _place(part)
            if query := plain_query(source.query):
                place += f", {query}"  # another query of the same database gives other rows
            if place in places and source.files == ["*"]:
                raise BadData(
                    f"{label[0].upper()}{label[1:]} and {places[place]} have the same file.",
                    where=place,
                    expected="each file in one source: its weight says how often its rows are used",
                    next_step="remove it from one of them",
                )
            places.setdefault(place, label)
        found[source.key] = parts
    return DatasetLocation(md5=_md5(_md5s(found)), name="data.sources", origin=SourcesOrigin(sources=found))


def refuse_other_sources(origin: SourcesOrigin, config: VersionDatasetConfig) -> None:
    """Refuse origins that are not those of the config, which is what the artifact is found by.

    Raises:
        BadData: they differ.
    """
    got = _md5s(origin.sources)
    if got != config.sources or _md5(got) != config.md5:
        raise BadData(
            "The sources are not those of the job.",
            where="data.sources",
            expected=config.md5,
            got=_md5(got),
            next_step="run again when nothing writes to the files",
        )


def wrong_sources(files: Path, sources: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return which files of a version_dataset artifact do not have the md5 that its config names."""
    return [
        f"{name}/{path} has md5 {got}"
        for name, parts in sources.items()
        for path, md5 in parts.items()
        if (got := dvc.dvc_md5(files / name / path, HashMemo(None))) != md5
    ]


def _parts(source: DataSource, memo: HashMemo, locate_dataset: _Locate) -> list[SourcePart]:
    if source.is_remote:
        from loraflow.data.versions.remote_files import locate_remote

        return locate_remote(source)
    if not source.is_pattern or Path(source.source).exists():  # chats[1].jsonl is also a file's name
        found = locate_dataset(source, memo)
        assert isinstance(found.origin, FolderOrigin | DvcOrigin)
        if isinstance(found.origin, FolderOrigin):
            refuse_unsaved(Path(found.origin.folder))
        name = "" if found.md5.endswith(".dir") else found.name
        return [SourcePart(path=name, md5=found.md5, origin=found.origin)]
    base, pattern = _split_pattern(source.source)
    paths = sorted(path for path in base.glob(pattern) if path.is_file() and not is_hidden(str(path.relative_to(base))))
    if not paths:
        raise BadData(
            "no file has a name of this pattern.",
            where=source.source,
            expected="a pattern relative to the working directory, such as chats/*.jsonl",
            next_step="correct source",
        )
    parts = []
    for path in paths:
        refuse_unsaved(path)
        origin = FolderOrigin(folder=str(path.absolute()))
        parts.append(SourcePart(path=path.relative_to(base).as_posix(), md5=dvc.dvc_md5(path, memo), origin=origin))
    return parts


def _split_pattern(source: str) -> tuple[Path, str]:
    """Return the folder that a pattern begins with, and the rest."""
    parts = Path(source).parts
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return Path(*parts[:first]), "/".join(parts[first:])


def _place(part: SourcePart) -> str:
    if isinstance(part.origin, RemoteOrigin):
        return part.origin.url
    if isinstance(part.origin, FolderOrigin):
        return str(Path(part.origin.folder).resolve())
    return f"{part.origin.path} of {part.origin.repo}" + (f" at {part.origin.rev}" if part.origin.rev else "")


def _md5s(sources: Mapping[str, list[SourcePart]]) -> dict[str, dict[str, str]]:
    return {name: {part.path: part.md5 for part in parts} for name, parts in sources.items()}


def _md5(sources: Mapping[str, Mapping[str, str]]) -> str:
    text = json.dumps(sources, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"
