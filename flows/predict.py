"""The flow predict: answer a file of chats with a model.

python -c "from loraflow.flows.predict import predict; predict(source='tickets.jsonl', target='answers.jsonl')"
"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

import logging
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run, task_run

from loraflow.credentials import mask, protect_output
from loraflow.flows.parameters import flow
from loraflow.serving.chat import Sampling
from loraflow.serving.models import find_model, tools_of
from loraflow.serving.predict import PredictionReport, PredictOptions
from loraflow.serving.predict import predict as answer_file
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
        done = answer_file(
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


def _run_name() -> str:
    return mask(f"{flow_run.parameters['model']} → {flow_run.parameters['target']}")


@flow(name="predict", flow_run_name=_run_name, validate_parameters=True)
def predict(
    source: str,
    target: str,
    model: str = "champion",
    store: str = ".loraflow/store",
    column: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> PredictionReport:
    """Answer the chats of a file and write them, with their answers, to another. A killed run resumes.

    Args:
        source: JSONL, JSON, CSV, TSV or Parquet.
        target: JSONL, CSV, TSV or Parquet; it must not exist.
        model: champion, a run's id, or a model's folder.
        store: Where champions and runs are looked up.
        column: The column that holds the question, for rows that are not chats.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Rows in memory at a time.
    """
    protect_output()
    return predict_file(model, source, target, store, column, max_new_tokens, batch_size)
