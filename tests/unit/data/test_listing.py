"""Names from outside: a `.dvc` file and DVC's list of files are checked before anything is written."""

import hashlib
import json
import time
from pathlib import Path

import pytest

from loraflow.config.data import Data
from loraflow.data.checks.compare import read_revision
from loraflow.data.versions import dvc
from loraflow.data.versions.dvc_pin import MAX_FOLDERS, parse_listing, parse_pin
from loraflow.data.versions.dvc_storage import prepare_pull
from loraflow.failures import BadData, MissingData
from loraflow.store.files import HashMemo

CONTENT = b'{"messages": []}\n'
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()

UNSAFE = {
    "parent": ["../../evil.txt"],
    "hidden parent": ["a/../../evil.txt"],
    "absolute": ["/tmp/evil.txt"],
    "backslash": ["..\\..\\evil.txt"],
    "control character": ["a\0b"],
    "line": ["a\nb"],
    "empty": [""],
    "empty part": ["a//b"],
    "dot": ["./a"],
    "git's folder": [".git/hooks/pre-commit"],
    "git's folder on macOS": ["sub/.GIT/config"],
    "git's folder on Windows": [".git. /config"],
    "DVC's folder": [".dvc/config"],
    "ignored files": ["sub/.dvcignore"],
    "duplicate": ["a", "a"],
    "file and folder": ["a/b/c", "a"],
    "deep": ["/".join("d" * (MAX_FOLDERS + 1))],
    "long": ["x" * 256],
    "very long": ["/".join(["y" * 200] * 6)],
    "surrogate": ["\ud800"],
    "URL": ["s3://bucket/key"],
}


def listing(names: list[str]) -> bytes:
    return json.dumps([{"md5": MD5, "relpath": name} for name in names]).encode()


def name_of(raw: bytes) -> str:
    return hashlib.md5(raw, usedforsecurity=False).hexdigest() + ".dir"


def read(raw: bytes) -> list[str]:
    return [file.name for file in parse_listing(raw, name_of(raw), "the cache", "pull again")]


@pytest.mark.parametrize("names", UNSAFE.values(), ids=UNSAFE)
def test_a_list_with_an_unsafe_name_is_refused(names):
    with pytest.raises(BadData, match="must not be written") as caught:
        read(listing(names))
    assert "the cache" in caught.value.where and len(str(caught.value)) < 1000


def test_ordinary_names_pass():
    names = ["a.jsonl", "A.jsonl", "sub/with space/ü–漢.csv", "..a", "a..", 'quote".json', ".hidden", "x" * 255]
    assert read(listing(names)) == names
    assert read(b"[]") == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b'[{"md5": "../../evil", "relpath": "a"}]',
        b'[{"md5": "' + MD5.encode() + b'.dir", "relpath": "a"}]',
        b'[{"md5": 1, "relpath": "a"}]',
        b'[{"md5": "' + MD5.encode() + b'", "relpath": ["a"]}]',
        b'[{"md5": "' + MD5.encode() + b'", "relpath": "\\x"}]',
        listing(["a"])[:-1],
        listing(["a"]) + b"x",
        listing(["a"]) + b"\n",
    ],
)
def test_a_list_that_dvc_did_not_write_is_refused(raw):
    with pytest.raises(BadData, match="malformed"):
        read(raw)


def test_a_list_whose_md5_is_not_its_name_is_refused():
    with pytest.raises(BadData, match="damaged"):
        parse_listing(listing(["b"]), name_of(listing(["a"])), "the cache", "pull again")


