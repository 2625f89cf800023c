"""The documents agree with the code: the picture of the pipeline, the pages that are tables of something, links, examples."""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

from loraflow.cli import COMMANDS
from loraflow.config.evaluation import SCORES
from loraflow.data.formats.chat_formats import read_chat
from loraflow.evaluation.metric_modules import BUILT_IN
from loraflow.execution.plan import STEPS, inputs_of

REPOSITORY = Path(__file__).parents[3]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def rows_of_table(text: str, header: str) -> list[list[str]]:
    """Return the cells of the table that follows a header line."""
    lines = text[text.index(header) :].splitlines()[2:]
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_picture_of_the_pipeline_has_the_inputs_of_every_step():
    picture = re.search(r"```mermaid\n(.*?)```", read("README.md"), re.DOTALL)[1]
    names = dict(re.findall(r'(\w+)\["([^"]+)"\]', picture))
    drawn: dict[str, set[str]] = {}
    optional: dict[str, set[str]] = {}
    for line in picture.splitlines()[1:]:
        sources, arrow, target = re.match(r"\s*(.*?)\s*(-->|-\.->\|.*?\|)\s*(.*)", line).groups()
        target = re.sub(r"\[.*", "", target)
        for source in sources.split(" & "):
            source = re.sub(r"[(\[].*", "", source)
            edges = drawn if arrow == "-->" else optional
            edges.setdefault(names.get(target, target), set()).add(names.get(source, source))
    for step in STEPS:
        required = set(inputs_of(step, compares_merges=False).values())
        assert drawn.pop(step.label, set()) == required, step.label
        assert optional.pop(step.label, set()) == set(step.inputs.values()) - required, step.label
    evaluations = {step.label for step in STEPS if step.stage.name == "evaluate"}
    assert (drawn, optional) == ({"gate": evaluations, "register": {"gate"}}, {})


def test_the_table_of_the_pipeline_names_what_each_stage_reads():
    stages = {step.stage.name for step in STEPS}
    table = {row[0]: row[1] for row in rows_of_table(read("README.md"), "| step | reads |")}
    assert table.keys() == stages | {"gate", "register"}
    for step in STEPS:
        if step.stage.name != "evaluate":  # of any model
            assert {word for word in re.findall(r"\w+", table[step.label]) if word in stages} == set(
                step.inputs.values()
            )


def test_the_picture_of_the_layers_is_the_contract():
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = re.search(r"## Layers\n\n```\n(.*?)```", read("docs/design.md"), re.DOTALL)[1].splitlines()
    drawn = [re.match(r"(?:loraflow/)?(\w+)", line)[1] for line in layers if not line.startswith("    ")]
    assert drawn == [layer.split(" | ")[0] for layer in contracts[0]["layers"]]
    parts = [line.split("/")[0].strip() for line in layers if line.startswith("    ")]
    modules = [name for name in contracts[2]["layers"] if (REPOSITORY / f"loraflow/data/{name}.py").exists()]
    assert parts == [name for name in contracts[2]["layers"] if name not in modules]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_way_through_the_code_names_what_is_in_the_files(number):
    parts = read("docs/design.md").split("| step | file |")
    for step, files in rows_of_table("| step | file |" + parts[number + 1], "| step | file |"):
        sources = ""
        folder = REPOSITORY
        for name in re.findall(r"`([\w/]+\.py)`", files):
            file = next(f for f in (REPOSITORY / name, REPOSITORY / "loraflow" / name, folder / name) if f.exists())
            folder = file.parent
            sources += file.read_text(encoding="utf-8")
        for code in re.findall(r"`@?([\w.]+ ?\w*)[^`]*`", step):
            if "." not in code or code[0].isupper():  # not a key of the recipe
                for word in re.findall(r"[A-Za-z_]\w+", code):
                    assert word in sources, f"{step}: {word} is not in {files}"


def test_each_function_on_the_way_to_the_training_loop_calls_the_next():
    """The table lists every function between the flow and the trainer, so that its length is the number of calls."""
    rows = rows_of_table(read("docs/design.md"), "| step | file |")
    names = [re.search(r"`(?:@\w+ )?(?:trainer\.)?(\w+)", step)[1] for step, _ in rows]
    assert names[0] == "finetune" and names[-1] == "train" and len(names) - 1 == 9
    dynamic = {"main": "Popen", "run": "stage_function"}  # another process; a module that the stage table names
    for name, called, (_, files) in zip(names, names[1:], rows, strict=False):
        tree = ast.parse(read(next(path for path in re.findall(r"`([\w/]+\.py)`", files))))
        function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
        calls = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for node in ast.walk(function) if isinstance(node, ast.Call)
        }  # fmt: skip
        assert dynamic.get(called, called) in calls, f"{name} does not call {called}"


def test_the_page_of_the_recipe_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("recipe_page", REPOSITORY / "docs" / "recipe_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read("docs/recipe.md") == module.page(), "run: python docs/recipe_page.py"


def test_the_table_of_metrics_has_every_module_and_its_scores():
    rows = rows_of_table(read("docs/gate.md"), "| module | scores | meaning | better |")
    documented = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows}
    assert documented == {metric: set(scores) for metric, scores in SCORES.items()}
    assert documented.keys() == {path.name for path in BUILT_IN.iterdir() if (path / f"{path.name}.py").exists()}


def test_the_example_rows_of_datasets_are_chats():
    rows = rows_of_table(read("docs/data.md"), "| format | example row |")
    assert len(rows) == 5
    for name, example in rows:
        messages = read_chat(json.loads(example.strip("`"))).messages
        assert messages[-1]["role"] == "assistant", name


def test_the_readme_lists_every_command():
    rows = rows_of_table(read("README.md"), "| command | does |")
    listed = {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    assert listed == set(COMMANDS)


def test_every_decision_is_in_the_index_under_its_number():
    folder = REPOSITORY / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in sorted(folder.glob("0*.md")):
        number = page.name[:4]
        assert page.read_text(encoding="utf-8").startswith(f"# {int(number)}. ")
        assert f"[{number}]({page.name})" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"
