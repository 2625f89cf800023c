"""Failures that only a bucket store can have, against a real S3 server."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from loraflow import identity
from loraflow.failures import BadConfig, CorruptArtifact, Failure, MissingExtra, Network, ReadOnlyStore
from loraflow.registry import PromotionLog
from loraflow.registry.cleanup import remove_unused
from loraflow.store import LocalStore, Store, Summary, bucket, open_store
from loraflow.store.lease import lease
from loraflow.store.lock import LockHeld
from loraflow.store.s3 import S3Store
from tests.s3_proxy import Answer, DropConnection, LoseReply, Request, s3_proxy  # noqa: F401
from tests.stored_artifacts import FP, PAYLOAD, put, rewrite

ROOT = Path(__file__).parents[3]
MIB = 2**20


def machine(tmp_path: Path, name: str, script: str, *arguments: str) -> subprocess.Popen:
    """Run a script as on another machine: with its own cache."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LORAFLOW_CACHE": str(tmp_path / f"cache of {name}")}
    head = "import sys, time\nfrom loraflow.store.s3 import S3Store\nfrom tests.stored_artifacts import FP, put\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + script, *arguments], env=env, stdout=subprocess.PIPE, text=True
    )


def big(store, content: bytes):
    """Stage one large file."""
    staged = store.staging("tokenize", FP)
    (staged / "large.bin").write_bytes(content)
    return lambda: store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})


def test_equal_results_have_equal_digests_in_a_folder_and_in_a_bucket(tmp_path, bucket_uri):
    assert put(LocalStore(tmp_path / "store")).digest == put(open_store(bucket_uri)).digest


COMMITTER = """
import itertools
from loraflow import identity
store = S3Store(sys.argv[1])
for i in itertools.count():
    put(store, payload=identity.payload("tokenize", 1, {}, {"x": i}), content="c" * 4000)
    print(i, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_a_random_moment_of_a_commit_leaves_old_or_new(tmp_path, bucket_uri, seed):
    process = machine(tmp_path, "killed", COMMITTER, bucket_uri)
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.2))
    process.kill()
    output = max([int(line) for line in process.stdout.read().split()], default=0)
    process.wait()
    store = open_store(bucket_uri)
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    for i in range(output + 1):
        assert store.find("tokenize", identity.fingerprint(identity.payload("tokenize", 1, {}, {"x": i}))) is not None
    for i in range(output + 3):  # an interrupted commit can be repeated
        ref = put(store, payload=identity.payload("tokenize", 1, {}, {"x": i}), content="c" * 4000)
        assert store.verify(ref) == []


RACER = """
store = S3Store(sys.argv[1], lease_seconds=4)
with store.lock("tokenize", FP):
    if store.find("tokenize", FP) is None:
        print("computed")
        time.sleep(0.5)
        put(store, content=sys.argv[2])
print(store.find("tokenize", FP).digest)
"""


def test_machines_that_need_the_same_artifact_compute_it_once(tmp_path, bucket_uri):
    racers = [machine(tmp_path, str(i), RACER, bucket_uri, str(i)) for i in range(3)]
    output = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sum("computed" in lines for lines in output) == 1
    assert len({lines[-1] for lines in output}) == 1


def test_machines_that_commit_at_the_same_time_agree_afterwards(tmp_path, bucket_uri):
    script = "store = S3Store(sys.argv[1])\nprint(put(store, content=sys.argv[2]).digest)"
    racers = [
        machine(tmp_path, str(i), script, bucket_uri, str(i // 2)) for i in range(4)
    ]  # two pairs of equal results
    assert len({racer.communicate(timeout=60)[0] for racer in racers}) == 1
    store = open_store(bucket_uri)
    assert all(store.verify(ref) == [] for ref in store.artifacts()), "also of equal results with different telemetry"


HOLDER = """
store = S3Store(sys.argv[1], lease_seconds=3)
with store.lock("tokenize", FP):
    print("has it", flush=True)
    sys.stdin.readline() if sys.argv[2] == "hang" else time.sleep(5)
    ref = put(store, content="late")
    print(ref.digest, flush=True)
