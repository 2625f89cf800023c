"""Ask a person before a promotion. The run is suspended, and its process ends; with the answer it starts again, cached."""

from __future__ import annotations

import logging

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from pydantic import Field

from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import PipelineResult
from loraflow.failures import BadConfig
from loraflow.reporting.markdown import approval_request
from loraflow.tasks.gate import record_decision
from loraflow.tasks.run import Run
from loraflow.tasks.run_record import model_scores

log = logging.getLogger("loraflow")
WAIT = 7 * 24 * 3600  # seconds; a run that nobody answers within a week fails


class Promotion(RunInput):
    """The answer. Prefect drops titles and descriptions of these fields: the markdown above them explains them."""

    promote: bool = False
    reason: str = Field("", max_length=500)


def refuse_without_deployment() -> None:
    """Refuse approval for a run that could not be resumed.

    Raises:
        BadConfig: the run belongs to no deployment.
    """
    if not deployment.id:
        raise BadConfig(
            "Approval needs a run of a deployment: only such a run can be suspended and resumed.",
            where="approval",
            expected="a run from Prefect's UI",
            next_step="`loraflow up`, then run finetune from its page; or `loraflow promote RUN --reason …` afterwards",
        )


def ask_for_approval(run: Run, result: PipelineResult, decision: Decision) -> Decision:
    """Before a promotion, suspend the run until a person has answered. Reruns respect a no."""
    if decision.verdict != "promote":
        return decision
    workspace = run.workspace
    recipe = workspace.recipe
    text = approval_request(recipe.name, decision, model_scores(run, result), confidence=recipe.evaluation.confidence)
    form = Promotion.with_initial_data(description=text, promote=False, reason="")
    # The key is the head of the log: a run that resumes and finds another champion asks again.
    head = workspace.seen_head
    # So does one that has another model, because its recipe was edited while it waited.
    key = f"promotion-{(head.hash if head else 'none')[:12]}-{result.merged.digest[:12]}"
    answer = suspend_flow_run(wait_for_input=form, timeout=WAIT, key=key)
    assert answer is not None
    words = f": {answer.reason}" if answer.reason else ""
    if answer.promote:
        return decision.with_reason(f"approved by hand{words}")
    declined = decision.overruled("reject", f"declined by hand{words}")
    record_decision(workspace, result, declined)
    log.warning("not promoted: %s", declined.reasons[0])
    return declined
