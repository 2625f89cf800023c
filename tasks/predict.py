"""Batch prediction as a Prefect task: retried by the failure's class, and resumed where it stopped."""

from __future__ import annotations

import logging
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from loraflow.credentials import mask
from loraflow.serving.chat import Sampling
from loraflow.serving.models import find_model, tools_of
from loraflow.serving.predict import PredictionReport, PredictOptions, predict
from loraflow.store import hash_memo, open_store
from loraflow.tasks.events import ProgressArtifact
from loraflow.tasks.stages import RETRIES, RETRY_DELAYS, is_retryable

log = logging.getLogger("loraflow")


def _task_name() -> str:
    return mask(f"predict {task_run.parameters['target']}")


@task(
    name="predict",
    task_run_name=_task_name,
    cache_policy=NO_CACHE,  # the file is the result; an unfinished one records its input, model and settings
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_retryable,
)
def predict_file(
    model: str, source: str, target: str, store: str, column: str | None, max_new_tokens: int, batch_size: int
) -> PredictionReport:
    """Answer a file's rows; return how many there are, and how many have an error instead of an answer."""
    artifacts = open_store(store)
    memo = hash_memo(artifacts)
    with artifacts.reader_lock():
        found = find_model(artifacts, model, memo=memo)
        done = predict(
            found,
            Path(source),
            Path(target),
            PredictOptions(
                sampling=Sampling(max_new_tokens=max_new_tokens),
                column=column,
                system=found.system,
                tools=tools_of(artifacts, found),
                batch_size=batch_size,
            ),
            memo=memo,
            on_batch=ProgressArtifact("predict").show,
        )
    memo.save()
    if done["errors"]:
        log.warning("%d of %d rows have no answer; the column `error` says why", done["errors"], done["rows"])
    return done
