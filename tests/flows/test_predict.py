"""Batch prediction as a flow, with every way to name a model."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import BadConfig, BadModel, CorruptArtifact
from loraflow.serving.models import find_model, load
from loraflow.store import LocalStore
from tests.conftest import build_phi3, chat
from tests.flows.test_finetune import promote
from tests.promoted_models import forget_promotions


def test_the_flow_answers_a_file_with_the_champion_as_evaluation_does(completed_project, project, tmp_path):
    from loraflow.flows.predict import predict

    summary = completed_project[1]
    promote(project, project.store / Path(summary["merged"]).relative_to(completed_project[0].store))
    scores = pd.read_parquet(
        next(Path(s["uri"]) for s in summary["stages"] if s["stage"] == "evaluate tuned") / "scores.parquet"
    )
    rows = [{"id": row.id, "messages": json.loads(row.prompt)} for row in scores.itertuples()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = predict(source=str(tmp_path / "in.jsonl"), target=str(tmp_path / "out.parquet"), store=str(project.store),
                   max_new_tokens=8, batch_size=8)  # fmt: skip
    assert (done["rows"], done["errors"]) == (8, 0)
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out["id"].tolist() == scores["id"].tolist()
    assert (
        out["prediction"].tolist() == scores["answer"].tolist() and out["finish"].tolist() == scores["finish"].tolist()
    )


def test_a_model_and_its_base_are_found_by_champion_run_and_path(completed_project, project):
    store, summary = LocalStore(project.store), completed_project[1]
    merged = project.store / Path(summary["merged"]).relative_to(completed_project[0].store)
    adapter = project.store / Path(summary["adapter"]).relative_to(completed_project[0].store)
    base = project.store / Path(next(s["uri"] for s in summary["stages"] if s["stage"] == "resolve_base")).relative_to(
        completed_project[0].store
    )
    forget_promotions(store)
    with pytest.raises(BadConfig, match=r"registry is empty"):
        find_model(store, "champion")
    promote(project, merged)
    for name in ("champion", "champion:tiny", summary["run"], str(merged)):
        found = find_model(store, name)
        assert (found.folder, found.base, found.unmerged_adapter) == (merged, base, None), name
        assert found.run.run == summary["run"] and found.ref.digest == merged.name
    for name in (adapter, adapter.parent):
        found = find_model(store, str(name))
        assert (found.folder, found.unmerged_adapter) == (base, adapter)
    elsewhere = find_model(LocalStore(project.folder / "other"), str(merged))
    assert elsewhere.ref is None and elsewhere.base == base
    with pytest.raises(BadConfig, match="no such model"):
        find_model(store, "nothing")
    with pytest.raises(BadConfig, match="no merged model"):
        find_model(store, "20200101-000000-abcdef")
    (merged / "config.json").unlink()
    with pytest.raises(CorruptArtifact, match="gone or incomplete"):
        find_model(store, "champion")


def test_an_adapter_on_its_base_gives_the_answers_of_the_merged_model(completed_project, project, tmp_path):
    import torch

    store, summary = LocalStore(project.store), completed_project[1]
    adapter = tmp_path / "adapter"
    shutil.copytree(summary["adapter"], adapter)
    with pytest.raises(BadConfig, match="which folder holds its base"):
        find_model(store, str(adapter))
    on_top = load(find_model(store, str(adapter), str(project.phi3)), "float32")
    merged = load(find_model(store, summary["run"]), "float32")
    ids = torch.tensor([merged.template.prompt_ids([chat(3)["messages"]])[0]])
    with torch.inference_mode():
        found, expected = on_top.model(ids).logits, merged.model(ids).logits
        base = load(find_model(store, str(project.phi3)), "float32").model(ids).logits
    assert (found - expected).abs().max() < (found - base).abs().max() / 20, "merging rounds to bf16, and no more"
    wider = build_phi3(tmp_path / "wider", hidden_size=128)
    with pytest.raises(BadModel, match="does not fit"):
        load(find_model(store, str(adapter), str(wider)), "float32")
    deeper = build_phi3(tmp_path / "shallow", layers=1)
    with pytest.raises(BadModel, match="does not fit"):
        load(find_model(store, str(adapter), str(deeper)), "float32")


def test_a_pickle_is_refused_and_never_opened(tmp_path, phi3):
    folder = tmp_path / "pickled"
    shutil.copytree(phi3, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadModel, match="pickle"):
        find_model(LocalStore(tmp_path / "store"), str(folder))


def test_evaluate_accepts_the_same_model_names_and_uses_the_recipes_system_message(
    completed_project, project, monkeypatch
):
    summary = completed_project[1]
    adapter = project.store / Path(summary["adapter"]).relative_to(completed_project[0].store)
    done = CliRunner().invoke(cli, ["evaluate", str(adapter), str(project.recipe)])
    assert isinstance(done.exception, BadConfig) and "loraflow merge" in done.exception.next_step
    record = project.store / "runs" / f"{summary['run']}.json"
    values = json.loads(record.read_text())
    values["resolved"]["data"]["system"] = "be brief"
    del values["checksum"]  # it is that of the record before
    record.write_text(json.dumps(values))
    assert find_model(LocalStore(project.store), summary["run"]).system == "be brief"
    (project.folder / "in.csv").write_text("prompt\nwhat is red\n")
    seen = []
    monkeypatch.setattr(
        "loraflow.serving.predict._prompts", lambda loaded, questions, n: seen.extend(questions) or ([[1]], [None])
    )
    CliRunner().invoke(cli, ["predict", summary["run"], str(project.folder / "in.csv"), str(project.folder / "out.csv"),
                             "--store", str(project.store), "--max-new-tokens", "1"], catch_exceptions=False)  # fmt: skip
    assert seen[0].messages[0] == {"role": "system", "content": "be brief"}
