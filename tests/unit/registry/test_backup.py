"""`loraflow backup`: the copy is a consistent store, whatever runs do meanwhile and wherever the backup ends."""

import errno
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow import identity
from loraflow.cli import cli
from loraflow.failures import BadConfig, CorruptArtifact, DamagedLog, DiskFull, Failure
from loraflow.registry import PromotionLog
from loraflow.registry.backup import back_up
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.runs import LogHead, StageRun, read_runs
from loraflow.store import LocalStore, Ref, Summary, open_store
from loraflow.store.artifact import MANIFEST, POINTER, Manifest, Pointer, build_manifest
from tests.crash import Crash, crash_at
from tests.promoted_models import add_model, commit, promote, record_run


def loraflow(*arguments, fails=None):
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert type(done.exception) is (fails or type(None)), done.exception
    return done


def promote_next(store, number):
    log, merged = PromotionLog(store, "tickets"), add_model(store, str(number))
    entry = promote(log, merged)
    record_run(
        store, f"20260101-000000-{number:06x}", merged, promotion_head=LogHead(seq=entry.seq, hash=entry.hash),
        summary={"run": "x", "recipe": "tickets", "registered": entry.seq},
    )  # fmt: skip
    return entry


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "store")
    for number in (1, 2):
        promote_next(store, number)
    return store


def check_copy(folder, source):
    """Verify every byte of a copy, and that its log is the beginning of the source's, with the models it needs."""
    loraflow("verify", "--deep", "--store", folder)
    copy = LocalStore(folder)
    log = PromotionLog(copy, "tickets")
    entries = log.entries(all_runs=True)
    assert [entry.hash for entry in entries] == [entry.hash for entry in PromotionLog(source, "tickets").entries()][
        : len(entries)
    ]
    for entry in log.active_promotions()[-2:]:  # cleanup with keep_champions=2 removes older ones
        assert copy.verify(entry.merged) == [] and copy.verify(entry.adapter) == []
    return log


def test_a_copy_made_while_a_loss_is_accepted_is_consistent(store, tmp_path, monkeypatch):
    """Anchors are read, then a person accepts the loss of the last entry, then the log is read."""
    promote_next(store, 3)
    (store.root / "registry/tickets/log/000003.json").unlink()
    read, accepted = LocalStore.read_documents, []

    def read_documents(self, prefix, suffix=""):
        found = read(self, prefix, suffix)
        if prefix == "anchors/" and self.root == store.root and not accepted:
            accepted.append(PromotionLog(store, "tickets").accept_loss("disk", "me"))
        return found

    monkeypatch.setattr(LocalStore, "read_documents", read_documents)
    loraflow("backup", tmp_path / "copy", "--store", store.uri)
    log = check_copy(tmp_path / "copy", store)
    assert accepted and len(log.entries()) == 2 and [acceptance.reason for acceptance in log.acceptances()] == ["disk"]


def test_a_copy_made_while_runs_commit_promote_and_clean_up_is_complete_and_keeps_its_champion(store, tmp_path):
    done, refused = threading.Event(), []

    def work():
        number = 3
        while not done.is_set():
            promote_next(store, number)
            number += 1
            try:
                list(remove_unused(store, keep=0, keep_champions=2))
            except Failure as failure:
                refused.append(failure)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(3):
            expected = PromotionLog(store, "tickets").head()
            loraflow("backup", tmp_path / "copy", "--store", store.uri)
            restored = shutil.copytree(tmp_path / "copy", tmp_path / "restored")
            log = check_copy(restored, store)
            assert log.head().seq >= expected.seq
            shutil.rmtree(restored)
    finally:
        done.set()
        worker.join()
    assert all("while a run is using" in failure.what for failure in refused)


def test_the_documented_restore_gives_a_store_with_the_same_champion(store, tmp_path):
    champion = PromotionLog(store, "tickets").head()
    loraflow("backup", tmp_path / "copy", "--store", store.uri)
    shutil.rmtree(store.root)
    page = Path(__file__).parents[3].joinpath("docs", "backup.md").read_text()
    commands = re.search(r"## Restore\n\n```bash\n(.*?)```", page, re.DOTALL)[1].splitlines()
    script = "\n".join(line for line in commands if not line.startswith("loraflow"))
    script = script.replace("/backups/tickets", str(tmp_path / "copy")).replace(".loraflow/store", str(store.root))
    subprocess.run(["sh", "-ec", script], check=True)
    assert not (store.root / "backup.json").exists()
    log = check_copy(store.root, store)
    assert log.head() == champion and len(read_runs(store)) == 2
    promote_next(store, 3)


