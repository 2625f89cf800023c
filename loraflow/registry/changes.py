"""What differs between two runs: settings, dataset, base, code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import JsonValue

from loraflow import identity
from loraflow.registry.runs import RunRecord

_NOT_ABOUT_THE_MODEL = {"runtime", "publish", "name"}  # sections of a recipe


def changes(first: RunRecord, second: RunRecord) -> Iterator[str]:
    """Yield what differs in the second run, one line each, such as `training_config.seed 0 → 1`."""
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
