"""Artifacts in a store, local and in a bucket: what is found, what counts as damaged, and what is quarantined."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow import identity
from loraflow.failures import CorruptArtifact
from loraflow.registry.backup import Copied, back_up
from loraflow.registry.cleanup import remove_unused
from loraflow.store import (
    LocalStore,
    Ref,
    Summary,
    hash_memo,
    open_store,
    read_intact,
    require_intact,
    require_intact_in_store,
    require_unchanged,
)
from loraflow.store.checkpoints import recompute_digest, reset_work_folder
from loraflow.store.files import HashMemo, hash_file, json_bytes
from loraflow.store.s3_artifacts import file_key
from tests.stored_artifacts import FP, PAYLOAD, put, remember, rewrite


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path: Path):
    """Each kind of store: tests of the interface run with both."""
    if request.param == "folder":
        return LocalStore(tmp_path / "a store with späce")
    return open_store(request.getfixturevalue("bucket_uri"))


def test_a_committed_artifact_is_found_and_intact(store):
    ref = put(store)
    assert store.find("tokenize", FP) == ref
    assert store.verify(ref) == []
    assert (store.path(ref) / "sub" / "a.txt").read_text() == "hello"
    assert ref.facets["sub"] == identity.digest({"sub/a.txt": store.manifest(ref).files["sub/a.txt"].sha256})


def test_telemetry_is_not_part_of_the_digest(tmp_path):
    assert put(LocalStore(tmp_path / "1")).digest == put(LocalStore(tmp_path / "2")).digest


def test_the_first_committed_digest_of_a_fingerprint_stays_current(store):
    first = put(store)
    assert put(store, content="other last bits") == first
    assert store.find("tokenize", FP) == first


def test_a_forced_computation_replaces_the_first(store):
    first = put(store)
    second = put(store, content="other", replace=True)
    assert second.digest != first.digest
    assert store.find("tokenize", FP) == second


def test_the_damaged_mark_of_a_forced_computation_counts_as_that_of_another_computation(tmp_path):
    reset_work_folder(tmp_path / "work", "a" * 64)
    assert recompute_digest(tmp_path / "work") == "a" * 64
    (tmp_path / "work" / "forced").write_bytes(b"\xff" * 64)
    assert recompute_digest(tmp_path / "work") not in (None, "a" * 64)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_a_computation_replaces_an_artifact_of_the_same_size_that_is_damaged(store, replace, other):
    """`--force` with a damaged artifact in the cache: the new files, and not the damaged ones, are kept."""
    ref = put(store)
    if other:  # the damaged digest is not the current one
        put(store, content="other", replace=True)
    damage_keeping_metadata(store, ref)
    assert other or store.find("tokenize", FP) == ref, "names and sizes are right"
    assert put(store, replace=replace or other) == ref == store.find("tokenize", FP) and store.verify(ref) == []
    assert (store.path(ref) / "sub" / "a.txt").read_text() == "hello"
    [record] = records_of_quarantine(store)
    assert record["problems"] == ["damaged, and replaced by a new artifact"]


def damage_keeping_metadata(store, ref: Ref) -> None:
    """Change one byte; the metadata of an object, which names its hash, stay as they are."""
    if isinstance(store, LocalStore):
        rewrite(store, ref, "sub/a.txt", "hellO")
    else:
        key = f"{store.bucket.prefix}{ref.stage}/{ref.fingerprint}/{ref.digest}/sub/a.txt"
        metadata = store.bucket.client.head_object(Bucket=store.bucket.name, Key=key)["Metadata"]
        assert metadata, "the upload stored the hash"
        store.bucket.client.put_object(Bucket=store.bucket.name, Key=key, Body=b"hellO", Metadata=metadata)


def records_of_quarantine(store) -> list[dict]:
    return [json.loads(data) for data in store.read_documents("set-aside/", ".json").values() if b'"was"' in data]


@pytest.mark.parametrize("harm", ["delete", "shorten", "extra", "manifest", "pointer"])
def test_names_and_sizes_are_checked_on_every_hit(store, harm):
    ref = put(store)
    name, content = {
        "delete": ("sub/a.txt", None),
        "shorten": ("sub/a.txt", "hell"),
        "extra": ("more", "x"),
        "manifest": ("manifest.json", "{"),
        "pointer": ("../current.json", None),
    }[harm]
    if harm == "pointer" and not isinstance(store, LocalStore):
        store.bucket.delete([f"{ref.stage}/{ref.fingerprint}/current.json"])
    else:
        rewrite(store, ref, name, content)
    assert store.find("tokenize", FP) is None
    again = put(store)
    assert store.find("tokenize", FP) == again
    assert store.verify(again) == []


def test_a_flipped_byte_is_detected_by_verify(store):
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO")
    assert store.find("tokenize", FP) == ref
    assert store.verify(ref) == ["sub/a.txt: hash mismatch"]


def test_an_edited_manifest_is_detected_by_verify(store):
    ref = put(store)
    values = store.manifest(ref).model_dump()
    values["payload"]["config"]["x"] = 2
    rewrite(store, ref, "manifest.json", json.dumps(values))
    assert any("fingerprint" in problem for problem in store.verify(ref))


@pytest.mark.parametrize("part", ["report", "figures", "facets", "provenance", "inputs"])
def test_a_manifest_that_was_edited_after_its_commit_is_a_miss_and_is_written_again(store, part):
    """None of these is covered by the digest or the fingerprint."""
    ref = put(store)
    values = store.manifest(ref).model_dump()
    edit = {"stage": "a", "fingerprint": "b", "digest": "c"} if part == "inputs" else "d"
    values[part]["sub"] = edit
    rewrite(store, ref, "manifest.json", json.dumps(values, indent=1, sort_keys=True))
    store = open_store(store.uri) if isinstance(store, LocalStore) else type(store)(store.uri)
    assert store.find("tokenize", FP) is None and store.verify(ref) == ["manifest.json: hash mismatch"]
    for read in (store.manifest, lambda ref: store.read(ref, "sub/a.txt")):
        with pytest.raises(CorruptArtifact, match="changed after it was written"):
            read(ref)
    again = put(store)
    assert store.find("tokenize", FP) == again == ref and store.verify(ref) == []
    assert store.manifest(ref).facets == ref.facets


def test_each_digest_of_a_fingerprint_keeps_the_hash_of_its_manifest(store):
    first, second = put(store), put(store, content="other", replace=True)
    pointer = json.loads(store.read_document(f"tokenize/{FP}/current.json"))
    assert pointer["digest"] == second.digest and set(pointer["manifests"]) == {first.digest, second.digest}
    values = store.manifest(first).model_dump() | {"report": {"promote": True}}
    rewrite(store, first, "manifest.json", json.dumps(values))
    assert store.check(first) == ["manifest.json: hash mismatch"] and store.check(second) == []


def test_a_pointer_of_an_older_release_is_read_and_its_manifest_has_to_agree_with_its_address(store):
    ref = put(store)
    store.write_document(f"tokenize/{FP}/current.json", json_bytes({"digest": ref.digest}))
    assert store.find("tokenize", FP) == ref and store.verify(ref) == []
    values = store.manifest(ref).model_dump()
    values["files"]["sub/a.txt"]["sha256"] = hashlib.sha256(b"hellO").hexdigest()
    rewrite(store, ref, "sub/a.txt", "hellO")
    rewrite(store, ref, "manifest.json", json.dumps(values))
    assert store.find("tokenize", FP) is None and "digest mismatch" in store.check(ref)[0]


@pytest.mark.parametrize("harm", ["7", "", None])
def test_damaged_telemetry_is_noticed_by_its_readers_and_the_artifact_is_used(store, tmp_path, caplog, harm):
    ref = put(store)
    other = open_store(store.uri)  # of another process, or on another machine
    if not isinstance(store, LocalStore):
        store.cache.drop(ref)
    rewrite(store, ref, stored_name(store, ref, "telemetry/time.json"), harm)
    assert other.find("tokenize", FP) == ref and other.check(ref) == []
    assert other.verify(ref) == ["telemetry/time.json: hash mismatch"]
    memo = hash_memo(other)
    for use in (require_intact_in_store, require_unchanged):
        caplog.clear()
        use(other, ref, memo)
        assert "is used, although its telemetry" in caplog.text and "telemetry/time.json" in caplog.text
    require_intact(other, ref, memo)
    assert (other.path(ref) / "sub" / "a.txt").read_text() == "hello"
    with pytest.raises(CorruptArtifact, match=r"mismatch|missing"):
        other.read(ref, "telemetry/time.json")
    assert list(back_up(other, tmp_path / "copy")) == [
        Copied(ref.model_copy(update={"facets": {}}), ref_size(other, ref))
    ]
    assert LocalStore(tmp_path / "copy").find("tokenize", FP).digest == ref.digest
    assert put(store).digest == ref.digest and other.verify(ref) == [], "a repeated computation replaces it"
    assert len(list(back_up(other, tmp_path / "copy"))) == 1, "the next backup has it"
    assert LocalStore(tmp_path / "copy").verify(ref) == [] and list(back_up(other, tmp_path / "copy")) == []


def ref_size(store, ref):
    return store.manifest(ref).size


@pytest.mark.timeout(60)
@pytest.mark.parametrize("harm", ["a pipe", "a device", "a link to itself"])
@pytest.mark.parametrize("name", ["manifest.json", "../current.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_manifest_or_pointer_does_not_block_a_read(tmp_path, name, harm):
    store = LocalStore(tmp_path)
    ref = put(store)
    path = store.path(ref) / name
    path.unlink()
    replace_by(path, harm)
    assert store.find("tokenize", FP) is None and store.check(ref) != []
    with pytest.raises(CorruptArtifact):
        store.manifest(ref)
    assert store.newest("tokenize") is None or name != "manifest.json"
    assert put(store).digest == ref.digest and store.find("tokenize", FP) == ref


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_document_does_not_block_a_read(tmp_path):
    replace_by(tmp_path / "x.json", "a pipe")
    with pytest.raises(OSError, match="not a regular file"):
        LocalStore(tmp_path).read_document("x.json")


def replace_by(path: Path, harm: str) -> None:
    if harm == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if harm == "a device" else path.name)


@pytest.mark.parametrize("harm", ["hellO", "hell", None])
@pytest.mark.parametrize("name", ["sub/a.txt", "telemetry/time.json"])
def test_a_file_that_is_read_is_hashed(store, name, harm):
    ref = put(store)
    assert store.read(ref, "sub/a.txt") == b"hello" == read_intact(store, ref, "sub/a.txt")
    if not isinstance(store, LocalStore):
        store.cache.drop(ref)  # a copy on this machine would be read instead
    rewrite(store, ref, stored_name(store, ref, name), harm)
    with pytest.raises(CorruptArtifact, match=r"is damaged(.|\n)*(mismatch|missing)"):
        store.read(ref, name)
    assert store.manifest(ref).digest == ref.digest, "reading moves nothing"
    with pytest.raises(CorruptArtifact, match="set-aside"):
        read_intact(store, ref, name)
    assert store.find("tokenize", FP) is None
    assert put(store).digest == ref.digest


def test_a_file_that_the_manifest_does_not_have_is_not_read(store):
    ref = put(store)
    rewrite(store, ref, "sub/b.txt", "more")
    with pytest.raises(CorruptArtifact, match="not in the manifest"):
        store.read(ref, "sub/b.txt")


def test_a_damaged_copy_of_a_buckets_file_is_replaced_by_the_intact_one(bucket_uri):
    store = open_store(bucket_uri)
    ref = put(store)
    for name in ("sub/a.txt", "telemetry/time.json"):
        (store.path(ref) / name).write_text("hellO")
        assert hashlib.sha256(store.read(ref, name)).hexdigest() == store.manifest(ref).files[name].sha256
    assert store.find("tokenize", FP) == ref


def stored_name(store, ref: Ref, name: str) -> str:
    """Return a file's name in the store: a bucket has telemetry below a folder of its own."""
    if isinstance(store, LocalStore):
        return name
    return file_key(ref, store.manifest(ref), name).removeprefix(f"{ref.stage}/{ref.fingerprint}/{ref.digest}/")


