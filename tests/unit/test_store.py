import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loraflow import identity
from loraflow.failures import CorruptArtifact, DiskFull, Failure, ReadOnlyStore, StorageError, from_os_error
from loraflow.registry.cleanup import remove_unused
from loraflow.store import (
    LocalStore,
    Manifest,
    Ref,
    Summary,
    hash_memo,
    open_store,
    read_intact,
    require_intact,
    require_intact_in_store,
    require_unchanged,
    staging,
)
from loraflow.store.checkpoints import finalize_checkpoint, prune_to_newest_intact
from loraflow.store.files import HashMemo, hash_file, json_bytes
from loraflow.store.s3_layout import file_key

PAYLOAD = identity.payload("tokenize", 1, {}, {"x": 1})
FP = identity.fingerprint(PAYLOAD)


def put(store: LocalStore, payload=PAYLOAD, content="hello", **options) -> Ref:
    staged = store.staging(payload["stage"], identity.fingerprint(payload))
    (staged / "sub").mkdir()
    (staged / "sub" / "a.txt").write_text(content)
    (staged / "telemetry").mkdir()
    (staged / "telemetry" / "time.json").write_text(str(time.time_ns()))
    return store.commit(
        staged,
        payload=payload,
        inputs={},
        summary=Summary(facets={"sub": ["sub/"]}),
        provenance={"seconds": 1},
        **options,
    )


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path: Path):
    """Each kind of store: tests of the interface run with both."""
    if request.param == "folder":
        return LocalStore(tmp_path / "a store with späce")
    return open_store(request.getfixturevalue("bucket_uri"))


def rewrite(store, ref: Ref, name: str, content: str | None) -> None:
    """Change a file of an artifact behind the store's back; None deletes it."""
    if isinstance(store, LocalStore):
        path = store.path(ref) / name
        path.write_text(content) if content is not None else path.unlink()
    else:
        key = f"{ref.stage}/{ref.fingerprint}/{ref.digest}/{name}"
        store.bucket.put(key, content.encode()) if content is not None else store.bucket.delete([key])


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


@pytest.mark.parametrize("replace", [False, True])
def test_a_computation_replaces_an_artifact_of_the_same_size_that_is_damaged(tmp_path, replace):
    """`--force` with a damaged artifact in the cache: the new files, and not the damaged ones, are kept."""
    store = LocalStore(tmp_path)
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO")
    assert store.find("tokenize", FP) == ref, "names and sizes are right"
    assert put(store, replace=replace) == ref and store.verify(ref) == []
    record = json.loads(next((tmp_path / "set-aside").glob("*.json")).read_text())
    assert record["problems"] == ["damaged, and replaced by a new artifact"]


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


def test_an_artifact_that_another_process_recomputed_meanwhile_is_not_quarantined(tmp_path):
    store, other = LocalStore(tmp_path), LocalStore(tmp_path)
    ref = put(store)
    rewrite(store, ref, "sub/a.txt", "hellO")
    problems = store.verify(ref)  # hashing large files takes minutes, in which another run does the same
    other.quarantine(ref, other.verify(ref))
    assert put(other) == ref
    assert store.quarantine(ref, problems) == store.location(ref)
    assert store.find("tokenize", FP) == ref and len(list((tmp_path / "set-aside").glob("*.json"))) == 1


def test_a_pointer_without_the_hash_of_its_own_manifest_is_not_believed(store):
    """Pointers of older stores have no hashes at all; this one lost the hash that an edited manifest would contradict."""
    ref = put(store)
    pointer = json.loads(store.read_document(f"tokenize/{FP}/current.json"))
    pointer["manifests"] = {"0" * 64: pointer["manifests"][ref.digest]}
    store.write_document(f"tokenize/{FP}/current.json", json_bytes(pointer))
    assert store.find("tokenize", FP) is None
    assert put(store) == ref == store.find("tokenize", FP)


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


