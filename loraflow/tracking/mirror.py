"""Bring MLflow to the state of the store: runs that are missing, versions of promoted models, the alias champion."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from loraflow.failures import Failure, Network, first_line
from loraflow.registry.log import Entry, PromotionLog
from loraflow.registry.runs import RunRecord, find_run, read_runs
from loraflow.store import Store
from loraflow.tracking.tracker import (
    RunContent,
    TrackedRun,
    Tracking,
    content_of,
    content_of_lost_run,
    find_tracking,
    is_installed,
    is_news,
    missing_extra,
)

if TYPE_CHECKING:
    from loraflow.tracking.mlflow_tracker import MlflowTracker

log = logging.getLogger("loraflow")
MAX_MOVES = 10  # moves of the alias in one call, if others promote at the same time


@dataclass(frozen=True)
class Synced:
    """What a synchronisation did."""

    runs: int  # sent
    versions: int  # registered
    champion: str | None  # version that the alias names; None if nothing was promoted


def mirror_run(store: Store, record: RunRecord) -> None:
    """Mirror a run that has ended. If the server refuses it, that is a warning; the run does not fail.

    A run that changed nothing imports nothing and sends nothing, unless something is left to send.
    """
    tracking = _tracking_of(record)
    if tracking is not None and record.model is not None and (is_news(record) or read_marks(store, record.model)):
        try_to_sync(store, record.model, tracking, record)


def mirror_log(store: Store, model: str) -> None:
    """Mirror a promotion or rollback by hand, to the server of the model's newest run.

    Nothing that happens here changes the outcome: the promotion log is written by now.
    """
    try:
        tracking = tracking_of_model(store, model)
        if tracking is not None:
            try_to_sync(store, model, tracking)
    except Exception as problem:  # a mistake in the mirror must not fail a promotion that is done
        warn_of_mistake(problem)


def warn_of_mistake(problem: Exception) -> None:
    """Warn in one sentence of an error that is not the server's."""
    log.warning("MLflow was not updated (%s); `loraflow mlflow sync` updates it", first_line(problem).rstrip("."))


def postpone(store: Store, record: RunRecord) -> None:
    """Mark a run that has to end at once, so that the next run mirrors it."""
    if record.model is not None and _tracking_of(record) is not None and is_news(record):
        add_mark(store, record.model, record.run)


def tracking_of_model(store: Store, model: str, uri: str | None = None) -> Tracking | None:
    """Return where the model's newest run was mirrored to; None if nowhere. `uri` replaces the address alone."""
    records = [record for record in read_runs(store) if record.model == model]
    section = records[-1].section("runtime").get("mlflow") if records else None
    if uri:
        section = {**(section if isinstance(section, dict) else {}), "uri": uri}
    return find_tracking(section, model)


def try_to_sync(store: Store, model: str, tracking: Tracking, record: RunRecord | None = None) -> None:
    """Send a run, the promotion log, and what earlier calls left unsent. If that fails, warn and remember it."""
    if not is_installed():
        if tracking.is_asked_for:
            log.warning("nothing is sent to MLflow: %s", missing_extra().what)
        return
    writer = record.run if record else uuid4().hex
    try:
        # The marks are read before the runs, so each mark that is removed below belongs to a run that was sent.
        left = read_marks(store, model)
        own = add_mark(store, model, writer)  # before the first request: this process may be killed at any of them
        sync(store, model, open_tracker(tracking), None if left else [record] if record else [])
    except Exception as error:
        add_mark(store, model, writer)  # again: another process, which sent this run too, may have removed it
        if not isinstance(error, Failure | OSError):
            raise
        reason = (error.got or error.what) if isinstance(error, Failure) else first_line(error)
        log.warning(
            "MLflow at %s was not updated (%s); the next run or `loraflow mlflow sync` updates it",
            tracking.uri,
            reason.rstrip("."),
        )
    else:
        remove_marks(store, [*left, own])


def open_tracker(tracking: Tracking) -> MlflowTracker:
    """Connect to MLflow.

    Raises:
        MissingExtra: it is not installed, or not whole.
        Network: it does not answer.
    """
    if not is_installed():
        raise missing_extra()
    try:
        from loraflow.tracking.mlflow_tracker import MlflowTracker
    except ImportError as error:
        raise missing_extra(str(error)) from error
    return MlflowTracker(tracking)


