"""Version and check a dataset: DVC's pins, uncommitted changes, revisions, remotes; splits, duplicates, leaks, bounds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loraflow.config.recipe import Data
from loraflow.data import check, dvc, version
from loraflow.data.check_report import CheckReport
from loraflow.failures import BadConfig, BadData, DirtyData, LimitExceeded, MissingData
from loraflow.job import Inputs, Job, Progress
from loraflow.store.files import HashMemo
from tests.conftest import chat


def sh(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_dvc(*arguments: str, cwd: Path) -> str:
    return sh(sys.executable, "-m", "dvc", "-q", *arguments, cwd=cwd)


def write_rows(file: Path, numbers) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository with two committed versions of data/, and a DVC remote inside it."""
    repo = tmp_path_factory.mktemp("repo with späce")
    sh("git", "init", "-q", cwd=repo)
    sh("git", "config", "user.email", "a@b", cwd=repo)
    sh("git", "config", "user.name", "a", cwd=repo)
    run_dvc("init", cwd=repo)
    run_dvc("remote", "add", "-d", "inside", ".dvc/remote", cwd=repo)
    for tag, count in (("v1", 20), ("v2", 30)):
        write_rows(repo / "data" / "train.jsonl", range(count))
        write_rows(repo / "data" / "sub" / "more.jsonl", range(500, 505))
        run_dvc("add", "data", cwd=repo)
        run_dvc("push", cwd=repo)
        sh("git", "add", "-A", cwd=repo)
        sh("git", "commit", "-qm", tag, cwd=repo)
        sh("git", "tag", tag, cwd=repo)
    return repo


@pytest.fixture
def clone(repository, tmp_path) -> Path:
    sh("git", "clone", "-q", str(repository), str(tmp_path / "clone"), cwd=tmp_path)
    return tmp_path / "clone"


def fetch(data: Data, out: Path) -> Path:
    out.mkdir(parents=True)
    found = version.locate(data, HashMemo(None))
    runtime = {"origin": found.origin.model_dump()}
    job = Job(stage="version_dataset", version=1, config={"md5": found.md5}, runtime=runtime)
    version.run(job, Inputs({}), out, Progress())
    return out / "files"


def test_the_md5_of_a_folder_equals_dvcs(repository):
    pin = dvc.read_pin(str(repository), "data.dvc", None)
    assert dvc.tree_md5(repository / "data") == pin.md5
    assert pin.is_folder and pin.path == "data"


def test_a_fresh_clone_gets_the_pinned_bytes_offline(clone, repository, tmp_path):
    assert not (clone / "data").exists()
    files = fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")
    assert dvc.tree_md5(files) == dvc.read_pin(str(repository), "data.dvc", None).md5
    assert not (clone / "data").exists(), "the work tree is unchanged"


def test_any_revision_is_read_without_touching_the_work_tree(repository, tmp_path):
    before = dvc.tree_md5(repository / "data")
    files = fetch(Data(source="data.dvc", repo=str(repository), rev="v1"), tmp_path / "out")
    assert len((files / "train.jsonl").read_text().splitlines()) == 20
    assert dvc.tree_md5(repository / "data") == before
    found = version.locate(Data(source="data.dvc", repo=str(repository), rev="v1"), HashMemo(None))
    assert found.origin.commit == sh("git", "rev-parse", "v1", cwd=repository).strip()


def test_one_changed_byte_is_refused_with_the_command_to_run(clone, repository):
    shutil.copytree(repository / "data", clone / "data")
    data = Data(source="data.dvc", repo=str(clone))
    version.locate(data, HashMemo(None))
    file = clone / "data" / "train.jsonl"
    raw = bytearray(file.read_bytes())
    raw[3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DirtyData) as caught:
        version.locate(data, HashMemo(None))
    assert "dvc add data" in str(caught.value) and "dvc checkout" in str(caught.value)


def test_hashes_are_remembered_by_stat_and_a_change_is_seen(tmp_path):
    file = tmp_path / "data" / "a.jsonl"
    write_rows(file, range(3))
    os.utime(file, (1000, 1000))
    memo = HashMemo(tmp_path / "memo.json")
    first = dvc.tree_md5(tmp_path / "data", memo)
    memo.save()
    again = HashMemo(tmp_path / "memo.json")
    assert again.known
    file.write_text(file.read_text().replace("1", "2", 1))
    assert dvc.tree_md5(tmp_path / "data", again) != first


