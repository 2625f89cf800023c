"""Sources on the Hugging Face hub (hf://) and in a bucket (s3://): what pins them, and what happens when they fail."""

import errno
import hashlib
import json
import resource
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from loraflow.base import hub as base_hub
from loraflow.config.load import parse_recipe
from loraflow.config.locations import LOCK
from loraflow.data.versions import remote_files
from loraflow.data.versions.remote_files import fetch_remote
from loraflow.data.versions.version import locate
from loraflow.failures import BadConfig, BadData, DiskFull, Failure, MissingExtra, Network, StorageError
from loraflow.store.files import HashMemo
from tests.unit.data.test_sources import Mixture, recipe

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


def rows(word: str, count: int = 40) -> bytes:
    return "".join(
        json.dumps({"prompt": f"{word} {n}?", "completion": f"answer {n}"}) + "\n" for n in range(count)
    ).encode()


class DatasetHub:
    """The endpoints of the hub that a dataset is read by: its commits, the files of a commit, and their content."""

    def __init__(self):
        self.files = {"README.md": b"# A set\n", "data/train-0.jsonl": rows("a"), "data/train-1.jsonl": rows("b"),
                      "data/old/train-0.jsonl": rows("old"), "faq.jsonl": rows("faq")}  # fmt: skip
        self.large = {"data/train-1.jsonl"}  # stored as git-lfs does
        self.status = 0  # answers everything with this status
        self.page = b""  # answers everything with this text, as a proxy does
        self.without: tuple[str, ...] = ()  # keys that lines of the list lack
        self.cut = 0  # bytes that are missing at the end of each file
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                status, headers, content = hub.answer(path)
                self.send_response(status)
                length = headers.pop("Length", len(content))
                for key, value in {"Content-Length": str(length), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) - hub.cut] if "resolve" in path else content)

            do_HEAD = do_GET

        return Handler

    def answer(self, path):
        missing = {"X-Error-Code": "RepoNotFound"}
        if self.page:
            return 200, {"Content-Type": "text/html"}, self.page
        if self.status:
            return self.status, missing if self.status in (401, 404) else {}, b"{}"
        if "me/set" not in path:
            return 404, missing, b"{}"
        if path.startswith("/api/datasets/me/set/tree/"):
            commit, _, folder = path.removeprefix("/api/datasets/me/set/tree/").partition("/")
            if commit != COMMIT:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            found = [self._line(name) for name in self.files if not folder or name.startswith(folder + "/")]
            return (200, {}, json.dumps(found).encode()) if found else (404, {"X-Error-Code": "EntryNotFound"}, b"{}")
        if path.startswith("/api/datasets/me/set"):
            return 200, {}, json.dumps({"id": "me/set", "sha": COMMIT, "siblings": [], "tags": []}).encode()
        name = path.removeprefix(f"/datasets/me/set/resolve/{COMMIT}/")
        content = self.files.get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        line = self._line(name)
        etag = line["lfs"]["oid"] if "lfs" in line else line["oid"]
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content

    def _line(self, name):
        content = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        line = {"type": "file", "path": name, "size": len(content), "oid": oid}
        if name in self.large:
            line["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {key: value for key, value in line.items() if key not in self.without}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = DatasetHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    close_session()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    close_session()


def at(path: str, commit: str = f"@{COMMIT}") -> dict:
    return {"source": f"hf://datasets/me/set{commit}/{path}".rstrip("/")}


def located(*sources):
    return locate(recipe(*sources).data, HashMemo(None))


@pytest.mark.parametrize(
    ("path", "name", "files"),
    [
        ("faq.jsonl", "faq", ["faq.jsonl"]),
        ("data/train-*.jsonl", "data", ["train-0.jsonl", "train-1.jsonl"]),
        ("data", "data", ["old/train-0.jsonl", "train-0.jsonl", "train-1.jsonl"]),
        ("data/*/*.jsonl", "data", ["old/train-0.jsonl"]),
        ("", "set", ["data/old/train-0.jsonl", "data/train-0.jsonl", "data/train-1.jsonl", "faq.jsonl"]),
    ],
)
def test_files_of_a_commit_are_named_as_local_ones_are_and_have_the_md5_of_their_content(hub, path, name, files):
    parts = located(at(path)).origin.sources
    assert {key: [part.path for part in value] for key, value in parts.items()} == {name: files}
    folder = path if path == "data" else path.rpartition("/")[0].removesuffix("/*")
    for part in parts[name]:
        content = hub.files[f"{folder}/{part.path}".lstrip("/")]
        assert part.md5 == hashlib.md5(content).hexdigest()


def test_a_commit_is_read_once_and_then_neither_list_nor_file_is_asked_for(hub, tmp_path):
    first = located(at("data/train-*.jsonl"))
    asked = len(hub.requests)
    assert located(at("data/train-*.jsonl")) == first
    assert len(hub.requests) == asked  # loraflow.lock
    hub.status = 500
    mixture = Mixture(tmp_path / "out", recipe(at("data/train-*.jsonl")))
    assert len(mixture.places("train")) + len(mixture.places("heldout")) == 80
    assert mixture.places("train")[0].startswith("data/train-")


def test_rows_of_the_hub_have_the_identity_of_the_same_local_files(hub, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / "data" / name).write_bytes(hub.files[f"data/{name}"])
    assert located(at("data/train-*.jsonl")).md5 == located({"source": "data/train-*.jsonl"}).md5


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_branch_is_refused_with_the_commit_to_write(hub, revision):
    with pytest.raises(BadData, match=f"write hf://datasets/me/set@{COMMIT}/faq.jsonl"):
        located(at("faq.jsonl", revision))
    assert not LOCK.exists()


@pytest.mark.parametrize(
    ("source", "status", "kind", "problem"),
    [
        (at("faq.csv"), 0, BadData, "No file of the dataset has this name"),
        (at("nothing/faq.jsonl"), 0, BadData, "no such file"),
        (at("faq.jsonl", f"@{OTHER}"), 0, BadData, "no such commit of 40 digits, 0-9 and a-f"),
        ({"source": f"hf://datasets/me/other@{COMMIT}/a.jsonl"}, 0, BadData, "set HF_TOKEN"),
        (at("faq.jsonl"), 401, BadData, "set HF_TOKEN"),
        (at("faq.jsonl"), 403, BadData, "set HF_TOKEN"),
        (at("faq.jsonl"), 500, Network, "check the network"),
    ],
)
def test_what_the_hub_does_not_give_is_named_with_the_next_step(hub, source, status, kind, problem, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's waiting between attempts
    hub.status = status
    with pytest.raises(kind) as caught:
        located(source)
    assert problem in str(caught.value)
    assert source["source"].split("@")[0] in str(caught.value)


def test_without_a_network_a_dataset_that_was_never_read_is_refused_as_unreachable(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(Network, match="check the network"):
        located(at("faq.jsonl"))


def test_a_file_that_is_cut_off_is_not_taken(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut = 7
    with pytest.raises(Network):
        located(at("faq.jsonl"))
    assert not LOCK.exists()
    hub.cut = 0
    assert located(at("faq.jsonl")).origin.sources["faq"][0].md5 == hashlib.md5(hub.files["faq.jsonl"]).hexdigest()


@pytest.mark.parametrize("name", ["data/train-0.jsonl", "data/train-1.jsonl"])
def test_a_file_that_was_changed_in_the_hubs_cache_is_refused(hub, name):
    located(at(name))
    remote_files._download(at(name)["source"]).write_bytes(rows("other"))
    LOCK.unlink()
    with pytest.raises(BadData, match="damaged in the hub's cache"):
        located(at(name))


def test_content_that_differs_from_the_lock_file_is_refused_with_the_one_that_is_wrong(hub, tmp_path):
    url = at("faq.jsonl")["source"]
    with pytest.raises(BadData, match=r"differs from the md5 in loraflow\.lock(.|\n)*restore loraflow\.lock"):
        fetch_remote(url, "0" * 32, tmp_path / "faq.jsonl")
    remote_files._download(url).write_bytes(rows("other"))
    with pytest.raises(BadData, match=r"damaged in the hub's cache(.|\n)*remove it"):
        fetch_remote(url, hashlib.md5(hub.files["faq.jsonl"]).hexdigest(), tmp_path / "faq.jsonl")


def test_an_empty_entry_of_the_lock_file_is_no_entry(hub):
    LOCK.write_text(json.dumps({at("faq.jsonl")["source"]: {}}))
    assert [part.path for part in located(at("faq.jsonl")).origin.sources["faq"]] == ["faq.jsonl"]


def test_the_lock_file_is_read_again_after_the_hub_has_answered(hub, monkeypatch):
    """A process that asks for another model at the same time has written meanwhile."""

    def answer(*_, **__):
        LOCK.write_text(json.dumps({"b@main": OTHER}))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    assert base_hub.commit_of("a", "main") == COMMIT
    assert json.loads(LOCK.read_text()) == {"a@main": COMMIT, "b@main": OTHER}


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, "The disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull, "quota"),
        (OSError(errno.EIO, "Input/output error"), StorageError, "input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/blobs/x"), Failure, "correct its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/cache/blobs/x"), Failure, "/cache/blobs/x"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Network, "check the network"),
    ],
)
def test_a_disk_that_fails_while_a_file_is_downloaded_is_no_failure_of_the_network(
    hub, monkeypatch, cause, kind, message
):
    def fails(*arguments, **options):
        raise cause

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    for read in (
        lambda: remote_files._download(at("faq.jsonl")["source"]),
        lambda: base_hub.download_config("me/model", COMMIT),
        lambda: base_hub.download("me/model", COMMIT, trust=False),
    ):
        with pytest.raises(Failure) as caught:
            read()
        assert type(caught.value) is kind
        assert message in str(caught.value)
        assert "runtime.store" not in str(caught.value) or kind is DiskFull


