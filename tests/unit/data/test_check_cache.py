"""check_dataset reads segments of rows that are new; its result never depends on the cache, nor on the processes that read."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from loraflow.config.recipe import Recipe
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.checks import check, near, segment_process, segment_reader
from loraflow.failures import BadData, Crashed, Killed
from loraflow.job import Inputs, Job, Progress
from loraflow.store.chunk_cache import ChunkCache
from tests.job_factory import Outside

WORDS = [f"{letter}{number}" for letter in "abcdefgh" for number in range(60)]
SETTINGS = {"near_duplicates": "drop", "validation_fraction": 0.1, "heldout_fraction": 0.1, "train": ["*"]}


def rows(count: int, seed: int = 0) -> list[str]:
    """Chats, near copies of some, and lines that are no chat."""
    rng = random.Random(seed)
    found: list[str] = []
    for number in range(count):
        question = " ".join(rng.choices(WORDS, k=12))
        if number % 40 == 7:
            question = json.loads(found[number - 5])["messages"][0]["content"] + " again"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": rng.choice(WORDS)}]
        found.append({50: "{bad\n", 51: "\n"}.get(number % 100, json.dumps({"messages": chat}) + "\n"))
    return found


class Folder:
    """A dataset, and a store that its checks share."""

    def __init__(self, folder: Path):
        self.files, self.outs = folder / "d/files", folder / "outs"
        self.cache = folder / "store/cache/check_dataset"
        self.work = folder / "store/work/check_dataset/one"

    def write(self, name: str, lines: list[str]) -> None:
        file = self.files / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines))

    def check(self, settings: dict, *, cached: bool = True) -> tuple[dict[str, bytes], int]:
        """Return all that the stage gives, and how many rows it read."""
        recipe = Recipe.model_validate({"name": "x", "base": {"model": "b"}, "data": settings})
        job = Job(stage="check_dataset", version=1, config=CheckDatasetConfig.from_recipe(recipe, Outside()))
        readers = []
        out = self.outs / str(len([*self.outs.glob("*")]))
        out.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                check, "SegmentReader", lambda *args: readers.append(segment_reader.SegmentReader(*args)) or readers[0]
            )
            summary = check.run(
                job, Inputs({"dataset": self.files.parent}), out, Progress(None, self.work if cached else None)
            )
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        return found | {"summary": json.dumps([summary.report, summary.figures]).encode()}, readers[0].computed

    def check_both(self, settings: dict) -> int:
        """Compare the result with that of a check without a cache; return how many rows were read with it."""
        found, read = self.check(settings)
        assert found == self.check(settings, cached=False)[0]
        return read


def test_rows_that_are_added_anywhere_are_read_alone(tmp_path):
    folder, before, more = Folder(tmp_path), rows(4000), rows(40, seed=1)
    folder.write("train.jsonl", before)
    assert folder.check_both(SETTINGS) == 4000 and folder.check_both(SETTINGS) == 0
    for lines in ([*before, *more], [*more, *before], [*before[:2000], *more, *before[2000:]]):
        folder.write("train.jsonl", lines)
        assert 0 < folder.check_both(SETTINGS) <= 40 + 2 * 1024
    folder.write("train.jsonl", before)
    folder.write("new.jsonl", more)
    assert folder.check_both(SETTINGS) <= 40, "the rows of a new file, which some segments had before"


def test_of_many_rows_3_percent_are_read_again_at_most(tmp_path):
    folder, before = Folder(tmp_path), rows(20_000)
    settings = SETTINGS | {"near_duplicates": "off"}
    folder.write("train.jsonl", before)
    assert folder.check(settings)[1] == 20_000
    for lines in ([*before, *rows(200, seed=1)], [*rows(200, seed=2), *before]):
        folder.write("train.jsonl", lines)
        assert folder.check(settings)[1] <= 0.03 * 20_000 + 256


def test_after_any_edit_the_result_is_that_without_a_cache(tmp_path):
    rng, folder, lines = random.Random(3), Folder(tmp_path), rows(700)
    more = iter(rows(400, seed=4))
    for edit in ("append", "insert", "delete", "reorder", "change", "append", "reorder"):
        at, count = rng.randrange(len(lines)), rng.randrange(1, 40)
        if edit == "reorder":
            block = [lines.pop(at % len(lines)) for _ in range(count)]
            lines[rng.randrange(len(lines)) : 0] = block
        else:
            new = [] if edit == "delete" else [next(more) for _ in range(1 if edit == "change" else count)]
            begin = len(lines) if edit == "append" else at
            lines[begin : begin + {"delete": count, "change": 1}.get(edit, 0)] = new
        folder.write("train.jsonl", lines)
        folder.check_both(SETTINGS | {"near_duplicates": rng.choice(["drop", "report"])})


def test_pairs_of_texts_are_compared_once(tmp_path, monkeypatch):
    compared, jaccard = [], near.jaccard
    monkeypatch.setattr(near, "jaccard", lambda *texts: compared.append(texts) or jaccard(*texts))
    folder, lines = Folder(tmp_path), rows(1000)
    folder.write("train.jsonl", lines)
    folder.check(SETTINGS)
    pairs = len(compared)
    assert pairs > 20 and folder.check(SETTINGS) and len(compared) == pairs
    copy = json.loads(lines[2])["messages"][0]["content"] + " once more"
    chat = [{"role": "user", "content": copy}, {"role": "assistant", "content": "x"}]
    folder.write("train.jsonl", [*lines, json.dumps({"messages": chat}) + "\n"])
    found = folder.check(SETTINGS)[0]
    # With the row that it was copied from, and with the other copy of it; chats and prompts.
    assert pairs < len(compared) <= pairs + 4
    assert found == folder.check(SETTINGS, cached=False)[0]


def test_a_new_source_is_read_alone(tmp_path):
    folder = Folder(tmp_path)
    sources = [{"source": name, "name": name, "weight": 1.5} for name in ("one", "two")]
    folder.write("one/a.jsonl", rows(1000))
    folder.write("two/b.jsonl", rows(300, seed=1))
    settings = {key: value for key, value in SETTINGS.items() if key != "train"}
    assert folder.check_both({**settings, "sources": sources[:1]}) == 1000
    assert folder.check_both({**settings, "sources": sources}) == 300
    assert folder.check_both({**settings, "sources": sources[::-1], "limit": 50, "duplicates": "keep"}) == 0
    pinned = [{**sources[0], "split": "train"}, sources[1]]
    assert folder.check_both({**settings, "sources": pinned}) == 1000, "its rows are not drawn"


@pytest.mark.parametrize(
    "change",
    [{"system": "You are."}, {"seed": 1}, {"group": "topic"}, {"thinking": "strip"}, {"heldout_fraction": 0.2}],
)
def test_rows_are_read_again_if_a_setting_decides_how(tmp_path, change):
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(300))
    folder.check(SETTINGS)
    assert folder.check_both(SETTINGS | change) == 300


@pytest.mark.parametrize(("first", "last"), [("good", "purple"), ("True", "no idea")])
def test_rows_whose_labels_depend_on_a_later_row_are_read_again(tmp_path, first, last):
    """Labels are marks or classes by all rows of the file."""
    folder = Folder(tmp_path)
    values = [first, "False"] * 150
    lines = [
        json.dumps({"prompt": f"q{n}", "completion": "a", "label": value}) + "\n" for n, value in enumerate(values)
    ]
    folder.write("train.jsonl", lines)
    before = folder.check(SETTINGS)[0]
    assert json.loads(before["report.json"])["counts"]["marked_false"] == 150
    classes = [f'{{"prompt": "x{n}", "completion": "a", "label": "{last} {n}"}}\n' for n in range(9)]
    folder.write("train.jsonl", [*lines, *classes])
    folder.check_both(SETTINGS)
    assert "marked_false" not in json.loads(folder.check(SETTINGS)[0]["report.json"])["counts"]


def test_a_question_about_two_labels_is_asked_again_if_a_later_row_has_a_third(tmp_path):
    folder = Folder(tmp_path)
    values = ["urgent", "normal"] * 150
    lines = [
        json.dumps({"prompt": f"q{n}", "completion": "a", "label": value}) + "\n" for n, value in enumerate(values)
    ]
    folder.write("train.jsonl", lines)
    before = json.loads(folder.check(SETTINGS)[0]["report.json"])
    assert before["doubtful"] == {"label": {"urgent": 150, "normal": 150}}
    folder.write("train.jsonl", [*lines, '{"prompt": "x", "completion": "a", "label": "later"}\n'])
    folder.check_both(SETTINGS)
    assert "doubtful" not in json.loads(folder.check(SETTINGS)[0]["report.json"])


def test_labels_that_stay_what_they_were_are_not_read_again(tmp_path):
    folder = Folder(tmp_path)
    values = [True, False] * 2000
    lines = [
        json.dumps({"prompt": f"q{n}", "completion": "a", "label": value}) + "\n" for n, value in enumerate(values)
    ]
    folder.write("train.jsonl", lines[:3970])
    folder.check(SETTINGS)
    folder.write("train.jsonl", lines)
    assert folder.check_both(SETTINGS) <= 30 + 2 * 1024


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_rows_of_tables_are_kept_too(tmp_path, suffix):
    import pandas as pd

    def write(count: int) -> None:
        table = pd.DataFrame({"prompt": [f"question {n}" for n in range(count)], "completion": "a", "n": range(count)})
        folder.files.mkdir(parents=True, exist_ok=True)
        file = folder.files / f"train{suffix}"
        if suffix == ".json":
            table.to_json(file, orient="records")
        else:
            (table.to_csv if suffix == ".csv" else table.to_parquet)(file, index=False)

    folder = Folder(tmp_path)
    settings = SETTINGS | {"near_duplicates": "off"}
    write(2000)
    assert folder.check_both(settings) == 2000
    write(2020)
    assert 20 <= folder.check_both(settings) <= 20 + 1024


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9] + b"x" + data[-8:], lambda data: data[:50], lambda data: b""]
)
def test_a_damaged_entry_is_not_believed(tmp_path, damage):
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(900))
    folder.check(SETTINGS)
    for file in folder.cache.glob("*/*"):
        file.write_bytes(damage(file.read_bytes()))
    assert folder.check_both(SETTINGS) == 900 and folder.check_both(SETTINGS) == 0


def test_an_entry_that_was_copied_over_another_one_is_not_believed(tmp_path):
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(900))
    folder.check(SETTINGS)
    *_, entry, other = sorted(
        folder.cache.glob("*/*"), key=lambda file: file.stat().st_size
    )  # the smallest has no rows
    other.write_bytes(entry.read_bytes())
    assert 0 < folder.check_both(SETTINGS) < 900


def test_processes_give_the_same_result(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    marked = [json.dumps({"prompt": f"q{n}", "completion": "a", "correct": n % 3 > 0}) + "\n" for n in range(800)]
    folder.write("train.jsonl", [*rows(1500), *marked])
    expected = folder.check(SETTINGS, cached=False)
    monkeypatch.setattr(segment_reader, "ALONE_ROWS", 300)
    started = count_processes(monkeypatch)
    assert folder.check(SETTINGS, cached=False) == expected and folder.check(SETTINGS) == expected
    assert [processes.count for processes in started] == [2, 2]
    assert folder.check(SETTINGS) == (expected[0], 0) and len(started) == 2


def count_processes(monkeypatch) -> list[segment_process.SegmentProcesses]:
    started = []

    def start(config):
        started.append(segment_process.SegmentProcesses(config))
        return started[-1]

    for module in (segment_process, segment_reader):
        monkeypatch.setattr(module, "processors", lambda: 2)
    monkeypatch.setattr(segment_reader, "SegmentProcesses", start)
    return started


def test_modules_of_the_current_folder_replace_none_of_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("token.py", "queue.py", "pickle.py"):
        (tmp_path / name).write_text("raise SystemExit('the module of the user')")
    processes, items, file = processes_for(monkeypatch, tmp_path)
    assert processes.submit(items, file).result()
    processes.close()


def test_a_process_that_ends_by_itself_is_no_failure_to_retry_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_process.sys, "path", [str(tmp_path), *segment_process.sys.path])
    (tmp_path / "queue.py").write_text("raise SystemExit('the module of the user')")
    processes, items, file = processes_for(monkeypatch, tmp_path)
    with pytest.raises(Crashed, match="ended early") as caught:
        processes.submit(items, file).result()
    assert caught.value.got == "exit status 1: the module of the user" and not caught.value.retryable
    processes.close()


def test_rows_are_read_alone_if_no_process_can_be_started(tmp_path, monkeypatch, caplog):
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(1500))
    expected = folder.check(SETTINGS, cached=False)
    monkeypatch.setattr(segment_reader, "ALONE_ROWS", 300)
    count_processes(monkeypatch)
    popen, children = subprocess.Popen, []

    def start(*args, **kwargs):
        if len(children) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        children.append(popen(*args, **kwargs))
        return children[-1]

    monkeypatch.setattr(segment_process.subprocess, "Popen", start)
    assert folder.check(SETTINGS, cached=False) == expected
    assert [child.returncode for child in children] == [-9] and caplog.text.count("others cannot be started") == 1


def test_the_processors_that_may_be_used_are_counted(monkeypatch):
    monkeypatch.setattr(segment_process.os, "sched_getaffinity", lambda _: {3}, raising=False)
    monkeypatch.setattr(segment_process.os, "cpu_count", lambda: 64)
    assert segment_process.processors() == 1
    monkeypatch.delattr(segment_process.os, "sched_getaffinity")
    assert segment_process.processors() == 64


def processes_for(monkeypatch, tmp_path) -> tuple[segment_process.SegmentProcesses, list, object]:
    monkeypatch.setattr(segment_process, "processors", lambda: 2)
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(40))
    recipe = Recipe.model_validate({"name": "x", "base": {"model": "b"}, "data": SETTINGS})
    config = CheckDatasetConfig.from_recipe(recipe, Outside())
    (file,) = check.files_of_sets(folder.files, config, None)
    return segment_process.SegmentProcesses(config), next(file.segments()), file


def test_a_process_that_is_killed_is_a_failure_that_is_retried(tmp_path, monkeypatch):
    processes, items, file = processes_for(monkeypatch, tmp_path)
    children = [child._process for child in processes._children]
    for child in children:
        child.kill()
        child.wait()
    with pytest.raises(Killed, match="was killed") as caught:
        processes.submit(items, file).result()
    assert caught.value.retryable and "exit status -9" in str(caught.value)
    processes.close()


def test_processes_end_with_the_reader_and_answer_nothing_after_an_exception(tmp_path, monkeypatch):
    processes, items, file = processes_for(monkeypatch, tmp_path)
    children = [child._process for child in processes._children]
    assert processes.submit(items._replace(rows=[None]), file).result() is None
    assert processes.submit(items, file).result(), "the process goes on"
    assert [child.poll() for child in children] == [None, None]
    processes.close()
    assert None not in [child.poll() for child in children]


def test_an_error_of_the_file_is_raised_where_it_is_read(tmp_path):
    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(300))
    folder.check(SETTINGS)
    folder.write("train.jsonl", ["[\n", "{\n", *rows(300)])
    with pytest.raises(BadData, match="one row per line"):
        folder.check(SETTINGS)


def test_a_forced_run_reads_everything(tmp_path):
    from loraflow.store.checkpoints import reset_work_folder

    folder = Folder(tmp_path)
    folder.write("train.jsonl", rows(300))
    folder.check(SETTINGS)
    reset_work_folder(folder.work, "0" * 64)
    assert folder.check(SETTINGS)[1] == 300
    assert ChunkCache.beside(folder.work, "check_dataset") is None
