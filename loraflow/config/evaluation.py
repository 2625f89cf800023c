"""The section `evaluation` of a recipe: how models are scored."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loraflow.frozen import Dtype, FrozenModel, Positive

SliceBy = Annotated[str, Field(min_length=1)]  # one of BUILT_IN_SLICES, or a field of the rows
BUILT_IN_SLICES = ("length", "script")
# The scores of each built-in metric, to check the names in the gate before anything runs.
SCORES = {
    "token_loss": {"token_loss"},
    "exact_match": {"exact_match"},
    "labels": {"accuracy"},
    "token_f1": {"token_f1"},
    "chrf": {"chrf"},
    "rouge": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "json_fields": {"json_valid", "field_f1"},
    "tool_calls": {"tool_name", "tool_arguments_f1", "valid_call_rate"},
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
