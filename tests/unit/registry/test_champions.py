"""Champions and rollback targets: what cleanup keeps, what a rollback refuses, and what `loraflow verify` reports."""

import shutil
import time
from types import SimpleNamespace

import pytest

from loraflow.config.runtime import Runtime
from loraflow.failures import CorruptArtifact, Failure
from loraflow.registry import PromotionLog
from loraflow.registry.champions import KEEP_CHAMPIONS, choose_intact
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.runs import StageRun
from loraflow.store import LocalStore, hash_memo, open_store
from loraflow.store.bucket import Bucket
from loraflow.store.files import hash_file
from loraflow.store.s3_artifacts import artifact_prefix
from loraflow.tasks.gate import gate
from tests.command_line import loraflow
from tests.promoted_models import add_model, commit, promote, record_run


@pytest.fixture(params=["folder", "bucket"])
def any_store(request, tmp_path):
    return (
        LocalStore(tmp_path / "store")
        if request.param == "folder"
        else open_store(request.getfixturevalue("bucket_uri"))
    )


def promoted(store, names, model="tickets"):
    log = PromotionLog(store, model)
    refs = [add_model(store, name) for name in names]
    for ref in refs:
        promote(log, ref)
    return log, refs


def test_cleanup_keeps_every_model_that_rollbacks_can_return_to(any_store):
    log, (a, b, c) = promoted(any_store, "abc")
    rejected = [add_model(any_store, name) for name in "xyz"]
    assert list(remove_unused(any_store, keep=3)) == []
    list(remove_unused(any_store, keep=1))
    assert sum(any_store.check(ref) == [] for ref in rejected) == 1
    for expected in (b, a):
        assert log.rollback("bad", "me", lambda found: choose_intact(any_store, found)).merged.digest == expected.digest
    assert log.head().merged.digest == a.digest and any_store.verify(a) == []
    with pytest.raises(Failure, match="no earlier"):
        log.rollback("bad", "me")
    promote(log, c)  # and forward again
    assert [entry.merged.digest for entry in log.active_promotions()] == [a.digest, c.digest]


def change(store, ref):
    """Change a byte of a model, as a damaged disk or a wrong write does."""
    if isinstance(store, LocalStore):
        time.sleep(0.02)  # a tick of the kernel's clock
        (store.path(ref) / "weights").write_text("#" * len((store.path(ref) / "weights").read_text()))
    else:
        key = f"{artifact_prefix(ref)}/weights"
        store.bucket.put(key, b"#" * len(store.bucket.get(key).data))


def compared(store, log, challenger):
    """Call the gate for a challenger. It ends before it compares scores, which these models do not have."""
    workspace = SimpleNamespace(store=store, log=log, seen_head=log.head(), memo=hash_memo(store))
    adapter = store.manifest(challenger).input_refs(store.uri)["adapter"]
    try:
        return gate.fn(workspace, SimpleNamespace(merged=challenger, adapter=adapter))
    except AttributeError as error:
        assert "base_scores" in str(error)  # which are read after the champion's files
    finally:
        workspace.memo.save()


def test_a_run_that_ends_with_another_champion_has_hashed_it_once_since_it_changed(any_store, monkeypatch):
    log, (champion,) = promoted(any_store, "a")
    challenger, read = add_model(any_store, "b"), []
    for module in ("files", "artifact"):
        monkeypatch.setattr(
            f"loraflow.store.{module}.hash_file", lambda file, _="": read.append(file) or hash_file(file)
        )
    monkeypatch.setattr("loraflow.store.files.SETTLED", 0)
    blocks = Bucket.blocks
    monkeypatch.setattr(Bucket, "blocks", lambda bucket, key: read.append(key) or blocks(bucket, key))
    compared(any_store, log, challenger)
    expected = 2 if isinstance(any_store, LocalStore) else 4  # in a bucket, also this machine's copies
    assert len(read) == expected, "the champion's merged model and adapter"
    compared(any_store, log, challenger)
    assert len(read) == expected, "they have not changed"
    change(any_store, champion)
    with pytest.raises(CorruptArtifact, match="hash mismatch"):
        compared(any_store, log, challenger)
    assert any_store.check(champion) != [], "it is in the quarantine"


def test_a_run_that_ends_with_its_own_model_as_champion_hashes_it_in_a_bucket_too(any_store):
    log, (champion,) = promoted(any_store, "a")
    assert compared(any_store, log, champion).reasons == ("the challenger is the champion",)
    change(any_store, any_store.manifest(champion).input_refs(any_store.uri)["adapter"])
    with pytest.raises(CorruptArtifact, match="hash mismatch"):
        compared(any_store, log, champion)


def test_a_damaged_adapter_of_another_champion_is_quarantined_with_a_warning(any_store, caplog):
    log, (champion,) = promoted(any_store, "a")
    adapter = any_store.manifest(champion).input_refs(any_store.uri)["adapter"]
    change(any_store, adapter)
    compared(any_store, log, add_model(any_store, "b"))
    assert "the adapter of the champion of tickets is missing or damaged (weights: hash mismatch)" in caplog.text
    assert any_store.check(adapter) != [] and any_store.verify(champion) == []


def test_cleanup_keeps_the_given_number_of_champions(store):
    _, refs = promoted(store, "abcde")
    loraflow(store, "gc", "--keep", "0", "--keep-champions", "3")
    assert [store.check(ref) == [] for ref in refs] == [False, False, True, True, True]
    list(remove_unused(store, keep=0, keep_champions=1))
    assert store.check(refs[3]) == [], "the champion and its rollback target always stay"
    loraflow(store, "gc", "--keep-champions", "1", fails=SystemExit)
    assert Runtime().keep_champions == KEEP_CHAMPIONS


