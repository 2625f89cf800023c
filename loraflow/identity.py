"""What makes two jobs the same: one function computes identity, and a miss can be explained.

- fingerprint: sha256 over a job's payload: stage, stage version, input digests, config slice
- digest: sha256 over the names and contents of an artifact's result files

Identity is *what*, never *where*: no path, device, time or host may reach a payload.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

SHORT = 12  # characters of a fingerprint or digest that people are shown


def canonical(value: Any) -> bytes:
    """Serialise JSON values so that equal values give equal bytes.

    Raises:
        TypeError: for anything but None, bool, int, float, str, list, tuple and mappings with string keys; an
            object's default repr would put its memory address into identity.
        ValueError: for NaN and infinities, which JSON cannot say.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"identity cannot hold {value}")
        # 1.0 and 1 are the same setting; a YAML author writes either.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"identity wants string keys, got {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"identity cannot hold a {type(value).__name__}: {value!r}")


def payload(stage: str, version: int, inputs: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a fingerprint is taken over. It is kept in the manifest, so that a miss can be explained."""
    return _plain({"stage": stage, "version": version, "inputs": dict(inputs), "config": dict(config)})


def fingerprint(job_payload: Mapping[str, Any]) -> str:
    """Return the sha256 of a payload, 64 hex digits."""
    return hashlib.sha256(canonical(job_payload)).hexdigest()


def digest(files: Mapping[str, str]) -> str:
    """Return the digest of result files, given as {relative posix path: sha256}."""
    rows = sorted((unicodedata.normalize("NFC", name), sha) for name, sha in files.items())
    return hashlib.sha256(canonical(rows)).hexdigest()


def short(value: str) -> str:
    """Return the part of a fingerprint or digest that people are shown."""
    return value[:SHORT]


def explain(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say what differs between two payloads, a line each: `peft_config.r 8 → 16`."""
    before, after = dict(_leaves("", old)), dict(_leaves("", new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key, "absent"), after.get(key, "absent")
        if a != b:
            lines.append(f"{key.removeprefix('config.')} {_show(key, a)} → {_show(key, b)}")
    return lines


def _leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value


def _show(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if key.startswith("inputs."):
        return short(text)
    return text if len(text) <= 60 else text[:57] + "…"
