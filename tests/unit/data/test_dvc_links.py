"""Datasets that DVC links into its cache (`dvc config cache.type`), and links that are refused."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from loraflow.config.data import Data
from loraflow.config.locations import SourcesOrigin
from loraflow.data.files import dataset_files
from loraflow.data.versions import dvc, version
from loraflow.failures import BadData, DirtyData
from loraflow.store.files import HashMemo
from tests.conftest import write_chats
from tests.unit.data.test_dvc import fetch, run_dvc, sh


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A git and DVC repository with a committed dataset, and a single file that is a dataset too."""
    root = tmp_path_factory.mktemp("linked")
    sh("git", "init", "-q", cwd=root)
    sh("git", "config", "user.email", "a@b", cwd=root)
    sh("git", "config", "user.name", "a", cwd=root)
    run_dvc("init", cwd=root)
    run_dvc("remote", "add", "-d", "inside", ".dvc/remote", cwd=root)
    write_chats(root / "data" / "train.jsonl", range(20))
    write_chats(root / "data" / "test" / "y.jsonl", range(500, 505))
    write_chats(root / "one.jsonl", range(3))
    run_dvc("add", "data", "one.jsonl", cwd=root)
    run_dvc("push", cwd=root)
    sh("git", "add", "-A", cwd=root)
    sh("git", "commit", "-qm", "data", cwd=root)
    return root


