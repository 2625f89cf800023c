"""A comparison whose numbers of rows cannot promote uses no look, and shows its scores all the same."""

import json

import pytest

from loraflow.config import load_recipe
from loraflow.evaluation.power import HeldoutRows, advice
from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import Workspace
from tests.unit.evaluation.test_scores import decide, scores


def asked(text):
    return json.dumps([{"role": "user", "content": text}])


def decided(recipe, monkeypatch, unscored=(), settings=None, **columns):
    """Decide between clearly better scores and the base's."""
    workspace = Workspace(load_recipe(recipe, settings or {}))
    monkeypatch.setattr("loraflow.tasks.gate._unscored_parts", lambda *_: list(unscored))
    base, tuned = scores(workspace, "base", 2.0, **columns), scores(workspace, "tuned", 1.0, **columns)
    return decide(workspace, base, tuned), workspace.looks.entries(), lambda: decide(workspace, base, tuned)


def test_a_part_of_which_no_row_was_scored_leaves_it_undecided_without_a_look(recipe, monkeypatch):
    decision, looks, again = decided(recipe, monkeypatch, ["language en (5 held-out rows)"])
    assert decision.verdict == "undecided" and "no row was scored of language en" in decision.reasons[0]
    assert not looks and decision.look is None and decision.comparisons[0].difference == 1
    assert (
        decision.budget
        == "No look was used: it could not promote (no row of language en (5 held-out rows) was scored)."
    )
    assert Decision.from_dict(decision.to_dict()) == decision
    assert (
        len(advice(decision, HeldoutRows(85))) == 1
        and "score rows of language en" in advice(decision, HeldoutRows(85))[0]
    )
    assert again().verdict == "unchanged"


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"group": ["a", "b"] * 40}, {}, "held-out rows: 2 independent, and 20 are needed"),
        (
            {"prompt": [asked(f"was ist {i}") for i in range(75)] + [asked("\u4ec0\u4e48")] * 5},
            {"gate.slices": {"script": {"token_loss": 3}}},
            "rows of script CJK: 1 independent, and 20 are needed",
        ),
    ],
)
def test_too_few_independent_rows_leave_it_undecided_without_a_look(recipe, monkeypatch, columns, settings, message):
    decision, looks, _ = decided(recipe, monkeypatch, settings=settings, **columns)
    assert decision.verdict == "undecided" and not looks and message in decision.budget
    assert any("at least 20 independent rows are needed" in reason for reason in decision.reasons)


def test_enough_rows_use_a_look(recipe, monkeypatch):
    decision, looks, _ = decided(recipe, monkeypatch)
    assert decision.verdict == "promote" and len(looks) == 1 and decision.budget.startswith("Look 1")
