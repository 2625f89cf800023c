"""Batch prediction as a Prefect task: retried by the failure's class, and resumed where it stopped."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from loraflow.serving.chat import Sampling
from loraflow.serving.models import find_model
from loraflow.serving.predict import PredictionReport, predict
from loraflow.store import open_store
from loraflow.store.files import HashMemo
from loraflow.tasks.stages import RETRIES, RETRY_DELAYS, UPDATE_EVERY, is_retryable

log = logging.getLogger("loraflow")


@task(
    name="predict",
    task_run_name="predict {target}",
    cache_policy=NO_CACHE,  # the file is the result, and an unfinished one remembers what it was begun with
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def predict_file(
    model: str, source: str, target: str, store: str, column: str | None, max_new_tokens: int, batch_size: int
) -> PredictionReport:
    """Answer a file's rows; return how many there were, and how many have an error in place of an answer."""
    place = open_store(store)
    memo = HashMemo(place.scratch / "hashes.json")
    with place.reader_lock():
        found = find_model(place, model)
        done = predict(
            found,
            Path(source),
            Path(target),
            sampling=Sampling(max_new_tokens=max_new_tokens),
            column=column,
            system=found.system,
            batch_size=batch_size,
            memo=memo,
            on_batch=_Shown(),
        )
    memo.save()
    if done["errors"]:
        log.warning("%d of %d rows have no answer; the column `error` says why", done["errors"], done["rows"])
    return done


class _Shown:
    """Progress as one artifact in the UI, updated now and then."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last < UPDATE_EVERY and done < total:
            return
        self.last = time.monotonic()
        text = f"predict {done}/{total}"
        log.info("%s", text)
        if self.artifact is None:
            self.artifact = create_progress_artifact(
                progress=100 * done / total, key="predict-progress", description=text
            )
        else:
            update_progress_artifact(self.artifact, progress=100 * done / total, description=text)  # type: ignore[unused-coroutine]