def test_quarantine_keeps_the_files_and_the_problems(store):
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO")
    path = store.quarantine(ref, ["why"]).removeprefix(store.uri + "/")
    assert store.read_document(f"{path}/sub/a.txt") == b"hellO"
    assert json.loads(store.read_document(f"{path}.json"))["problems"] == ["why"]
    assert store.find("tokenize", FP) is None


def test_an_artifact_that_another_process_recomputed_meanwhile_is_not_quarantined(store):
    other = open_store(store.uri)
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO")
    problems = store.verify(ref)  # hashing large files takes minutes, in which another run does the same
    other.quarantine(ref, other.verify(ref))
    assert put(other) == ref
    assert store.quarantine(ref, problems) is None
    assert store.find("tokenize", FP) == ref and store.verify(ref) == []
    assert len(records_of_quarantine(store)) == 1
    other.remove(ref)  # another worker was faster
    assert store.quarantine(ref, problems) is not None and store.find("tokenize", FP) is None


@pytest.mark.parametrize(
    "require", [require_intact, require_intact_in_store, lambda *args: read_intact(*args, "sub/a.txt")]
)
def test_an_artifact_that_is_recomputed_while_it_is_checked_is_used(store, monkeypatch, require):
    ref = put(store)
    if not isinstance(store, LocalStore):
        store.cache.drop(ref)
    rewrite(store, ref, "sub/a.txt", "hellO")
    quarantine = store.quarantine

    def after_another(ref, problems):
        rewrite(store, ref, "sub/a.txt", "hello")
        return quarantine(ref, problems)

    monkeypatch.setattr(store, "quarantine", after_another)
    require(store, ref)
    assert store.find("tokenize", FP) == ref and records_of_quarantine(store) == []


