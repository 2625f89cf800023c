"""The flow: fine-tune, evaluate, merge, gate, register.

loraflow run configs/quickstart.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.pipeline import pipeline
from tasks.decisions import gate, publish, register
from tasks.report import publish_report
from tasks.run import open_run


def _run_name() -> str:
    return Path(flow_run.parameters["recipe"]).stem


@flow(name="finetune", flow_run_name=_run_name, validate_parameters=True)
def finetune(
    recipe: str = "configs/quickstart.yaml",
    overrides: dict[str, Any] | None = None,
    force: list[str] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model by a recipe, and promote it if it is better than base and champion.

    Args:
        recipe: Path of a recipe, or the name of one in configs/.
        overrides: Recipe keys to change, such as {"training_config.learning_rate": 1e-4}.
        force: Stages to compute again although they are cached.
    """
    with open_run(recipe, overrides or {}, force or []) as run:
        made = run.until_whole(pipeline)
        decision = gate(run.jobs, made)
        entry = register(run.jobs, made, decision)
        summary = run.summary(made, decision, entry)
        summary["published"] = publish(run.jobs, made, summary)
        publish_report(run, made, summary)
        return summary