def test_cleanup_keeps_the_models_of_further_seeds_of_the_newest_run_of_each_model(store):
    """A repeated run finds them; with `gc --keep 0` it would merge each of them again."""
    old, new, other = ([add_model(store, f"{name}{seed}") for seed in range(3)] for name in "abc")
    for run, refs, model in (("20260101-000000-aaaaaa", old, "tickets"), ("20260102-000000-bbbbbb", new, "tickets"),
                             ("20260101-000000-cccccc", other, "other")):  # fmt: skip
        first, *further = [
            StageRun(stage=label, state="computed", fingerprint=ref.fingerprint, digest=ref.digest)
            for label, ref in zip(("merge", "merge seed 43", "merge seed 44"), refs, strict=True)
        ]
        record_run(store, run, refs[0], model, stages=[first, *further])
    loraflow(store, "gc", "--keep", "0")
    assert [[store.check(ref) == [] for ref in refs] for refs in (old, new, other)] == [
        [False] * 3, [False, True, True], [False, True, True],
    ]  # fmt: skip


def test_cleanup_keeps_the_champions_of_every_log_in_the_store(store):
    _, (a, b) = promoted(store, "ab")
    _, (c, d) = promoted(store, "cd", model="other")
    list(remove_unused(store, keep=0))
    assert [store.check(ref) for ref in (a, b, c, d)] == [[]] * 4


def test_cleanup_removes_nothing_while_a_log_is_damaged(store):
    _, (a, _) = promoted(store, "ab")
    _, (c, _) = promoted(store, "cd", model="other")
    (store.root / "registry" / "other" / "log" / "000002.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="promotion log"):
        list(remove_unused(store, keep=0))
    assert store.check(a) == [] and store.check(c) == []


def test_cleanup_keeps_superseded_artifacts_that_a_champion_was_made_from(store):
    _, (a,) = promoted(store, "a")
    inputs = store.manifest(a).input_refs(store.uri)
    commit(store, "resolve_base", "base", "recomputed", replace=True)
    commit(store, "train", "a", "recomputed", {"base": inputs["base"]}, replace=True)
    list(remove_unused(store, keep=0))
    assert store.check(inputs["base"]) == [] and store.check(inputs["adapter"]) == []


def test_a_model_that_no_lookup_finds_does_not_take_the_place_of_one_that_is_found(store):
    """A crash between an artifact and its pointer leaves one that is newer than the others, but is never found."""
    found, torn, orphan = (add_model(store, name) for name in "abc")
    (store.path(torn) / "weights").write_text("")
    (store.path(orphan).parent / "current.json").unlink()
    removed = [item.name.name for item in remove_unused(store, keep=1)]
    assert sorted(removed) == sorted([torn.digest, orphan.digest]) and store.find("merge", found.fingerprint) == found


@pytest.mark.parametrize("harm", ["remove", "flip", "shorten"])
def test_a_rollback_to_a_missing_or_damaged_model_is_refused_and_names_the_run_that_rebuilds_it(store, harm):
    log, (a, b) = promoted(store, "ab")
    record_run(store, "20260101-000000-aaaaaa", a)
    weights = store.path(a) / "weights"
    if harm == "remove":
        shutil.rmtree(store.path(a))
    else:
        weights.write_text(weights.read_text().replace("merge", "merGe") if harm == "flip" else "m")
    failure = loraflow(store, "rollback", "--reason", "bad", fails=CorruptArtifact).exception
    for part in ("loraflow run tickets.yaml", "loraflow show 20260101-000000-aaaaaa", "--skip-missing"):
        assert part in failure.next_step
    assert log.head().merged.digest == b.digest and len(log.entries()) == 2
    assert store.find("merge", a.fingerprint) is None, "a run recomputes it"
    add_model(store, "a")
    loraflow(store, "rollback", "--reason", "bad")
    assert log.head().merged.digest == a.digest


def test_a_rollback_skips_missing_models_only_with_skip_missing(store):
    log, (a, b, c, d) = promoted(store, "abcd")
    for ref in (b, c):
        shutil.rmtree(store.path(ref))
    loraflow(store, "rollback", "--reason", "bad", fails=CorruptArtifact)
    loraflow(store, "rollback", "--reason", "bad", "--skip-missing")
    assert log.head().merged.digest == a.digest and log.rollback_reason(d.digest) == "bad"
    assert [entry.merged.digest for entry in log.active_promotions()] == [a.digest]


def test_a_rollback_without_an_intact_model_is_refused(store):
    log, (a, b) = promoted(store, "ab")
    shutil.rmtree(store.path(a))
    failure = loraflow(store, "rollback", "--reason", "bad", "--skip-missing", fails=CorruptArtifact).exception
    assert failure.what == "None of the earlier models is intact." and "rollback" in failure.next_step
    assert log.head().merged.digest == b.digest


def test_verify_reports_a_missing_champion_and_its_missing_rollback_target(store):
    log, (a, b, c) = promoted(store, "abc")
    record_run(store, "20260101-000000-aaaaaa", b)
    loraflow(store, "verify")
    shutil.rmtree(store.path(a))
    done = loraflow(store, "verify")
    assert "missing" in done.output and "entry 1" in done.output, "an older one is named, but is no failure"
    shutil.rmtree(store.path(b))
    done = loraflow(store, "verify", fails=CorruptArtifact)
    assert "entry 2" in done.output and "20260101-000000-aaaaaa" in done.exception.next_step
    assert log.head().merged == c


def test_verify_reports_a_damaged_promotion_log(store):
    promoted(store, "ab")
    (store.root / "registry" / "tickets" / "log" / "000002.json").write_text("{")
    done = loraflow(store, "verify", fails=CorruptArtifact)
    assert "promotion log of tickets" in done.output and "backup" in done.exception.next_step
