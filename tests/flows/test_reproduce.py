"""A whole run, training included, is computed again: the same bytes, from the dataset's hash to the scores."""

import json

from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.store import LocalStore


def test_a_training_is_reproduced_bit_for_bit_in_a_fresh_store(completed_project, tmp_path):
    project, summary = completed_project
    fresh = tmp_path / "fresh"
    done = CliRunner().invoke(
        cli, ["reproduce", summary["run"], "--store", str(project.store), "--into", str(fresh), "--json"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    stages = json.loads(done.stdout)["stages"]
    assert len(stages) == len(summary["stages"]) and all(stage["same"] for stage in stages)
    digests = {(ref.stage, ref.digest) for ref in LocalStore(fresh).artifacts()}
    assert {"train", "merge", "evaluate"} <= {stage for stage, _ in digests}
    assert digests == {(ref.stage, ref.digest) for ref in LocalStore(project.store).artifacts()}


def test_the_model_of_a_run_is_derived_again_from_its_dataset_on(completed_project):
    project, summary = completed_project
    done = CliRunner().invoke(cli, ["verify", summary["run"], "--rederive", "--store", str(project.store)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "are the same bit for bit" in done.output and "0 differences" in done.output
