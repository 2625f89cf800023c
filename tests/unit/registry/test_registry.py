"""The promotion log: its entries, writers at the same time, rollbacks, and stored decisions."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loraflow.failures import CorruptArtifact, Failure
from loraflow.registry import PromotionLog
from loraflow.registry.log import HeadChanged, models
from loraflow.store import LocalStore, Ref, open_store
from loraflow.store.checksum import check_document


def ref(name):
    return Ref(stage="merge", fingerprint=name * 64, digest=name * 64, uri="/somewhere")


def promote(log, name):
    return log.append(
        log.head(), action="promote", merged=ref(name), adapter=None, inputs={}, reasons=["better"], actor="me"
    )


@pytest.fixture(params=["folder", "bucket"])
def log(request, tmp_path):
    store = tmp_path if request.param == "folder" else open_store(request.getfixturevalue("bucket_uri"))
    return PromotionLog(store, "tickets")


def test_the_last_entry_is_the_active_promotion(log):
    assert log.head() is None
    promote(log, "a")
    promote(log, "b")
    assert [entry.seq for entry in log.entries()] == [1, 2]
    assert log.head().merged.digest == "b" * 64


def test_a_moved_store_keeps_its_log(tmp_path):
    promote(PromotionLog(tmp_path, "tickets"), "a")
    (tmp_path / "registry").rename(tmp_path / "moved")
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "registry")
    head = PromotionLog(tmp_path / "new", "tickets").head()
    assert head.merged.uri == str(tmp_path / "new")


@pytest.mark.parametrize("harm", ["edit", "delete", "garbage"])
def test_a_changed_log_is_refused(log, harm):
    for name in "abc":
        promote(log, name)
    name = "registry/tickets/log/000002.json"
    if harm == "delete" and isinstance(log.store, LocalStore):
        (log.store.root / name).unlink()
    elif harm == "delete":
        log.store.bucket.delete([name])
    elif harm == "garbage":
        log.store.write_document(name, b"{")
    else:
        values = json.loads(log.store.read_document(name))
        values["reasons"] = ["because"]
        log.store.write_document(name, json.dumps(values).encode())
    with pytest.raises(CorruptArtifact, match="damaged"):
        log.head()


def test_one_of_many_concurrent_writers_wins(log):
    promote(log, "a")
    seen = log.head()

    def attempt(name):
        try:
            log.append(seen, action="promote", merged=ref(name), adapter=None, inputs={}, reasons=[], actor="me")
        except HeadChanged:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, "bcdefghi")) == 1
    assert len(log.entries()) == 2
    assert len(log.store.documents("registry/")) == 2, "no draft is left"


def test_each_rollback_goes_one_model_further_back(log):
    for name in "abc":
        promote(log, name)
    assert log.rollback("bad", "me").merged.digest == "b" * 64
    assert log.rollback_reason("c" * 64) == "bad"
    assert log.rollback_reason("b" * 64) is None
    assert log.rollback("worse", "me").merged.digest == "a" * 64
    with pytest.raises(Failure, match="no earlier"):
        log.rollback("more", "me")


def test_a_model_that_is_promoted_again_is_no_longer_rolled_back(log):
    promote(log, "a")
    promote(log, "b")
    log.rollback("bad", "me")
    promote(log, "b")
    assert log.rollback_reason("b" * 64) is None
    assert log.rollback("bad again", "me").merged.digest == "a" * 64


def test_decisions_are_stored_per_head_and_protocol(log):
    promote(log, "a")
    head = log.head()
    log.write_decision(head, "b" * 64, "p" * 64, {"verdict": "reject"})
    assert log.read_decision(head, "b" * 64, "p" * 64) == {"verdict": "reject"}
    assert log.read_decision(head, "b" * 64, "q" * 64) is None
    promote(log, "c")
    assert log.read_decision(log.head(), "b" * 64, "p" * 64) is None


# An entry as it is in logs since the first release: its bytes must not change, and it must stay readable.
ENTRY_ON_DISK = """{
 "action": "promote",
 "actor": "me",
 "adapter": {
  "digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "facets": {
   "tokenizer": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
  },
  "fingerprint": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
  "stage": "resolve_base",
  "uri": "/x"
 },
 "before": null,
 "hash": "252d188269f59a3af44bf05a4ba9c2a7529424be89675c9158cec42db5199947",
 "inputs": {
  "base": "phi",
  "dataset": "md5",
  "recipe": "tiny"
 },
 "merged": {
  "digest": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
  "facets": {},
  "fingerprint": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
  "stage": "merge",
  "uri": "/somewhere"
 },
 "model": "tickets",
 "reasons": [
  "better: +0.1 ≥ 0"
 ],
 "seq": 1,
 "time": "2026-11-26T10:00:00Z"
}
"""


def test_an_entry_is_serialized_to_the_bytes_of_existing_logs(tmp_path, monkeypatch):
    log = PromotionLog(tmp_path, "tickets")
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-11-26T10:00:00Z")
    adapter = Ref(stage="resolve_base", fingerprint="b" * 64, digest="a" * 64, uri="/x", facets={"tokenizer": "c" * 64})
    log.append(
        None,
        action="promote",
        merged=Ref(stage="merge", fingerprint="d" * 64, digest="e" * 64, uri="/somewhere"),
        adapter=adapter,
        inputs={"dataset": "md5", "base": "phi", "recipe": "tiny"},
        reasons=["better: +0.1 ≥ 0"],
        actor="me",
    )
    assert log.store.read_document("registry/tickets/log/000001.json").decode() == ENTRY_ON_DISK


def test_a_log_of_an_older_release_is_read_and_continued(log):
    log.store.write_document("registry/tickets/log/000001.json", ENTRY_ON_DISK.encode())
    assert log.head().inputs == {"base": "phi", "dataset": "md5", "recipe": "tiny"}
    promote(log, "b")
    assert [entry.before for entry in log.entries()] == [
        None,
        "252d188269f59a3af44bf05a4ba9c2a7529424be89675c9158cec42db5199947",
    ]


def test_a_decision_is_serialized_to_the_bytes_of_existing_stores_with_a_checksum_and_a_damaged_one_is_ignored(log):
    promote(log, "a")
    log.write_decision(log.head(), "b" * 64, "p" * 64, {"verdict": "reject", "reasons": ["worse"]})
    [name] = log.store.documents("registry/tickets/decisions/")
    document = check_document(name, log.store.read_document(name))
    assert document == b'{\n "reasons": [\n  "worse"\n ],\n "verdict": "reject"\n}\n'
    log.store.write_document(name, b"{")
    assert log.read_decision(log.head(), "b" * 64, "p" * 64) is None


def test_a_model_that_was_never_promoted_is_not_in_the_registry(log):
    promote(log, "a")
    PromotionLog(log.store, "rejected").write_decision(None, "0" * 64, "protocol", {"verdict": "reject"})
    assert models(log.store) == [log.model]