@pytest.fixture
def root(origin, tmp_path, monkeypatch) -> Path:
    """A copy of it."""
    shutil.copytree(origin, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    dataset_files.cache_folder.cache_clear()
    return tmp_path / "project"


@pytest.fixture
def linked(root) -> Path:
    """A copy whose files are links into the cache."""
    run_dvc("config", "cache.type", "symlink", cwd=root)
    run_dvc("checkout", "--relink", cwd=root)
    assert Path("data/test/y.jsonl").is_symlink() and Path("one.jsonl").is_symlink()
    return root


def check_that_it_works(root: Path, out: Path) -> None:
    pin = dvc.read_pin(".", "data.dvc", None)
    for number, data in enumerate([Data(source="data.dvc"), Data(source="data.dvc", rev="HEAD"), Data(source="data")]):
        assert version.locate(data, HashMemo(None)).md5 == pin.md5
        files = fetch(data, out / str(number))
        assert not any(path.is_symlink() for path in files.rglob("*")), "an artifact has copies, not links"
        assert dvc.dvc_md5(files) == pin.md5
    single = version.locate(Data(source="one.jsonl.dvc"), HashMemo(None))
    assert single.md5 == dvc.read_pin(".", "one.jsonl.dvc", None).md5
    assert not (fetch(Data(source="one.jsonl.dvc"), out / "one") / "one.jsonl").is_symlink()
    dvc.pull("data.dvc")
    with Path("data/new.jsonl").open("w") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(DirtyData):
        version.locate(Data(source="data.dvc"), HashMemo(None))
    added = dvc.add("data", push=False)
    assert added.md5 not in (pin.md5,) and version.locate(Data(source="data.dvc"), HashMemo(None)).md5 == added.md5


def test_a_dataset_of_hard_links_into_dvcs_cache_is_read(root, tmp_path):
    run_dvc("config", "cache.type", "hardlink", cwd=root)
    run_dvc("checkout", "--relink", cwd=root)
    assert Path("data/test/y.jsonl").stat().st_nlink == 2
    check_that_it_works(root, tmp_path)


def test_a_dataset_of_symbolic_links_into_a_shared_cache_is_read(root, tmp_path):
    """The cache is outside of the project. Also if its path has a link in it, as the mount of a shared disk often has."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "mount").symlink_to(tmp_path / "disk")
    shutil.move(root / ".dvc" / "cache", tmp_path / "disk" / "cache")
    run_dvc("cache", "dir", "--local", str(tmp_path / "mount" / "cache"), cwd=root)
    run_dvc("config", "cache.type", "symlink", cwd=root)
    run_dvc("checkout", "--relink", cwd=root)
    assert Path("data/train.jsonl").resolve().is_relative_to(tmp_path / "disk")
    check_that_it_works(root, tmp_path)


def test_a_byte_written_through_a_link_is_named_as_a_changed_object_of_the_cache(linked):
    file = Path("data/train.jsonl")
    file.resolve().chmod(0o644)
    file.write_text(file.read_text().replace("1", "2", 1))
    for data in (Data(source="data.dvc"), Data(source="data")):
        with pytest.raises(BadData, match="cache was changed") as caught:
            version.locate(data, HashMemo(None))
        assert "dvc pull" in str(caught.value) and str(file) in str(caught.value)
    file.resolve().unlink()
    with pytest.raises(BadData, match="does not have the object"):
        version.locate(Data(source="data.dvc"), HashMemo(None))
    dvc.pull("data.dvc")
    assert version.locate(Data(source="data.dvc"), HashMemo(None))


def test_every_other_link_is_refused(linked, tmp_path):
    """Links to files and folders, in and outside of the project, and into the cache but not to an object."""
    outside = tmp_path / "secret.txt"
    outside.write_text("x")
    another = tmp_path / "another" / "files" / "md5" / "ab" / ("c" * 30)
    another.parent.mkdir(parents=True)
    another.write_text("x")
    targets = [
        outside,
        tmp_path / "project" / "data.dvc",
        tmp_path / "project" / "data" / "test",
        tmp_path / "nothing",
        another,
        tmp_path / "project" / ".dvc" / "config",
        tmp_path / "project" / ".dvc" / "cache",
        tmp_path / "project" / ".dvc" / "cache" / "files" / "md5",
        tmp_path / "project" / ".dvc" / "cache" / "files" / "md5" / ".." / ".." / ".." / "config",
        next(Path(".dvc/cache/files/md5").glob("*/*.dir")).absolute(),
    ]
    for target in targets:
        link = Path("data", "link.jsonl")
        link.symlink_to(target)
        for act in (
            lambda: version.locate(Data(source="data.dvc"), HashMemo(None)),
            lambda: version.locate(Data(source="data"), HashMemo(None)),
            lambda: dvc.add("data", push=False),
        ):
            with pytest.raises(BadData, match="only regular files") as caught:
                act()
            assert "link.jsonl -> " in str(caught.value)
        link.unlink()


def test_a_link_in_a_folder_outside_of_dvc_is_refused(tmp_path):
    write_chats(tmp_path / "plain" / "a.jsonl", range(3))
    (tmp_path / "plain" / "b.jsonl").symlink_to(tmp_path / "plain" / "a.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadData, match="only regular files"):
        dvc.work_tree_md5(tmp_path / "plain")
    with pytest.raises(BadData, match="neither a folder nor a regular file"):
        dvc.dvc_md5(tmp_path / "pipe")


def test_what_dvc_imported_from_a_url_is_the_pinned_content_when_the_url_has_other_rows(root, tmp_path):
    """As from a bucket: `dvc import-url` is how a source outside of the repository is pinned."""
    outside = tmp_path / "bucket" / "chats.jsonl"
    write_chats(outside, range(5))
    pinned = outside.read_bytes()
    run_dvc("import-url", str(outside), "imported.jsonl", cwd=root)
    write_chats(outside, range(9))
    data = Data.model_validate({"sources": [{"source": "imported.jsonl.dvc"}]})
    origin = version.locate(data, HashMemo(None)).origin
    assert isinstance(origin, SourcesOrigin)
    assert origin.sources["imported.jsonl"][0].md5 == hashlib.md5(pinned).hexdigest()
    assert (fetch(Data(source="imported.jsonl.dvc"), tmp_path / "out") / "imported.jsonl").read_bytes() == pinned