@pytest.mark.parametrize("deep", [(), ("--deep",)])
def test_verify_does_not_count_an_artifact_that_was_recomputed_meanwhile(tmp_path, monkeypatch, deep):
    from loraflow.cli.store import verify

    store = LocalStore(tmp_path / "store")
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO" if deep else "hell")
    quarantine = LocalStore.quarantine

    def after_another(self, ref, problems):
        rewrite(store, ref, "sub/a.txt", "hello")
        return quarantine(self, ref, problems)

    monkeypatch.setattr(LocalStore, "quarantine", after_another)
    done = CliRunner().invoke(verify, [*deep, "--store", str(store.root)])
    assert done.exit_code == 0, done.output
    assert "recomputed meanwhile" in done.output and "0 damaged" in done.output and "quarantined" not in done.output


def test_a_pointer_without_the_hash_of_its_own_manifest_is_not_believed(store):
    """Pointers of older stores have no hashes at all; this one lost the hash that an edited manifest would contradict."""
    ref = put(store)
    pointer = json.loads(store.read_document(f"tokenize/{FP}/current.json"))
    manifests = {"0" * 64: pointer["manifests"][ref.digest]}
    edit_report(store, ref)
    store.write_document(f"tokenize/{FP}/current.json", json_bytes({"digest": ref.digest, "manifests": manifests}))
    require_unbelieved(store, ref, "the hash of the current manifest is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": 3}', b"\xff"])
