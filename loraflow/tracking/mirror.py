"""Bring MLflow to the state of the store: runs that are missing, versions of promoted models, the alias champion."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from loraflow.failures import Failure, MissingExtra, Network
from loraflow.registry.log import Entry, PromotionLog
from loraflow.registry.runs import RunRecord, find_run, read_runs
from loraflow.store import Store
from loraflow.tracking.content import content_of, content_of_lost_run, is_news
from loraflow.tracking.settings import Tracking, find_tracking, is_installed
from loraflow.tracking.tracker import RunContent, TrackedRun, Tracker

log = logging.getLogger("loraflow")
MAX_MOVES = 10  # of the alias in one call, if others promote at the same time


@dataclass(frozen=True)
class Synced:
    """What a synchronisation did."""

    runs: int  # sent
    versions: int  # registered
    champion: str | None  # version that the alias names; None if nothing was promoted


def mirror_run(store: Store, record: RunRecord) -> None:
    """Mirror a run that has ended. A server that does not take it costs a warning, never the run.

    A run that changed nothing imports nothing and sends nothing, unless something is left to send.
    """
    tracking = _tracking_of(record)
    if tracking is None or record.model is None or (not is_news(record) and not _is_pending(store, record.model)):
        return
    try_to_sync(store, record.model, tracking, None if _is_pending(store, record.model) else [record])


def mirror_log(store: Store, model: str) -> None:
    """Mirror a promotion or rollback by hand, to the server of the model's newest run."""
    tracking = tracking_of_model(store, model)
    if tracking is not None:
        try_to_sync(store, model, tracking, [])


def postpone(store: Store, record: RunRecord) -> None:
    """Remember to mirror a run later, for a run that has to end at once."""
    if record.model is not None and _tracking_of(record) is not None and is_news(record):
        _set_pending(store, record.model, True)


def tracking_of_model(store: Store, model: str) -> Tracking | None:
    """Return where the model's newest run was mirrored to; None if nowhere."""
    records = [record for record in read_runs(store) if record.model == model]
    return _tracking_of(records[-1]) if records else find_tracking(None, model)


def try_to_sync(store: Store, model: str, tracking: Tracking, records: Sequence[RunRecord] | None) -> None:
    """Synchronise; if that fails, warn in one sentence and remember it for the next run."""
    if not is_installed():
        if tracking.is_asked_for:
            log.warning("nothing is sent to MLflow: %s", " ".join(_not_installed().what.split()))
        return
    try:
        _set_pending(store, model, True)  # before the first request: this process may be killed at any of them
        sync(store, model, open_tracker(tracking), records)
    except (Failure, OSError) as failure:
        reason = (failure.got or failure.what) if isinstance(failure, Failure) else str(failure)
        log.warning(
            "MLflow at %s does not show this yet (%s); the next run or `loraflow mlflow sync` sends it",
            tracking.uri,
            reason.rstrip("."),
        )
    else:
        _set_pending(store, model, False)


def open_tracker(tracking: Tracking) -> Tracker:
    """Connect to MLflow.

    Raises:
        MissingExtra: it is not installed.
        Network: it does not answer.
    """
    if not is_installed():
        raise _not_installed()
    from loraflow.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker(tracking)


def sync(store: Store, model: str, tracker: Tracker, records: Iterable[RunRecord] | None = None) -> Synced:
    """Send the runs that MLflow does not have, register promoted models, and move the alias to the champion.

    Args:
        store: the truth.
        model: the name in loraflow's registry.
        tracker: the server.
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


def _send(tracker: Tracker, known: dict[str, TrackedRun], content: RunContent) -> bool:
    """Send a run, unless the server has all of it. One that was interrupted is completed."""
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
    store: Store, model: str, tracker: Tracker, known: dict[str, TrackedRun]
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
        wanted = versions[entries[-1].merged.digest]
        if tracker.champion() != wanted:
            tracker.set_champion(wanted)
        # Another process may have promoted in between, and moved the alias before this one moved it back.
        if promotions.entries()[-1].hash == entries[-1].hash:
            return created, wanted
    raise Network("The promotion log changes faster than MLflow's alias can follow.", next_step="loraflow mlflow sync")


def _register(store: Store, tracker: Tracker, known: dict[str, TrackedRun], entry: Entry) -> str:
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


def _pending_name(model: str) -> str:
    return f"mlflow/{model}/pending.json"


def _is_pending(store: Store, model: str) -> bool:
    return store.read_document(_pending_name(model)) is not None


def _set_pending(store: Store, model: str, pending: bool) -> None:
    """Write or remove the mark that something is left to send. Without it, `loraflow mlflow sync` still finds it."""
    with suppress(Failure, OSError):
        if pending:
            store.write_document(_pending_name(model), b"{}\n")
        elif _is_pending(store, model):
            store.remove_document(_pending_name(model))


def _not_installed() -> MissingExtra:
    return MissingExtra("The extra mlflow is not installed.", next_step="pip install 'loraflow[mlflow]'")


def summary_line(synced: Synced, model: str, uri: str) -> str:
    """Return a line for people about what was done."""
    champion = f"champion is version {synced.champion}" if synced.champion else "no champion yet"
    return f"{model} at {uri}: {synced.runs} runs sent, {synced.versions} models registered, {champion}"
