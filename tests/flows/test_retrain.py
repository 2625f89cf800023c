"""Retraining: the newest dataset of a branch, without a pull; nothing new is said so."""

import subprocess
import sys

import pytest

from loraflow.failures import BadConfig
from loraflow.flows.retrain import is_news, retrain
from loraflow.registry.runs import RunSummary
from tests.flows.conftest import states
from tests.site import git


def version(where, message: str) -> None:
    """Make a version of data/ and commit it."""
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=where, check=True)
    git(where, "add", "data.dvc", ".gitignore")
    git(where, "commit", "-qm", message)


@pytest.fixture
def repository(place, monkeypatch):
    """The place as a git repository with a versioned dataset."""
    git(place.folder, "init", "-q", "-b", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=place.folder, check=True)
    version(place.folder, "first")
    monkeypatch.chdir(place.folder)
    return place


@pytest.mark.slow
def test_a_new_dataset_is_news_and_the_same_again_is_up_to_date(repository):
    source = {"data.source": "data.dvc"}
    first = retrain(str(repository.recipe), settings=source, return_state=True)
    if (
        first.name != "UpToDate"
    ):  # the store was filled from the same files; only the gate may have had something to say
        first = retrain(str(repository.recipe), settings=source, return_state=True)
    assert first.name == "UpToDate" and "Every stage is cached" in first.message

    file = repository.folder / "data" / "heldout.jsonl"
    before = file.read_text()
    file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    version(repository.folder, "second")
    file.write_text("dirt that nobody committed")  # the branch counts, not the work tree
    second = retrain(str(repository.recipe), settings=source)
    assert isinstance(second, dict) and is_news(RunSummary.model_validate(second))
    assert states(second)["check_dataset"] == "computed" and states(second)["train"] == "cached"
    assert retrain(str(repository.recipe), settings=source, return_state=True).name == "UpToDate"


def test_a_branch_that_does_not_exist_and_approval_without_a_deployment_are_refused(repository):
    with pytest.raises(BadConfig, match="no such branch"):
        retrain(str(repository.recipe), branch="nowhere", settings={"data.source": "data.dvc"})
    with pytest.raises(BadConfig, match="Approval needs a run of a deployment"):
        retrain(str(repository.recipe), approval=True)


def test_evaluate_scores_the_champion_or_a_run_and_reuses_what_is_scored(place):
    from loraflow.flows.evaluate_model import evaluate
    from tests.flows.test_finetune import place_last

    last = place_last(place)
    found = evaluate(last["run"], str(place.recipe))
    assert found["metrics"] == last["summary"]["metrics"]["tuned"], "the same artifact: nothing is scored twice"
    with pytest.raises(BadConfig, match="no such model"):
        evaluate("nothing", str(place.recipe))
