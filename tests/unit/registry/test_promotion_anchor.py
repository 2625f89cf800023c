"""The anchor of a promotion log: entries that were lost or edited are noticed, and only a person accepts the loss."""

import json
import logging
import shutil

import pytest

from loraflow.failures import BadConfig, CorruptArtifact, DamagedLog, Failure
from loraflow.registry import PromotionLog
from loraflow.registry import log as log_module
from loraflow.registry.anchor import FOLDER
from loraflow.registry.log import models
from loraflow.registry.runs import LogHead
from loraflow.serving.models import find_model
from loraflow.store import LocalStore, open_store
from tests.command_line import loraflow
from tests.promoted_models import add_model, promote, record_run

LOG = "registry/tickets/log"
RUN = "20260101-000000-aaaaaa"


def three_promotions(store):
    """Promote three models; a run record knows the second promotion."""
    log = PromotionLog(store, "tickets")
    for number, name in enumerate("abc", 1):
        merged = add_model(store, name)
        entry = promote(log, merged)
        if number == 2:
            record_run(store, RUN, merged, promotion_head=LogHead(seq=2, hash=entry.hash))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "store"
    three_promotions(LocalStore(folder))
    return folder


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path, template):
    if request.param == "folder":
        return LocalStore(shutil.copytree(template, tmp_path / "store"))
    store = open_store(request.getfixturevalue("bucket_uri"))
    three_promotions(store)
    return store


@pytest.fixture
def log(store):
    return PromotionLog(store, "tickets")


def edit(store, number, **values):
    """Change an entry and give it the hash that fits, as someone would who wants it to go unnoticed."""
    log = PromotionLog(store, "tickets")
    stored = json.loads(store.read_document(f"{LOG}/{number:06d}.json"))
    stored.pop("hash")
    changed = log.entries()[number - 1].model_validate({**stored, **values})
    document = json.dumps({**changed.model_dump(), "hash": changed.hash}).encode()
    store.write_document(f"{LOG}/{number:06d}.json", document)


def delete(store, *names):
    for prefix in names:
        found = store.documents(prefix) if prefix.endswith("/") else [prefix]
        for name in found:
            store.remove_document(name)