def test_no_manifest_is_believed_because_of_a_pointer_that_cannot_be_read(store, content):
    """It is not taken for a pointer that is missing: copies of artifacts that were never current have none."""
    ref = put(store)
    edit_report(store, ref)
    store.write_document(f"tokenize/{FP}/current.json", content)
    require_unbelieved(store, ref, "cannot be read")


def edit_report(store, ref: Ref) -> None:
    values = store.manifest(ref).model_dump() | {"report": {"promote": True}}
    rewrite(store, ref, "manifest.json", json.dumps(values))


def require_unbelieved(store, ref: Ref, why: str) -> None:
    """Require that an artifact is a miss, damaged for every check, and right after it is computed again."""
    assert store.find("tokenize", FP) is None
    problems = [f"current.json: {why}"]
    assert store.check(ref) == store.verify(ref) == problems
    with pytest.raises(CorruptArtifact, match=rf"cannot be checked(.|\n)*{why}"):
        store.manifest(ref)
    assert put(store) == ref == store.find("tokenize", FP)
    assert store.verify(ref) == [] and store.manifest(ref).report == {}


def test_a_pointer_that_lost_one_hash_still_has_those_of_other_digests(store):
    """The older digest may be a champion's model."""
    first, second = put(store), put(store, content="other", replace=True)
    pointer = json.loads(store.read_document(f"tokenize/{FP}/current.json"))
    del pointer["manifests"][second.digest], pointer["checksum"]  # as a pointer of an older release
    store.write_document(f"tokenize/{FP}/current.json", json_bytes(pointer))
    assert store.verify(first) == [] and store.verify(second) != []
    edit_report(store, first)
    assert store.verify(first) == ["manifest.json: hash mismatch"]
    assert put(store, content="other") == second and store.verify(second) == []
    assert store.verify(first) == ["manifest.json: hash mismatch"], "the commit kept the hash"


def test_a_link_in_an_artifact_is_refused(store):
    staged = store.staging("tokenize", FP)
    (staged / "link").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="neither"):
        store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})


def test_documents_are_created_once_and_listed_in_order(store):
    assert store.read_document("runs/1.json") is None
    assert store.create_document("runs/2.json", b"2") and not store.create_document("runs/2.json", b"3")
    store.write_document("runs/1.json", b"1")
    store.write_document("runs/1.json", b"one")
    assert store.documents("runs/") == ["runs/1.json", "runs/2.json"]
    assert (store.read_document("runs/1.json"), store.read_document("runs/2.json")) == (b"one", b"2")
    assert list(store.artifacts()) == []


