"""The flow stage: run one stage of another run on this worker (`runtime.placement`). Both share the artifact store."""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from loraflow.credentials import protect_output
from loraflow.execution.launcher import run_job
from loraflow.execution.parent_death import end_with_parent
from loraflow.failures import Failure, from_os_error
from loraflow.flows.parameters import JsonObject
from loraflow.store import require_intact
from loraflow.tasks.events import ProgressArtifact
from loraflow.tasks.gpu_lease import gpu_lease
from loraflow.tasks.placement import accept_job, failure_message


@flow(name="stage", flow_run_name="{label}", persist_result=False)
def stage(job: JsonObject, store: str, label: str, force: bool = False) -> State[None] | None:
    """Run one stage of another run and put its artifact into the shared store.

    Args:
        job: The stage's job, as the other run has built it.
        store: The artifact store that both runs share.
        label: The stage's name in the UI.
        force: Recompute the stage even if its artifact is in the store.
    """
    protect_output()
    end_with_parent()
    try:
        accepted, artifacts = accept_job(job, store)
        with artifacts.reader_lock():
            for ref in accepted.inputs.values():
                require_intact(artifacts, ref)
            with gpu_lease(accepted):
                run_job(accepted, artifacts, ProgressArtifact(label).show_figures, force=force)
    except (Failure, OSError) as error:
        failure = error if isinstance(error, Failure) else from_os_error(error, store)
        if failure is None:
            raise
        return Failed(message=failure_message(failure))
    return None
