"""Retraining: the newest dataset of a branch, without a pull; a run without new data ends as UpToDate."""

import subprocess
import sys

import pytest

from loraflow.failures import BadConfig
from loraflow.flows.retrain import is_news, retrain
from loraflow.registry.runs import RunSummary
from tests.flows.conftest import states
from tests.local_deployment import git


def version(folder, message: str) -> None:
    """Version data/ and commit the pin."""
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=folder, check=True)
    git(folder, "add", "data.dvc", ".gitignore")
    git(folder, "commit", "-qm", message)


@pytest.fixture
def repository(project, monkeypatch):
    """The project as a git repository with a versioned dataset."""
    git(project.folder, "init", "-q", "-b", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=project.folder, check=True)
    version(project.folder, "first")
    monkeypatch.chdir(project.folder)
    return project


@pytest.mark.slow
def test_a_new_dataset_retrains_and_an_unchanged_one_is_up_to_date(repository):
    source = {"data.source": "data.dvc"}
    first = retrain(str(repository.recipe), settings=source, return_state=True)
    if first.name != "UpToDate":  # the store has these stages already; only the gate may have promoted
        first = retrain(str(repository.recipe), settings=source, return_state=True)
    assert first.name == "UpToDate" and "Every stage is cached" in first.message

    file = repository.folder / "data" / "heldout.jsonl"
    before = file.read_text()
    file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    version(repository.folder, "second")
    file.write_text("an uncommitted change")  # retrain reads the branch, not the work tree
    second = retrain(str(repository.recipe), settings=source)
    assert isinstance(second, dict) and is_news(RunSummary.model_validate(second))
    assert states(second)["check_dataset"] == "computed" and states(second)["train"] == "cached"
    assert retrain(str(repository.recipe), settings=source, return_state=True).name == "UpToDate"


def test_a_branch_that_does_not_exist_and_approval_without_a_deployment_are_refused(repository):
    with pytest.raises(BadConfig, match="no such branch"):
        retrain(str(repository.recipe), branch="nowhere", settings={"data.source": "data.dvc"})
    with pytest.raises(BadConfig, match="Approval needs a run of a deployment"):
        retrain(str(repository.recipe), approval=True)


def test_evaluate_scores_the_champion_or_a_run_and_reuses_scores(project):
    from loraflow.flows.evaluate_model import evaluate
    from tests.flows.test_finetune import last_record

    last = last_record(project)
    found = evaluate(last["run"], str(project.recipe))
    assert found["metrics"] == last["summary"]["metrics"]["tuned"], "the same artifact, not scored again"
    with pytest.raises(BadConfig, match="no such model"):
        evaluate("nothing", str(project.recipe))
