"""DVC's id of a folder, for folders that have files of git and DVC, ignored files, or links into DVC's cache.

DVC itself computes the expected md5.
"""

import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc_data.hashfile.build import IgnoreInCollectedDirError, build

from loraflow.config.data import Data
from loraflow.data.versions import dvc, version
from loraflow.failures import BadData
from loraflow.store.files import HashMemo
from tests.unit.data.test_dvc import fetch, run_dvc


def md5_by_dvc(root: Path, folder: str) -> str:
    """Return what `dvc add` would write, without writing it."""
    with Repo(str(root)) as repo:
        _, _, tree = build(
            repo.cache.local, str(root / folder), repo.cache.local.fs, "md5", ignore=repo.dvcignore, dry_run=True
        )
        return str(tree.hash_info.value)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    Repo.init(str(tmp_path), no_scm=True).close()
    (tmp_path / ".dvcignore").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHATS = {f"data/{name}": name for name in ("a.jsonl", "b.bak", "keep.bak", "sub/c.jsonl", "sub/tmp/d.jsonl", "x.log")}
LAYOUTS = {
    "plain": {},
    "gitignore": {"data/.gitignore": "*.log\n"},
    "gitignore below": {"data/sub/.gitignore": "/tmp\n", "data/my.gitignore": "", "data/.GITIGNORE": ""},
    "only gitignore": {"data/sub2/.gitignore": "*"},
    "git's files": {
        "data/.git/config": "x",
        "data/.git/hooks/a": "x",
        "data/sub/.git": "gitdir: ../x",
        "data/.github/x": "x",
    },
    "files of others": {"data/.hg/x": "x", "data/.svn/x": "x", "data/.gitmodules": "x", "data/.gitattributes": "x"},
    "DVC inside": {"data/sub/.dvc/config": "", "data/sub/.dvcignore": "nothing"},
    "DVC's folder as a file": {"data/sub/tmp/.dvc": "x"},
    "patterns": {".dvcignore": "# comment\n\n*.bak\n!keep.bak\n  x.log  \n"},
    "folders": {".dvcignore": "tmp/\n"},
    "a folder by its path": {".dvcignore": "/data/sub/\n"},
    "what is below a folder": {".dvcignore": "data/sub/**\n!data/sub/c.jsonl\n"},
    "taken back below an ignored folder": {".dvcignore": "sub\n!d.jsonl\n"},
    "a later line decides": {".dvcignore": "!keep.bak\n*.bak\n"},
    "folder pattern and a file of that name": {".dvcignore": "a.jsonl/\n**/c.jsonl\n"},
    "escaped": {".dvcignore": "\\#odd\n\\!odd\n", "data/#odd": "x", "data/!odd": "x"},
    "everything taken back": {".dvcignore": "*.jsonl\n!*.jsonl\n"},
    "ranges": {".dvcignore": "[ab].*\nx.lo?\n"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_md5_of_a_folder_is_dvcs_whatever_is_ignored(root, layout):
    write(root, CHATS | layout)
    assert dvc.work_tree_md5(Path("data")) == md5_by_dvc(root, "data")


def test_ignore_files_of_several_folders_count_in_the_order_of_dvc(root):
    """The nearer file decides, an ignored file is not read, and a folder that is ignored above is not taken back below."""
    files = {f"team/set/{name.removeprefix('data/')}": text for name, text in CHATS.items()}
    write(root, files | {".dvcignore": "*.bak\n*.log\n", "team/.dvcignore": "!set/keep.bak\n/set/sub/tmp\n!x.log\n"})
    assert dvc.work_tree_md5(Path("team/set")) == md5_by_dvc(root, "team/set")
    write(root, {".dvcignore": "team/.dvcignore\n"})
    assert dvc.work_tree_md5(Path("team/set")) == md5_by_dvc(root, "team/set")
    write(root, {".dvcignore": ".dvcignore\n", "team/set/sub/.dvcignore": "c.jsonl"})
    assert dvc.work_tree_md5(Path("team/set")) == md5_by_dvc(root, "team/set")


def test_a_dataset_in_a_repository_inside_of_another_follows_the_inner_one(root):
    Repo.init(str(root), no_scm=True, force=True).close()
    (root / "inner").mkdir()
    Repo.init(str(root / "inner"), no_scm=True).close()
    write(root / "inner", CHATS)
    write(root, {".dvcignore": "*.bak\n"})
    assert dvc.work_tree_md5(Path("inner/data")) == md5_by_dvc(root / "inner", "data")


def test_an_ignore_file_inside_of_a_dataset_is_refused_as_dvc_does(root):
    write(root, CHATS | {"data/sub/.dvcignore": "c.jsonl\n"})
    with pytest.raises(IgnoreInCollectedDirError):
        md5_by_dvc(root, "data")
    with pytest.raises(BadData, match=r"\.dvcignore"):
        dvc.work_tree_md5(Path("data"))


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"!\n"], ids=["no UTF-8", "no pattern"])
def test_an_ignore_file_that_cannot_be_read_is_named(root, raw):
    write(root, CHATS)
    (root / ".dvcignore").write_bytes(raw)
    with pytest.raises(BadData, match=r"(?s)cannot be read.*\.dvcignore"):
        dvc.work_tree_md5(Path("data"))


def test_a_dataset_with_gitignore_files_is_added_run_and_pulled(root):
    write(root, CHATS | {"data/.gitignore": "*.log\n", "data/sub/old.gitignore": ""})
    run_dvc("remote", "add", "-d", "inside", "remote", cwd=root)
    pin = dvc.add("data")
    assert version.locate(Data(source="data.dvc"), HashMemo(None)).md5 == pin.md5
    files = fetch(Data(source="data.dvc"), root / "from the work tree")
    assert (files / ".gitignore").read_text() == "*.log\n"
    shutil.rmtree(root / "data")
    assert dvc.dvc_md5(fetch(Data(source="data.dvc"), root / "from the cache")) == pin.md5
    dvc.pull("data.dvc")
    assert (root / "data" / "sub" / "old.gitignore").exists()
