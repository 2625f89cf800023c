"""The section `evaluation` of a recipe: how models are scored."""

from typing import Annotated

from pydantic import Field

from loraflow.frozen import Dtype, FrozenModel, Positive

SliceBy = Annotated[str, Field(min_length=1)]  # one of BUILT_IN_SLICES, or a field of the rows
BUILT_IN_SLICES = ("length", "script")

# What is known about scores, so that names in the gate are checked before anything runs. docs/gate.md says how to add a
# metric.

# The scores of each built-in metric with their largest values. The smallest is 0. None: it has no largest value.
SCORES: dict[str, dict[str, float | None]] = {
    "token_loss": {"token_loss": None},
    "exact_match": {"exact_match": 1.0},
    "labels": {"accuracy": 1.0},
    "token_f1": {"token_f1": 1.0},
    "chrf": {"chrf": 100.0},
    "rouge": {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "rougeLsum": 1.0},
    "json_fields": {"json_valid": 1.0, "field_f1": 1.0},
    "tool_calls": {"tool_name": 1.0, "tool_arguments_f1": 1.0, "valid_call_rate": 1.0},
}
# Scores that are 0 or 1 in each row.
BINARY = frozenset({"exact_match", "accuracy", "json_valid", "stops", "tool_name", "valid_call_rate"})
LOWER_IS_BETTER = frozenset({"token_loss", "perplexity"})
OF_ALL_ROWS = frozenset({"stops", "perplexity", "macro_f1"})  # computed by evaluate itself, whatever the metrics
# Columns of a score table that are not scores.
ROW_COLUMNS = frozenset(
    {"id", "set", "group", "prompt", "reference", "reference_calls", "reference_tokens"}
    | {"answer", "answer_tokens", "finish", "nll"}
)
# The largest value of each score that has one. A score of another name, or a value above this, has no known range.
RANGES = {name: most for scores in SCORES.values() for name, most in scores.items() if most is not None} | {
    "stops": 1.0
}


class Evaluation(FrozenModel):
    """How base, tuned model and champion are scored on held-out rows: all in the same way."""

    metrics: list[str] = Field(
        ["token_loss", "exact_match", "token_f1", "rouge", "chrf"],
        description="Names of built-in metrics, or paths of folders with an `evaluate` module, from the working directory.",
    )
    max_rows: Positive | None = Field(None, description="Score a seeded sample of at most this many rows of each set.")
    max_new_tokens: Positive = Field(256, description="Longest answer, in tokens.")
    dtype: Dtype = Field(
        "float32", description="float32 scores repeat exactly; in 16 bits, answers depend on the batch size."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="Confidence level of the reported intervals."
    )
    general: str | None = Field(
        None,
        description="A JSONL file, or its .dvc file, with general chats and multiple-choice questions. Base, tuned model "
        "and champion are scored on them: the loss of the chats' last answers, and the share of questions that are right.",
    )
    samples: Annotated[int, Field(ge=0)] = Field(5, description="Number of answers shown in the run's report.")
    seed: int = Field(0, description="Seed of the sample of max_rows.")
    slices: list[SliceBy] = Field(
        [],
        description="Show the gate's scores for parts of the held-out rows. `length`: quarters by the reference's tokens; "
        "`script`: the script of most letters of the question; else a field of the rows, such as `language`. The gate "
        "does not use them.",
    )
