"""`loraflow show`: the champion with all that the store knows about it, runs and artifacts, from a store of a real run."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.registry import PromotionLog
from loraflow.registry.runs import LogHead, RunRecord, read_run
from loraflow.store import LocalStore, Summary, open_store
from tests.promoted_models import forget_promotions


def show(store, *arguments, fails=None):
    """Run `loraflow show` and return its output; `fails` is the failure that it must end with."""
    done = CliRunner().invoke(cli, ["show", *arguments, "--store", str(store)])
    assert type(done.exception) is (fails or type(None)), done.exception
    return done


def facts(store, *arguments, fails=None):
    return json.loads(show(store, "champion", *arguments, "--json", fails=fails).stdout)


@pytest.fixture
def run(completed_project):
    return completed_project[1]


@pytest.fixture
def store(project):
    """The store of a real run, without a champion."""
    store = LocalStore(project.store)
    forget_promotions(store)
    return store


@pytest.fixture
def champion(store, run):
    """The same, with the run's model promoted by hand."""
    done = CliRunner().invoke(cli, ["promote", run["run"], "--reason", "better answers", "--store", store.uri])
    assert done.exit_code == 0, done.exception
    return store


def artifact(store, stage):
    return next(ref for ref in store.artifacts() if ref.stage == stage)


def test_show_champion_lists_promotion_run_data_base_recipe_scores_and_files(champion, run, project):
    merged, adapter, base = (artifact(champion, stage) for stage in ("merge", "train", "resolve_base"))
    md5 = champion.manifest(artifact(champion, "version_dataset")).payload["config"]["md5"]
    shown = facts(champion.uri)
    assert shown["model"] == "tiny" and shown["in_force"] == shown["promoted"]
    assert (shown["promoted"]["entry"], shown["promoted"]["reasons"]) == (1, ["better answers"])
    assert shown["promoted_by_run"] == shown["run"]["run"] == shown["scores"]["run"] == run["run"]
    assert shown["run"]["computed"] and shown["run"]["state"] == "done"
    assert shown["run"]["commit"] == read_run(champion, run["run"]).commit and shown["dataset"]["commit"] is None
    assert shown["dataset"]["md5"] == md5 and shown["dataset"]["rows"] == {"train": 80, "heldout": 20}
    assert shown["base"]["content"] == champion.manifest(base).payload["config"]["source"]["content"]
    assert shown["base"]["digest"] == base.digest and shown["base"]["model"] == str(project.phi3)
    assert shown["recipe"]["name"] == "tiny" and shown["recipe"]["settings"]["peft_config"]["r"] == 4
    assert shown["scores"]["metrics"] == run["metrics"] and shown["scores"]["confidence"] == 0.95
    uri = champion.location(merged)
    contents = shown["merged"].pop("contents")
    assert shown["merged"] == {"digest": merged.digest, "uri": uri, "problems": []}
    assert contents == shown["adapter"]["contents"] == "intact", "the promotion hashed them"
    assert shown["adapter"]["uri"] == f"{champion.location(adapter)}/adapter"
    assert (Path(shown["adapter"]["uri"]) / "adapter_config.json").exists()

    text = show(champion.uri, "champion").stdout
    loss = [run["metrics"][side]["heldout"]["token_loss"] for side in ("base", "tuned")]
    for part in (
        "champion of tiny", shown["promoted"]["time"], "entry 1 ", "better answers", run["run"], f"md5 {md5}",
        "80 training rows, 20 held-out rows", str(project.phi3), f"artifact {base.digest}", "r 4, lora_alpha 8, learning_rate 0.01",
        "95% intervals", "heldout, 8 rows", *(f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in loss),
        champion.location(merged), f"{champion.location(adapter)}/adapter",
    ):  # fmt: skip
        assert part in text, part
    assert "gone" not in text and "not recorded" not in text


def test_the_data_commit_is_the_commit_of_its_revision_or_of_the_project(champion, run):
    record = read_run(champion, run["run"])
    data = {**record.section("data"), "source": "data.dvc"}
    cases = {"the project's HEAD": ({**data, "rev": None}, "c" * 40), "unknown": ({**data, "rev": "v1"}, None)}
    for name, (section, commit) in cases.items():
        values = {**record.model_dump(), "commit": "c" * 40, "resolved": {**record.resolved, "data": section}}
        champion.write_document(f"runs/{run['run']}.json", RunRecord.model_validate(values).document)
        shown = facts(champion.uri)
        assert shown["run"]["commit"] == "c" * 40 and shown["dataset"]["commit"] == commit, name
    assert "data.dvc at revision v1" in show(champion.uri, "champion").stdout


