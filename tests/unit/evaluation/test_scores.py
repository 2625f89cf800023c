"""The gate reads score tables: it hashes the bytes that it parses, and believes no edited table or manifest."""

import io
from types import SimpleNamespace

import pandas as pd
import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, BadData, CorruptArtifact
from loraflow.store import Ref, Summary
from loraflow.tasks.gate import gate
from loraflow.tasks.guards import heldout_slices


def scores(workspace: Workspace, name: str, value: float, version=1, config=None, rows_digest="rows", **columns) -> Ref:
    """Commit a score table as an evaluation does."""
    payload = identity.payload("evaluate", version, {"model": name, "rows": rows_digest}, config or {})
    staged = workspace.store.staging("evaluate", identity.fingerprint(payload))
    rows = {"id": [f"r{i}" for i in range(80)], "set": "heldout", "token_loss": value, **columns}
    pd.DataFrame(rows).to_parquet(staged / "scores.parquet", index=False)
    return workspace.store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})


@pytest.fixture
def workspace(recipe):
    return Workspace(load_recipe(recipe))


def decide(workspace, base, tuned, champion=None):
    merged = Ref(stage="merge", fingerprint="f" * 64, digest="d" * 64, uri=workspace.store.uri)
    result = SimpleNamespace(
        merged=merged, base_scores=base, tuned_scores=tuned, champion_scores=champion, further_seeds=(), general={}
    )
    return gate.fn(workspace, result)


def improve(file):
    """Replace the scores by better ones; names and sizes stay."""
    data = file.read_bytes()
    table = pd.read_parquet(file)
    written = io.BytesIO()
    table.assign(token_loss=0.5).to_parquet(written, index=False)
    assert len(written.getvalue()) == len(data)
    file.write_bytes(written.getvalue())


@pytest.mark.parametrize("harmed", ["base", "tuned", "champion"])
def test_edited_scores_promote_nothing_and_are_quarantined(workspace, harmed):
    refs = {name: scores(workspace, name, 2.0) for name in ("base", "tuned", "champion")}
    assert decide(workspace, **refs).verdict != "promote"
    for name in workspace.store.documents("registry/"):
        (workspace.store.root / name).unlink()
    improve(workspace.store.path(refs[harmed]) / "scores.parquet")
    assert workspace.store.find("evaluate", refs[harmed].fingerprint) == refs[harmed], "its size is right"
    with pytest.raises(CorruptArtifact, match=r"damaged(.|\n)*set-aside(.|\n)*scores.parquet: hash mismatch"):
        decide(workspace, **refs)
    assert workspace.store.find("evaluate", refs[harmed].fingerprint) is None, "so its stage recomputes it"
    assert not workspace.store.documents("registry/"), "no decision is stored"


def test_a_table_without_an_id_in_a_row_is_refused_although_it_is_intact(workspace):
    ids = [None, *(f"r{i}" for i in range(1, 80))]
    with pytest.raises(BadData, match="no valid `id`"):
        decide(workspace, scores(workspace, "base", 2.0, id=ids), scores(workspace, "tuned", 1.0, id=ids))
    assert not workspace.looks.entries(), "scores that cannot be compared cost no look"


def test_better_scores_are_promoted(workspace):
    base, tuned = scores(workspace, "base", 2.0), scores(workspace, "tuned", 1.0)
    assert decide(workspace, base, tuned).verdict == "promote"


