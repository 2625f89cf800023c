"""The files of champions: which ones are kept, and whether a rollback can return to them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from loraflow.failures import CorruptArtifact, Failure, ReadOnlyStore
from loraflow.registry.log import Entry, PromotionLog
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.store import Ref, Store, require_unchanged
from loraflow.store.artifact import result_problems
from loraflow.store.files import HashMemo

log = logging.getLogger("loraflow")
KEEP_CHAMPIONS = 10  # the default of runtime.keep_champions


def kept_champions(log: PromotionLog, keep_champions: int) -> list[Entry]:
    """Return the champion and its newest rollback targets, oldest first: at most `keep_champions`, at least two."""
    return log.active_promotions()[-max(keep_champions, 2) :]


def lineage(store: Store, entry: Entry) -> list[Ref]:
    """Return the artifacts of a champion and of all that it was made from, as far as their manifests can be read."""
    found: set[tuple[str, str, str]] = set()
    refs = []
    todo = [ref for ref in (entry.merged, entry.adapter) if ref is not None]
    while todo:
        ref = todo.pop()
        name = (ref.stage, ref.fingerprint, ref.digest)
        if name in found:
            continue
        found.add(name)
        refs.append(ref)
        try:
            todo += store.manifest(ref).input_refs(store.uri).values()
        except Failure:  # a missing or damaged artifact, which `loraflow verify` reports
            continue
    return refs


def require_champion_intact(store: Store, champion: Entry, memo: HashMemo) -> None:
    """Hash those files of a champion that changed since this machine hashed them.

    A damaged adapter is quarantined with a warning: the merged model is in use, and no run of another recipe recomputes
    the adapter.

    Raises:
        CorruptArtifact: the merged model is damaged. It was moved to the quarantine.
    """
    require_unchanged(store, champion.merged, memo)
    if champion.adapter is None:
        return
    problems = result_problems(store.check_changed(champion.adapter, memo))
    if not problems:
        return
    if _has_manifest(store, champion.adapter):
        with suppress(ReadOnlyStore):
            if store.quarantine(champion.adapter, problems) is None:
                return  # another worker recomputed it meanwhile
    log.warning(
        "the adapter of the champion of %s is missing or damaged (%s): %s",
        champion.model,
        "; ".join(problems[:3]),
        how_to_rebuild(store, champion.adapter),
    )


def choose_intact(store: Store, targets: Sequence[Entry], *, skip_missing: bool = False) -> Entry:
    """Return the newest of the rollback targets; with `skip_missing`, the newest whose model is intact.

    Every byte of the model is hashed. `targets` is not empty, and the newest is first.

    Raises:
        CorruptArtifact: the model is missing or damaged. A damaged one is quarantined, so that a run recomputes it.
    """
    for entry in targets:
        problems = result_problems(store.verify(entry.merged))
        if not problems:
            return entry
        if skip_missing:
            continue
        where: str | None = store.location(entry.merged)
        if _has_manifest(store, entry.merged):  # otherwise a run would find it in the cache
            where = store.quarantine(entry.merged, problems)
        if where is None:  # another worker recomputed it meanwhile
            return entry
        raise CorruptArtifact(
            f"The model of entry {entry.seq} is missing or damaged, so there was no rollback.",
            where=where,
            got="; ".join(problems[:3]),
            next_step=f"{how_to_rebuild(store, entry.merged)}, then roll back again; or go further back with "
            "`loraflow rollback --skip-missing --reason …`",
        )
    raise CorruptArtifact(
        "None of the earlier models is intact.",
        where=f"registry of {targets[0].model}",
        got=f"{len(targets)} earlier models, all missing or damaged",
        next_step=how_to_rebuild(store, targets[0].merged),
    )


def _has_manifest(store: Store, ref: Ref) -> bool:
    try:
        store.manifest(ref)
    except CorruptArtifact:
        return False
    return True


class MissingModel(NamedTuple):
    """A champion whose files are missing or incomplete."""

    entry: Entry
    ref: Ref
    problems: list[str]
    is_needed: bool  # whether it is the champion or the model to which the next rollback returns


def missing_models(log: PromotionLog, keep_champions: int = KEEP_CHAMPIONS) -> Iterator[MissingModel]:
    """Yield the champion and rollback targets whose merged model or adapter is missing or incomplete, newest first."""
    newest_first = kept_champions(log, keep_champions)[::-1]
    for position, entry in enumerate(newest_first):
        for ref in (entry.merged, entry.adapter):
            if ref is not None and (problems := log.store.check(ref)):
                yield MissingModel(entry, ref, problems, is_needed=position < 2 and ref == entry.merged)
