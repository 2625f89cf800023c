"""Commands and comparisons that read an artifact's files themselves notice a changed byte, as stages do."""

import pytest

from loraflow.cli.data import _of_run
from loraflow.cli.data_check import _of_recipe
from loraflow.config import load_recipe
from loraflow.execution.launcher import run_job
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.stages import CHECK_DATASET, VERSION_DATASET
from loraflow.tasks.drift import compare_data
from tests.promoted_models import commit, promote


@pytest.fixture
def workspace(recipe):
    return Workspace(load_recipe(recipe))


@pytest.fixture
def version(workspace):
    """The artifact of the dataset."""
    return run_job(workspace.job(VERSION_DATASET, {}), workspace.store)


def change(workspace, ref):
    file = workspace.store.path(ref) / "files" / "train.jsonl"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"content"', b'"kontent"', 1))
    assert workspace.store.find(ref.stage, ref.fingerprint) == ref, "names and sizes do not show it"


def test_data_check_of_a_recipe_computes_a_damaged_dataset_again(recipe, workspace, version, caplog):
    change(workspace, version)
    folder = _of_recipe(str(recipe), personal=False).folder
    assert b"kontent" not in (folder / "train.jsonl").read_bytes() and "damaged" in caplog.text


def test_data_diff_refuses_the_damaged_dataset_of_a_run(workspace, version):
    change(workspace, version)
    stage = StageRun(stage="version_dataset", state="computed", fingerprint=version.fingerprint, digest=version.digest)
    record = RunRecord(run="20260101-000000-abcdef", recipe="tiny", stages=[stage])
    workspace.store.write_document(f"runs/{record.run}.json", record.document)
    with pytest.raises(CorruptArtifact):
        _of_run(record.run, workspace.store)


def test_a_damaged_dataset_does_not_decide_whether_to_retrain(recipe, workspace, dataset, version):
    old = run_job(workspace.job(CHECK_DATASET, {"dataset": version}), workspace.store)
    tokens = commit(workspace.store, "tokenize", "t", inputs={"rows": old})
    adapter = commit(workspace.store, "train", "a", inputs={"tokens": tokens})
    promote(workspace.log, commit(workspace.store, "merge", "m", inputs={"adapter": adapter}))
    file = dataset / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    newer = Workspace(load_recipe(recipe))
    newest = run_job(newer.job(VERSION_DATASET, {}), newer.store)
    new = run_job(newer.job(CHECK_DATASET, {"dataset": newest}), newer.store)
    assert compare_data.fn(newer, new).changed == 1
    change(workspace, version)
    assert compare_data.fn(Workspace(load_recipe(recipe)), new) is None, "it cannot be told, so nothing waits for it"
