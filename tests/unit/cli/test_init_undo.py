"""`loraflow init` leaves what was in the folder before: it refuses places that are taken, and undoes what it wrote."""

import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow.cli.init import init
from loraflow.cli.undo import undone_on_failure
from loraflow.data.versions import dvc
from loraflow.failures import BadConfig
from tests.unit.data.test_dvc import run_dvc, sh

FILES = (".gitignore", "README.md", "prefect.yaml", "data", "datasets/rows")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a file of rows, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 30)
    return tmp_path


def call_init():
    return CliRunner().invoke(init, ["--data", "rows.jsonl", "--base", "bundled:smollm2"])


def everything(folder: Path) -> dict[str, object]:
    """Return each path below a folder with its link's target, its content, or None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.readlink()
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def quick_dvc(monkeypatch):
    """Let `init` call the real DVC in this process."""
    monkeypatch.setattr(dvc, "run_dvc", lambda arguments: run_dvc(*arguments, cwd=Path.cwd()))


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


class Stopped(Exception):
    pass


def test_links_whose_target_is_not_mounted_stay(folder):
    paths = [Path(name) for name in FILES]
    Path("datasets").mkdir()
    for path in paths:
        path.symlink_to("/not-mounted/anything")
    before = everything(folder)
    with pytest.raises(Stopped), undone_on_failure(paths):
        Path("prefect.yaml").unlink()
        Path("prefect.yaml").write_text("written")  # what a command that replaces files does
        raise Stopped
    assert everything(folder) == before


def test_init_with_a_data_link_that_is_not_mounted_uses_another_folder(folder, monkeypatch):
    Path("data").symlink_to("/not-mounted/data")
    before = everything(folder)
    monkeypatch.setattr("loraflow.data.versions.dvc.add", disk_full)
    copied = []
    monkeypatch.setattr("loraflow.cli.init.shutil.copyfile", lambda _, copy: copied.append(copy))
    assert call_init().exception.errno == 28
    assert copied == [Path("datasets/rows/rows.jsonl")] and everything(folder) == before


@pytest.mark.parametrize("name", [".gitignore", ".dvcignore", "prefect.yaml", "configs/rows.yaml", "data.dvc"])
def test_init_refuses_a_link_without_a_target_before_it_writes(folder, name):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).symlink_to("/not-mounted/file")
    if name == "data.dvc":  # so the data goes to datasets/rows
        Path("datasets").mkdir()
        Path("datasets/rows.dvc").symlink_to("/not-mounted/file")
    before = everything(folder)
    done = call_init()
    assert isinstance(done.exception, BadConfig), done.exception
    assert Path(name).name in str(done.exception) or "datasets/rows.dvc exists already" in str(done.exception)
    assert everything(folder) == before


def test_init_does_not_overwrite_the_pin_of_a_dataset_that_is_not_pulled(folder):
    Path("data").mkdir()
    Path("datasets").mkdir()
    Path("datasets/rows.dvc").write_text("outs:\n- md5: of another dataset\n")
    before = everything(folder)
    done = call_init()
    assert isinstance(done.exception, BadConfig) and "datasets/rows.dvc exists already" in str(done.exception)
    assert everything(folder) == before


@pytest.mark.parametrize("broken", ["write_atomic", "remove"])
def test_a_step_of_the_undo_that_fails_hides_neither_the_error_nor_the_other_steps(folder, monkeypatch, caplog, broken):
    Path("first").write_text("mine")
    Path("first").chmod(0o640)

    def fail(path, *_):
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(Stopped), undone_on_failure([Path("first"), Path("new"), Path("deep/er/new")]):
        Path("first").write_text("mine\nand more")
        Path("new").write_text("new")
        Path("deep/er/new").mkdir(parents=True)
        monkeypatch.setattr(f"loraflow.cli.undo.{broken}", fail)
        raise Stopped
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if broken == "write_atomic":
        assert Path("first").read_text() == "mine\nand more", "not truncated"
        assert not Path("new").exists() and not Path("deep").exists()
        assert len(messages) == 1 and "first" in messages[0] and "No space left" in messages[0]
    else:
        assert Path("first").read_text() == "mine" and Path("first").stat().st_mode & 0o777 == 0o640
        assert len(messages) == 2 and "new could not be restored" in messages[0]


FAILS = {
    "copy": "loraflow.cli.init.shutil.copyfile",
    "after dvc add": "loraflow.data.versions.dvc.read_pin",
    "readme": "loraflow.cli.init.write_readme",
    "push": "loraflow.data.versions.dvc.push_pin",
}


@pytest.mark.parametrize("fails", FAILS)
@pytest.mark.parametrize("in_git", [True, False])
def test_an_init_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch, quick_dvc, fails, in_git):
    """With the real DVC: no copy of the data in its cache, no trace in git's index."""
    Path(".gitignore").write_text("mine\n")
    if in_git:
        sh("git", "init", "-q", cwd=folder)
        sh("git", "add", ".gitignore", cwd=folder)
        Path(".gitignore").write_text("mine\nnot staged yet\n")
        index = sh("git", "ls-files", "--stage", cwd=folder)
    before = everything(folder)
    with monkeypatch.context() as patch:
        patch.setattr(FAILS[fails], disk_full)
        assert call_init().exception.errno == 28
    after = everything(folder)
    assert {path: content for path, content in after.items() if not path.startswith(".git/")} == {
        path: content for path, content in before.items() if not path.startswith(".git/")
    }
    if in_git:
        assert sh("git", "ls-files", "--stage", cwd=folder) == index
    if fails == "readme":
        done = call_init()
        assert done.exception is None and Path("data.dvc").exists() and Path(".dvc/cache").is_dir(), done.output


