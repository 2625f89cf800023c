"""The stages as Prefect tasks. Each is a thin wrapper: the work is in the module that its docstring names.

`Run.find_or_run` looks the artifact up in the store first. If it is there, the task ends as Cached. Otherwise the stage runs
in a worker process, here or on another work pool (`runtime.placement`). A call of a task returns the artifact's `Ref`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import task_run
from prefect.states import Completed

from loraflow import stages
from loraflow.execution.workspace import Workspace
from loraflow.failures import Failure, mask_errors
from loraflow.reporting.rows import check_notes, used_elsewhere
from loraflow.store import Ref, read_intact
from loraflow.tasks.run import Run, StageResult

log = logging.getLogger("loraflow")
P = ParamSpec("P")

RETRIES = 2
RETRY_DELAYS: list[float] = [2, 30]  # seconds; only preemption, kills and network failures are retried at all


def is_retryable(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether a retry can help, by the failure's class. A plain function: Prefect ignores partials here.

    CPython before 3.11.8 raises SystemError if two threads parse Python at once (bug 106905), as Prefect's threads do.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, SystemError) or (isinstance(error, Failure) and error.retryable)


class StageTask(Task[P, Ref | State[Ref]]):
    """A task whose call returns the artifact.

    On a cache hit the task's function returns a Completed state named Cached, with the reason and the artifact. Prefect
    returns such a state unchanged to the caller, so `__call__` takes the artifact out of it.
    """

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Ref:  # type: ignore[override]
        """Run the task and return its artifact."""
        result = super().__call__(*args, **kwargs)
        return result.result() if isinstance(result, State) else result


def stage_task(function: Callable[Concatenate[Run, P], StageResult]) -> StageTask[Concatenate[Run, P]]:
    """Make a stage's function a Prefect task.

    Prefect's own cache is off: its hits do not check that the artifact exists, and another server does not have them.
    The UI has no place for a task's docstring, so in a run of a deployment it is the first line of the task's log.
    """
    sentences = " ".join((inspect.getdoc(function) or "").split())

    @wraps(function)
    def run_stage(run: Run, *args: P.args, **kwargs: P.kwargs) -> Ref | State[Ref]:
        if run.is_deployed:
            log.info("%s", sentences)
        with mask_errors():
            result = function(run, *args, **kwargs)
        if result.is_cached:
            return Completed(name="Cached", message="; ".join(result.lookup.why()), data=result.ref)
        return result.ref

    return StageTask(
        run_stage,
        name=function.__name__,
        task_run_name=_label,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=is_retryable,
    )


def _label() -> str:
    """Return the name of a task run: its label, where a stage runs several times in a flow."""
    return str(task_run.parameters.get("label") or task_run.task_name)


@stage_task
def version_dataset(run: Run) -> StageResult:
    """Copy the files that data.dvc pins into the store, verified against their md5.

    Output: `files/`. Work: `loraflow/data/versions/version.py`.
    """
    return run.find_or_run(stages.VERSION_DATASET)


@stage_task
def check_dataset(run: Run, *, dataset: Ref) -> StageResult:
    """Read the chats, check every row, and split them into training, validation and held-out rows.

    Input: the dataset's files. Output: `train.jsonl`, `validation.jsonl`, `heldout.jsonl`, and `quarantine.jsonl` with
    the malformed rows and their reasons. Work: `loraflow/data/checks/check.py`.
    """
    return run.find_or_run(stages.CHECK_DATASET, dataset=dataset)


@stage_task
def resolve_base(run: Run) -> StageResult:
    """Fetch the base model: safetensors, tokenizer and chat template, pinned by content or commit.

    Output: a folder for `from_pretrained`. Work: `loraflow/base/resolve.py`.
    """
    return run.find_or_run(stages.RESOLVE_BASE)


@stage_task
def tokenize(run: Run, *, rows: Ref, base: Ref) -> StageResult:
    """Render the training rows with the base's chat template and turn them into token ids with a loss mask.

    Input: checked rows, and the base's tokenizer. Output: Arrow files of ids and labels, and the packing plan.
    Work: `loraflow/data/tokens/tokenization.py`.
    """
    return run.find_or_run(stages.TOKENIZE, rows=rows, base=base)


@stage_task
def train(run: Run, *, tokens: Ref, base: Ref, label: str = "train", seed: int | None = None) -> StageResult:
    """Train a LoRA adapter on the tokens. A run that was interrupted resumes from its last checkpoint.

    Input: tokens, and the base model. Output: `adapter/` in PEFT's format. Work: `loraflow/training/train.py`.
    """
    return run.find_or_run(stages.TRAIN, label, seed, tokens=tokens, base=base)


@stage_task
def train_group(run: Run, *, tokens: Ref, base: Ref, label: str) -> StageResult:
    """Train the adapters of several trials at once, to compare their losses.

    Input: tokens, and the base model. Output: the losses of each trial. Work: `loraflow/training/train_group.py`.
    """
    return run.find_or_run(stages.TRAIN_GROUP, label, tokens=tokens, base=base)


@stage_task
def merge(run: Run, *, base: Ref, adapter: Ref, tokens: Ref | None = None, label: str = "merge") -> StageResult:
    """Merge the adapter into the base's weights, bit for bit as PEFT does.

    Input: base and adapter; also tokens where two ways of merging are compared (QLoRA). Output: a folder for
    `from_pretrained`. Work: `loraflow/adapters/merge.py`.
    """
    optional: dict[str, Ref] = {} if tokens is None else {"tokens": tokens}
    return run.find_or_run(stages.MERGE, label, base=base, adapter=adapter, **optional)


@stage_task
def verify(run: Run, *, base: Ref, adapter: Ref, merged: Ref, rows: Ref, label: str = "verify") -> StageResult:
    """Compare the merged model's logits with those of base and adapter, on held-out chats.

    Output: `report.json` with the KL divergence in nats per token. Work: `loraflow/adapters/verify.py`.
    """
    return run.find_or_run(stages.VERIFY, label, base=base, adapter=adapter, merged=merged, rows=rows)


@stage_task
def deal_rows(run: Run, *, rows: Ref) -> StageResult:
    """Write the held-out rows that the models of this run are scored on, if the recipe keeps others in reserve.

    Input: the held-out rows. Output: `heldout.jsonl` with those that were dealt. Work: `loraflow/data/checks/deal_rows.py`;
    which rows these are is decided in `loraflow/registry/deals.py`.
    """
    return run.find_or_run(stages.DEAL_ROWS, rows=rows)


@stage_task
def evaluate(run: Run, *, model: Ref, rows: Ref, label: str = "evaluate") -> StageResult:
    """Answer the held-out rows with a model and score every answer.

    Input: a base or merged model, and the held-out rows. Output: `scores.parquet` with a row per example, and
    `metrics.json` with intervals. Work: `loraflow/evaluation/score.py`.
    """
    return run.find_or_run(stages.EVALUATE, label, model=model, rows=rows)


@stage_task
def check_general(run: Run, *, rows: Ref) -> StageResult:
    """Read the general chats and questions that show what a model forgets, and refuse those that it was trained on.

    Input: the training rows. Output: `general.jsonl`. Work: `loraflow/data/checks/general.py`.
    """
    return run.find_or_run(stages.CHECK_GENERAL, rows=rows)


@stage_task
def score_general(run: Run, *, model: Ref, general: Ref, label: str = "score_general") -> StageResult:
    """Measure a model's loss on general chats, and its answers to general multiple-choice questions.

    Input: a base or merged model, and the general rows. Output: a table of scores per kind of row. Work:
    `loraflow/evaluation/general.py`.
    """
    return run.find_or_run(stages.SCORE_GENERAL, label, model=model, general=general)


# Checks between the stages: cheap, and never cached. They stop a run whose reports exceed a limit of the recipe.


@task(name="check", task_run_name="check rows", cache_policy=NO_CACHE, persist_result=False)
def check_rows(workspace: Workspace, rows: Ref) -> None:
    """Stop the run if too many rows are malformed or near-duplicates are refused, or no row is left."""
    from loraflow.data.checks.check_report import CheckReport
    from loraflow.data.checks.row_limits import check_limits, refuse_findings

    report = workspace.store.manifest(rows).report
    where = f"{workspace.store.location(rows)}/report.json"
    for note in check_notes(CheckReport.model_validate(report), used_elsewhere(workspace.recipe)):
        log.warning("%s", note)
    refuse_findings(report, where)
    data = workspace.recipe.data
    refuse = data.near_duplicates == "refuse"
    check_limits(
        report,
        data.max_quarantined,
        where,
        data.source if not data.sources else "The mixture",
        refuse_near_leaks=refuse,
    )


@task(name="check", task_run_name="check merge", cache_policy=NO_CACHE, persist_result=False)
def check_merge(workspace: Workspace, verified: Ref) -> None:
    """Stop the run if the merged model differs too much from base and adapter (merge.max_kl)."""
    from loraflow.adapters import verify

    report = workspace.store.manifest(verified).report
    figures = {name: value for name, value in report.items() if isinstance(value, int | float)}
    verify.check_limits(figures, workspace.recipe.merge.max_kl)


@task(name="check", task_run_name="check general rows", cache_policy=NO_CACHE, persist_result=False)
def check_general_rows(workspace: Workspace, general: Ref) -> None:
    """Stop the run before training if the general rows are too few for gate.forgetting."""
    from loraflow.data.chats import GENERAL_FILE
    from loraflow.data.checks import general as rows
    from loraflow.evaluation.power import MINIMUM_ROWS

    if margins := workspace.recipe.gate.forgetting_margins:
        rows.check_limits(read_intact(workspace.store, general, GENERAL_FILE), margins, MINIMUM_ROWS)