@pytest.mark.parametrize("name", ["weights", "manifest.json"])
def test_a_second_backup_replaces_what_was_damaged_in_the_copy(store, tmp_path, name):
    list(back_up(store, tmp_path / "copy"))
    copy, merged = LocalStore(tmp_path / "copy"), PromotionLog(store, "tickets").head().merged
    file = copy.path(merged) / name
    data = file.read_bytes()
    if name == "manifest.json":  # with its pointer, which has the manifest's hash
        (file.parents[1] / "current.json").unlink()
        file.write_bytes(data.replace(b'"figures": {}', b'"figures": {"x": 1}'))
    else:
        file.write_bytes(data.swapcase())
    assert [item.ref.digest for item in back_up(store, tmp_path / "copy")] == [merged.digest]
    assert file.read_bytes() == data
    check_copy(tmp_path / "copy", store)


def test_a_backup_of_a_store_that_lacks_its_champion_is_not_called_complete(store, tmp_path):
    (store.path(PromotionLog(store, "tickets").head().merged) / "manifest.json").unlink()
    refused = loraflow("backup", tmp_path / "copy", "--store", store.uri, fails=CorruptArtifact)
    assert "lacks a model of tickets" in str(refused.exception) and "rebuilds it" in str(refused.exception)


def test_a_backup_to_a_full_disk_names_the_disk(store, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr("loraflow.store.local.shutil.copy2", fail)
    with pytest.raises(DiskFull) as caught:
        list(back_up(store, tmp_path / "copy"))
    assert caught.value.where.startswith(str(tmp_path / "copy"))


def test_an_artifact_with_a_link_is_named_and_the_others_are_copied_with_their_times(store, tmp_path):
    damaged, *others = store.artifacts()
    (store.path(damaged) / "link").symlink_to("nowhere")
    for number, ref in enumerate(others):
        os.utime(store.path(ref), (number, number))
    [problem] = [item.problem for item in back_up(store, tmp_path / "copy") if item.problem]
    assert "link is neither a folder nor a regular file" in problem
    copy = LocalStore(tmp_path / "copy")
    assert [copy.path(ref).stat().st_mtime for ref in others] == [*range(len(others))]


def test_a_backup_with_a_damaged_run_record_is_not_called_complete(store, tmp_path):
    name = store.documents("runs/")[0]
    store.write_document(name, store.read_document(name).replace(b"tickets", b"Tickets"))
    refused = loraflow("backup", tmp_path / "copy", "--store", store.uri, fails=CorruptArtifact).exception
    assert refused.where == f"{store.uri}/{name}"
    assert refused.next_step == "restore it from another backup, or remove it; then back up again"
    store.remove_document(name)
    loraflow("backup", tmp_path / "copy", "--store", store.uri)
    assert check_copy(tmp_path / "copy", store).store.documents("runs/") == store.documents("runs/")


def test_a_backup_keeps_an_intact_run_record_that_the_store_lost(store, tmp_path):
    list(back_up(store, tmp_path / "copy"))
    name = store.documents("runs/")[0]
    intact = store.read_document(name)
    store.remove_document(name)
    list(back_up(store, tmp_path / "copy"))
    assert LocalStore(tmp_path / "copy").read_document(name) == intact


def test_a_document_that_is_damaged_in_the_store_does_not_replace_its_copy(store, tmp_path, caplog):
    list(back_up(store, tmp_path / "copy"))
    for harm in (lambda data: data.replace(b"tickets", b"Tickets"), lambda data: b"", lambda data: data[:-9]):
        name = store.documents("runs/")[0]
        intact = store.read_document(name)
        store.write_document(name, harm(intact))
        list(back_up(store, tmp_path / "copy"))
        assert LocalStore(tmp_path / "copy").read_document(name) == intact and name in caplog.text
        store.write_document(name, intact)


def test_a_second_backup_copies_only_what_is_new(store, tmp_path):
    first = list(back_up(store, tmp_path / "copy"))
    assert len(first) == len(list(store.artifacts()))
    assert list(back_up(store, tmp_path / "copy")) == []
    promote_next(store, 3)
    assert sorted(item.ref.stage for item in back_up(store, tmp_path / "copy")) == ["merge", "train"]
    assert check_copy(tmp_path / "copy", store).head().seq == 3


def test_the_copy_has_the_current_artifact_of_each_fingerprint(store, tmp_path):
    old = commit(store, "train", "x", "old")
    list(back_up(store, tmp_path / "copy"))
    new = commit(store, "train", "x", "new", replace=True)
    list(back_up(store, tmp_path / "copy"))
    copy = LocalStore(tmp_path / "copy")
    assert copy.find("train", old.fingerprint).digest == new.digest and copy.verify(old) == []


@pytest.mark.parametrize("step", [0, 3, 12, 25, 40, 60, 80, 90, 100, 110, 115])
def test_a_backup_that_is_killed_leaves_a_consistent_copy_and_can_be_repeated(store, tmp_path, step):
    list(back_up(store, tmp_path / "copy"))
    for number in (3, 4):
        promote_next(store, number)
    try:
        with crash_at(step):
            list(back_up(store, tmp_path / "copy"))
    except Crash:
        assert check_copy(tmp_path / "copy", store).head().seq >= 2
        list(back_up(store, tmp_path / "copy"))
    assert check_copy(tmp_path / "copy", store).head().seq == 4


def test_a_damaged_log_does_not_replace_the_log_in_an_earlier_backup(store, tmp_path):
    list(back_up(store, tmp_path / "copy"))
    (store.root / "registry" / "tickets" / "log" / "000002.json").unlink()
    loraflow("backup", tmp_path / "copy", "--store", store.uri, fails=DamagedLog)
    assert PromotionLog(tmp_path / "copy", "tickets").head().seq == 2
    loraflow("registry", "accept", "--reason", "no backup", "--store", store.uri)
    loraflow("backup", tmp_path / "copy", "--store", store.uri)
    assert check_copy(tmp_path / "copy", store).head().seq == 1


def test_a_damaged_artifact_is_named_and_everything_else_is_copied(store, tmp_path):
    champion = PromotionLog(store, "tickets").head().merged
    (store.path(champion) / "weights").write_text("merGe 2")
    done = loraflow("backup", tmp_path / "copy", "--store", store.uri, fails=Failure)
    assert f"not copied  {champion}: weights: hash mismatch" in done.output
    assert "verify --deep" in done.exception.next_step
    copy = LocalStore(tmp_path / "copy")
    assert copy.check(champion) and PromotionLog(copy, "tickets").head().seq == 2
    assert len(list(copy.artifacts())) == len(list(store.artifacts())) - 1


def test_a_folder_that_is_not_a_backup_of_this_store_is_refused(store, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    loraflow("backup", other, "--store", store.uri, fails=BadConfig)
    loraflow("backup", store.root / "copy", "--store", store.uri, fails=BadConfig)
    loraflow("backup", store.root, "--store", store.uri, fails=BadConfig)
    list(back_up(store, tmp_path / "copy"))
    loraflow("backup", tmp_path / "copy", "--store", tmp_path / "copy", fails=BadConfig)
    with pytest.raises(BadConfig, match="not a backup"):
        list(back_up(LocalStore(tmp_path / "another"), tmp_path / "copy"))
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_bucket_is_copied_to_a_folder(bucket_uri, tmp_path):
    store = open_store(bucket_uri)
    promote_next(store, 1)
    loraflow("backup", tmp_path / "copy", "--store", store.uri)
    assert check_copy(tmp_path / "copy", store).head().seq == 1


def plant(store, stage, home):
    """Put an artifact into a stage's folder whose manifest, with the right hashes, says that it is of another stage."""
    payload, staged = {**identity.payload("train", 1, {}, {}), "stage": stage}, store.root.parent / "staged"
    staged.mkdir()
    (staged / "weights").write_text("x")
    values = build_manifest(staged, {**payload, "stage": "train"}, {}, Summary(), {}).model_dump()
    values |= {"stage": stage, "payload": payload, "fingerprint": identity.fingerprint(payload)}
    manifest = Manifest.model_construct(**values)
    (staged / MANIFEST).write_bytes(manifest.document)
    shutil.copytree(staged, home / manifest.fingerprint / manifest.digest)
    ref = Ref(stage=home.name, fingerprint=manifest.fingerprint, digest=manifest.digest, uri=store.uri)
    (home / ref.fingerprint / POINTER).write_bytes(Pointer(digest=ref.digest).pointing_to(ref, manifest.document))
    return ref


@pytest.mark.parametrize("stage", ["{folder}/outside", "../../outside", "merge"])
def test_an_artifact_that_says_it_is_of_another_folder_is_not_believed_and_nothing_is_written_outside(
    store, tmp_path, stage
):
    """A store may come from anywhere. An absolute path, a relative one, and the name of another stage."""
    ref = plant(store, stage.format(folder=tmp_path), store.root / "train")
    before = set(tmp_path.iterdir())
    assert store.find("train", ref.fingerprint) is None and len(store.verify(ref)) == 1
    loraflow("backup", tmp_path / "copy", "--store", store.uri, fails=Failure)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "copy"}
    check_copy(tmp_path / "copy", store)


@pytest.mark.parametrize(
    "name", ["/absolute", "..", ".", "", "a/b", "../a", "a\0", "a/", "./a", "a\n", " ", " a", "\x1ba"]
)
def test_no_document_names_an_artifact_outside_of_its_store(name):
    good = {"stage": "train", "fingerprint": "f", "digest": "d", "uri": "/store"}
    for part in ("stage", "fingerprint", "digest"):
        with pytest.raises(ValueError, match="not the name of a folder"):
            Ref.model_validate({**good, part: name})
    with pytest.raises(ValueError, match="not the name of a folder"):
        StageRun(stage="train", state="computed", fingerprint="f", digest=name)