def put(store: Path, oid: str, raw: bytes) -> None:
    path = store / "files" / "md5" / oid[:2] / oid[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A DVC repository with a remote, as files only: no process of DVC is started."""
    folder = tmp_path / "outer" / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text(
        f"[core]\n    no_scm = True\n    remote = near\n['remote \"near\"']\n    url = {tmp_path / 'remote'}\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return folder


def pin_listing(folder: Path, names: list[str], *, where: str, oid: str | None = None) -> str:
    """Put a list and its files into the cache or the remote, and write data.dvc. Return the list's md5."""
    raw = listing(names)
    oid = oid or name_of(raw)
    store = folder / ".dvc" / "cache" if where == "cache" else folder.parent.parent / "remote"
    put(store, oid, raw)
    put(store, MD5, CONTENT)
    (folder / "data.dvc").write_text(f"outs:\n- md5: {oid}\n  hash: md5\n  path: data\n")
    return oid


def pull() -> None:
    dvc.pull("data.dvc")


def diff() -> None:
    read_revision(Data(source="data.dvc"))


def run() -> None:
    target = Path("..", "target", "files")
    target.mkdir(parents=True)
    pin = dvc.read_pin(".", "data.dvc", None)
    dvc.fetch(".", pin, None, target, HashMemo(None))


@pytest.mark.parametrize("where", ["cache", "remote"])
@pytest.mark.parametrize("use", [pull, run, diff])
def test_nothing_is_written_outside_by_any_reader_of_a_list(project, where, use, tmp_path):
    pin_listing(project, ["a.jsonl", "../../evil.txt"], where=where)
    with pytest.raises(BadData, match="must not be written"):
        use()
    assert not list(tmp_path.rglob("evil.txt")) and not Path("data").exists()


@pytest.mark.parametrize("where", ["cache", "remote"])
@pytest.mark.parametrize("use", [pull, run])
def test_a_damaged_list_is_refused_with_the_step_that_replaces_it(project, where, use):
    pin_listing(project, ["b.jsonl"], where=where, oid=name_of(listing(["a.jsonl"])))
    with pytest.raises(BadData, match="is damaged") as caught:
        use()
    assert ("rm -f" if where == "cache" else "dvc push") in caught.value.next_step
    assert not Path("data").exists()


def test_a_checked_list_of_the_remote_is_put_into_the_cache_for_dvc(project):
    oid = pin_listing(project, ["a.jsonl", "sub/b.jsonl"], where="remote")
    prepare_pull(".", dvc.read_pin(".", "data.dvc", None), None)
    assert (project / ".dvc" / "cache" / "files" / "md5" / oid[:2] / oid[2:]).read_bytes() == listing(
        ["a.jsonl", "sub/b.jsonl"]
    )


def test_a_good_list_is_pulled_and_read(project):
    pin_listing(project, ["a.jsonl", "sub/b.jsonl"], where="remote")
    run()
    assert Path("..", "target", "files", "sub", "b.jsonl").read_bytes() == CONTENT
    assert not Path("data").exists()
    pull()
    assert Path("data", "sub", "b.jsonl").read_bytes() == CONTENT


def test_a_list_that_is_nowhere_is_named(project):
    pin_listing(project, ["a.jsonl"], where="remote")
    (project / "data.dvc").write_text(f"outs:\n- md5: {'0' * 32}.dir\n  hash: md5\n  path: data\n")
    with pytest.raises(MissingData, match="its remote does not have it"):
        pull()


def test_a_pull_through_a_link_that_leaves_the_project_is_refused(project, tmp_path):
    pin_listing(project, ["a.jsonl"], where="cache")
    (tmp_path / "elsewhere").mkdir()
    Path("data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadData, match="link to a place outside"):
        pull()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_file_that_a_pull_would_refuse_is_not_added(project):
    Path("data").mkdir()
    Path("data", "back\\slash.jsonl").write_bytes(CONTENT)
    with pytest.raises(BadData, match="must not be written"):
        dvc.add("data")
    assert not Path("data.dvc").exists()


OUT = f"outs:\n- md5: {MD5}\n  hash: md5\n  path: "


@pytest.mark.parametrize(
    "text",
    [
        OUT + "../evil",
        OUT + "/evil",
        OUT + "s3://bucket/evil",
        OUT + "file:///evil",
        OUT + ".git",
        OUT + "..\\evil",
        OUT + '"a\\0b"',
        OUT + ".",
        OUT + "data\nwdir: ..\n",
        OUT + "data\nwdir: /tmp\n",
        OUT + "[data]",
        OUT + "data\n- md5: a\n  path: b\n",
        OUT + "data\n  files:\n  - relpath: ../evil\n",
        OUT + "data\n  cloud:\n    near: {etag: a}\n",
        "outs:\n- md5: ../../evil\n  hash: md5\n  path: data\n",
        "outs:\n- md5: !!timestamp x\n  hash: md5\n  path: data\n",
        "outs:\n- md5: 0x_\n  hash: md5\n  path: data\n",
        "outs: &a [*a]",
        "outs: text",
        "- outs",
        "",
        "\0",
    ],
)
def test_a_dvc_file_that_leaves_its_repository_is_refused(text):
    with pytest.raises(BadData) as caught:
        parse_pin(text, "data.dvc", "data.dvc")
    assert len(str(caught.value)) < 1500


def test_a_cloud_versioned_output_is_named():
    with pytest.raises(BadData, match="cloud-versioned"):
        parse_pin("outs:\n- path: data\n  files:\n  - relpath: a\n", "data.dvc", "data.dvc")


def test_deeply_nested_yaml_is_refused_at_once():
    start = time.process_time()
    for text in ("[" * 40_000, "{a: " * 40_000, "- " * 40_000, "x" * 10_000_000):
        with pytest.raises(BadData):
            parse_pin(text, "data.dvc", "data.dvc")
    assert time.process_time() - start < 5


def test_a_dvc_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "data.dvc").write_bytes(b"\xff\xfe\x00outs")
    with pytest.raises(BadData, match="cannot be read"):
        dvc.read_pin(str(tmp_path), "data.dvc", None)
