"""The flow predict: answer a file of chats with a model.

python -c "from loraflow.flows.predict import predict; predict(source='tickets.jsonl', target='answers.jsonl')"
"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

from prefect.runtime import flow_run

from loraflow.credentials import mask, protect_output
from loraflow.flows.parameters import flow
from loraflow.serving.predict import PredictionReport
from loraflow.tasks.predict import predict_file


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