COMMITTER = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, {tests!r})
from loraflow import identity
from loraflow.store import LocalStore
from test_store import put
store = LocalStore({root!r})
for i in itertools.count(int(sys.argv[1])):
    put(store, payload=identity.payload("tokenize", 1, {{}}, {{"x": i}}), content="c" * 4000)
    print(i, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_sigkill_at_a_random_moment_leaves_old_or_new(tmp_path, seed):
    root = tmp_path / "store"
    script = COMMITTER.format(tests=str(Path(__file__).parent), root=str(root))
    process = subprocess.Popen([sys.executable, "-c", script, "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)
    reported = [int(line) for line in process.stdout.read().split()]
    process.wait()
    store = LocalStore(root)
    found = list(store.artifacts())
    assert len(found) > max(reported, default=0), "every commit that was reported is there"
    assert all(store.verify(ref) == [] for ref in found)
    for i in range(max(reported, default=0) + 1):
        assert store.find("tokenize", identity.fingerprint(identity.payload("tokenize", 1, {}, {"x": i}))) is not None
    # and the next commit succeeds
    put(store, payload=identity.payload("tokenize", 1, {}, {"x": len(found)}), content="c" * 4000)


RACER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from loraflow.store import LocalStore
from test_store import put, FP
store = LocalStore({root!r})
with store.lock("tokenize", FP):
    if store.find("tokenize", FP) is None:
        Path({root!r}, "computed-" + sys.argv[1]).write_text("")
        time.sleep(0.3)
        put(store, content=sys.argv[1])
print(store.find("tokenize", FP).digest)
"""


def test_processes_that_need_the_same_artifact_compute_it_once(tmp_path):
    root = tmp_path / "store"
    root.mkdir()
    script = RACER.format(tests=str(Path(__file__).parent), root=str(root))
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    digests = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert len(digests) == 1
    assert len(list(root.glob("computed-*"))) == 1


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    script = "import sys,time\nfrom loraflow.store import LocalStore\nwith LocalStore(sys.argv[1]).lock('a','b'):\n print(1,flush=True);time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    with LocalStore(tmp_path).lock("a", "b"):
        pass


def test_a_full_disk_is_a_failure_with_a_next_step_and_leaves_nothing(tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "store")
    import loraflow.store.local as local

    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(local, "write_json", full)
    with pytest.raises(DiskFull) as caught:
        put(store)
    assert "loraflow gc" in str(caught.value)
    assert list(store.artifacts()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/unshare").exists(), reason="root writes everywhere")
def test_a_read_only_store_can_be_read_and_a_write_reports_it(tmp_path):
    root = tmp_path / "store"
    ref = put(LocalStore(root))
    script = (
        "import sys\nsys.path.insert(0, sys.argv[2])\nfrom loraflow.store import LocalStore\n"
        "from loraflow.failures import ReadOnlyStore\nfrom test_store import put, FP, PAYLOAD\n"
        "from loraflow import identity\nstore = LocalStore(sys.argv[1])\n"
        "assert store.find('tokenize', FP) is not None\n"
        "with store.reader_lock():\n pass\n"
        "try:\n put(store, payload=identity.payload('tokenize', 1, {}, {'x': 9}))\n"
        "except ReadOnlyStore as failure:\n print('refused', 'runtime.store' in str(failure))\n"
    )
    mount = f"mount --bind {root} {root} && mount -o remount,ro,bind {root}"
    command = f"{mount} && {sys.executable} -c '{script.replace(chr(39), chr(34))}' {root} {Path(__file__).parent}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[:80]}")
    assert done.stdout.strip() == "refused True", done.stderr
    assert LocalStore(root).verify(ref) == []
    assert ReadOnlyStore.exit_code == 1


def test_cleanup_keeps_the_newest_and_stops_while_a_run_reads(store, monkeypatch):
    refs = [put(store, payload=identity.payload("merge", 1, {}, {"x": i}), content=f"model {i}") for i in range(5)]
    digests = [ref.digest for ref in refs]
    monkeypatch.setattr(store, "committed_at", lambda ref: digests.index(ref.digest))
    removed = [path for path, _, _ in remove_unused(store, keep=2)]
    assert sorted(path.name for path in removed) == sorted(ref.digest for ref in refs[:3])
    assert store.find("merge", refs[4].fingerprint) == refs[4]
    with store.reader_lock(), pytest.raises(Exception, match="while a run is using the store"):
        list(remove_unused(store, keep=0))


# A manifest as it is in stores since the first release: its bytes must not change, and it must stay readable.
MANIFEST_ON_DISK = """{
 "digest": "64688d47f8e0e95040d2b078a9a331a56e61236d6b2365d2cb38ca6b23105023",
 "facets": {
  "adapter": "64688d47f8e0e95040d2b078a9a331a56e61236d6b2365d2cb38ca6b23105023"
 },
 "figures": {
  "first_loss": null,
  "mean": 0.5,
  "steps": 20
 },
 "files": {
  "adapter/weights.bin": {
   "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
   "size": 7
  },
  "telemetry/curve.jsonl": {
   "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",
   "size": 3
  }
 },
 "fingerprint": "d789dee5d1b861d4456054b82fb5d579462641bd7180f2359ad1dbbc130eefce",
 "inputs": {
  "base": {
   "digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "facets": {
    "tokenizer": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
   },
   "fingerprint": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
   "stage": "resolve_base"
  }
 },
 "payload": {
  "config": {
   "lr": 0.0002,
   "note": null,
   "packing": true,
   "seed": 7,
   "targets": [
    "qkv_proj"
   ]
  },
  "inputs": {
   "base": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
  },
  "stage": "train",
  "version": 3
 },
 "provenance": {
  "name": "späce",
  "seconds": 12.5,
  "started": "2026-11-26T10:00:00Z",
  "versions": {
   "torch": "2.13.0"
  }
 },
 "report": {
  "samples": [
   {
    "id": "1",
    "ok": true
   }
  ]
 },
 "schema_version": 1,
 "stage": "train",
 "version": 3
}
"""


def test_a_manifest_is_serialized_to_the_bytes_of_existing_stores(tmp_path):
    store = LocalStore(tmp_path)
    payload = identity.payload(
        "train",
        3,
        {"base": "a" * 64},
        {"seed": 7, "lr": 2e-4, "targets": ["qkv_proj"], "note": None, "packing": True},
    )
    base = Ref(stage="resolve_base", fingerprint="b" * 64, digest="a" * 64, uri="/x", facets={"tokenizer": "c" * 64})
    staged = store.staging("train", identity.fingerprint(payload))
    for name, content in {"adapter/weights.bin": "weights", "telemetry/curve.jsonl": "{}\n"}.items():
        (staged / name).parent.mkdir()
        (staged / name).write_text(content)
    ref = store.commit(
        staged,
        payload=payload,
        inputs={"base": base},
        summary=Summary(
            figures={"steps": 20, "mean": 0.5, "first_loss": None},
            facets={"adapter": ["adapter/"]},
            report={"samples": [{"id": "1", "ok": True}]},
        ),
        provenance={
            "started": "2026-11-26T10:00:00Z",
            "seconds": 12.5,
            "versions": {"torch": "2.13.0"},
            "name": "späce",
        },
    )
    assert (store.path(ref) / "manifest.json").read_text() == MANIFEST_ON_DISK
    assert store.manifest(ref).input_refs(store.uri) == {"base": base.model_copy(update={"uri": store.uri})}


def test_a_manifest_of_an_older_release_is_read_and_written_unchanged():
    manifest = Manifest.model_validate_json(MANIFEST_ON_DISK)
    assert manifest.size == 10 and manifest.files["adapter/weights.bin"].size == 7
    assert manifest.payload["config"]["lr"] == 2e-4 and manifest.provenance["versions"] == {"torch": "2.13.0"}
    assert json_bytes(manifest.model_dump()).decode() == MANIFEST_ON_DISK


def test_a_summary_accepts_every_json_value():
    """Stages report tuples and counts by number; in the manifest they are lists and strings."""
    summary = Summary(report={"by_length": {1: (2, 3)}, "share": np.float64(0.5)})
    assert summary.report == {"by_length": {"1": [2, 3]}, "share": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        Summary(report={"folder": Path("x")})


def remember(monkeypatch) -> None:
    """Let a memo remember hashes of files that were just written."""
    monkeypatch.setattr("loraflow.store.files.SETTLED", -1)


def test_cached_hashes_of_an_older_release_have_no_ctime_and_are_not_believed(tmp_path):
    file, memo = tmp_path / "file", tmp_path / "hashes.json"
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    inode = file.stat().st_ino
    memo.write_text(f'{{"sha256:{file}": [7, 1000000000000000000, {inode}, "remembered"]}}')
    assert HashMemo(memo).hash(file) == hashlib.sha256(b"content").hexdigest()


def test_a_changed_byte_is_seen_although_size_mtime_and_inode_are_as_before(tmp_path):
    file, memo = tmp_path / "file", HashMemo(None)
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    right = memo.hash(file)
    assert memo.remembers(file, right) and memo.has_hash(file, right)
    before = file.stat()
    time.sleep(0.05)  # longer than a tick of the kernel's clock
    file.write_text("cOntent")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (7, 10**18, before.st_ino)
    assert not memo.remembers(file, right) and not memo.has_hash(file, right)


def test_a_hash_of_a_file_that_was_just_written_is_not_remembered(tmp_path):
    file, memo = tmp_path / "file", HashMemo(None)
    file.write_text("content")
    memo.hash(file)
    assert memo.known == {}


def test_a_wrong_memo_makes_no_intact_artifact_damaged(store, monkeypatch):
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


def test_a_damaged_file_is_quarantined_by_whoever_requires_the_artifact(store, monkeypatch):
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


FAULTS = {"EIO": errno.EIO, "EMFILE": errno.EMFILE, "ESTALE": errno.ESTALE, "EACCES": errno.EACCES}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["pointer", "manifest", "list", "size"])
def test_a_lookup_that_the_machine_cannot_answer_is_a_failure_and_no_miss(tmp_path, monkeypatch, fault, call):
    store = LocalStore(tmp_path)
    ref = put(store)
    names = {"pointer": "current.json", "manifest": "manifest.json", "list": ref.digest, "size": "a.txt"}
    failing = {
        "pointer": ("read_bytes", Path),
        "manifest": ("read_bytes", Path),
        "list": ("scandir", os),
        "size": ("stat", Path),
    }
    name, owner = failing[call]
    real = getattr(owner, name)

    def fail(path, *args, **options):
        if Path(path).name == names[call]:
            raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]), str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(Failure) as caught:
            store.find("tokenize", FP)
        assert not isinstance(caught.value, CorruptArtifact) and caught.value.where and caught.value.next_step
    assert store.find("tokenize", FP) == ref


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch, number):
    """`Path.glob` of Python 3.13 skips it: verify, gc, backup and the promotion log would see less than there is."""
    store = LocalStore(tmp_path)
    ref = put(store)
    store.create_document("registry/tickets/log/000001.json", b"{}")
    assert list(store.artifacts()) == [ref.model_copy(update={"facets": {}})]
    listdir, scandir = os.listdir, os.scandir
    for name in (FP, "log"):

        def fail(real, path, name=name):
            if Path(path).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda path: fail(listdir, path))
            patch.setattr(os, "scandir", lambda path: fail(scandir, path))
            with pytest.raises(Failure):
                list(store.artifacts()) if name == FP else store.documents("registry/")


def test_a_checkpoint_is_not_removed_because_too_many_files_are_open(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("w")
    finalize_checkpoint(checkpoint)

    def fail(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(Failure, match="too many open files"):
            prune_to_newest_intact(tmp_path)
    assert prune_to_newest_intact(tmp_path) == checkpoint


@pytest.mark.parametrize("content", ["{", "[]", '{"sha256:/file": [1]}'])
def test_a_damaged_hash_cache_is_ignored_and_rewritten(tmp_path, content):
    file, memo = tmp_path / "file", tmp_path / "hashes.json"
    file.write_text("content")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    memo.write_text(content)
    hashes = HashMemo(memo)
    expected = hashlib.sha256(b"content").hexdigest()
    assert hashes.hash(file) == expected
    hashes.save()
    stamp = [7, 1_000_000_000_000_000_000, file.stat().st_ino, file.stat().st_ctime_ns, expected]
    assert json.loads(memo.read_text()) == {f"sha256:{file}": stamp}


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from loraflow.store import LocalStore
folder = LocalStore(sys.argv[1]).staging("train", "f" * 64)
(folder / "weights").write_bytes(b"0" * 1000)
print(folder.name, flush=True)
time.sleep(60)
"""


def holder(root: Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", HOLDER, str(root), str(Path(__file__).parents[2])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_thirteen_kills_leave_one_staging_folder_the_one_in_use(tmp_path):
    def kill_one(_):
        process, _name = holder(tmp_path)
        process.kill()
        process.wait()

    for number in range(3):
        kill_one(number)
    for number in range(10):  # a folder of a process that has ended, without waiting for ten more of them
        folder = LocalStore(tmp_path).staging("train", f"{number}" * 64)
        os.close(staging._held.pop(folder))
    mine = LocalStore(tmp_path).staging("merge", FP)
    assert [path.name for path in (tmp_path / "staging").iterdir() if path.is_dir()] == [mine.name]
    staging.discard(mine)
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_staging_folder_of_a_running_process_stays(tmp_path):
    process, name = holder(tmp_path)
    try:
        staging.discard(LocalStore(tmp_path).staging("merge", FP))
        list(remove_unused(LocalStore(tmp_path), keep=1))
        assert (tmp_path / "staging" / name / "weights").exists()
    finally:
        process.kill()
        process.wait()
    removed = [path.name for path, size, _ in remove_unused(LocalStore(tmp_path), keep=1) if size == 1000]
    assert removed == [name] and list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "removed"),
    [
        ({"host": "other", "machine": "m", "boot": "b"}, False),
        ({"host": "other", "machine": "m", "boot": "here"}, True),  # a container on this kernel
        ({"host": "me", "machine": "mine", "boot": "before"}, True),  # this machine was restarted
        ({"host": "me", "machine": "another", "boot": "b"}, False),  # two machines of one name
        ([], False),
    ],
)
def test_a_staging_folder_of_another_machine_is_left_to_it(tmp_path, monkeypatch, owner, removed):
    monkeypatch.setattr(staging, "_this_machine", lambda: staging._Machine("me", "mine", "here"))
    folder = tmp_path / "train-0123-abcd"
    folder.mkdir()
    (tmp_path / "train-0123-abcd.owner").write_text(json.dumps(owner))
    staging.remove_abandoned(tmp_path)
    assert folder.exists() is not removed


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_decides_who_can_read_an_artifact_and_a_checkpoint(tmp_path, umask):
    import torch
    from safetensors.torch import save_file

    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    private = staged / "private"
    private.mkdir(mode=0o700)
    save_file({"w": torch.zeros(2)}, private / "model.safetensors")
    for mode in (0o600, 0o755, 0o444, 0o4755):
        (staged / f"{mode:o}.bin").write_text("x")
        (staged / f"{mode:o}.bin").chmod(mode)
    ref = store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})
    store.write_document("runs/x.json", b"{}")
    store.create_document("registry/m/log/1.json", b"{}")
    checkpoint = store.work_folder("train", FP) / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, checkpoint / "adapter_model.safetensors")
    finalize_checkpoint(checkpoint)
    for path in store.root.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert oct(path.stat().st_mode & 0o7777) == oct(expected), path
    assert store.verify(ref) == []


