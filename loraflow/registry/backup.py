"""Copy a store to a folder while runs use it.

The documents are read before the artifacts: everything that the promotion log names was committed before, so it is
copied too. Among the documents, run records and anchors are read before the log, which may only be ahead of them. The copy
is written in the opposite order, so that it is a consistent store at any moment, also after a crash.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from loraflow.failures import BadConfig, CorruptArtifact, Failure
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.registry.anchor import models_with
from loraflow.registry.champions import missing_models
from loraflow.registry.deals import DealRecord
from loraflow.registry.log import PromotionLog, models
from loraflow.registry.looks import LookRecord
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.registry.runs import FOLDER as RUNS
from loraflow.registry.runs import damaged_runs
from loraflow.store import LocalStore, Ref, Store, hash_memo
from loraflow.store.artifact import result_problems
from loraflow.store.checksum import lost_checksum
from loraflow.store.files import HashMemo, is_inside, json_bytes

log = logging.getLogger("loraflow")
MARKER = "backup.json"  # in the copy: which store it is a copy of
_REGISTRY = "registry/"
_NUMBERED = re.compile(r"(registry/[^/]+/(?:log|looks|deals)/)(\d+)\.json")  # they refer to earlier ones, and to others


class Copied(NamedTuple):
    """An artifact that was copied, or the reason why it could not be."""

    ref: Ref
    size: int
    problem: str = ""


def back_up(store: Store, target: Path) -> Iterator[Copied]:
    """Copy artifacts, promotion logs, anchors and run records to a folder; yield each artifact that is new there.

    The folder is a store itself. A second backup to it copies what is new, and what was damaged there. Artifacts and
    intact run records that the store no longer has stay in it. Unfinished work and the quarantine are not copied.

    Raises:
        BadConfig: the folder has other files, or a copy of another store.
        DamagedLog: a promotion log, or a record of looks or deals, is damaged. An earlier copy in the folder stays as it is.
    """
    copy = _open_copy(store, target)
    with store.reader_lock():  # no cleanup removes artifacts meanwhile
        runs, anchors, registry = _read_consistently(store)
        yield from _copy_artifacts(store, copy)
    _write_documents(copy, registry)
    for name in copy.documents(_REGISTRY):  # entries whose loss was accepted
        if name not in registry:
            copy.remove_document(name)
    _write_documents(copy, anchors)
    _write_documents(copy, runs)
    for name in damaged_runs(copy).keys() - runs.keys():  # a person has removed the store's
        log.warning("%s is damaged and not in the store: it is removed from the backup", name)
        copy.remove_document(name)


class _Documents(NamedTuple):
    runs: dict[str, bytes]
    anchors: dict[str, bytes]
    registry: dict[str, bytes]


def _read_consistently(store: Store) -> _Documents:
    """Read run records and anchors, then the registry, which may only be ahead of them.

    If a person accepts a loss meanwhile, the registry is behind the anchors that were read before: then all are read again.
    """
    while True:
        runs = store.read_documents(RUNS)
        anchors = store.read_documents(f"{ANCHORS}/")
        for model in models(store, of_runs=True):
            PromotionLog(store, model).entries(all_runs=True)
        for model in models_with("looks", store):
            LookRecord(store, model).entries(all_runs=True)
        for model in models_with("deals", store):
            DealRecord(store, model).check()
        registry = _read_registry(store)
        if _accepted(store.documents(f"{ANCHORS}/")) == _accepted(anchors):
            return _Documents(runs, anchors, registry)


def _accepted(names: Iterable[str]) -> list[str]:
    """Return the documents that say that a person accepted a loss. They are written first, and never removed."""
    return sorted(name for name in names if "accepted-" in name.rsplit("/", 1)[1])


def _read_registry(store: Store) -> dict[str, bytes]:
    """Read the registry's documents, as they were at one moment.

    A listing may lack a file that is written meanwhile, and have a later one. So all are read twice: the second time has all
    that the first one names and refers to. Entries, looks and deals that are newer than the first time are left out.
    """
    last = dict[str, int]()
    for name in store.documents(_REGISTRY):
        if numbered := _NUMBERED.fullmatch(name):
            last[numbered[1]] = max(last.get(numbered[1], 0), int(numbered[2]))
    found = {}
    for name, data in store.read_documents(_REGISTRY).items():
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None or int(numbered[2]) <= last.get(numbered[1], 0):
            found[name] = data
    return found


def _write_documents(copy: LocalStore, documents: Mapping[str, bytes]) -> None:
    """Write documents that differ. A document that is damaged in the store does not replace the copy's."""
    for name, data in documents.items():
        before = copy.read_document(name) if is_inside(name) else data
        if before is None or (before != data and not lost_checksum(name, before, data)):
            copy.write_document(name, data)
        elif before != data:
            log.warning("%s is damaged in the store; the backup keeps its earlier copy", name)