def test_a_look_is_spent_before_the_verdict_and_a_crash_in_between_grants_none(workspace, monkeypatch):
    base, tuned = scores(workspace, "base", 2.0), scores(workspace, "tuned", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("loraflow.evaluation.gate.decide", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decide(workspace, base, tuned)
    [look] = workspace.looks.entries()
    decision = decide(workspace, base, tuned)
    assert decision.look == look.seq and workspace.looks.entries() == [look], "the same comparison is the same look"
    assert decision.budget.startswith(
        "Look 1 of 365, 364 left, at 80 held-out rows, of which 80 were never scored before"
    )
    other = Workspace(workspace.recipe.model_copy(update={"name": "renamed"}))
    changed = decide(other, base, scores(workspace, "tuned 2", 1.9))
    assert changed.look == 2 and "6.9e-05 allowed at look 2 of 365" in changed.comparisons[0].reason


def test_a_champion_with_another_tokenizer_costs_no_look(workspace):
    base, tuned = (
        scores(workspace, "base", 2.0, reference_tokens=20),
        scores(workspace, "tuned", 1.0, reference_tokens=20),
    )
    with pytest.raises(BadConfig, match=r"token_loss of challenger and champion(.|\n)*register.model"):
        decide(workspace, base, tuned, champion=scores(workspace, "champion", 1.9, reference_tokens=10))
    assert not workspace.looks.entries()


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([0.025], "at most 2.5% for any"),
        ([0.001], "at most 0.1% for any"),
        ([0.4, 0.05], "at most 40% for any false promotion in 365 looks of this model, whatever its held-out rows. "
         "gate.error was 0.4 at an earlier look, and is 0.05 now."),
        ([0.05, 0.4], "at most 40% for any"),
    ],
)  # fmt: skip
def test_the_error_that_is_shown_is_that_of_all_looks_of_the_period(workspace, errors, message):
    base, tuned = scores(workspace, "base", 2.0), scores(workspace, "tuned", 1.99)
    for error in errors:
        rules = workspace.recipe.gate.model_copy(update={"error": error})
        workspace.recipe = workspace.recipe.model_copy(update={"gate": rules})
        decision = decide(workspace, base, tuned)
    assert message in decision.budget, decision.budget


def test_new_rules_and_a_new_champion_are_new_looks(workspace):
    base, tuned = scores(workspace, "base", 2.0), scores(workspace, "tuned", 1.99)
    assert decide(workspace, base, tuned).verdict == "undecided"
    again = decide(workspace, base, tuned)
    assert again.verdict == "unchanged" and len(workspace.looks.entries()) == 1
    assert again.budget.startswith("When it was decided: Look 1 of 365, 364 left"), "more looks may have followed"
    looser = workspace.recipe.gate.model_copy(update={"error": 0.4})
    workspace.recipe = workspace.recipe.model_copy(update={"gate": looser})
    assert decide(workspace, base, tuned).verdict == "undecided" and len(workspace.looks.entries()) == 2
    decide(workspace, base, tuned, champion=base)
    assert [look.number for look in workspace.looks.entries()] == [1, 2, 3]


@pytest.mark.parametrize("other", [{"config": {"max_new_tokens": 8}}, {"rows_digest": "older rows"}, {"version": 2}])
@pytest.mark.parametrize("who", ["base", "champion"])
def test_a_model_that_was_scored_by_another_protocol_or_on_other_rows_is_refused_and_costs_no_look(
    workspace, who, other
):
    refs = {name: scores(workspace, name, 2.0, **(other if name == who else {})) for name in ("base", "champion")}
    with pytest.raises(BadData, match=rf"scored in different ways(.|\n)*{who}(.|\n)*--force evaluate"):
        decide(workspace, tuned=scores(workspace, "tuned", 1.0), **refs)
    assert not workspace.looks.entries()


def test_a_row_with_the_same_id_and_another_prompt_is_not_compared(workspace):
    tuned = scores(workspace, "tuned", 1.0, prompt=[f"question {i}" for i in range(80)])
    base = scores(workspace, "base", 2.0, prompt=["older question", *(f"question {i}" for i in range(1, 80))])
    with pytest.raises(BadData, match="different questions"):
        decide(workspace, base, tuned)
    assert not workspace.looks.entries()


def test_the_report_shows_the_gates_scores_by_slice_where_the_recipe_asks_for_it(workspace):
    columns = {"reference_tokens": range(1, 81), "reference": "x", "finish": "stop", "prompt": '[{"content": "red"}]'}
    base, tuned = (scores(workspace, name, value, **columns) for name, value in (("base", 2.0), ("tuned", 1.0)))
    result = SimpleNamespace(base_scores=base, tuned_scores=tuned, champion_scores=None)
    run = SimpleNamespace(workspace=workspace)
    assert heldout_slices(run.workspace, result) == [], "no table is read"
    evaluation = workspace.recipe.evaluation.model_copy(update={"slices": ["length", "script"]})
    workspace.recipe = workspace.recipe.model_copy(update={"evaluation": evaluation})
    found = heldout_slices(run.workspace, result)
    assert [(part.by, part.rows) for part in found] == [*[("length", 20)] * 4, ("script", 80)]
    primary = workspace.recipe.gate.primary
    assert all(part.values["tuned"][primary].value == 1.0 for part in found)
    improve(workspace.store.path(tuned) / "scores.parquet")
    assert heldout_slices(run.workspace, result) == [], "a damaged table shows nothing"