"""


def test_the_lease_of_a_dead_worker_expires_and_the_lease_of_a_live_worker_does_not(tmp_path, bucket_uri):
    store = S3Store(bucket_uri, lease_seconds=3)
    living = machine(tmp_path, "living", HOLDER, bucket_uri, "work")
    living.stdout.readline()
    with store.lock("tokenize", FP):
        assert store.find("tokenize", FP) is not None, "the wait was longer than a lease"
    living.wait()
    dead = machine(tmp_path, "dead", HOLDER, bucket_uri, "work")
    dead.stdout.readline()
    dead.kill()
    dead.wait()
    started = time.monotonic()
    with store.lock("tokenize", FP):
        assert 1 < time.monotonic() - started < 20


def test_the_age_of_a_lease_is_measured_by_the_servers_clock(bucket_uri, monkeypatch):
    store = open_store(bucket_uri)
    with lease(store.bucket, "locks/x.json", seconds=60):
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 300)
        with pytest.raises(LockHeld), lease(store.bucket, "locks/x.json", seconds=60, wait=False):
            pass


def test_a_worker_whose_lease_expired_returns_the_current_artifact(tmp_path, bucket_uri):
    sleeper = machine(tmp_path, "sleeper", HOLDER, bucket_uri, "work")
    sleeper.stdout.readline()
    sleeper.send_signal(signal.SIGSTOP)
    store = S3Store(bucket_uri, lease_seconds=3)
    with store.lock("tokenize", FP):
        first = put(store, content="in time")
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.communicate(timeout=60)[0].split()[-1] == first.digest
    assert store.find("tokenize", FP) == first and store.verify(first) == []


def test_a_flipped_byte_in_the_bucket_is_detected_on_download_and_quarantined(bucket_uri):
    store = open_store(bucket_uri)
    ref = put(store)
    store.cache.drop(ref)  # as on another machine
    rewrite(store, ref, "sub/a.txt", "hellO")
    assert store.find("tokenize", FP) == ref, "names and sizes are right"
    with pytest.raises(CorruptArtifact) as caught:
        store.path(ref)
    assert "sub/a.txt: hash mismatch" in str(caught.value) and "set-aside" in caught.value.where
    assert store.find("tokenize", FP) is None
    again = put(store)
    store.cache.drop(again)
    assert store.verify(again) == [] and (store.path(again) / "sub" / "a.txt").read_text() == "hello"


def test_a_flipped_byte_in_the_cache_is_repaired_from_the_bucket(bucket_uri):
    store = open_store(bucket_uri)
    ref = put(store)
    (store.path(ref) / "sub" / "a.txt").write_text("hellO")
    assert store.fetch(ref) == []
    assert (store.path(ref) / "sub" / "a.txt").read_text() == "hello"
    assert store.find("tokenize", FP) == ref


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(tmp_path, bucket_uri):
    store = open_store(bucket_uri)
    ref = put(store)
    store.cache.drop(ref)
    values = store.manifest(ref).model_dump()
    values["files"]["telemetry/../../../../../../../escaped"] = {"size": 1, "sha256": "0" * 64}
    rewrite(store, ref, "manifest.json", __import__("json").dumps(values))
    with pytest.raises(CorruptArtifact):
        store.path(ref)
    assert not list(tmp_path.rglob("escaped"))


UPLOADER = """
from loraflow.store import Summary, bucket
from tests.stored_artifacts import PAYLOAD
bucket.PART_SIZE = 5 * 2**20
store = S3Store(sys.argv[1])
if sys.argv[2] == "first":
    staged = store.staging("tokenize", FP)
    (staged / "large.bin").write_bytes(bytes(range(256)) * 4096 * 40)
    store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})
else:
    print("done", store.resume_commit("tokenize", FP).digest)
"""


def unfinished_uploads(s3_server, bucket_uri) -> list[str]:
    """Return the keys of multipart uploads that were begun and not completed, relative to the store's prefix."""
    prefix = bucket_uri.removeprefix("s3://tests/") + "/"
    found = s3_server.client().list_multipart_uploads(Bucket="tests", Prefix=prefix).get("Uploads", [])
    return [upload["Key"].removeprefix(prefix) for upload in found]