def test_a_linked_file_of_another_folder_keeps_its_mode_and_is_readable_in_the_store(tmp_path):
    """Weights of a base are hard links: their mode belongs to whoever owns the base's folder."""
    private, public = tmp_path / "private.bin", tmp_path / "public.bin"
    for path, mode in ((private, 0o600), (public, 0o755)):
        path.write_text(path.name)
        path.chmod(mode)
    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    os.link(private, staged / "private.bin")
    os.link(public, staged / "public.bin")
    before = os.umask(0o022)
    try:
        folder = store.path(store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={}))
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600 and public.stat().st_mode & 0o777 == 0o755
    assert (folder / "private.bin").stat().st_mode & 0o777 == 0o644
    assert (folder / "private.bin").read_text() == "private.bin" and private.stat().st_nlink == 1
    assert public.stat().st_nlink == 2, "what everybody can read is not copied"


def test_drafts_of_interrupted_writes_are_cleaned_up(tmp_path):
    store = LocalStore(tmp_path)
    put(store)
    store.write_document("runs/x.json", b"{}")
    old = [tmp_path / "runs" / ".x.json.ab12_cd3", tmp_path / "tokenize" / FP / ".current.json.0123abcd"]
    for path in old:
        path.write_text("{")
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (tmp_path / "runs" / ".new.json.0123abcd").write_text("{")
    assert len(list(remove_unused(store, keep=1))) == 2
    assert not any(path.exists() for path in old) and (tmp_path / "runs" / ".new.json.0123abcd").exists()
    assert store.find("tokenize", FP)


