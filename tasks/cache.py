"""Prefect's cache key for a stage is our fingerprint; whether a hit counts is the store's word."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from prefect.cache_policies import CachePolicy


@dataclass
class StageKey(CachePolicy):
    """Key a task by its job's fingerprint, and by the store: a ref from one store says nothing about another."""

    def compute_key(
        self, task_ctx: Any, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """Return the key: readable, since it becomes a file name of Prefect's result storage."""
        job = inputs["job"]
        store = hashlib.sha256(inputs["store"].encode()).hexdigest()[:8]
        return f"{job.stage}-{job.fingerprint[:32]}-{store}"