def test_a_remote_without_the_object_is_named(clone, tmp_path):
    shutil.rmtree(clone / ".dvc" / "remote")
    with pytest.raises(MissingData, match="its remote does not have it") as caught:
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")
    assert "dvc push" in str(caught.value)


def test_a_damaged_object_is_never_delivered(clone, tmp_path):
    objects = [p for p in (clone / ".dvc" / "remote").rglob("*") if p.is_file() and not p.name.endswith(".dir")]
    for path in objects:
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"cat", b"dog"))
    with pytest.raises((BadData, MissingData)):
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("outs: []", "no single output"),
        ("outs:\n- md5: abc.dir\n  path: data\n", "DVC 2"),
        ("outs:\n- md5: abc.dir\n  path: ../../etc\n  hash: md5\n", "points out of"),
        (": [", "no single output"),
    ],
)
def test_dvc_files_without_a_usable_pin_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "data.dvc").write_text(text)
    with pytest.raises(BadData, match=message):
        dvc.read_pin(str(tmp_path), "data.dvc", None)


def test_a_revision_that_does_not_exist_is_a_failure(repository):
    with pytest.raises(BadData, match="Git cannot"):
        dvc.read_pin(str(repository), "data.dvc", "no-such-branch")


def test_links_in_a_dataset_are_refused(tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", range(3))
    (tmp_path / "data" / "link.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(BadData, match="regular files"):
        dvc.tree_md5(tmp_path / "data")


# check


def run_check(folder: Path, out: Path, **settings) -> dict:
    out.mkdir()
    (folder.parent / "artifact").mkdir(exist_ok=True)
    shutil.copytree(folder, folder.parent / "artifact" / "files", dirs_exist_ok=True)
    data = Data(**settings)
    config = data.model_dump(include={"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system",
                                      "duplicates", "limit", "heldout_fraction", "seed"})  # fmt: skip
    job = Job(stage="check_dataset", version=1, config=config)
    return check.run(job, Inputs({"dataset": folder.parent / "artifact"}), out, Progress()).report


def ids(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def test_a_row_keeps_its_side_when_others_come_and_go(tmp_path):
    write_rows(tmp_path / "a" / "data" / "chats.jsonl", range(200))
    write_rows(tmp_path / "b" / "data" / "chats.jsonl", range(100, 300))
    for name in "ab":
        run_check(tmp_path / name / "data", tmp_path / name / "out", validation_fraction=0.2)
    sides = [{i: side for side in ("train", "validation", "heldout") for i in ids(tmp_path / name / "out" / f"{side}.jsonl")}
             for name in "ab"]  # fmt: skip
    shared = sides[0].keys() & sides[1].keys()
    assert len(shared) == 100
    assert all(sides[0][i] == sides[1][i] for i in shared)
    assert {"train", "validation", "heldout"} == set(sides[0].values())


def test_rows_with_equal_prompts_are_on_one_side(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{j}"} for i in range(100) for j in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_check(tmp_path / "data", tmp_path / "out", heldout_fraction=0.3)
    prompts = [{json.loads(line)["messages"][0]["content"] for line in (tmp_path / "out" / f"{side}.jsonl").open()}
               for side in ("train", "heldout")]  # fmt: skip
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_duplicates_and_leaks_are_dropped_and_reported(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", [1, 2, 2, 3, 100])
    write_rows(tmp_path / "data" / "heldout.jsonl", [100, 101, 101])
    write_rows(tmp_path / "data" / "hand.jsonl", [101, 102])
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["heldout.jsonl"],
                       extra_heldout={"hand": "hand.jsonl"})  # fmt: skip
    assert report["rows"] == {"train": 3, "validation": 0, "heldout": 4}
    assert report["sets"] == {"heldout": 2, "hand": 2}
    assert report["counts"]["duplicate"] == 2 and report["counts"]["leak"] == 1
    reasons = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "its prompt is held out (heldout.jsonl:1)" in reasons and "same as train.jsonl:2" in reasons


def test_chats_without_a_system_message_get_the_recipes(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", range(20))
    run_check(tmp_path / "data", tmp_path / "out", system="be brief", train=["*"])
    row = json.loads((tmp_path / "out" / "train.jsonl").open().readline())
    assert row["messages"][0] == {"role": "system", "content": "be brief"}


def test_too_many_malformed_rows_stop_the_run_and_are_listed(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", range(50))
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("{nonsense\n")
    report = run_check(tmp_path / "data", tmp_path / "out")
    with pytest.raises(LimitExceeded) as caught:
        check.check_limits(report, 0.01, "report.json")
    assert "train.jsonl:51: column 2" in str(caught.value)
    check.check_limits(report, 0.05, "report.json")


def test_an_empty_side_stops_the_run(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", range(5))
    report = run_check(tmp_path / "data", tmp_path / "out", heldout_fraction=0.0)
    with pytest.raises(BadData, match="No heldout row"):
        check.check_limits(report, 0.01, "report.json")


def test_a_file_that_another_held_out_set_has_already_is_refused(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", range(5))
    write_rows(tmp_path / "data" / "hard.jsonl", range(100, 103))
    with pytest.raises(BadData, match='held-out set "heldout" already belongs to the set "hard"'):
        run_check(tmp_path / "data", tmp_path / "out", heldout=["hard.jsonl"], extra_heldout={"hard": "hard.jsonl"})


def test_the_report_of_no_training_row_has_an_empty_profile(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", range(3))
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["train.jsonl"])
    assert report["profile"] == {} == json.loads((tmp_path / "out" / "report.json").read_text())["profile"]
    assert CheckReport.model_validate(report).profile is None
    with pytest.raises(BadData, match="No train row"):
        check.check_limits(report, 0.01, "report.json")


def test_the_quickstarts_sides_share_no_phrase():
    from examples import tickets

    for train, heldout in (*tickets.REQUESTS.values(), *tickets.URGENCY.values(), tickets.GREETINGS, tickets.CLOSES,
                           tickets.NO_PRODUCT, tickets.ORDER_FORMS):  # fmt: skip
        assert not (set(train) & set(heldout)) - {""}
    assert not set(tickets.PRODUCTS.train) & set(tickets.PRODUCTS.heldout)
    assert len(tickets.REQUESTS) >= 8


def test_the_quickstarts_files_are_the_pinned_ones(tmp_path):
    """The generator is deterministic: a new version of Python or a reordered phrase must not change data.dvc."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "examples/tickets.py", str(tmp_path / "data")], cwd=root, check=True)
    pin = dvc.read_pin(str(root), "data.dvc", None).md5
    listed = json.loads((root / ".dvc" / "remote" / "files" / "md5" / pin[:2] / pin[2:]).read_text())
    pinned = {entry["relpath"]: entry["md5"] for entry in listed}
    made = {file.name: dvc.tree_md5(file) for file in (tmp_path / "data").iterdir()}
    assert made == {name: pinned[name] for name in ("train.jsonl", "heldout.jsonl")}


def test_a_named_remote_is_pushed_to_and_fetched_from(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(clone)
    run_dvc("remote", "add", "second", str(tmp_path / "second"), cwd=clone)
    write_rows(clone / "data" / "train.jsonl", range(44))
    with pytest.raises(BadConfig) as caught:
        dvc.add("data", remote="third")
    assert "one of inside, second" in str(caught.value) and "third" in str(caught.value)
    assert "data.dvc" not in sh("git", "status", "--short", cwd=clone), "nothing was added"
    before = sorted((clone / ".dvc" / "remote").rglob("*"))
    pin = dvc.add("data", remote="second")
    assert sorted((clone / ".dvc" / "remote").rglob("*")) == before, "the default remote is unchanged"
    assert list((tmp_path / "second").rglob("*.dir"))

    shutil.rmtree(clone / "data")
    shutil.rmtree(clone / ".dvc" / "cache")
    with pytest.raises(MissingData):
        fetch(Data(source="data.dvc", repo=str(clone)), tmp_path / "without")
    files = fetch(Data(source="data.dvc", repo=str(clone), remote="second"), tmp_path / "out")
    assert dvc.tree_md5(files) == pin.md5
    shutil.rmtree(clone / ".dvc" / "cache", ignore_errors=True)
    with pytest.raises(BadConfig, match="no such DVC remote"):
        fetch(Data(source="data.dvc", repo=str(clone), remote="third"), tmp_path / "none")
