"""`plan` warns of a champion with other tokens before anything is trained: its losses per token cannot be compared."""

import json
import shutil

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.config import load_recipe
from loraflow.execution.launcher import run_job
from loraflow.execution.plan_notes import token_lines, warn_of_other_tokens
from loraflow.execution.workspace import Workspace
from loraflow.identity import fingerprint, payload
from loraflow.stages import CHECK_DATASET, EVALUATE, RESOLVE_BASE, VERSION_DATASET
from loraflow.store import Summary

PLAIN = {"gate.primary": "exact_match"}


def write(store, stage, values, inputs, name, table=None):
    """Commit an artifact: scores, or a model that is never opened."""
    out = store.staging(stage, fingerprint(values))
    if table is None:
        (out / name).write_text("weights")
    else:
        table.to_parquet(out / name)
    return store.commit(out, payload=values, inputs=inputs, summary=Summary(), provenance={})


def scored(workspace, model, rows, tokens):
    job = workspace.job(EVALUATE, {"model": model, "rows": rows})
    table = pd.DataFrame({"id": [f"r{i}" for i in range(8)], "set": "heldout", "reference_tokens": tokens})
    write(workspace.store, "evaluate", job.payload, {"model": model, "rows": rows}, "scores.parquet", table)


@pytest.fixture
def other_base(phi3, tmp_path):
    """The same base with another chat template: a space after each message."""
    folder = shutil.copytree(phi3, tmp_path / "other")
    template = folder / "chat_template.jinja"
    assert "<|end|>" in template.read_text()
    template.write_text(template.read_text().replace("<|end|>", " <|end|>"))
    return {"base.model": str(folder)}


@pytest.fixture
def champion(recipe):
    """Promote a model of the recipe's base."""
    workspace = Workspace(load_recipe(recipe))
    base = run_job(workspace.job(RESOLVE_BASE, {}), workspace.store)
    merged = write(
        workspace.store, "merge", payload("merge", 1, {}, {"of": "test"}), {"base": base}, "model.safetensors"
    )
    workspace.log.append(None, action="promote", merged=merged, adapter=None, inputs={}, reasons=["good"], actor="me")
    return merged


def test_a_champion_of_the_same_base_is_compared_without_a_word(recipe, champion):
    assert token_lines(Workspace(load_recipe(recipe))) == []


def test_the_plan_warns_where_tokenizer_or_template_are_others_and_a_loss_is_compared(
    recipe, champion, other_base, caplog
):
    workspace = Workspace(load_recipe(recipe, other_base))
    assert token_lines(workspace) == [], "the base is not known yet"
    run_job(workspace.job(RESOLVE_BASE, {}), workspace.store)
    [line] = token_lines(workspace)
    assert "another tokenizer or chat template than the base: if it splits" in line and "compare token_loss" in line
    assert token_lines(Workspace(load_recipe(recipe, other_base | PLAIN))) == [], "answers can be compared"
    assert token_lines(Workspace(load_recipe(recipe, other_base | PLAIN | {"gate.guards": {"token_loss": 0.1}})))
    caplog.clear()
    warn_of_other_tokens(workspace)
    assert caplog.messages == [line], "a run says it before the training"
    sets = [part for key, value in other_base.items() for part in ("--set", f"{key}={value}")]
    shown = CliRunner().invoke(cli, ["plan", str(recipe), *sets])
    assert line in shown.output, shown.exception
    assert json.loads(CliRunner().invoke(cli, ["plan", str(recipe), "--json", *sets]).output)["champion"] == [line]


def test_the_plan_is_certain_once_both_models_were_scored_on_the_rows(recipe, champion, other_base):
    workspace = Workspace(load_recipe(recipe, other_base))
    store = workspace.store
    base = run_job(workspace.job(RESOLVE_BASE, {}), store)
    dataset = run_job(workspace.job(VERSION_DATASET, {}), store)
    rows = run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), store)
    scored(workspace, base, rows, 20)
    assert "if it splits" in token_lines(workspace)[0]
    scored(workspace, champion, rows, [20] * 5 + [21] * 3)
    [line] = token_lines(workspace)
    assert "other tokens in 3 references: gate will refuse to compare token_loss" in line


def test_other_files_that_give_the_same_tokens_are_no_reason_to_warn(recipe, champion, other_base):
    workspace = Workspace(load_recipe(recipe, other_base))
    store = workspace.store
    base = run_job(workspace.job(RESOLVE_BASE, {}), store)
    dataset = run_job(workspace.job(VERSION_DATASET, {}), store)
    rows = run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), store)
    for model in (base, champion):
        scored(workspace, model, rows, 20)
    assert token_lines(workspace) == []


def test_a_champion_whose_files_are_gone_is_left_to_the_plan_of_its_scores(recipe, champion, other_base):
    workspace = Workspace(load_recipe(recipe, other_base))
    run_job(workspace.job(RESOLVE_BASE, {}), workspace.store)
    shutil.rmtree(workspace.store.path(champion))
    assert token_lines(workspace) == []
