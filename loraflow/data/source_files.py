"""The files of the sources of a mixture (`data.sources`): where they are, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from loraflow.config.data_sources import DataSource
from loraflow.config.locations import DatasetLocation, DvcOrigin, FolderOrigin, SourcePart, SourcesOrigin
from loraflow.config.stage_configs import VersionDatasetConfig
from loraflow.data import dvc
from loraflow.data.hidden_files import is_hidden
from loraflow.data.sqlite_reader import plain_query, refuse_unsaved
from loraflow.failures import BadData, Failure
from loraflow.store.files import HashMemo

_Locate = Callable[[DataSource, HashMemo], DatasetLocation]


def locate_sources(sources: list[DataSource], memo: HashMemo, locate_one: _Locate) -> DatasetLocation:
    """Return a mixture: the md5 over its sources' names and contents, and where to read each of them.

    Raises:
        Failure: as `locate_one`, with the number and name of the source; or a pattern matches no file.
    """
    found: dict[str, list[SourcePart]] = {}
    places: dict[str, str] = {}  # file → the source that has it
    for number, source in enumerate(sources, 1):
        label = f"source {number} ({source.key})"
        try:
            parts = _parts(source, memo, locate_one)
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


def _parts(source: DataSource, memo: HashMemo, locate_one: _Locate) -> list[SourcePart]:
    if not source.is_pattern or Path(source.source).exists():  # chats[1].jsonl is also a file's name
        found = locate_one(source, memo)
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
    if isinstance(part.origin, FolderOrigin):
        return str(Path(part.origin.folder).resolve())
    return f"{part.origin.path} of {part.origin.repo}" + (f" at {part.origin.rev}" if part.origin.rev else "")


def _md5s(sources: Mapping[str, list[SourcePart]]) -> dict[str, dict[str, str]]:
    return {name: {part.path: part.md5 for part in parts} for name, parts in sources.items()}


def _md5(sources: Mapping[str, Mapping[str, str]]) -> str:
    text = json.dumps(sources, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"
