"""A model is derived again from what it was made of, and a run runs again in a fresh store: bytes are compared."""

import json
import shutil

import pytest
from click.testing import CliRunner

from loraflow import identity
from loraflow.cli import cli
from loraflow.config import load_recipe
from loraflow.execution import rederive as reproducing
from loraflow.execution.launcher import run_job
from loraflow.execution.rederive import rederive, reproduce
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, CorruptArtifact, Crashed, LimitExceeded
from loraflow.job import Job
from loraflow.registry import PromotionLog
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.stages import CHECK_DATASET, MERGE, VERSION_DATASET
from loraflow.store import LocalStore, Summary
from tests.conftest import build_phi3
from tests.tiny_adapters import make_adapter


def commit(store, stage, folder, inputs, facets=None):
    payload = identity.payload(stage, 1, {name: ref.digest for name, ref in inputs.items()}, {})
    staged = store.staging(stage, identity.fingerprint(payload))
    shutil.copytree(folder, staged, dirs_exist_ok=True)
    return store.commit(staged, payload=payload, inputs=inputs, summary=Summary(facets=facets or {}), provenance={})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with a dataset, a base, an adapter, and the model that the merge stage made of them."""
    folder = tmp_path_factory.mktemp("made")
    store = LocalStore(folder / "store")
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "r.yaml").write_text(
        f"name: r\ndata: {{source: {folder}/data, train: [train.jsonl], heldout: [], heldout_fraction: 0.3}}\n"
        f"base: {{model: {folder}/base}}\nregister: {{model: tickets}}\nruntime: {{store: {folder}/store}}\n"
    )
    base_folder = build_phi3(folder / "base")
    make_adapter(base_folder, folder / "trained" / "adapter")
    workspace = Workspace(load_recipe(folder / "r.yaml"))
    dataset = run_job(workspace.job(VERSION_DATASET, {}), store)
    rows = run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), store)
    base = commit(store, "resolve_base", base_folder, {})
    adapter = commit(store, "train", folder / "trained", {"base": base, "rows": rows}, {"adapter": ["adapter/"]})
    job = Job(
        stage="merge",
        version=MERGE.version,
        inputs={"base": base, "adapter": adapter},
        facets={"adapter": "adapter"},
        config={"dtype": None, "max_shard_size_gb": 5.0},
    )
    merged = run_job(job, store)
    entry = {"merged": merged, "adapter": adapter, "inputs": {}, "reasons": ["x"], "actor": "me"}
    PromotionLog(store, "tickets").append(None, action="promote", **entry)
    return folder, {"dataset": dataset, "rows": rows, "base": base, "adapter": adapter, "merged": merged}


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[0] / "store", tmp_path / "store")
    return LocalStore(tmp_path / "store"), made[1]


def verify(store, *arguments):
    return CliRunner().invoke(cli, ["verify", *arguments, "--store", store.uri])


def test_the_champion_is_derived_again_bit_for_bit_from_the_dataset_on(copy):
    store, _ = copy
    done = verify(store, "champion", "--rederive")
    assert done.exit_code == 0, (done.output, done.exception)
    for part in ("the dataset's files have the md5 that DVC pins", "are the same bit for bit", "0 differences"):
        assert part in done.output
    order = ["version_dataset/", "check_dataset/", "train/", "merge/"]
    assert [done.output.index(name) for name in order] == sorted(done.output.index(name) for name in order)


def test_the_merge_is_computed_again_in_a_worker_whose_end_is_a_failure_with_its_name(copy, monkeypatch):
    from loraflow.execution import rederive as module

    monkeypatch.setattr(module, "WORKER", ["/bin/false"])
    assert isinstance(verify(copy[0], "champion", "--rederive").exception, Crashed)


def forge(store, ref, change):
    """Change an artifact's files, and its manifest so that no hash in it is wrong. Return the ref that it has then."""
    manifest = json.loads((store.path(ref) / "manifest.json").read_text())
    inputs = {name: source.model_copy() for name, source in store.manifest(ref).input_refs(store.uri).items()}
    change(store.path(ref))
    staged = store.staging(ref.stage, ref.fingerprint)
    shutil.copytree(store.path(ref), staged, dirs_exist_ok=True)
    (staged / "manifest.json").unlink()
    return store.commit(
        staged,
        payload=manifest["payload"],
        inputs=inputs,
        summary=Summary(),
        provenance=store.manifest(ref).provenance,
        replace=True,
    )