def test_an_init_that_fails_leaves_the_objects_that_the_cache_had(folder, monkeypatch, quick_dvc):
    """In a repository of DVC whose cache is shared with others."""
    sh("git", "init", "-q", cwd=folder)
    run_dvc("init", cwd=folder)
    run_dvc("cache", "dir", str(folder / "shared cache"), cwd=folder)
    Path("files").mkdir()
    Path("files/new.jsonl").write_text('{"prompt": "new", "completion": "a"}\n' * 30)
    Path("files/known.jsonl").write_text('{"prompt": "known", "completion": "a"}\n' * 30)
    run_dvc("add", "files/known.jsonl", cwd=folder)

    def kept() -> dict[str, object]:
        found = everything(folder)
        return {path: found[path] for path in found if not path.startswith((".git/", ".dvc/tmp"))}

    before, index = kept(), sh("git", "ls-files", "--stage", cwd=folder)
    assert len([path for path, content in before.items() if path.startswith("shared") and content]) == 1
    in_cache = []

    def fail(*_):
        in_cache.extend(path for path, content in kept().items() if path.startswith("shared") and content)
        disk_full()

    monkeypatch.setattr(FAILS["readme"], fail)
    done = CliRunner().invoke(init, ["--data", "files", "--base", "bundled:smollm2"])
    assert done.exception.errno == 28, done.output
    assert len(in_cache) == 3, "the known file, the new one, and the list of both"
    assert kept() == before and sh("git", "ls-files", "--stage", cwd=folder) == index


IN_GIT = {  # the url of the default remote, of config.local, the line of .gitignore; whether it is pushed
    "inside": (".dvc/remote", None, "", False),
    "ignored": (".dvc/remote", None, "/.dvc/remote", True),
    "ignored as a folder": ("storage", None, "/storage/", True),
    "ignored by its files": ("storage", None, "/storage/*", True),
    "in git's own folder": (".git/storage", None, "", True),
    "a url": ("file://{top}/storage", None, "", False),
    "another in config.local": (".dvc/remote", "{top}-there", "", True),
    "inside by config.local": ("{top}-there", "file://{top}/storage", "", False),
    "outside": ("{top}-there", None, "", True),
}


@pytest.mark.parametrize(("url", "local", "ignored", "pushed"), IN_GIT.values(), ids=IN_GIT)
def test_ones_chats_are_not_pushed_into_the_git_repository(folder, quick_dvc, caplog, url, local, ignored, pushed):
    """As in a clone of loraflow, whose remote is a folder of the repository."""
    sh("git", "init", "-q", cwd=folder)
    run_dvc("init", cwd=folder)
    run_dvc("remote", "add", "-d", "inside", url.format(top=folder), cwd=folder)
    if local:
        run_dvc("remote", "modify", "--local", "inside", "url", local.format(top=folder), cwd=folder)
    Path(".gitignore").write_text(ignored + "\n")
    done = call_init()
    assert done.exception is None, done.output
    places = (folder, Path(f"{folder}-there"))
    found = [path for place in places for path in place.rglob("files/md5/*/*.dir") if "cache" not in path.parts]
    assert bool(found) == pushed and ("not pushed" in caplog.text) != pushed
    sh("git", "add", "-A", cwd=folder)
    assert "md5/" not in sh("git", "ls-files", cwd=folder)


@pytest.mark.parametrize("remote", [None, "inside"])
def test_a_remote_that_is_named_is_pushed_to(folder, quick_dvc, caplog, remote):
    sh("git", "init", "-q", cwd=folder)
    run_dvc("init", cwd=folder)
    run_dvc("remote", "add", "-d", "inside", "storage", cwd=folder)
    Path("data").mkdir()
    Path("data/a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    dvc.add("data", remote=remote)
    assert bool(list(folder.glob("storage/files/md5/*/*.dir"))) == bool(remote)
    assert (f"DVC remote {folder}/storage is in this repository" in caplog.text) == (not remote)
