"""Promotions and rollbacks as git tags that GTO reads (`register.git_tags`)."""

import gto.api
import pytest

from loraflow.config import load_recipe
from loraflow.failures import BadConfig
from loraflow.registry import PromotionLog
from loraflow.store import LocalStore
from loraflow.tracking.git_tags import make_tags, tag_log
from tests.local_deployment import git
from tests.promoted_models import add_model, promote, record_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository with two commits, on a machine where git knows no identity of its own."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for message in ("one", "two"):
        git(folder, "commit", "-q", "--allow-empty", "-m", message)
    return folder


@pytest.fixture
def log(tmp_path):
    return PromotionLog(LocalStore(tmp_path / "store"), "tickets")


def revision(folder, name):
    return git(folder, "rev-parse", f"{name}^{{commit}}").strip()


def add_run(log, number, merged, seq, commit, **register):
    run = f"20260101-00000{number}-abcdef"
    summary = {"run": run, "recipe": "tickets", "registered": seq}
    resolved = {"register": {"model": "tickets", "git_tags": True, **register}}
    return record_run(log.store, run, merged, summary=summary, commit=commit, resolved=resolved)


def roll_back(log, merged):
    adapter = log.store.manifest(merged).input_refs(log.store.uri)["adapter"]
    log.append(log.head(), action="rollback", merged=merged, adapter=adapter, inputs={}, reasons=["bad"], actor="me")


def champion(folder):
    """The version that GTO finds in use."""
    [found] = gto.api.find_versions_in_stage(str(folder), "tickets", "champion")
    return found.version


def test_gto_reads_promotions_and_a_rollback_although_all_are_of_one_commit(log, folder):
    first, second = (add_model(log.store, name) for name in ("a", "b"))
    commit = revision(folder, "HEAD~1")
    for number, merged in ((1, first), (2, second)):
        promote(log, merged)
        add_run(log, number, merged, number, commit)
        tag_log(log.store, "tickets", folder)
        assert champion(folder) == f"v{number}.0.0"
    roll_back(log, first)
    tag_log(log.store, "tickets", folder)
    assert champion(folder) == "v1.0.0"
    promote(log, add_model(log.store, "c"))
    add_run(log, 4, log.head().merged, 4, commit)
    tag_log(log.store, "tickets", folder)
    assert champion(folder) == "v4.0.0"
    in_use = [name for name in git(folder, "tag").split() if "#" in name and "!" not in name]
    assert in_use == [f"tickets#champion#{number}" for number in (1, 2, 3, 4)]
    assert revision(folder, "tickets@v1.0.0") == commit
    assert git(folder, "diff", "--stat", "tickets@v1.0.0", "tickets@v2.0.0") == "", "the second commit has no changes"
    assert revision(folder, "tickets@v2.0.0^") == commit and revision(folder, "tickets#champion#3") == commit
    assert first.digest in git(folder, "tag", "-l", "--format=%(contents)", "tickets@v1.0.0")


def test_tags_that_are_missing_are_made_later_and_none_is_made_twice_or_moved(log, folder):
    first, second = (add_model(log.store, name) for name in ("a", "b"))
    records = []
    for number, merged in ((1, first), (2, second)):
        promote(log, merged)
        records.append(add_run(log, number, merged, number, revision(folder, f"HEAD~{2 - number}")))
    assert make_tags(log.entries(), records, "tickets", folder) == []
    made = git(folder, "for-each-ref", "refs/tags")
    git(folder, "tag", "-d", "tickets#champion#2")
    assert make_tags(log.entries(), records, "tickets", folder) == []
    assert len(made.splitlines()) == 5 == len(git(folder, "tag").split())
    assert champion(folder) == "v2.0.0" and revision(folder, "tickets@v2.0.0") == revision(folder, "HEAD")


def test_a_tag_about_another_model_is_named_and_stays(log, folder):
    git(folder, "tag", "-a", "-m", "mine", "tickets@v1.0.0", "HEAD")
    promote(log, add_model(log.store, "a"))
    before = revision(folder, "tickets@v1.0.0")
    [problem] = make_tags(log.entries(), [], "tickets", folder)
    assert "tickets@v1.0.0 names another model than entry 1" in problem and revision(folder, "tickets@v1.0.0") == before


def test_nothing_is_tagged_unless_the_newest_run_asks_for_it_and_no_repository_is_a_warning(
    log, folder, tmp_path, caplog
):
    merged = add_model(log.store, "a")
    promote(log, merged)
    tag_log(log.store, "tickets", folder)
    add_run(log, 1, merged, 1, None, git_tags=False)
    tag_log(log.store, "tickets", folder)
    assert git(folder, "tag") == "" and not caplog.records
    add_run(log, 2, merged, 1, "0" * 40)
    (tmp_path / "elsewhere").mkdir()
    tag_log(log.store, "tickets", tmp_path / "elsewhere")
    assert "tickets is not tagged in git" in caplog.text
    tag_log(log.store, "tickets", folder)
    assert revision(folder, "tickets@v1.0.0") == revision(folder, "HEAD"), "the run's commit is not in this repository"


def test_a_name_that_gto_does_not_read_is_refused_before_the_run(recipe):
    assert load_recipe(recipe, {"register.git_tags": True}).register_.git_tags
    for name in ("a.b", "a-", "a_"):
        with pytest.raises(BadConfig, match="git_tags"):
            load_recipe(recipe, {"register.git_tags": True, "register.model": name})


def test_a_promotion_by_hand_is_tagged_on_the_commit_of_its_run_and_an_unknown_commit_is_named(log, folder):
    merged = add_model(log.store, "a")
    adapter = log.store.manifest(merged).input_refs(log.store.uri)["adapter"]
    run = add_run(log, 1, merged, None, revision(folder, "HEAD~1"))
    log.append(
        log.head(), action="promote", merged=merged, adapter=adapter, inputs={"run": run.run}, reasons=[], actor="me"
    )
    assert make_tags(log.entries(), [run], "tickets", folder) == []
    assert revision(folder, "tickets@v1.0.0") == revision(folder, "HEAD~1")
    promote(log, add_model(log.store, "b"))
    lost = add_run(log, 2, log.head().merged, 2, "0" * 40)
    [problem] = make_tags(log.entries(), [run, lost], "tickets", folder)
    assert "tickets@v2.0.0 is on the current commit, because the commit 000" in problem
