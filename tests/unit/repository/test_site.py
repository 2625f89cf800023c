"""The documents as a site: what its pages are made of. `make docs` builds it, and fails for a broken link."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from loraflow import failures
from loraflow.cli import COMMANDS
from loraflow.stages import STAGES

DOCS = Path(__file__).parents[3] / "docs"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as zensical reads them."""
    folder = tmp_path_factory.mktemp("site")
    load("site/build").stage(folder)
    return folder


def headings(page: Path) -> list[str]:
    return re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_reference_has_every_command_stage_and_failure(site):
    assert headings(site / "reference" / "cli.md") == [f"loraflow {name}" for name in COMMANDS]
    stages = (site / "reference" / "stages.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \| (\d+) \|", stages, re.MULTILINE) == [
        (stage.name, str(stage.version)) for stage in STAGES.values()
    ]
    classes = {name for name, value in vars(failures).items() if isinstance(value, type) and name != "Failure"}
    found = set(headings(site / "reference" / "failures.md"))
    assert found == {name for name in classes if issubclass(getattr(failures, name), failures.Failure)} | {"Failure"}


def test_the_reference_has_options_messages_and_signatures(site):
    assert "--strict-gate" in (site / "reference" / "cli.md").read_text(encoding="utf-8")
    assert "| --columns is malformed. |" in (site / "reference" / "failures.md").read_text(encoding="utf-8")
    assert "def load_recipe(path: str | Path" in (site / "reference" / "python.md").read_text(encoding="utf-8")


def test_the_navigation_names_every_page(site):
    project = tomllib.loads((DOCS.parent / "zensical.toml").read_text(encoding="utf-8"))["project"]
    named = set(re.findall(r"'([\w/.-]+\.md)'", str(project["nav"])))
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.md")}
    assert pages - {page for page in pages if page.startswith("decisions/0")} == named


def test_a_link_to_a_file_that_the_site_lacks_becomes_text(site):
    assert "](../" not in (site / "recipe.md").read_text(encoding="utf-8")
    assert "[the gate](gate.md)" in (site / "index.md").read_text(encoding="utf-8")
    assert "](upgrade.md)" in (site / "changelog.md").read_text(encoding="utf-8")


def test_the_tutorial_runs_commands_that_exist():
    tutorial = load("tutorial/write")
    commands = [
        found["command"] for found in tutorial.RUNS.finditer((DOCS / "tutorial" / "text.md").read_text("utf-8"))
    ]
    called = [name for command in commands for name in re.findall(r"loraflow ([a-z]+)", command)]
    assert set(called) >= {"init", "run", "plan", "show", "predict"} and set(called) <= set(COMMANDS)


def test_the_tutorial_writes_outputs_below_the_commands_and_takes_known_ones_from_its_memo(tmp_path, monkeypatch):
    tutorial = load("tutorial/write")
    folder = tmp_path / "tickets"
    folder.mkdir()
    text = tmp_path / "text.md"
    text.write_text("# T\n\n{{ echo a; echo b; pwd }}\n\n{{ printf '1\\n2\\n3\\n' | lines 2-2 }}\n", encoding="utf-8")
    monkeypatch.setattr(tutorial, "TEXT", text)
    page = tutorial.page(folder)
    assert "```\n$ echo a; echo b; pwd\na\nb\n~/tickets\n```" in page and "\n…\n2\n…\n```" in page
    monkeypatch.setattr(tutorial.subprocess, "run", None)
    assert tutorial.page(folder) == page
    tutorial.write_csv(folder / "tickets.csv")
    rows = (folder / "tickets.csv").read_text("utf-8").splitlines()
    assert len(set(rows)) == len(rows) == 181 and rows[0] == "text,category"


def test_a_recording_has_what_a_command_prints_and_no_long_pauses(tmp_path, monkeypatch):
    session = load("site/session")
    monkeypatch.setattr(session, "COMMANDS", ["printf 'ü\\n'; sleep 0.3; pwd"])
    monkeypatch.setattr(session, "PAUSE", 0.1)
    events = list(session.events(tmp_path))
    shown = "".join(text for _, text in events)
    times = [seconds for seconds, _ in events]
    assert "ü\r\n~/tickets\r\n" in shown and times == sorted(times)
    printed = [seconds for seconds, text in events if "ü" in text or "~" in text]
    assert 0 < printed[-1] - printed[-2] <= 0.11
    monkeypatch.setattr(session, "COMMANDS", ["exit 3"])
    with pytest.raises(SystemExit, match="ended with 3"):
        list(session.events(tmp_path))