HARMS = {
    "last entry deleted": lambda store: delete(store, f"{LOG}/000003.json"),
    "first entry deleted": lambda store: delete(store, f"{LOG}/000001.json"),
    "two entries deleted": lambda store: delete(store, f"{LOG}/000003.json", f"{LOG}/000002.json"),
    "log deleted": lambda store: delete(store, f"{LOG}/"),
    "registry deleted": lambda store: delete(store, "registry/"),
    "registry and anchor deleted": lambda store: delete(store, "registry/", f"{FOLDER}/"),
    "two entries and anchor deleted": lambda store: delete(
        store, f"{LOG}/000003.json", f"{LOG}/000002.json", f"{FOLDER}/"
    ),
    "last entry edited": lambda store: edit(store, 3, reasons=["because"]),
    "middle entry edited": lambda store: edit(store, 2, reasons=["because"]),
    "first entry edited": lambda store: edit(store, 1, actor="someone else"),
    "anchor damaged": lambda store: store.write_document(f"{FOLDER}/tickets/head.json", b"{"),
    "anchor emptied": lambda store: store.write_document(f"{FOLDER}/tickets/head.json", b""),
    "entry without hash": lambda store: store.write_document(f"{LOG}/000003.json", b"{}"),
    "entry is a list": lambda store: store.write_document(f"{LOG}/000003.json", b"[]"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_lost_or_edited_entry_is_noticed_and_nothing_is_used_or_promoted(log, store, harm):
    head = log.head()
    HARMS[harm](store)
    fresh = PromotionLog(store, "tickets")
    for use in (fresh.head, fresh.active_promotions, lambda: fresh.rollback("bad", "me")):
        with pytest.raises(DamagedLog, match="damaged") as caught:
            use()
    assert "backup" in caught.value.next_step
    assert "loraflow registry accept --model tickets" in caught.value.next_step and caught.value.got
    with pytest.raises(DamagedLog):
        promote(fresh, head.merged)
    with pytest.raises(DamagedLog):
        find_model(store, "champion")
    assert "loraflow registry accept" in loraflow(store, "verify", fails=CorruptArtifact).exception.next_step
    loraflow(store, "gc", "--keep", "0", fails=DamagedLog)
    assert store.check(head.merged) == []


@pytest.mark.parametrize("harm", HARMS)
def test_an_accepted_loss_is_recorded_and_the_intact_entries_go_on(log, store, harm):
    HARMS[harm](store)
    done = loraflow(store, "registry", "accept", "--reason", "no backup")
    again = PromotionLog(store, "tickets")
    kept = again.entries(all_runs=True)
    [acceptance] = again.acceptances()
    assert (acceptance.reason, acceptance.kept.seq) == ("no backup", len(kept)) and acceptance.actor
    assert "champion" in done.output and "no backup" in loraflow(store, "registry").output
    promote(again, add_model(store, "d"))
    assert again.head().seq == len(kept) + 1 and again.entries(all_runs=True)[:-1] == kept
    assert all(name.startswith(LOG) for name in acceptance.set_aside)
    assert acceptance.lost or acceptance.set_aside or acceptance.problem
    delete(store, f"{LOG}/{again.head().seq:06d}.json")
    with pytest.raises(DamagedLog):
        PromotionLog(store, "tickets").head()


def test_a_damaged_acceptance_means_that_the_loss_is_accepted_again(log, store):
    delete(store, f"{LOG}/", f"{FOLDER}/")
    log.accept_loss("no backup", "me")
    assert log.entries(all_runs=True) == []
    store.write_document(f"{FOLDER}/tickets/accepted-000001.json", b"{")
    with pytest.raises(DamagedLog):
        log.entries(all_runs=True)
    log.accept_loss("no backup", "me")
    promote(log, add_model(store, "d"))
    assert [acceptance.reason for acceptance in log.acceptances()] == ["no backup"]


def test_a_log_that_is_not_damaged_has_no_loss_to_accept(log, store):
    loraflow(store, "registry", "accept", "--reason", "x", fails=Failure)
    assert not log.acceptances()


def test_a_restored_log_is_used_again(log, store):
    name = f"{LOG}/000003.json"
    backup = store.read_document(name)
    delete(store, name)
    with pytest.raises(DamagedLog):
        log.head()
    store.write_document(name, backup)
    assert log.head().seq == 3


def test_a_deleted_or_forged_anchor_does_not_hide_what_run_records_know(log, store):
    delete(store, f"{FOLDER}/")
    assert PromotionLog(store, "tickets").head().seq == 3
    delete(store, f"{LOG}/000003.json", f"{LOG}/000002.json")
    first = PromotionLog(store, "tickets")._read().entries[0]
    store.write_document(f"{FOLDER}/tickets/head.json", json.dumps({"seq": 1, "hash": first.hash}).encode())
    fresh = PromotionLog(store, "tickets")
    with pytest.raises(DamagedLog) as caught:
        promote(fresh, first.merged)
    assert f"runs/{RUN}.json" in caught.value.expected
    loraflow(store, "verify", fails=CorruptArtifact)
    loraflow(store, "registry", fails=DamagedLog)


def test_a_log_whose_anchor_is_one_entry_behind_is_intact_and_the_next_append_writes_the_anchor(
    log, store, monkeypatch
):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(log_module, "write_anchor", crash)
    with pytest.raises(KeyboardInterrupt):
        promote(log, add_model(store, "d"))
    monkeypatch.undo()
    assert log.head().seq == 4
    assert json.loads(store.read_document(f"{FOLDER}/tickets/head.json"))["seq"] == 3
    promote(log, add_model(store, "e"))
    assert json.loads(store.read_document(f"{FOLDER}/tickets/head.json"))["seq"] == 5


def test_an_anchor_that_cannot_be_written_does_not_undo_the_promotion(log, store, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_module, "write_anchor", full)
    assert promote(log, add_model(store, "d")).seq == 4
    assert "not its anchor" in caplog.text and log.head().seq == 4


def test_a_log_of_an_earlier_version_is_anchored_by_the_next_append(log, store):
    delete(store, f"{FOLDER}/", "runs/")
    assert PromotionLog(store, "tickets").head().seq == 3
    promote(log, add_model(store, "d"))
    delete(store, f"{LOG}/000004.json")
    with pytest.raises(DamagedLog, match="damaged"):
        log.head()


def test_a_run_record_of_an_earlier_version_shows_that_a_log_was_deleted(log, store):
    delete(store, f"{FOLDER}/", "registry/")
    record_run(store, RUN, add_model(store, "b"), summary={"run": RUN, "recipe": "tickets", "registered": 3})
    with pytest.raises(DamagedLog) as caught:
        PromotionLog(store, "tickets").head()
    assert caught.value.expected == f"entry 3, as runs/{RUN}.json says" and caught.value.got == "intact entries: 0"
    assert models(store) == ["tickets"]


def test_stray_files_in_a_log_are_ignored_with_one_warning(log, store, caplog):
    strays = ["000003.json~", "000003 (copy).json", "#000003.json#", "3.json", "000004.json.tmp", "old/000004.json"]
    for name in strays:
        store.write_document(f"{LOG}/{name}", b"stray")
    store.write_document("registry/notes.txt", b"stray")
    store.write_document("registry/tickets (copy)/log/000001.json", b"stray")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert PromotionLog(store, "tickets").head().seq == 3
    assert len([record for record in caplog.records if "ignored" in record.message]) == 1
    assert all(name in caplog.text for name in strays)
    assert models(store) == ["tickets"]
    promote(log, add_model(store, "d"))


def test_an_entry_that_cannot_be_created_is_reported_instead_of_another_writer(tmp_path):
    store = LocalStore(tmp_path)
    log = PromotionLog(store, "tickets")
    promote(log, add_model(store, "a"))
    (tmp_path / LOG / "000002.json").mkdir()
    with pytest.raises(Failure, match="cannot be written"):
        promote(log, add_model(store, "b"))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "", ".hidden", "Tickets", "x" * 9 + "\n"])
def test_a_model_name_that_is_a_path_is_refused(store, name):
    with pytest.raises(BadConfig, match="not a name"):
        PromotionLog(store, name)


def test_a_moved_store_takes_its_anchor_along(tmp_path):
    promote(PromotionLog(tmp_path / "a", "tickets"), add_model(LocalStore(tmp_path / "a"), "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert PromotionLog(tmp_path / "b", "tickets").head().seq == 1