def test_a_cache_miss_is_explained_by_remaining_files_and_the_nearest_payload(store):
    assert store.previous_state("tokenize", FP) is None and store.newest("tokenize") is None
    refs = [put(store, payload=identity.payload("tokenize", 1, {}, {"x": x, "y": x})) for x in (1, 2, 3)]
    assert store.newest("tokenize").stage == "tokenize"
    assert store.newest_payload("tokenize", identity.payload("tokenize", 1, {}, {"x": 2, "y": 9}))["config"]["x"] == 2
    rewrite(store, refs[0], "sub/a.txt", None)
    assert store.previous_state("tokenize", refs[0].fingerprint) == "damaged"
    store.remove(refs[1])
    assert store.previous_state("tokenize", refs[1].fingerprint) == "removed"
    assert store.find("tokenize", refs[2].fingerprint) == refs[2]


def test_a_single_file_can_be_read(store):
    ref = put(store)
    assert store.read(ref, "sub/a.txt") == b"hello"
    assert store.read(ref, "telemetry/time.json").isdigit()


def test_the_manifest_of_a_missing_artifact_is_a_failure_with_a_next_step(store):
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        store.manifest(Ref(stage="tokenize", fingerprint=FP, digest="0" * 64, uri=store.uri))


def test_cleanup_keeps_the_newest_and_stops_while_a_run_reads(store, monkeypatch):
    refs = [put(store, payload=identity.payload("merge", 1, {}, {"x": i}), content=f"model {i}") for i in range(5)]
    digests = [ref.digest for ref in refs]
    monkeypatch.setattr(store, "committed_at", lambda ref: digests.index(ref.digest))
    removed = [path for path, _, _ in remove_unused(store, keep=2)]
    assert sorted(path.name for path in removed) == sorted(ref.digest for ref in refs[:3])
    assert store.find("merge", refs[4].fingerprint) == refs[4]
    with store.reader_lock(), pytest.raises(Exception, match="while a run is using the store"):
        list(remove_unused(store, keep=0))


def test_an_intact_artifact_is_not_reported_as_damaged_because_of_a_wrong_memo(store, monkeypatch):
    remember(monkeypatch)
    ref, memo = put(store), HashMemo(None)
    for path in store.path(ref).rglob("*.*"):
        memo.hash(path)
    memo.known = {key: (*known[:4], "0" * 64) for key, known in memo.known.items()}
    assert not store.is_remembered(ref, memo)
    require_intact(store, ref, memo)
    assert store.is_remembered(ref, memo) and store.find("tokenize", FP) == ref


def test_an_unchanged_artifact_is_hashed_once(store, monkeypatch):
    remember(monkeypatch)
    ref, memo, hashed = put(store), hash_memo(store), []
    path = store.path(ref)
    monkeypatch.setattr(
        "loraflow.store.files.hash_file", lambda file, _="sha256": hashed.append(file) or hash_file(file)
    )
    require_intact(store, ref, memo)
    assert len(hashed) == 2, "its files"
    require_intact(store, ref, hash_memo(store))
    require_unchanged(store, ref, hash_memo(store))
    assert len(hashed) == 2, "the memo was saved"
    os.utime(path / "sub" / "a.txt")
    require_intact(store, ref, hash_memo(store))
    assert len(hashed) == 3
    assert store.verify(ref, hash_memo(store)) == []
    assert len(hashed) == (5 if isinstance(store, LocalStore) else 3), "verify hashes what is in the store, always"


def test_an_artifact_with_a_damaged_file_is_quarantined_when_it_is_required(store, monkeypatch):
    remember(monkeypatch)
    for number, require in enumerate((require_intact, require_unchanged, require_intact_in_store)):
        ref = put(store, payload=identity.payload("tokenize", 1, {}, {"x": number}))
        memo = hash_memo(store)
        require(store, ref, memo)
        if not isinstance(store, LocalStore):
            store.cache.drop(ref)
        time.sleep(0.02)
        rewrite(store, ref, "sub/a.txt", "hellO")
        with pytest.raises(CorruptArtifact, match=r"set-aside(.|\n)*sub/a.txt: hash mismatch"):
            require(store, ref, memo)
        assert store.find("tokenize", ref.fingerprint) is None
