"""Metrics as modules of HF `evaluate`: loraflow's own, loaded by path, and any folder that a recipe names. All offline.

`evaluate` would look up a bare name on the hub and run the script it finds, so a bare name always means a module of
loraflow.

What decides a metric of the user's own are its script, the modules that it imports, and the files that it names.
Files that the code writes itself, such as a cache or a log, are no part of it: they change with each evaluation. A file
counts as written if its name is in a call that opens it for writing, directly or through a variable of the same module.

Scores of two models are comparable only if the same code computed them, and a script may leave its arithmetic to a module
beside it. Installed packages are no part of it: like torch, they are recorded by their versions.
"""

import ast
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from loraflow.failures import BadConfig
from loraflow.stage_code import parse
from loraflow.store.files import HashMemo

log = logging.getLogger("loraflow")
PACKAGE = "loraflow"  # its code is a part of the stage's
# Calls that write the file that they are a method of, and those that write the file that they are given first, or second.
_WRITING_METHODS = frozenset({"write_text", "write_bytes", "touch", "unlink"})
_WRITING_CALLS = frozenset(
    {"FileHandler", "RotatingFileHandler", "connect", "to_csv", "to_json", "to_parquet", "savez", "save"}
)
_COPYING_CALLS = frozenset({"copy", "copy2", "copyfile", "move", "replace", "rename"})


def metric_hash(script: Path, memo: HashMemo) -> str:
    """Return the hash of a metric: of its script, or of all its files if it has more."""
    files = metric_files(script)
    if files == [script]:
        return memo.hash(script)
    hashes = [[os.path.relpath(file, script.parent), memo.hash(file)] for file in files]
    return hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest()


def metric_files(script: Path) -> list[Path]:
    """Return a metric's script, and what it reads in the working directory and in its own folder, in a stable order.

    That is every module that it imports from there, directly or through another one, and every file whose path is written
    as a text in one of them, such as `open("metrics/words.txt")`.
    """
    found, left = [script], [script]
    seen = {script.resolve()}
    while left:
        for file in _named_files(left.pop(), script.parent):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                found.append(file)
                if file.suffix == ".py":
                    left.append(file)
    return [script, *sorted(found[1:])]