def sync(store: Store, model: str, tracker: MlflowTracker, records: Iterable[RunRecord] | None = None) -> Synced:
    """Send the runs that MLflow does not have, register promoted models, and move the alias to the champion.

    Args:
        records: the runs to send; None for all of the model.

    Raises:
        Network: the server did not do all of it. Calling this again completes it.
        DamagedLog: the promotion log lost entries or was changed.
    """
    if records is None:
        records = [record for record in read_runs(store) if record.model == model]
    known, sent = tracker.find_runs(), 0
    for record in records:
        if is_news(record):
            sent += _send(tracker, known, content_of(store, record))
    created, champion = _mirror_registry(store, model, tracker, known)
    return Synced(sent, created, champion)


def _send(tracker: MlflowTracker, known: dict[str, TrackedRun], content: RunContent) -> bool:
    """Send a run, unless the server has all of it. Complete an interrupted one."""
    run = known.get(content.run)
    if run is not None and run.is_complete:
        return False
    if run is None:
        run = tracker.start_run(content)
    tracker.write_run(run, content)
    tracker.finish_run(run, content)
    known[content.run] = TrackedRun(run.id, True)
    return True


def _mirror_registry(
    store: Store, model: str, tracker: MlflowTracker, known: dict[str, TrackedRun]
) -> tuple[int, str | None]:
    """Register all models of the log, then move the alias to the last one. Return how many are new, and the alias."""
    promotions = PromotionLog(store, model)
    versions: dict[str, str] | None = None
    created = 0
    for _ in range(MAX_MOVES):
        entries = promotions.entries()
        if not entries:
            return created, None
        versions = tracker.find_versions() if versions is None else versions
        for entry in entries:
            if entry.merged.digest not in versions:
                versions[entry.merged.digest] = _register(store, tracker, known, entry)
                created += 1
        version = versions[entries[-1].merged.digest]
        if tracker.champion() != version:
            tracker.set_champion(version)
        # Another process may have promoted in between, and moved the alias before this one moved it back.
        if promotions.entries()[-1].hash == entries[-1].hash:
            return created, version
    raise Network("The promotion log changed while MLflow's alias was being set.", next_step="loraflow mlflow sync")


def _register(store: Store, tracker: MlflowTracker, known: dict[str, TrackedRun], entry: Entry) -> str:
    record = find_run(store, entry.merged)
    location = store.location(entry.merged)
    if record is not None:
        content = content_of(store, record)
    else:
        content = content_of_lost_run(f"entry-{entry.seq}", entry.inputs.get("recipe", entry.model), location)
    _send(tracker, known, content)
    tags = {"loraflow.entry": str(entry.seq), "loraflow.location": location, "loraflow.actor": entry.actor}
    description = "\n".join(
        [f"{entry.action} {entry.seq}, {entry.time}. The weights are at {location}", *entry.reasons]
    )
    return tracker.create_version(entry.merged.digest, known[content.run], tags, description)


def _tracking_of(record: RunRecord) -> Tracking | None:
    return find_tracking(record.section("runtime").get("mlflow"), record.model or record.recipe)


def summary_line(synced: Synced, model: str, uri: str) -> str:
    """Return a line for people about what was done."""
    champion = f"champion is version {synced.champion}" if synced.champion else "no champion yet"
    return f"{model} at {uri}: {synced.runs} runs sent, {synced.versions} models registered, {champion}"


def read_marks(store: Store, model: str) -> list[str]:
    """Return the names of a model's marks; none if all was sent.

    Raises:
        Network: the store does not answer.
    """
    return store.documents(f"mlflow/{model}/")


def add_mark(store: Store, model: str, writer: str) -> str:
    """Write the mark of a run's id or another unique name, and return its name.

    If the store refuses, nothing is marked: `loraflow mlflow sync` finds what is missing without marks.
    """
    name = f"mlflow/{model}/pending/{writer}.json"
    with suppress(Failure, OSError):
        store.write_document(name, b"{}\n")
    return name


def remove_marks(store: Store, names: Iterable[str]) -> None:
    """Remove the marks of what was sent. A mark that stays only makes the next run compare with MLflow."""
    for name in names:
        with suppress(Failure, OSError):
            store.remove_document(name)