def test_a_promotion_by_the_gate_names_the_run_whose_scores_decided(store, run):
    """Here a later run found the model of the first one in the cache and promoted it."""
    first = read_run(store, run["run"])
    merged, adapter = artifact(store, "merge"), artifact(store, "train")
    PromotionLog(store, "tiny").append(
        None, action="promote", merged=merged, adapter=adapter, inputs={"recipe": "tiny"}, reasons=["+0.4"], actor="me"
    )
    later = "29990101-000000-abcdef"
    stages = [{**stage.model_dump(), "state": "cached"} for stage in first.stages]
    metrics = {"base": None, "tuned": first.summary.model_dump()["metrics"]["tuned"], "champion": None}
    summary = {**first.summary.model_dump(), "run": later, "registered": 1, "metrics": metrics}
    record = RunRecord.model_validate({**first.model_dump(), "run": later, "stages": stages, "summary": summary})
    store.write_document(f"runs/{later}.json", record.document)
    values = {**first.model_dump(), "summary": {**first.summary.model_dump(), "registered": None}}
    store.write_document(f"runs/{first.run}.json", RunRecord.model_validate(values).document)
    shown = facts(store.uri)
    assert shown["run"]["run"] == first.run and shown["promoted_by_run"] == later
    assert shown["scores"]["run"] == later and shown["scores"]["metrics"]["base"] is None
    assert f"promoted with run {later}" in show(store.uri, "champion").stdout


def test_after_a_rollback_both_the_rollback_and_the_promotion_are_shown(champion):
    log = PromotionLog(champion, "tiny")
    other = artifact(champion, "merge").model_copy(update={"digest": "0" * 64})
    log.append(log.head(), action="promote", merged=other, adapter=None, inputs={}, reasons=["new"], actor="me")
    log.rollback("answers in French", "ops")
    shown = facts(champion.uri)
    assert (shown["in_force"]["action"], shown["in_force"]["entry"]) == ("rollback", 3)
    assert (shown["promoted"]["action"], shown["promoted"]["entry"]) == ("promote", 1)
    text = show(champion.uri, "champion").stdout
    assert "by ops, entry 3" in text and "answers in French" in text and "better answers" in text


def test_the_record_of_a_run_names_the_last_entry_of_the_promotion_log(completed_project):
    """So that a log which was deleted together with its anchor is noticed."""
    project, summary = completed_project
    head = PromotionLog(project.store, "tiny").head()
    expected = LogHead(seq=head.seq, hash=head.hash) if head else LogHead()
    assert read_run(LocalStore(project.store), summary["run"]).promotion_head == expected


def test_a_missing_champion_is_reported(store, run):
    failure = show(store.uri, "champion", fails=BadConfig).exception
    assert failure.what == "The registry is empty." and "promote RUN" in failure.next_step
    CliRunner().invoke(cli, ["promote", run["run"], "--reason", "x", "--store", store.uri])
    failure = show(store.uri, "champion:other", fails=BadConfig).exception
    assert failure.what == "There is no champion of other yet." and "tiny" in failure.expected


def test_one_of_several_models_is_selected_by_option_or_after_a_colon(champion):
    head = PromotionLog(champion, "tiny").head()
    PromotionLog(champion, "huge").append(
        None, action="promote", merged=head.merged, adapter=None, inputs={}, reasons=["larger"], actor="me"
    )
    failure = show(champion.uri, "champion", fails=BadConfig).exception
    assert failure.what == "The registry holds several models." and failure.expected == "one of huge, tiny"
    assert facts(champion.uri, "--model", "huge")["promoted"]["reasons"] == ["larger"]
    assert "champion of tiny" in show(champion.uri, "champion:tiny").stdout
    assert facts(champion.uri, "--model", "huge")["adapter"]["digest"] == artifact(champion, "train").digest, (
        "the merged model's manifest names it"
    )
    show(champion.uri, "champion:tiny", "--model", "huge", fails=BadConfig)