def _named_files(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files that a Python file imports or names, from the metric's folder or the working directory."""
    try:
        tree = parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the metric's import raises the same error, and says where
    written = _written_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _modules(Path(), name.name, file)
        elif isinstance(node, ast.ImportFrom):
            # evaluate copies the modules beside a script, and so makes them importable by `from .name import …`.
            start = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else Path()
            module = f"{node.module}." if node.module else ""
            for name in node.names:
                yield from _modules(start, f"{module}{name.name}", file)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in written:
            yield from (file for file in (Path(node.value), folder / node.value) if _is_file(file))


def _written_names(tree: ast.Module) -> set[str]:
    """Return the texts that name a file which the code opens for writing."""
    attributes: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        for target, texts in _assigned(node):
            if isinstance(target, ast.Attribute):
                attributes.setdefault(target.attr, set()).update(texts)
    return set(_written_in(tree, {}, attributes))


_Texts = Mapping[str, set[str]]  # variable or attribute: the texts in what is assigned to it


def _written_in(scope: ast.AST, outer: _Texts, attributes: _Texts) -> Iterator[str]:
    """Yield those texts of a module or a function, with the variables of the scopes around it."""
    nodes = list(_nodes_of(scope))
    own: dict[str, set[str]] = {}
    for node in nodes:
        for target, texts in _assigned(node):
            if isinstance(target, ast.Name):
                own.setdefault(target.id, set()).update(texts)
    known = {**outer, **own}
    for node in nodes:
        if isinstance(node, _FUNCTIONS):
            yield from _written_in(node, known, attributes)
        elif isinstance(node, ast.Call):
            for target in _written_by(node):
                yield from _texts(target)
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield from known.get(part.id, ())
                    elif isinstance(part, ast.Attribute):
                        yield from attributes.get(part.attr, known.get(part.attr, ()))


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _nodes_of(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a module or function, and of classes in it; of functions in it only themselves."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, _FUNCTIONS):
            yield from _nodes_of(node)


def _assigned(node: ast.AST) -> list[tuple[ast.expr, set[str]]]:
    """Return the targets of an assignment, with the texts in its value."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return []
    return [
        (target, _texts(node.value)) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]


def _written_by(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the expressions for the files that a call writes."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = function.value if isinstance(function, ast.Attribute) else None
    if name == "open":
        modes = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        if any(_is_writing_mode(mode) for mode in modes):
            yield from (file for file in (owner, *call.args[:1]) if file is not None)
    elif name in _WRITING_METHODS and owner is not None:
        yield owner
    elif name in _WRITING_CALLS:
        yield from call.args[:1]
    elif name in _COPYING_CALLS:
        yield from call.args[-1:]
    yield from (keyword.value for keyword in call.keywords if name == "basicConfig" and keyword.arg == "filename")


def _is_writing_mode(node: ast.expr) -> bool:
    """Tell whether it is a mode of `open` that writes, such as "w", "ab" or "r+"."""
    mode = node.value if isinstance(node, ast.Constant) else None
    return (
        isinstance(mode, str)
        and 0 < len(mode) <= 3
        and set(mode) <= set("rwxabt+")
        and not set(mode).isdisjoint("wxa+")
    )


def _texts(node: ast.expr) -> set[str]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def _modules(start: Path, name: str, by: Path) -> Iterator[Path]:
    """Yield the files of a module with a dotted name, and of the packages that it is in."""
    top = name.partition(".")[0]
    if start == Path() and top == PACKAGE:
        return
    path, found = start, []
    for part in name.split("."):
        path /= part
        found += [file for file in (path.with_name(f"{part}.py"), path / "__init__.py") if _is_file(file)]
    if found and start == Path() and _is_library(top, Path.cwd(), os.environ.get("PYTHONPATH", "")):
        _warn_of_library(by, top, found[0])
    else:
        yield from found


@cache
def _is_library(name: str, folder: Path, python_path: str) -> bool:
    """Tell whether an absolute import finds Python's or an installed module: the working directory is searched last.

    A folder that PYTHONPATH names is searched first.
    """
    if folder in (Path(entry).absolute() for entry in python_path.split(os.pathsep) if entry):
        return False
    if name in sys.stdlib_module_names:
        return True
    spec = PathFinder.find_spec(name, [entry for entry in sys.path if Path(entry).absolute() != folder])
    # Without an origin it is a folder, and a module comes before it.
    return spec is not None and spec.origin is not None


@cache
def _warn_of_library(by: Path, name: str, file: Path) -> None:
    log.warning(
        "%s imports %s of Python or a library, not the project's file %s; rename that file to use it",
        by,
        name,
        file,
    )


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises for a text that cannot be a path


BUILT_IN = Path(__file__).parent / "metrics"


class ModuleScores(NamedTuple):
    """The scores of a metric's module, by name: over all rows, and of each row."""

    values: dict[str, float]
    rows: dict[str, list[float]]


def find_module(name: str) -> Path:
    """Return a metric's script.

    Raises:
        BadConfig: there is no metric of this name.
    """
    own = BUILT_IN / name / f"{name}.py"
    if own.exists() and "/" not in name:
        return own
    folder = Path(name)
    script = folder if folder.suffix == ".py" else folder / f"{folder.name}.py"
    if "/" in name and script.is_file():
        return script
    names = sorted(path.name for path in BUILT_IN.iterdir() if (path / f"{path.name}.py").exists())
    raise BadConfig(
        "There is no such metric.",
        where="evaluation.metrics",
        expected=f"one of {', '.join(names)}, or the path of a folder with an `evaluate` module",
        got=name,
        next_step="for a module of the hub, copy its folder and name its path from the working directory: ./metrics/bleu",
    )


def module_hashes(names: Sequence[str], memo: HashMemo) -> dict[str, str]:
    """Return the hashes of metric modules' files, which are part of an evaluation's fingerprint."""
    return {name: _hash(name, memo) for name in names}


def _hash(name: str, memo: HashMemo) -> str:
    script = find_module(name)
    return memo.hash(script) if BUILT_IN in script.parents else metric_hash(script, memo)


def require_unchanged(name: str, expected: str) -> None:
    """Check that a metric's module is still the one that the evaluation's fingerprint names.

    Raises:
        BadConfig: its script, or another of its files, was edited or replaced since the run started.
    """
    if _hash(name, HashMemo(None)) != expected:
        raise BadConfig(
            f"The metric {name} was edited during the run, so its scores cannot be kept.",
            where=", ".join(map(str, metric_files(find_module(name)))),
            next_step="run again: finished stages are cached. A file that the metric writes itself must be opened for "
            "writing in the module that names it: then it does not count as part of the metric",
        )


@cache
def _temporary_folder() -> TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return TemporaryDirectory(prefix="loraflow-metrics-")


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def compute(name: str, predictions: Sequence[str | float], references: Sequence[str | int]) -> ModuleScores:
    """Return a module's scores.

    A module that gives no scores for rows is called again for each row, so that models can be compared in pairs.
    """
    import evaluate

    for name_of_folder in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):  # in the home, which may be read-only
        if not _is_writable(Path(getattr(evaluate.config, name_of_folder))):
            setattr(evaluate.config, name_of_folder, Path(_temporary_folder().name))
    module = evaluate.load(str(find_module(name).absolute()), keep_in_memory=True, experiment_id="loraflow", seed=0)
    result = module.compute(predictions=predictions, references=references)
    values = {key: float(value) for key, value in result.items() if isinstance(value, int | float)}
    rows = {key: [float(x) for x in result[f"{key}_scores"]] for key in values if f"{key}_scores" in result}
    if not rows:
        singles = [
            module.compute(predictions=[p], references=[r]) for p, r in zip(predictions, references, strict=True)
        ]
        rows = {key: [float(single[key]) for single in singles] for key in values}
    return ModuleScores(values, rows)
