"""The decorator `@stage_task`: a Prefect task named after its stage, retried on some failures, Cached on a cache hit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import task_run
from prefect.states import Completed

from loraflow.failures import Failure, mask_errors
from loraflow.store import Ref
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
