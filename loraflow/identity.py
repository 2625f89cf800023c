"""Fingerprints and digests: when two jobs, or two artifacts, are the same, and why a job misses the cache.

- fingerprint: sha256 of a job's payload, which is the stage, its version, the input digests and the stage's config
- digest: sha256 of the names and contents of an artifact's result files

Identity is *what* is computed, never *where*: no path, device, time or host may enter a payload.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pydantic import JsonValue

SHORT = 12  # characters of a fingerprint or digest in messages

# JSON values, with tuples for lists and any mapping for an object.
Plain: TypeAlias = "Mapping[str, Plain] | Sequence[Plain] | str | int | float | bool | None"


def canonical(value: Plain) -> bytes:
    """Serialise JSON values so that equal values give equal bytes.

    Raises:
        TypeError: the value contains anything but None, bool, int, float, str, list, tuple and mappings with string keys.
            The default repr of an object would put its memory address into the fingerprint.
        ValueError: the value contains NaN or an infinity, which JSON does not have.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _plain(value: Plain) -> JsonValue:
    """Return a value as JSON has it, with whole floats as integers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a fingerprint cannot contain {value}")
        # 1.0 and 1 are the same setting: people write either in YAML.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the keys of a fingerprint's payload must be strings, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"a fingerprint cannot contain a {type(value).__name__}: {value!r}")


def payload(stage: str, version: int, inputs: Mapping[str, str], config: Mapping[str, Plain]) -> dict[str, JsonValue]:
    """Return the values that a fingerprint hashes. The manifest records them, so that a cache miss can be explained."""
    return {"stage": stage, "version": version, "inputs": {**inputs}, "config": _plain(config)}


def fingerprint(job_payload: Mapping[str, Plain]) -> str:
    """Return the sha256 of a payload, 64 hex digits."""
    return hashlib.sha256(canonical(job_payload)).hexdigest()


def digest(files: Mapping[str, str]) -> str:
    """Return the digest of result files, given as {relative posix path: sha256}."""
    rows = sorted((unicodedata.normalize("NFC", name), sha) for name, sha in files.items())
    return hashlib.sha256(canonical(rows)).hexdigest()


def short(value: str) -> str:
    """Return the first characters of a fingerprint or digest, for messages."""
    return value[:SHORT]


def explain(old: Mapping[str, Plain], new: Mapping[str, Plain]) -> list[str]:
    """Return the differences between two payloads, one line each, such as `peft_config.r 8 → 16`."""
    before, after = dict(_leaves("", old)), dict(_leaves("", new))
    other_metrics = before.get("config.metrics") != after.get("config.metrics")
    lines = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key, "absent"), after.get(key, "absent")
        if other_metrics and key.startswith("config.modules.") and "absent" in (a, b):
            continue  # the file of a metric that was added or removed
        if a != b:
            lines.append(f"{key.removeprefix('config.')} {_show(key, a)} → {_show(key, b)}")
    return lines


def _leaves(prefix: str, value: Plain) -> Iterable[tuple[str, Plain]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value


def _show(key: str, value: Plain) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if key.startswith("inputs."):
        return short(text)
    return text if len(text) <= 60 else text[:57] + "…"