def test_a_killed_upload_resumes_at_the_part_where_it_stopped(tmp_path, s3_server, bucket_uri, proxy):
    arrived, killed = threading.Event(), threading.Event()

    def hang_at_the_fourth_part(request: Request) -> None:
        if request.part == 4:
            arrived.set()
            killed.wait(60)
            raise DropConnection

    proxy.fault = hang_at_the_fourth_part
    first = machine(tmp_path, "one", UPLOADER, bucket_uri, "first")
    assert arrived.wait(60)
    first.kill()
    first.wait()
    killed.set()
    proxy.fault = lambda request: None
    store = open_store(bucket_uri)
    assert store.find("tokenize", FP) is None and len(unfinished_uploads(s3_server, bucket_uri)) == 1
    proxy.requests.clear()
    output = machine(tmp_path, "one", UPLOADER, bucket_uri, "again").communicate(timeout=120)[0].split()
    parts = [request.part for request in proxy.requests if request.part is not None]
    assert min(parts) == 4 and output[0] == "done", "parts 1 to 3 were not sent again"
    ref = store.find("tokenize", FP)
    assert ref.digest == output[-1] and store.verify(ref) == []
    assert unfinished_uploads(s3_server, bucket_uri) == []


def test_an_upload_waits_for_a_store_that_is_unavailable_for_a_moment(s3_server, bucket_uri, proxy, monkeypatch):
    monkeypatch.setattr(bucket, "PART_SIZE", 5 * MIB)
    stopped: list[threading.Thread] = []

    def stop_at_the_second_part(request: Request) -> None:
        if request.part == 2 and not stopped:
            s3_server.stop()
            stopped.append(threading.Thread(target=lambda: (time.sleep(1), s3_server.start())))
            stopped[0].start()

    proxy.fault = stop_at_the_second_part
    store = open_store(bucket_uri)
    ref = big(store, os.urandom(12 * MIB))()
    stopped[0].join()
    assert store.verify(ref) == []


def test_an_unavailable_store_is_a_network_failure_and_the_commit_can_be_resumed(bucket_uri, proxy, monkeypatch):
    def unavailable(request: Request) -> Answer | None:
        raise DropConnection

    monkeypatch.setattr(bucket, "RETRY_SECONDS", 0.0)
    store = open_store(bucket_uri)
    commit = big(store, b"what took hours")
    proxy.fault = unavailable
    with pytest.raises(Network) as caught:
        commit()
    assert caught.value.retryable and "AWS_ENDPOINT_URL_S3" in str(caught.value)
    proxy.fault = lambda request: None
    assert store.resume_commit("tokenize", FP) == store.find("tokenize", FP) is not None


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
def test_requests_to_a_busy_server_are_repeated(bucket_uri, proxy, status, code):
    refused: list[Request] = []

    def busy_once_for_each_key(request: Request) -> Answer | None:
        if request.operation != "PutObject" or request.key in [sent.key for sent in refused]:
            return None
        refused.append(request)
        return Answer(status, code)

    proxy.fault = busy_once_for_each_key
    store = open_store(bucket_uri)
    assert store.verify(put(store)) == [] and len(refused) == 4, "two files, the manifest, the pointer"


@pytest.mark.parametrize(
    ("settings", "uri", "what", "next_step"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "refuses the credentials", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, None, "refuses the credentials", "AWS_PROFILE"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, None, "no credentials", "AWS_PROFILE"),
        ({"AWS_PROFILE": "nobody"}, None, "settings of the S3 client", "aws s3 ls"),
        ({"AWS_ENDPOINT_URL_S3": "no url"}, None, "settings of the S3 client", "aws s3 ls"),
        ({}, "s3://no-such-bucket-of-ours", "bucket does not exist", "aws s3 mb s3://no-such-bucket-of-ours"),
        ({}, "s3://", "names no bucket", ""),
        ({}, "gs://bucket", "kind of store is not supported", "runtime.store"),
    ],
)
def test_wrong_settings_have_one_clear_message(bucket_uri, monkeypatch, settings, uri, what, next_step):
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(BadConfig) as caught:
        open_store(uri or bucket_uri)
    assert what in str(caught.value) and next_step in str(caught.value) and caught.value.exit_code == 2