def test_a_limit_of_the_size_of_files_is_named(hub, monkeypatch):
    """The kernel's own error, which has no file's name."""
    hub.files["faq.jsonl"] = rows("x", 4000)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
        with pytest.raises(DiskFull, match="larger than a limit"):
            located(at("faq.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_answers_that_are_not_those_of_a_hub_are_named(hub):
    hub.without = ("size",)
    with pytest.raises(BadConfig, match="HF_ENDPOINT did not answer as the hub does"):
        located(at("faq.jsonl"))
    hub.page = b"<html>Please log in to the network.</html>"
    for source in (at("faq.jsonl"), at("faq.jsonl", "@main")):
        with pytest.raises(BadConfig, match="HF_ENDPOINT did not answer as the hub does"):
            located(source)
    with pytest.raises(Network, match="did not return the commit"):
        base_hub.commit_of("me/model", "main")
    with pytest.raises(Network, match="could not be downloaded"):
        base_hub.download("me/model", COMMIT, trust=False)


def test_a_secret_is_masked_before_a_message_is_cut(hub, monkeypatch):
    """The first characters of a secret are not found by its name any more."""
    monkeypatch.setenv("MY_API_KEY", "geheim" * 30)

    def fails(*arguments, **options):
        raise RuntimeError("x" * 250 + "geheim" * 30)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    for read in (
        lambda: remote_files._download(at("faq.jsonl")["source"]),
        lambda: base_hub.download_config("a", COMMIT),
    ):
        with pytest.raises(Network) as caught:
            read()
        assert "x" * 250 in str(caught.value)
        assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("name", ["data/../../train.jsonl", "data/.git/train.jsonl"])
def test_names_that_leave_their_folder_are_refused_in_a_listing_and_in_the_lock_file(hub, name):
    hub.files[name] = rows("x")
    if ".." not in name:  # which the recipe refuses, and a folder does not read
        with pytest.raises(BadData, match="must not be written"):
            located(at(name))
    LOCK.write_text(json.dumps({at("data")["source"]: {name: "0" * 32}}))
    with pytest.raises(BadData, match="must not be written"):
        located(at("data"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"source": "hf://me/set/faq.jsonl"}, "should be hf://datasets/OWNER/NAME@COMMIT/PATH"),
        ({"source": "s3://bucket"}, "should be s3://BUCKET/KEY"),
        ({"source": "s3://key:word@bucket/a.jsonl"}, "s3://***@bucket/a.jsonl"),
        ({"source": "faq", "md5": "0" * 32}, "md5: only an object of s3:// is pinned by it"),
        ({"source": "s3://bucket/a.jsonl", "md5": "0" * 31}, "md5"),
        (at("data/**/*.jsonl"), "a folder is read with its subfolders, without **"),
        *(
            (at(path), "should be hf://datasets/OWNER/NAME@COMMIT/PATH")
            for path in ("../a", "a/../b", "a/..", "a//b", "a/./b", ".")
        ),
        ({"source": f"hf://datasets/a--b/c@{COMMIT}/a.jsonl"}, "Cannot have -- or .. in repo_id"),
        ({"source": f"hf://datasets/me/set.git@{COMMIT}/a.jsonl"}, "cannot end by '.git'"),
        ({"source": f"hf://datasets/../set@{COMMIT}/a.jsonl"}, "cannot start or end with"),
        ({"source": "s3://bucket/chats/*.jsonl"}, "s3://BUCKET/KEY, not a pattern"),
        ({"source": "s3://bucket/chats/.."}, "should be s3://BUCKET/KEY"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_before_anything_runs(source, problem):
    text = json.dumps({"name": "r", "base": {"model": "m"}, "data": {"sources": [source]}})
    with pytest.raises(BadConfig) as caught:
        parse_recipe(text, name="r.yaml")
    assert problem in str(caught.value)


def test_sources_of_two_files_with_an_at_sign_have_two_names_and_other_buckets_are_read():
    sources = recipe(at("faq@de.jsonl"), at("faq@en.jsonl"), {"source": "s3://My_Bucket//x/../a"}).data.sources
    assert [source.key for source in sources] == ["faq-de", "faq-en", "a"]


def test_a_converted_branch_is_refused_with_the_commit_to_write(hub):
    with pytest.raises(BadData, match=f"write hf://datasets/me/set@{COMMIT}/default/train"):
        located(at("default/train", "@refs/convert/parquet"))
    assert hub.requests == ["GET /api/datasets/me/set/revision/refs/convert/parquet"]


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s3_server.client().put_object(Bucket="tests", Key="sets/chats 1.jsonl", Body=rows("s"))
    return s3_server


URL, MD5 = "s3://tests/sets/chats 1.jsonl", hashlib.md5(rows("s")).hexdigest()


def test_an_object_is_read_by_its_md5_and_refused_without_it_with_the_md5_to_write(bucket, tmp_path):
    with pytest.raises(BadData, match=f"write md5: {MD5}"):
        located({"source": URL})
    mixture = Mixture(tmp_path / "out", recipe({"source": URL, "md5": MD5, "name": "s"}))
    assert len(mixture.places("train")) + len(mixture.places("heldout")) == 40
    (tmp_path / "chats 1.jsonl").write_bytes(rows("s"))
    assert located({"source": URL, "md5": MD5, "name": "s"}).md5 == located({"source": "*.jsonl", "name": "s"}).md5


def test_an_object_that_was_replaced_is_refused(bucket, tmp_path):
    bucket.client().put_object(Bucket="tests", Key="sets/chats 1.jsonl", Body=rows("t"))
    with pytest.raises(BadData, match=r"differs from the md5 in the recipe(.|\n)*write md5: "):
        Mixture(tmp_path / "out", recipe({"source": URL, "md5": MD5}))


@pytest.mark.parametrize(
    ("url", "settings", "kind", "problem"),
    [
        ("s3://tests/sets/none.jsonl", {}, BadData, "There is no such object"),
        ("s3://no-bucket-of-this-name/a.jsonl", {}, BadData, "There is no such object"),
        (URL, {"AWS_ACCESS_KEY_ID": "nobody"}, BadConfig, "AWS_PROFILE"),
        (URL, {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, Network, "check the network"),
    ],
)
def test_an_object_that_cannot_be_read_is_named(bucket, tmp_path, monkeypatch, url, settings, kind, problem):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's waiting between attempts
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind) as caught:
        fetch_remote(url, MD5, tmp_path / "a.jsonl")
    assert problem in str(caught.value)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("code", "status", "kind", "problem"),
    [
        ("AccessDenied", 403, BadConfig, "do not give access"),
        ("ExpiredToken", 400, BadConfig, "do not give access"),
        ("SlowDown", 503, Network, "check the network, then run again\n"),
        ("InvalidObjectState", 403, Failure, "The bucket refused the request"),
        ("PermanentRedirect", 301, Failure, "The bucket refused the request"),
    ],
)
def test_what_a_bucket_refuses_is_not_always_a_matter_of_credentials(
    tmp_path, monkeypatch, code, status, kind, problem
):
    errors = pytest.importorskip("botocore.exceptions")

    class Client:
        def get_object(self, **of):
            answer = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise errors.ClientError(answer, "GetObject")

    monkeypatch.setattr("loraflow.store.s3_client.make_client", Client)
    with pytest.raises(kind) as caught:
        fetch_remote("s3://b/a.jsonl", MD5, tmp_path / "a.jsonl")
    assert problem in f"{caught.value}\n"
    assert code in str(caught.value)


def test_without_boto3_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtra, match=r"source in a bucket(.|\n)*pip install 'loraflow\[s3\]'"):
        fetch_remote(URL, MD5, tmp_path / "a.jsonl")


def test_an_object_that_is_cut_off_is_not_taken(tmp_path, monkeypatch):
    pytest.importorskip("boto3")

    class CutOff(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 100)

    server = ThreadingHTTPServer(("127.0.0.1", 0), CutOff)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(Network, match="check the network"):
        fetch_remote(URL, MD5, tmp_path / "a.jsonl")
    server.shutdown()
    server.server_close()
