"""Collect what `loraflow compare` shows of runs and champions: scores, settings and training losses, from the store."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
from pydantic import JsonValue

from loraflow import identity
from loraflow.evaluation.compare import TableComparison, compare_tables
from loraflow.evaluation.gate import heldout_rows
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.frozen import StoredModel
from loraflow.registry.runs import RunRecord, find_named_run, find_run
from loraflow.serving.models import champion_entry, only_model
from loraflow.store import Ref, Store, read_intact

_NOT_ABOUT_THE_MODEL = {"runtime", "publish", "name"}  # sections of a recipe


class _Rules(StoredModel):
    """The part of a run's gate that says how scores are compared."""

    lower_is_better: list[str] = []
    ranges: dict[str, tuple[float, float]] = {}

    def joined(self, other: _Rules) -> _Rules:
        """Return the rules of two runs: what one of them says of a score, or the range that both of its ranges are in."""
        ranges = self.ranges | other.ranges
        for name in self.ranges.keys() & other.ranges.keys():
            (low, high), (other_low, other_high) = self.ranges[name], other.ranges[name]
            ranges[name] = min(low, other_low), max(high, other_high)
        return _Rules(lower_is_better=sorted({*self.lower_is_better, *other.lower_is_better}), ranges=ranges)


@dataclass(frozen=True)
class Compared:
    """A model that is compared: its run and its scores."""

    name: str  # as it was asked for
    record: RunRecord
    table: pd.DataFrame
    losses: tuple[tuple[float, float], ...]  # (step, training loss)


@dataclass(frozen=True)
class Pairing:
    """A model against the first one."""

    name: str
    scores: TableComparison
    settings: tuple[str, ...]  # that differ
    same_model: bool


@dataclass(frozen=True)
class ModelComparison:
    """Models beside each other; each further one against the first."""

    models: tuple[Compared, ...]
    pairings: tuple[Pairing, ...]
    confidence: float


def compare_models(store: Store, names: tuple[str, ...], confidence: float = 0.95) -> ModelComparison:
    """Compare the models of runs, or champions.

    Raises:
        BadConfig: there is no such run or champion, or it has no scores.
        BadData: two of them were not scored on a common row.
        CorruptArtifact: scores are gone or damaged.
    """
    models = tuple(_find(store, name) for name in names)
    first = models[0]
    pairings = []
    for other in models[1:]:
        gate = _rules(first).joined(_rules(other))
        pairings.append(
            Pairing(
                other.name,
                compare_tables(first.table, other.table, confidence=confidence, **gate.model_dump()),
                tuple(_changed(first.record, other.record)),
                _digest(first.record) == _digest(other.record),
            )
        )
    return ModelComparison(models, tuple(pairings), confidence)


def _rules(model: Compared) -> _Rules:
    return _Rules.model_validate(model.record.section("gate"))


def _find(store: Store, name: str) -> Compared:
    if name.split(":")[0] == "champion":
        entry = champion_entry(store, name.partition(":")[2] or only_model(store))
        record = find_run(store, entry.merged)
    else:
        record = find_named_run(store, name)
    if record is None:
        raise BadConfig("There is no such run or champion.", where=name, next_step="`loraflow runs` lists the runs")
    stage = record.stage("evaluate tuned")
    if stage is None:
        raise BadConfig("This run did not score a model.", where=name, next_step="`loraflow runs` lists the runs")
    ref = Ref(stage="evaluate", fingerprint=stage.fingerprint, digest=stage.digest, uri=store.uri)
    table = pd.read_parquet(io.BytesIO(read_intact(store, ref, "scores.parquet")))
    return Compared(name, record, heldout_rows(table, store.location(ref)), _losses(store, record))


def _losses(store: Store, record: RunRecord) -> tuple[tuple[float, float], ...]:
    """Return the training losses that were logged; nothing if the adapter is gone."""
    stage = record.stage("train")
    if stage is None:
        return ()
    ref = Ref(stage="train", fingerprint=stage.fingerprint, digest=stage.digest, uri=store.uri)
    try:
        lines = store.read(ref, "telemetry/curves.jsonl").decode().splitlines()
    except CorruptArtifact:  # cleanup removes adapters before scores
        return ()
    return tuple((row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row)


def _changed(first: RunRecord, second: RunRecord) -> Iterator[str]:
    yield from identity.explain(_settings(first), _settings(second))
    for label in ("version_dataset", "resolve_base"):
        one, two = first.stage(label), second.stage(label)
        if one and two and one.digest != two.digest:
            yield f"{label} {identity.short(one.digest)} → {identity.short(two.digest)}"
    if first.loraflow != second.loraflow:
        yield f"loraflow {first.loraflow} → {second.loraflow}"
    if first.commit != second.commit:
        yield f"git commit {(first.commit or 'none')[:12]} → {(second.commit or 'none')[:12]}"


def _settings(record: RunRecord) -> Mapping[str, JsonValue]:
    return {section: values for section, values in record.resolved.items() if section not in _NOT_ABOUT_THE_MODEL}


def _digest(record: RunRecord) -> str | None:
    stage = record.stage("merge")
    return stage.digest if stage else None
