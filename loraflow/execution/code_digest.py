"""A digest of each stage's code. It is not part of identity: a cache hit by other code only warns.

`loraflow/code_digests.json` records, for each stage, its version, the digest of its code without comments and docstrings,
a hash of the same source files as they are, and earlier digests that give the same results. As long as the source files
are the recorded ones, nothing is parsed. `python tests/golden/write.py` records them.
"""

import ast
import hashlib
import threading
from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, TypeAdapter

from loraflow.stage_code import module_source, parse, source_hash
from loraflow.stages import Stage

# CPython before 3.11.8 fails in ast.parse when two threads parse at once (bug 106905); Prefect has threads.
_PARSING = threading.Lock()
PREFIX = 16  # recorded digits of a hash


class RecordedCode(BaseModel):
    """The recorded digests of a stage's code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    digest: str
    sources: str  # how the sha256 over the source files begins
    equivalent: list[str] = []  # how the digests of earlier code with the same results begin


@cache
def recorded() -> dict[str, RecordedCode]:
    """Return the recorded digests, by stage."""
    text = files("loraflow").joinpath("code_digests.json").read_bytes()
    return TypeAdapter(dict[str, RecordedCode]).validate_json(text)


def is_current(stage: Stage, digest: str) -> bool:
    """Return whether an artifact's code digest is that of today's code, or of earlier code with the same results."""
    known = recorded().get(stage.name)
    if digest == code_digest(stage):
        return True
    return known is not None and known.version == stage.version and digest[:PREFIX] in known.equivalent


def code_digest(stage: Stage) -> str:
    """Return the digest of a stage's code."""
    return _code_digest(stage.name, stage.code)


@cache
def _code_digest(stage: str, modules: tuple[str, ...]) -> str:
    known = recorded().get(stage)
    if known is not None and source_hash(modules).startswith(known.sources):
        return known.digest
    return parsed_digest(modules)


def parsed_digest(modules: tuple[str, ...]) -> str:
    """Return a digest of modules' names and code, without comments and docstrings."""
    total = hashlib.sha256()
    with _PARSING:
        for name in modules:
            total.update(name.encode())
            total.update(normalized(module_source(name).decode()))
    return total.hexdigest()


def normalized(source: str) -> bytes:
    """Return a module's code without comments and docstrings, in the interpreter's own layout."""
    tree = parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()  # unparse, not dump: dump's text changes between Python versions