def test_a_copy_to_a_full_disk_names_the_disk_that_is_full_and_not_the_file_that_is_copied(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(os, "sendfile", fail)
    with pytest.raises(OSError) as caught:
        shutil.copyfile(tmp_path / "source", tmp_path / "copy")
    failure = from_os_error(caught.value, "store")
    assert isinstance(failure, DiskFull) and failure.where == str(tmp_path / "copy")


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EIO, StorageError, "input/output error"),
        (errno.ESTALE, StorageError, "network file system"),
        (errno.ENOTCONN, StorageError, "not connected"),
        (errno.EMFILE, Failure, "too many open files"),
        (errno.ENFILE, Failure, "too many open files"),
        (errno.ENOLCK, Failure, "cannot lock files"),
        (errno.EROFS, ReadOnlyStore, "cannot be written"),
        (errno.EDQUOT, DiskFull, "quota"),
        (errno.ENOSPC, DiskFull, "disk is full"),
        (errno.EFBIG, DiskFull, "larger than a limit"),
        (errno.ENAMETOOLONG, Failure, "too long"),
        (errno.ELOOP, Failure, "symbolic links"),
        (errno.ENOTDIR, Failure, "not a folder"),
    ],
)
def test_each_error_of_the_system_is_one_sentence_with_a_next_step(tmp_path, monkeypatch, number, kind, sentence):
    store, opened = LocalStore(tmp_path), os.open

    def fail(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    for use in (
        lambda: store.write_document("runs/x.json", b"{}"),
        lambda: store.staging("train", FP),
        lambda: store.lock("train", FP).__enter__(),
        lambda: list(remove_unused(store, keep=1)),
    ):
        with pytest.raises(Failure, match=sentence) as caught:
            use()
        assert type(caught.value) is kind and caught.value.next_step
        assert caught.value.where.startswith(str(tmp_path)) and len(str(caught.value).splitlines()) == 4
    if kind is ReadOnlyStore:  # a read-only store can still be read
        with store.reader_lock():
            pass
    else:
        with pytest.raises(kind), store.reader_lock():
            pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_fault_of_the_machine_is_not_taken_for_a_damaged_artifact(tmp_path, monkeypatch, number):
    store = LocalStore(tmp_path)
    ref, opened, asked = put(store), Path.open, []

    def fail(self, *args, **kwargs):
        if self.name == "a.txt":
            asked.append(self)
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(Failure) as caught:
            require_intact(store, ref)
    assert not isinstance(caught.value, CorruptArtifact) and "a.txt" in caught.value.where
    assert len(asked) == 3, "it is asked again first"
    assert store.verify(ref) == [] and not (tmp_path / "set-aside").exists()


def test_a_folder_that_cannot_be_listed_is_not_committed_as_empty(tmp_path, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("sub"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(Failure, match="too many open files"):
        put(LocalStore(tmp_path))
    assert list(LocalStore(tmp_path).artifacts()) == []


@pytest.mark.parametrize("file", ["current.json", "manifest.json"])
def test_a_fault_of_the_machine_is_no_cache_miss(tmp_path, monkeypatch, file):
    """EIO and EMFILE say nothing about the artifact: it is neither recomputed nor quarantined."""
    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    (staged / "a").write_text("a")
    ref = store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})
    real = Path.read_bytes

    def fail(path):
        if path.name == file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    for look in (lambda: store.find("tokenize", FP), lambda: store.check(ref), lambda: store.manifest(ref)):
        with pytest.raises(StorageError) as caught:
            look()
        assert file in caught.value.where
    monkeypatch.undo()
    assert store.find("tokenize", FP) == ref


def test_a_store_below_a_file_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/store"):
        with pytest.raises(Failure, match="is a file and not a folder"):
            open_store(str(tmp_path / folder))
    assert open_store(str(tmp_path / "not yet" / "store")).find("tokenize", FP) is None