def test_a_champion_without_a_run_record_is_shown_from_its_artifacts(champion, run):
    (champion.root / "runs" / f"{run['run']}.json").unlink()
    shown = facts(champion.uri)
    assert shown["run"] is None and shown["scores"] is None and shown["promoted_by_run"] == run["run"]
    assert shown["recipe"] == {"name": "tiny", "method": None, "settings": {}}
    assert shown["dataset"]["md5"].endswith(".dir") and shown["base"]["digest"] and not shown["merged"]["problems"]
    text = show(champion.uri, "champion").stdout
    assert "no record of a run with this model" in text and f"promoted with run {run['run']}" in text


def test_a_champion_without_files_is_shown_from_its_record_with_exit_status_1(champion, run):
    merged = artifact(champion, "merge")
    (champion.path(merged) / "model.safetensors").unlink()
    done = show(champion.uri, "champion", fails=CorruptArtifact)
    assert "gone or incomplete: model.safetensors: missing" in done.stdout and run["run"] in done.stdout
    assert done.exception.exit_code == 1 and "rollback" in done.exception.next_step
    for stage in ("merge", "train", "resolve_base", "version_dataset", "check_dataset"):
        shutil.rmtree(champion.root / stage)
    shown = facts(champion.uri, fails=CorruptArtifact)
    assert shown["merged"]["problems"] and shown["adapter"]["problems"]
    assert shown["scores"]["run"] == run["run"] and shown["dataset"]["md5"] is None
    assert shown["base"]["digest"] == read_run(champion, run["run"]).stage("resolve_base").digest


def test_a_runs_page_compares_the_memory_estimate_with_the_measured_peak(champion, run):
    shown = show(champion.uri, run["run"]).stdout
    lines = shown.split("Memory of the stages")[1].splitlines()
    train, evaluate, merge = (
        next(line for line in lines if name in line) for name in ("train", "evaluate base", "merge")
    )
    assert "peak " in merge and "estimated" not in merge
    assert all(part in train for part in ("estimated", "weights", "adapters", "optimizer", "activations", "logits"))
    assert "estimated" in evaluate and "generation" in evaluate


def test_show_accepts_runs_and_artifacts(champion, run):
    assert show(champion.uri, run["run"]).stdout.startswith("# tiny: ")
    assert json.loads(show(champion.uri, run["run"], "--json").stdout)["summary"]["metrics"] == run["metrics"]
    merged, adapter = artifact(champion, "merge"), artifact(champion, "train")
    for prefix in (merged.digest[:8], merged.fingerprint):
        lines = show(champion.uri, prefix).stdout.splitlines()
        assert lines[0] == f"{merged}   {champion.location(merged)}"
        assert f"  input     adapter: {adapter}" in lines
    assert json.loads(show(champion.uri, merged.digest[:8], "--json").stdout)["digest"] == merged.digest
    show(champion.uri, merged.digest[:3], fails=BadConfig)
    show(champion.uri, run["run"], "--model", "tiny", fails=BadConfig)


def test_a_run_record_is_unchanged_by_reading_and_writing(store, run):
    assert read_run(store, run["run"]).document == store.read_document(f"runs/{run['run']}.json")


def test_a_champion_in_a_bucket_is_shown_without_fetching_its_model(champion, bucket_uri):
    bucket = open_store(bucket_uri)
    for ref in champion.artifacts():
        manifest, staged = champion.manifest(ref), bucket.staging(ref.stage, ref.fingerprint)
        shutil.copytree(champion.path(ref), staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        copied = bucket.commit(
            staged,
            payload=manifest.payload,
            inputs=manifest.input_refs(bucket.uri),
            summary=Summary(figures=manifest.figures, report=manifest.report),
            provenance=manifest.provenance,
        )
        assert copied.digest == ref.digest
    for prefix in ("runs/", "registry/"):
        for name, data in champion.read_documents(prefix).items():
            bucket.write_document(name, data)
    shutil.rmtree(bucket.scratch)
    here, there = facts(champion.uri), facts(bucket_uri)
    assert there["merged"]["uri"].startswith(bucket_uri) and there["adapter"]["uri"].endswith("/adapter")
    for name in ("merged", "adapter"):
        assert here[name].pop("uri") != there[name].pop("uri")
        assert (here[name].pop("contents"), there[name].pop("contents")) == ("intact", "not checked")
    assert here == there
    assert not list(bucket.scratch.rglob("*.safetensors"))
