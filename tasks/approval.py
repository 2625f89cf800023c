"""A person's word before a promotion: the run leaves its worker meanwhile, and goes on, all cached, with the answer."""

from __future__ import annotations

import logging
from typing import Any

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from pydantic import Field

from loraflow.failures import BadConfig
from loraflow.tasks.decisions import overrule
from loraflow.tasks.report import comparison_table

log = logging.getLogger("loraflow")
WAIT = 7 * 24 * 3600  # seconds; a run that nobody answers within a week fails


class Promotion(RunInput):
    """Shall this model become the champion?"""

    promote: bool = Field(
        False, title="Promote", description="Off keeps the champion.", json_schema_extra={"position": 0}
    )
    reason: str = Field(
        "", title="Reason", description="For the promotion log.", max_length=500, json_schema_extra={"position": 1}
    )


def refuse_without_deployment() -> None:
    """Refuse approval where the run could not be taken up again.

    Raises:
        BadConfig: nobody could answer: the run belongs to no deployment.
    """
    if not deployment.id:
        raise BadConfig(
            "Approval needs a run of a deployment: only such a run can be left and taken up again.",
            where="approval",
            expected="a run from Prefect's UI",
            next_step="`loraflow up`, then run finetune from its page; or `loraflow promote RUN --reason …` afterwards",
        )


def ask_for_approval(run: Any, made: Any, decision: dict[str, Any]) -> None:
    """Before a promotion, leave the run until a person has answered; a no is a decision that reruns respect."""
    if decision["verdict"] != "promote":
        return
    text = "\n".join(
        [
            f"# {run.jobs.recipe.name}: promote?",
            "",
            *[f"- {reason}" for reason in decision["reasons"]],
            "",
            *comparison_table(run.metrics(made)),
        ]
    )
    form = Promotion.with_initial_data(description=text, promote=False, reason="")
    # The key is the head of the log: a run that resumes to find another champion asks anew.
    answer = suspend_flow_run(wait_for_input=form, timeout=WAIT, key=f"promotion-{(decision['seen'] or 'none')[:12]}")
    assert answer is not None
    words = f": {answer.reason}" if answer.reason else ""
    if answer.promote:
        decision["reasons"] = [*decision["reasons"], f"approved by hand{words}"]
        return
    decision |= {"verdict": "reject", "reasons": [f"declined by hand{words}"]}
    overrule(run.jobs, made, decision)
    log.warning("not promoted: %s", decision["reasons"][0])
