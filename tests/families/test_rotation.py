"""`make test` runs a third of the family tests; three parts together are all of them, and each is stable."""

import subprocess

import pytest
import transformers

from tests.families.page import BEGIN, END, PAGE, VERSION, table
from tests.families.rotation import PARTS, part_of, part_to_run
from tests.families.tiny import FAMILIES


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAFLOW_FAMILIES", raising=False)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "m"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_part_follows_from_the_commit_alone(repository):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    assert part_to_run(["tests"], repository) == part_to_run([], repository) == part_of(head)


def test_all_parts_run_where_they_are_asked_for_and_without_git(repository, tmp_path_factory, monkeypatch):
    assert part_to_run(["tests/families/test_matrix.py::test_x"], repository) is None
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp()))
    assert part_to_run([], tmp_path_factory.mktemp("no git")) is None
    monkeypatch.setenv("LORAFLOW_FAMILIES", "all")
    assert part_to_run([], repository) is None


def test_each_family_is_in_one_part_and_the_parts_are_of_similar_size():
    parts = [[family for family in FAMILIES if part_of(f"test_matrix[{family}]") == part] for part in range(PARTS)]
    assert sum(map(len, parts)) == len(FAMILIES) and min(map(len, parts)) >= len(FAMILIES) // 6


@pytest.mark.skipif(
    not transformers.__version__.startswith(VERSION), reason="layers have other names in other versions"
)
def test_the_page_of_models_shows_what_the_code_decides():
    assert PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == table(), "python -m tests.families.page"
