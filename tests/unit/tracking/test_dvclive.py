"""Files for DVC: the installed `dvc` reads what --dvclive and --dvc-pipeline write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from loraflow import identity
from loraflow.failures import BadConfig
from loraflow.store import LocalStore, Summary
from loraflow.tracking.dvclive import write_dvclive, write_pipeline
from tests.promoted_models import add_model, record_run

RUN = "20260101-000000-aaaaaa"


def dvc(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True)


@pytest.fixture
def run(tmp_path):
    """Write a run with a score and a learning rate; a call is another run."""
    store = LocalStore(tmp_path / "store")

    def record(score, rate):
        payload = identity.payload("train", 1, {}, {"x": str(score)})
        staged = store.staging("train", identity.fingerprint(payload))
        (staged / "telemetry").mkdir()
        (staged / "adapter").write_text(f"weights {score}")
        (staged / "telemetry" / "curves.jsonl").write_text(
            f'{{"step": 1, "loss": 2.5}}\n{{"step": 2, "loss": {score}}}\n'
        )
        train = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})
        stage = {"stage": "train", "state": "computed", "fingerprint": train.fingerprint, "digest": train.digest}
        scores = {
            "tuned": {"heldout": {"token_loss": {"value": score, "low": 0.1, "high": 3.0, "n": 9}}},
            "champion": None,
        }
        return record_run(
            store,
            RUN,
            add_model(store, "m"),
            stages=[stage],
            resolved={
                "training_config": {"learning_rate": rate},
                "data": {"repo": "https://me:a-long-password@h/x"},
                "runtime": {"store": "/here"},
            },
            summary={"run": RUN, "recipe": "t", "metrics": scores, "decision": {"verdict": "promote"}},
        )

    return lambda folder, score, rate: write_dvclive(store, record(score, rate), folder / "dvclive")


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    dvc(folder, "init", "-q")
    return folder


def test_dvc_shows_how_scores_settings_and_curves_differ_from_the_last_commit(project, run):
    run(project, 1.5, 0.1)
    git(project, "add", "-A")
    git(project, "commit", "-qm", "first")
    run(project, 0.5, 0.2)
    key, metrics = "tuned.heldout.token_loss.value", json.loads(dvc(project, "metrics", "diff", "--json"))
    assert metrics["dvclive/metrics.json"][key] == {"old": 1.5, "new": 0.5, "diff": -1.0}
    params = json.loads(dvc(project, "params", "diff", "--json"))
    assert params["dvclive/params.yaml"]["training_config.learning_rate"] == {"old": 0.1, "new": 0.2, "diff": 0.1}
    plots = json.loads(dvc(project, "plots", "show", "--json"))
    assert "0.5" in json.dumps(plots) and any("loss.tsv" in name for name in plots.get("data", plots))


def test_the_files_have_no_password_and_nothing_of_the_machine_and_are_the_same_for_the_same_run(tmp_path, run):
    run(tmp_path, 1.5, 0.1)
    before = {path: path.read_bytes() for path in (tmp_path / "dvclive").rglob("*") if path.is_file()}
    run(tmp_path, 1.5, 0.1)
    after = {path: path.read_bytes() for path in (tmp_path / "dvclive").rglob("*") if path.is_file()}
    assert before == after
    together = b"".join(after.values())
    assert b"a-long-password" not in together and b"/here" not in together and RUN.encode() not in together


def test_a_curve_that_the_next_run_does_not_have_is_removed(tmp_path, run):
    stale = tmp_path / "dvclive" / "plots" / "metrics" / "train" / "old.tsv"
    stale.parent.mkdir(parents=True)
    stale.write_text("step\told\n")
    run(tmp_path, 1.5, 0.1)
    assert not stale.exists() and (stale.parent / "loss.tsv").read_text() == "step\tloss\n1\t2.5\n2\t1.5\n"


def test_dvc_repro_runs_the_stage_and_knows_its_metrics(project, run, tmp_path):
    (project / "configs").mkdir()
    (project / "configs" / "t.yaml").write_text("name: t\ntraining_config: {learning_rate: 0.1}\npeft_config: {r: 8}\n")
    (project / "data").mkdir()
    (project / "data" / "train.jsonl").write_text("{}\n")
    dvc(project, "add", "-q", "data")
    write_pipeline(project, "t.v1", Path("configs/t.yaml"), Path("data"))
    document = yaml.safe_load((project / "dvc.yaml").read_text())
    assert document["stages"]["t-v1"]["cmd"].endswith("--dvclive")
    # The command itself is `loraflow run`, which has tests of its own; here a copy of its files stands for it.
    ready = tmp_path / "ready"
    ready.mkdir()
    run(ready, 1.5, 0.1)
    document["stages"]["t-v1"]["cmd"] = f"cp -r {ready}/dvclive/. dvclive && rm dvclive/dvc.yaml"
    (project / "dvc.yaml").write_text(yaml.safe_dump(document))
    (project / "dvclive").mkdir()
    dvc(project, "repro", "-q")
    shown = json.loads(dvc(project, "metrics", "show", "--json"))
    assert "dvclive/metrics.json" in json.dumps(shown)
    assert "up to date" in dvc(project, "status")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "first")
    recipe = project / "configs" / "t.yaml"
    recipe.write_text(recipe.read_text().replace("0.1", "0.2"))
    params = json.loads(dvc(project, "params", "diff", "--json"))
    assert params["configs/t.yaml"]["training_config.learning_rate"] == {"old": 0.1, "new": 0.2, "diff": 0.1}
    assert "t-v1" in dvc(project, "status")


def test_the_pipeline_names_the_files_so_a_run_adds_no_second_dvc_yaml(tmp_path, run):
    write_pipeline(tmp_path, "t", tmp_path / "t.yaml", tmp_path / "data")
    run(tmp_path, 1.5, 0.1)
    assert not (tmp_path / "dvclive" / "dvc.yaml").exists()


def test_init_refuses_a_second_pipeline_with_a_step_that_works(tmp_path, monkeypatch):
    from loraflow.cli import cli

    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {}\n")
    Path("other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = ["init", "--data", "other.jsonl", "--base", "bundled:smollm2", "--dvc-pipeline"]
    with pytest.raises(BadConfig) as caught:
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert "omit --dvc-pipeline" in caught.value.next_step and "--name" not in caught.value.next_step
    assert not Path("configs").exists() and not Path("datasets").exists()


def test_a_run_in_dvcs_copy_of_a_project_warns_unless_its_store_is_elsewhere(tmp_path):
    from loraflow.tracking.dvclive import lost_with_experiment

    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    assert "promotion" in lost_with_experiment(copy, ".loraflow/store")
    for folder, store in ((copy, "/shared/store"), (copy, "s3://bucket/x"), (tmp_path, ".loraflow/store")):
        assert lost_with_experiment(folder, store) is None
