"""`loraflow repair` on the store of a real run: the same bytes are computed again, and nothing is promoted."""

import shutil
import time

from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import CorruptArtifact
from loraflow.registry import PromotionLog
from loraflow.store import LocalStore


def repair(store, *options, fails=None):
    done = CliRunner().invoke(cli, ["repair", "--store", store.uri, *options])
    assert type(done.exception) is (fails or type(None)), done.exception
    return done


def test_damaged_and_missing_artifacts_are_recomputed_after_their_cost_was_named(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = LocalStore(project.store)
    refs = {ref.stage: ref for ref in store.artifacts()}
    before = PromotionLog(store, "tiny").entries()
    time.sleep(0.02)
    weights = store.path(refs["merge"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"#")
    (store.path(refs["tokenize"]) / "manifest.json").write_text("{")
    refused = repair(store, fails=CorruptArtifact)
    assert "Nothing was recomputed" in str(refused.exception) and "loraflow repair --yes" in str(refused.exception)
    lines = refused.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["recompute", "tokenize"], ["recompute", "merge"]]
    assert all(" s in run " in line for line in lines[:2]) and lines[2].startswith("to recompute: 2 stages, about ")
    done = repair(store, "--yes")
    assert done.stdout.count("recomputed ") == 2 and "the store is complete" in done.stdout
    for stage in ("tokenize", "merge"):
        assert store.find(stage, refs[stage].fingerprint).digest == refs[stage].digest
        assert store.verify(refs[stage]) == []
    assert PromotionLog(store, "tiny").entries() == before
    assert "nothing is damaged or missing" in repair(store).stdout


def test_an_artifact_whose_dataset_has_changed_is_listed_as_lost(project, completed_project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = LocalStore(project.store)
    dataset = next(ref for ref in store.artifacts() if ref.stage == "version_dataset")
    next(store.path(dataset).rglob("train.jsonl")).write_text("{}")
    source = completed_project[0].folder / "data"  # which the recorded recipe names
    shutil.move(source, tmp_path / "elsewhere")
    try:
        done = repair(store, "--yes", fails=CorruptArtifact)
    finally:
        shutil.move(tmp_path / "elsewhere", source)
    assert "lost       version_dataset" in done.stdout and "The dataset does not exist." in done.stdout
    assert "Not everything could be recomputed" in str(done.exception)
