"""A deployed run whose time is over, or whose machine is taken away, continues in another run of its deployment.

Prefect cancels a run with SIGTERM, the signal that also announces the end of a machine. What tells them apart is the run's
state on the server: a run that is cancelled is Cancelling before its process gets the signal.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from prefect import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run

from loraflow.credentials import MASK, mask
from loraflow.failures import BudgetSpent

log = logging.getLogger("loraflow")


def schedule_continuation(spent: BudgetSpent, computed: Sequence[str]) -> None:
    """Schedule the run that continues, and name it in the failure that ends this one.

    If the run finished no stage and saved nothing, no other run is scheduled: a stage that never reaches its first
    checkpoint within the time would be started again and again.

    Args:
        spent: the failure that ends this run. Its details say whether the interrupted stage saved anything.
        computed: stages that this run finished. They are cached now, so the next run does not force them again.
    """
    if not computed and not spent.details.get("saved"):
        spent.next_step = (
            "raise runtime.max_hours, or lower training_config.save_steps: this run finished no stage and saved no "
            "checkpoint, so no other run was scheduled"
        )
        return
    try:
        name = _schedule(computed)
    except Exception as error:  # the server is gone or refuses: the run ends as it would have ended
        log.warning("no other run was scheduled: %s", mask(str(error)))
        return
    spent.next_step = f"nothing: the run {name} of the same deployment continues from the last checkpoint"
    log.warning("this run reached its time limit; the run %s continues it", name)


def schedule_continuation_after_signal(computed: Sequence[str]) -> None:
    """Schedule the run that continues after SIGTERM, unless this run is being cancelled (runtime.preemptible)."""
    try:
        if _is_cancelled():
            log.info("this run was cancelled, so no other run continues it")
            return
        name = _schedule(computed)
    except Exception as error:  # the server is gone: a run that may have been cancelled must not come back
        log.warning("no other run was scheduled: %s", mask(str(error)))
        return
    log.warning("this run was asked to stop; the run %s continues it", name)


def _is_cancelled() -> bool:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run.id).state
    return state is None or state.type in (StateType.CANCELLING, StateType.CANCELLED)


def _schedule(computed: Sequence[str]) -> str:
    """Create the next run as this one was created, and return its name. It starts when a worker has a free slot."""
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(flow_run.id)
        if this.deployment_id is None:
            raise ValueError("this run has no deployment")
        parameters = dict(this.parameters)
        if MASK in json.dumps(parameters, default=str):
            raise ValueError(
                "credentials in this run's parameters are masked on the server; start the run again by hand"
            )
        if parameters.get("force"):
            done = {label.split()[0] for label in computed}  # "evaluate base" is of the stage evaluate
            parameters["force"] = [stage for stage in parameters["force"] if stage not in done]
        following = client.create_flow_run_from_deployment(
            this.deployment_id,
            parameters=parameters,
            tags=this.tags,
            work_queue_name=this.work_queue_name,
            job_variables=this.job_variables,
            idempotency_key=f"goes-on-{this.id}-{this.run_count}",  # a repeated request does not make a second run
        )
    return following.name
