"""Mirror a run to MLflow when it ends, if the recipe or the environment asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.failures import Preempted
from loraflow.registry.runs import RunRecord
from loraflow.store import Store
from loraflow.tracking import mirror
from loraflow.tracking.git_tags import tag_log

if TYPE_CHECKING:
    from loraflow.tasks.run import Run


def mirror_run(run: Run, record: RunRecord, error: BaseException | None) -> None:
    """Mirror a run that has ended. A run that was asked to end leaves that to the next one.

    Nothing that happens here changes the run's outcome: its record and the promotion log are written by now.
    """
    store: Store = run.workspace.store
    try:
        if isinstance(error, Preempted) or (error is not None and not isinstance(error, Exception)):
            mirror.postpone(store, record)
        else:
            mirror.mirror_run(store, record)
    except Exception as problem:  # a mistake in the mirror must not fail a run that is done
        mirror.warn_of_mistake(problem)
    if error is None and record.model is not None and record.summary is not None and record.summary.registered:
        tag_log(store, record.model)
