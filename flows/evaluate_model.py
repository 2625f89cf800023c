"""Score a model on a recipe's held-out rows. (A file named evaluate.py would shadow the library of that name.)"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

from prefect.runtime import flow_run
from pydantic import JsonValue

from loraflow.credentials import mask
from loraflow.execution.deal import deal_for_scores
from loraflow.execution.runner import find_scorable_model, with_model
from loraflow.flows.parameters import NO_SETTINGS, THE_ONLY_RECIPE, RecipeName, Settings, flow
from loraflow.tasks.report import publish_scores
from loraflow.tasks.run import open_run
from loraflow.tasks.stages import check_dataset, deal_rows, resolve_base, version_dataset
from loraflow.tasks.stages import evaluate as task_evaluate


def _run_name() -> str:
    return mask(f"{flow_run.parameters['model']}, recipe {flow_run.parameters['recipe']}")


@flow(name="evaluate", flow_run_name=_run_name, validate_parameters=True)
def evaluate(
    model: str = "champion", recipe: RecipeName = THE_ONLY_RECIPE, settings: Settings = NO_SETTINGS
) -> dict[str, JsonValue]:
    """Score a model on the held-out rows of a recipe, with the metrics and settings of its `evaluation` section.

    Args:
        model: The champion (or champion:NAME), the id of a run, or the path of a model's folder.
        recipe: Name of a recipe in configs/, or a path. Empty: the only recipe of configs/.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    with open_run(recipe, settings, [], rename=False) as run:
        found = find_scorable_model(run.workspace, model)
        rows = check_dataset(run, dataset=version_dataset(run))
        run.workspace, ref = with_model(run.workspace, found)
        ref = ref or resolve_base(run)
        if run.workspace.recipe.deals_rows:
            deal_for_scores(run.workspace, rows, ref)
            rows = deal_rows(run, rows=rows)
        scores = task_evaluate(run, model=ref, rows=rows)
        return publish_scores(run, model, found.folder, scores)
