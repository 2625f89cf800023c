"""A metric of the user's own is its script and what it imports and names: an edit of any of them evaluates again."""

import importlib
import subprocess
import sys

import pytest

from loraflow.evaluation.metric_modules import BUILT_IN, compute, module_hashes, require_unchanged
from loraflow.failures import BadConfig
from loraflow.store.files import HashMemo, hash_file

METRIC = """import datasets
import evaluate
from .rules import score
from metrics.common import FACTOR


class Mine(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references):
        words = open("metrics/words.txt").read().split()
        scores = [FACTOR * score(p, words) for p in predictions]
        return {"mine": sum(scores) / len(scores), "mine_scores": scores}
"""
EDITS = {
    "metrics/mine/mine.py": METRIC.replace("FACTOR *", "2 * FACTOR *"),
    "metrics/mine/rules.py": "def score(text, words):\n    return float(text not in words)\n",
    "metrics/common.py": "from metrics.more import HALF\nFACTOR = HALF\n",
    "metrics/more.py": "HALF = 0.25\n",
    "metrics/words.txt": "no\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics" / "mine").mkdir(parents=True)
    for name, text in {
        "metrics/mine/mine.py": METRIC,
        "metrics/mine/rules.py": "def score(text, words):\n    return float(text in words)\n",
        "metrics/common.py": "from metrics.more import HALF\nFACTOR = HALF * 2\n",
        "metrics/more.py": "HALF = 0.5\n",
        "metrics/words.txt": "yes\n",
        "metrics/other.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def hash_now() -> str:
    return module_hashes(["./metrics/mine"], HashMemo(None))["./metrics/mine"]


@pytest.mark.parametrize("edited", EDITS)
def test_an_edit_of_any_file_of_a_metric_changes_its_hash(project, edited):
    before = hash_now()
    require_unchanged("./metrics/mine", before)
    (project / edited).write_text(EDITS[edited])
    assert hash_now() != before
    with pytest.raises(BadConfig, match="was edited during the run"):
        require_unchanged("./metrics/mine", before)


def test_the_edits_change_the_scores(project, monkeypatch):
    """What the hash must follow, by evaluate itself, with the working directory in Python's path as a worker has it."""
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file of the same size and second would not be read again

    def score() -> float:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("metrics", "evaluate_modules")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return compute("./metrics/mine", ["yes"], ["yes"]).values["mine"]

    assert score() == 1.0
    for name, expected in (("metrics/more.py", 0.5), ("metrics/common.py", 0.25), ("metrics/words.txt", 0.0),
                           ("metrics/mine/rules.py", 0.25), ("metrics/mine/mine.py", 0.5)):  # fmt: skip
        (project / name).write_text(EDITS[name])
        assert score() == expected, name


def test_other_files_do_not_change_the_hash_of_a_metric(project):
    before = hash_now()
    (project / "metrics/other.py").write_text("changed = True\n")
    (project / "metrics/mine/README.md").write_text("changed\n")
    assert hash_now() == before


@pytest.mark.parametrize("name", ["random", "yaml", "metrics"])
def test_a_file_of_the_project_named_like_a_library_is_neither_imported_nor_hashed(project, monkeypatch, caplog, name):
    """The oracle is an interpreter that is started as workers are, with the working directory last."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (project / "metrics" / "mine" / "mine.py").write_text(f"import {name}\n")
    before = hash_now()
    (project / f"{name}.py").write_text("")
    code = f"import sys; sys.path.append({str(project)!r}); import {name}; print({name}.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    is_the_projects = done.stdout.strip() == str(project / f"{name}.py")
    assert is_the_projects is (name == "metrics")
    assert (hash_now() != before) is is_the_projects
    assert (
        any(f"not the project's file {name}.py" in record.getMessage() for record in caplog.records)
        is not is_the_projects
    )
    monkeypatch.setenv("PYTHONPATH", str(project))
    assert hash_now() != before, "its folder comes first then"


def test_a_metric_of_one_file_has_the_hash_of_the_file(project):
    """So that scores which were computed before this rule stay in use."""
    script = project / "metrics/mine/mine.py"
    script.write_text(
        "import os\nimport evaluate\nfrom . import nothing\nNAMES = ['', '.', 'a' * 9999, '\\0', '\\ud800']\n"
    )
    assert hash_now() == hash_file(script)
    script.write_text("this is no Python\n")
    assert hash_now() == hash_file(script)


def test_a_built_in_metric_is_its_script_whatever_the_working_directory_has(project, monkeypatch):
    (project / "loraflow/evaluation").mkdir(parents=True)
    (project / "loraflow/evaluation/label_scores.py").write_text("")
    assert module_hashes(["labels"], HashMemo(None)) == {"labels": hash_file(BUILT_IN / "labels" / "labels.py")}


WRITES = {
    "write_text": "CACHE = Path('metrics/mine/cache.json')\ndef keep(text):\n    CACHE.write_text(text)\n",
    "open": "def keep(text):\n    with open('metrics/mine/cache.json', 'a') as file:\n        file.write(text)\n",
    "mode": "CACHE = Path('metrics') / 'mine/cache.json'\nNAME = 'metrics/mine/cache.json'\n"
    "def keep(text):\n    with open(NAME, mode='w') as file:\n        file.write(text)\n",
    "method": "def keep(text):\n    path = Path('metrics/mine/cache.json')\n    with path.open('w') as file:\n"
    "        file.write(text)\n",
    "attribute": "class Keeper:\n    cache = 'metrics/mine/cache.json'\n    def keep(self, text):\n"
    "        self.path = Path(self.cache)\n        self.path.write_text(text)\n\n    def __call__(self, text):\n"
    "        Path(self.cache).write_text(text)\n\n\nkeep = Keeper().keep\n",
    "logging": "import logging\ndef keep(text):\n    handler = logging.FileHandler('metrics/mine/cache.json')\n"
    "    handler.emit(logging.makeLogRecord({'msg': text}))\n    handler.close()\n",
    "copy": "import shutil\ndef keep(text):\n    Path('metrics/mine/new').write_text(text)\n"
    "    shutil.move('metrics/mine/new', 'metrics/mine/cache.json')\n",
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_a_metric_writes_itself_is_no_part_of_it_and_the_files_that_it_reads_are(project, how, exists):
    cache, words = project / "metrics" / "mine" / "cache.json", project / "metrics" / "words.txt"
    if exists:
        cache.write_text("of yesterday")
    (project / "metrics" / "mine" / "rules.py").write_text(
        f"from pathlib import Path\n{WRITES[how]}\n\ndef score(text, words):\n    keep(text + '!')\n    return float(text in words)\n"
    )
    before = hash_now()
    importlib.invalidate_caches()
    names = {}
    exec((project / "metrics" / "mine" / "rules.py").read_text(), names)  # as `evaluate` imports it
    assert names["score"]("yes", ["yes"]) == 1.0
    assert "yes!" in cache.read_text(), "it was written"
    require_unchanged("./metrics/mine", before)
    assert hash_now() == before
    words.write_text("no\n")
    with pytest.raises(BadConfig, match="edited during the run"):
        require_unchanged("./metrics/mine", before)


def test_a_file_that_is_read_counts_if_another_function_writes_a_file_by_a_variable_of_the_same_name(project):
    (project / "metrics" / "mine" / "rules.py").write_text(
        "def keep(text):\n    path = 'out.log'\n    open(path, 'a').write(text)\n\n\n"
        "def score(text, words):\n    path = 'metrics/other.txt'\n    return float(text in open(path).read())\n"
    )
    (project / "metrics" / "other.txt").write_text("yes")
    (project / "out.log").write_text("")
    before = hash_now()
    (project / "out.log").write_text("more")
    assert hash_now() == before
    (project / "metrics" / "other.txt").write_text("no")
    assert hash_now() != before
