"""What gate.forgetting asks the gate to confirm: that a model is not much worse on general rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraflow.evaluation.general import CHATS, CHOICES

if TYPE_CHECKING:
    import pandas as pd

# The set of rows of each score, and its column there.
SCORES = {
    "loss": (CHATS, "token_loss"),
    "accuracy": (CHOICES, "accuracy"),
    "accuracy_norm": (CHOICES, "accuracy_norm"),
}
PREFIX = "general_"  # these scores' names begin with it in the gate's reasons
Tables = Mapping[str, "pd.DataFrame"]  # one model's tables, by the name of the set


@dataclass(frozen=True)
class GeneralGuard:
    """A score on general rows that may get worse by at most `margin`."""

    name: str  # in reasons
    metric: str  # a column of the tables
    margin: float
    challenger: pd.DataFrame
    others: Mapping[str, pd.DataFrame]


def general_guards(
    margins: Mapping[str, float], challenger: Tables, others: Mapping[str, Tables]
) -> list[GeneralGuard]:
    """Return the guards of gate.forgetting.

    Args:
        margins: {score: how much worse it may get}.
        challenger: the tables of score_general for the new model.
        others: the same for base and champion.
    """
    found = []
    for score, margin in margins.items():
        rows, column = SCORES[score]
        tables = {name: tables[rows] for name, tables in others.items()}
        found.append(GeneralGuard(f"{PREFIX}{score}", column, margin, challenger[rows], tables))
    return found