def test_without_boto3_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtra, match="boto3") as caught:
        open_store("s3://bucket")
    assert "pip install 'loraflow[s3]'" in str(caught.value)


def test_read_only_credentials_can_read_and_a_write_names_the_missing_permission(bucket_uri, monkeypatch):
    ref = put(open_store(bucket_uri))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    store = open_store(bucket_uri)
    with store.reader_lock():
        assert store.find("tokenize", FP) == ref
    with pytest.raises(ReadOnlyStore) as caught:
        put(store, payload=identity.payload("tokenize", 1, {}, {"x": 9}))
    assert "PutObject" in str(caught.value)


def test_cleanup_removes_stale_uploads_and_files_without_a_manifest(s3_server, bucket_uri, monkeypatch):
    store = open_store(bucket_uri)
    ref = put(store)
    s3_server.client().create_multipart_upload(
        Bucket="tests", Key=f"{bucket_uri.removeprefix('s3://tests/')}/tokenize/a/b/large.bin"
    )
    store.bucket.put("tokenize/a/b/small.bin", b"1")
    assert [str(name) for name, _, _ in remove_unused(store, keep=1)] == []
    monkeypatch.setattr("loraflow.registry.cleanup.STALE_SECONDS", -60)
    gone = {str(name) for name, _, why in remove_unused(store, keep=1) if "two weeks" in why}
    assert {"uploads/tokenize/a/b/large.bin", "tokenize/a/b"} <= gone
    assert unfinished_uploads(s3_server, bucket_uri) == [] and not list(store.bucket.listing("tokenize/a/"))
    assert store.find("tokenize", FP) == ref and store.verify(ref) == []


def test_cleanup_stops_while_another_machine_reads_but_not_for_a_dead_reader(tmp_path, bucket_uri):
    script = "with S3Store(sys.argv[1]).reader_lock():\n    print('reads', flush=True)\n    time.sleep(60)"
    reader = machine(tmp_path, "reader", script, bucket_uri)
    reader.stdout.readline()
    with pytest.raises(Failure, match="while a run is using the store"):
        list(remove_unused(open_store(bucket_uri), keep=0))
    reader.kill()
    reader.wait()
    time.sleep(3)
    list(remove_unused(S3Store(bucket_uri, lease_seconds=2), keep=0))


def test_a_lease_is_acquired_although_the_reply_to_its_write_is_lost(bucket_uri, proxy):
    lost: list[Request] = []

    def lose_the_first_reply(request: Request) -> None:
        if request.operation == "PutObject" and not lost:  # the client sends again, and meets its own first write
            lost.append(request)
            raise LoseReply

    proxy.fault = lose_the_first_reply
    store = open_store(bucket_uri)
    with lease(store.bucket, "locks/x.json", wait=False) as acquired:
        assert lost and acquired.etag == store.bucket.get("locks/x.json").etag
        assert proxy.operations().count("PutObject") == 2


def test_a_cache_hit_needs_two_requests_and_its_manifest_none(bucket_uri, proxy):
    ref = put(open_store(bucket_uri))
    store = S3Store(bucket_uri)
    assert store.find("tokenize", FP) == ref
    proxy.requests.clear()
    assert store.find("tokenize", FP) == ref and store.manifest(ref).digest == ref.digest
    assert proxy.operations() == ["GetObject", "ListObjectsV2"], "the pointer, and names, sizes and the manifest's ETag"


def test_a_manifest_that_has_changed_is_read_again(bucket_uri):
    store = open_store(bucket_uri)
    ref = put(store)
    assert store.find("tokenize", FP) == ref
    rewrite(store, ref, "manifest.json", "{}")
    assert store.find("tokenize", FP) is None and store.check(ref) == ["manifest.json: ValidationError"]


