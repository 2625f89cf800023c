"""The pages of the site that are made from code: commands, stages, failures, and the Python API. `make docs` writes them.

They are not committed, so they cannot be out of date. docs/recipe.md, which is committed, is made by docs/recipe_page.py.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import click

import loraflow
from loraflow import failures
from loraflow.cli import cli
from loraflow.stages import STAGES

PACKAGE = Path(loraflow.__file__).parent
# What a script may call: module → names. Prefect's flows are called like functions.
API = {
    "loraflow.config.load": ("load_recipe", "parse_recipe"),
    "loraflow.flows.finetune": ("finetune",),
    "loraflow.flows.retrain": ("retrain",),
    "loraflow.flows.evaluate_model": ("evaluate",),
    "loraflow.flows.predict": ("predict",),
    "loraflow.store": ("open_store",),
    "loraflow.store.base": ("Store",),
    "loraflow.store.artifact": ("Ref", "Manifest"),
    "loraflow.registry.runs": ("read_run", "RunSummary"),
    "loraflow.execution.plan": ("plan", "PlannedStep"),
    "loraflow.failures": ("Failure",),
}


def pages() -> dict[str, str]:
    """Return the pages, by their file names."""
    return {"cli.md": commands(), "stages.md": stages(), "failures.md": messages(), "python.md": python_api()}


def commands() -> str:
    """Return the page of all commands, with the help that each prints."""
    context = click.Context(cli, info_name="loraflow", max_content_width=110, terminal_width=110)
    parts = ["# Commands\n", "What `loraflow COMMAND --help` prints.\n"]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_help(command, click.Context(command, info_name=name, parent=context, max_content_width=110), 2))
    return "\n".join(parts)


def _help(command: click.Command, context: click.Context, level: int) -> str:
    text = [f"{'#' * level} {context.command_path}\n", f"```text\n{command.get_help(context)}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            text.append(_help(inner, click.Context(inner, info_name=name, parent=context), level + 1))
    return "\n".join(text)


def stages() -> str:
    """Return the page of the table of stages."""
    lines = [
        "# Stages\n",
        "Each stage reads artifacts and writes one. It is computed again if its version, its settings or an input changes",
        "([identity](../design.md#identity)). The work is the function `run` of its module.\n",
        "| stage | version | inputs | module | runs in | GPU | other pools |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in STAGES.values():
        inputs = ", ".join(
            f"{name} ({' or '.join(given.source)}{': ' + given.part if given.part else ''})"
            + (", optional" if given.optional else "")
            for name, given in stage.inputs.items()
        )
        where = "a worker process" if stage.in_worker else "the process of the flow"
        lines.append(
            f"| {stage.name} | {stage.version} | {inputs or 'none'} | `{stage.module}` | {where} | "
            f"{'yes' if stage.uses_gpu else 'no'} | {'yes' if stage.placeable else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def messages() -> str:
    """Return the page of failures: each class with its exit status, and the sentences that it is raised with."""
    found: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                found.setdefault(node.func.id, []).append((_text(node.args[0]), _next_step(node)))
    parts = [
        "# Failures and messages\n",
        "A failure says what is wrong, then where, what was expected, what was found, and what to do next. Words in braces",
        "are filled in. A failure that can be retried is retried by Prefect, and the stage resumes where it stopped.\n",
    ]
    for name, kind in _failure_classes().items():
        first = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
        parts.append(f"## {name}\n")
        parts.append(f"{first} Exit status {kind.exit_code}; {'is' if kind.retryable else 'is not'} retried.\n")
        rows = sorted({row for row in found.get(name, ()) if row[0]})
        if rows:
            parts.append("| message | next |\n|---|---|")
            parts.extend(f"| {_cell(what)} | {_cell(step)} |" for what, step in rows)
            parts.append("")
    return "\n".join(parts)


def _failure_classes() -> dict[str, type[failures.Failure]]:
    values = vars(failures).items()
    return {name: kind for name, kind in values if isinstance(kind, type) and issubclass(kind, failures.Failure)}


def _next_step(call: ast.Call) -> str:
    return next((_text(keyword.value) for keyword in call.keywords if keyword.arg == "next_step"), "")


def _text(node: ast.expr) -> str:
    """Return a text in the code, with the expressions of an f-string in braces; empty for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{…}"
            if not isinstance(part, ast.FormattedValue) or not isinstance(part.value, ast.Name)
            else f"{{{part.value.id}}}"
            for part in node.values
        )  # fmt: skip
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} / {_text(node.orelse)}".strip(" /")
    return ""


def _cell(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return re.sub(r"([<>*_\[\]])", r"\\\1", text) if "`" not in text else text.replace("<", "&lt;")


def python_api() -> str:
    """Return the page of the functions and classes that a script may use, from their signatures and docstrings."""
    parts = [
        "# Python API\n",
        "Everything else may change between versions without a note. Failures are raised as classes of",
        "`loraflow.failures` ([messages](failures.md)).\n",
    ]
    for module, names in API.items():
        tree = ast.parse(_file(module).read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for name in names:
            node = found[name]
            parts.append(f"## {module.removesuffix('.load')}.{name}\n")
            parts.append(f"```python\n{_signature(node)}\n```\n")
            parts.append(f"```text\n{ast.get_docstring(node) or ''}\n```\n")
    return "\n".join(parts)


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.FunctionDef):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){result}"
    lines = [f"class {node.name}"]
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id[0] != "_":
            lines.append(f"    {part.target.id}: {ast.unparse(part.annotation)}")
        elif isinstance(part, ast.FunctionDef) and part.name[0] != "_":
            lines.append(f"    {_signature(part)}")
    return "\n".join(lines)