def _open_copy(store: Store, target: Path) -> LocalStore:
    target = target.expanduser().absolute()
    source = Path(store.uri).absolute() if isinstance(store, LocalStore) else None
    if source is not None and (target == source or source in target.parents):
        raise BadConfig(
            "The backup cannot be inside the store.", where=str(target), next_step="name a folder elsewhere"
        )
    if not target.exists() or not any(target.iterdir()):
        target.mkdir(parents=True, exist_ok=True)
        copy = LocalStore(target)
        copy.write_document(MARKER, json_bytes({"store": store.uri, "created": time.time()}))
        return copy
    copy = LocalStore(target)
    try:
        origin = json.loads(copy.read_document(MARKER) or b"{}")["store"]
    except (ValueError, KeyError, TypeError):
        origin = "other files"
    if origin != store.uri:
        raise BadConfig(
            "This folder is not a backup of the store.",
            where=str(target),
            expected=f"an empty folder, or an earlier backup of {store.uri}",
            got=str(origin),
            next_step="name another folder",
        )
    return copy


def _copy_artifacts(store: Store, copy: LocalStore) -> Iterator[Copied]:
    memo = hash_memo(copy)
    try:
        for ref in store.artifacts():
            if is_new := not _has_intact_copy(store, copy, ref, memo):
                try:
                    manifest = store.manifest(ref)
                    problems = copy.adopt(store.path(ref), manifest)
                except (CorruptArtifact, FileNotFoundError) as error:  # a run may quarantine it at this moment
                    manifest, problems = None, [str(error).splitlines()[0]]
                if problems or manifest is None:
                    yield Copied(ref, 0, "; ".join(problems[:3]))
                    continue
                yield Copied(ref, manifest.size)
            if _is_current(store, ref) and (is_new or not _is_current(copy, ref)):
                copy.make_current(ref)
    finally:
        memo.save()


def _has_intact_copy(store: Store, copy: LocalStore, ref: Ref, memo: HashMemo) -> bool:
    """Tell whether the copy has an artifact with the store's manifest and the bytes that it names."""
    try:
        problems = copy.check_changed(ref, memo)
        # Damaged telemetry is copied again if the store's is intact.
        if result_problems(problems) or (problems and not store.verify(ref)):
            return False
        return copy.manifest(ref) == store.manifest(ref)
    except CorruptArtifact:
        return False


def _is_current(store: Store, ref: Ref) -> bool:
    found = store.find(ref.stage, ref.fingerprint)
    return found is not None and found.digest == ref.digest


def require_complete(failed: int, store: Store, target: Path) -> None:
    """Refuse to call a backup complete in which artifacts, a champion, the model before it or a run record are missing.

    Raises:
        Failure: some could not be copied, the store does not have them, or a run record or report is damaged.
    """
    if failed:
        raise Failure(
            f"{failed} artifacts are damaged and are not in the backup. Everything else is.",
            where=store.uri,
            next_step="`loraflow verify --deep` moves them to the quarantine; run their recipes, then back up again",
        )
    copy = LocalStore(target)
    for model in models(copy, of_runs=True):
        for missing in missing_models(PromotionLog(copy, model)):
            if missing.is_needed:
                raise CorruptArtifact(
                    f"The backup lacks a model of {model}, because the store lacks it. Everything else was copied.",
                    where=store.location(missing.ref),
                    got=f"entry {missing.entry.seq} of the promotion log names it",
                    next_step=f"{how_to_rebuild(store, missing.ref)}; then back up again",
                )
    for name, problem in damaged_runs(copy).items():
        raise CorruptArtifact(
            "A damaged document was copied as it is. Everything else was copied.",
            where=f"{store.uri}/{name}",
            got=problem.got or problem.what,
            next_step="restore it from another backup, or remove it; then back up again",
        )