def test_cleanup_needs_as_many_requests_for_many_artifacts_as_for_few(bucket_uri, proxy):
    asked, payloads = [], [identity.payload("tokenize", 1, {}, {"x": i}) for i in range(9)]
    store = open_store(bucket_uri)
    for some in (payloads[:2], payloads[2:]):
        for payload in some:
            put(store, payload=payload)
        proxy.requests.clear()
        assert list(remove_unused(store, keep=3)) == []
        asked.append(len(proxy.requests))
    assert asked[0] == asked[1], "a listing has a thousand keys"


def test_entries_of_the_promotion_log_are_downloaded_once(bucket_uri, proxy):
    store = open_store(bucket_uri)
    log, ref = PromotionLog(store, "m"), put(store)
    for number in range(3):
        log.append(log.head(), action="promote", merged=ref, adapter=None, inputs={}, reasons=[str(number)], actor="a")
    again, head = PromotionLog(S3Store(bucket_uri), "m"), log.head()
    proxy.requests.clear()
    assert [entry.reasons for entry in again.entries()] == [["0"], ["1"], ["2"]]
    assert again.head() == head and len(again.active_promotions()) == 1
    assert proxy.operations().count("GetObject") == 4, "three entries and the anchor"
    assert proxy.operations().count("ListObjectsV2") == 9, "anchors, runs and log, three times"


def test_a_bucket_is_opened_once_for_the_same_settings(bucket_uri, monkeypatch, proxy):
    store = open_store(bucket_uri)
    proxy.requests.clear()
    assert open_store(bucket_uri) is store and proxy.requests == []
    monkeypatch.setenv("LORAFLOW_CACHE", "/somewhere/else")
    assert open_store(bucket_uri).scratch != store.scratch


def test_listings_of_several_pages_are_read_to_their_end():
    boto3 = pytest.importorskip("boto3")
    from botocore.stub import Stubber  # SeaweedFS answers 1,105 uploads in one page, so a stub gives the pages

    of_bucket = bucket.Bucket.__new__(bucket.Bucket)
    of_bucket.uri, of_bucket.name, of_bucket.prefix = "s3://b/p", "b", "p/"
    of_bucket.client = boto3.client("s3", region_name="x", aws_access_key_id="x", aws_secret_access_key="x")
    with Stubber(of_bucket.client) as stub:
        object_ = {"Size": 1, "LastModified": datetime(2026, 11, 28), "ETag": "e"}
        first = {"Contents": [{"Key": "p/a", **object_}], "IsTruncated": True, "NextContinuationToken": "t"}
        stub.add_response("list_objects_v2", first, {"Bucket": "b", "Prefix": "p/"})
        second = {"Contents": [{"Key": "p/b", **object_}], "IsTruncated": False}
        stub.add_response("list_objects_v2", second, {"Bucket": "b", "Prefix": "p/", "ContinuationToken": "t"})
        assert [item.key for item in of_bucket.listing()] == ["a", "b"]
        upload = {"Uploads": [{"Key": "p/a", "UploadId": "1"}], "IsTruncated": True}
        stub.add_response("list_multipart_uploads", {**upload, "NextKeyMarker": "k", "NextUploadIdMarker": "u"})
        stub.add_response(
            "list_multipart_uploads", {"Uploads": [{"Key": "p/b", "UploadId": "2"}], "IsTruncated": False}
        )
        assert [item["UploadId"] for item in bucket.unfinished_uploads(of_bucket)] == ["1", "2"]
        stub.add_response("list_parts", {"Parts": [{"PartNumber": 1}], "IsTruncated": True, "NextPartNumberMarker": 1})
        stub.add_response("list_parts", {"Parts": [{"PartNumber": 2}], "IsTruncated": False})
        assert [part["PartNumber"] for part in bucket._uploaded_parts(of_bucket, "a", "1")] == [1, 2]


@pytest.mark.parametrize("store", [LocalStore, S3Store])
def test_a_store_has_each_method_of_the_interface_itself(store):
    names = [name for name, value in vars(Store).items() if callable(value) and not name.startswith("_")]
    assert len(names) > 20
    assert [name for name in names if getattr(store, name).__qualname__.startswith("Store.")] == []