def test_weights_that_no_merge_of_base_and_adapter_gives_are_found_though_all_hashes_are_right(copy):
    store, refs = copy

    def change(folder):
        file = next(folder.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    forged = forge(store, refs["merged"], change)
    assert not store.verify(forged), "each hash is right"
    *before, last = rederive(store, forged)
    assert not any(check.problems for check in before)
    assert [problem.split(":")[1] for problem in last.problems] == [" its bytes differ"]


HARMS = {
    "a byte of the dataset": ("dataset", "files/train.jsonl", "hash mismatch"),
    "a byte of the base": ("base", "config.json", "hash mismatch"),
    "a file of the adapter removed": ("adapter", "adapter/adapter_config.json", "missing"),
    "a manifest": ("rows", "manifest.json", "manifest"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_changed_byte_anywhere_in_the_lineage_is_found(copy, harm):
    store, refs = copy
    name, file, problem = HARMS[harm]
    path = store.path(refs[name]) / file
    if problem == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))
    done = verify(store, "champion", "--rederive")
    assert isinstance(done.exception, CorruptArtifact) and "differs" in done.output and problem in done.output
    assert "bit for bit" not in done.output, "a merge of damaged parts says nothing"


def test_a_dataset_whose_files_are_not_those_of_its_md5_is_found_though_all_hashes_are_right(copy):
    store, refs = copy
    forged = forge(store, refs["dataset"], lambda folder: (folder / "files" / "train.jsonl").write_text("{}\n"))
    checks = list(rederive(store, forged))
    assert any("the files have md5" in problem for check in checks for problem in check.problems)


@pytest.mark.parametrize("arguments", [["champion"], ["--rederive"], ["champion", "--rederive", "--deep"]])
def test_options_of_verify_that_do_not_belong_together_are_refused(copy, arguments):
    assert isinstance(verify(copy[0], *arguments).exception, BadConfig)


def test_a_name_that_is_no_run_is_refused(copy):
    assert isinstance(verify(copy[0], "20260101-000000-abcdef", "--rederive").exception, BadConfig)


@pytest.fixture
def recorded(made, copy, monkeypatch):
    """The store with a record of a run, of which only the stages of the dataset are run again."""
    steps = reproducing.steps_of
    monkeypatch.setattr(reproducing, "steps_of", lambda recipe: steps(recipe)[:2])
    store, refs = copy
    stages = [
        StageRun(stage=ref.stage, state="computed", fingerprint=ref.fingerprint, digest=ref.digest)
        for ref in (refs["dataset"], refs["rows"])
    ]
    text = (made[0] / "r.yaml").read_text()
    record = RunRecord(run="20260101-000000-abcdef", recipe="r", recipe_text=text, stages=stages)
    store.write_document(f"runs/{record.run}.json", record.document)
    return store, record


def test_a_run_is_reproduced_in_a_fresh_store_and_compared_stage_by_stage(recorded, tmp_path):
    store, record = recorded
    arguments = ["reproduce", record.run, "--store", store.uri, "--into", str(tmp_path / "fresh")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "all 2 stages are the same, bit for bit" in done.output
    assert {ref.stage for ref in LocalStore(tmp_path / "fresh").artifacts()} == {"version_dataset", "check_dataset"}
    assert isinstance(CliRunner().invoke(cli, arguments).exception, BadConfig), "a store with artifacts is not fresh"


def test_a_run_that_differs_names_settings_versions_and_files(recorded, tmp_path):
    store, record = recorded
    other = record.model_copy(update={"overrides": {"data.heldout_fraction": 0.5}})
    same, differs = reproduce(store, other, str(tmp_path / "fresh"))
    assert same.is_same and not differs.is_same
    text = " ".join(differs.reasons)
    assert "heldout_fraction 0.3 → 0.5" in text and "files that differ: heldout.jsonl" in text
    assert "versions and hardware are the recorded ones" in text
    store.write_document(f"runs/{record.run}.json", other.document)
    arguments = ["reproduce", record.run, "--store", store.uri, "--into", str(tmp_path / "again"), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, LimitExceeded)
    assert [stage["same"] for stage in json.loads(done.stdout)["stages"]] == [True, False]


def test_the_device_that_trained_is_named_where_two_runs_differ(tmp_path):
    """It is in the telemetry, which is no part of a digest."""
    from loraflow.execution.rederive import _compared
    from tests.promoted_models import commit as commit_text

    found = {}
    for name, device in (("before", "NVIDIA A100"), ("after", "NVIDIA H100")):
        store = LocalStore(tmp_path / name)
        folder = tmp_path / f"{name}-files"
        (folder / "telemetry").mkdir(parents=True)
        (folder / "weights").write_text(name)
        (folder / "telemetry" / "engine.json").write_text(json.dumps({"device": device, "devices": 2}))
        found[name] = store, commit(store, "train", folder, {"base": commit_text(store, "resolve_base", "b")})
    (old_store, old), (new_store, new) = found["before"], found["after"]
    stage = StageRun(stage="train", state="computed", fingerprint=old.fingerprint, digest=old.digest)
    result = _compared(old_store, stage, new_store, new_store.manifest(new))
    assert not result.is_same and "device 2 x NVIDIA A100 → 2 x NVIDIA H100" in result.reasons
    assert "files that differ: weights" in result.reasons
