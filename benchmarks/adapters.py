"""Write the table of docs/adapters.md: train, kill, resume, evaluate, export and merge every variant.

PYTHONPATH=. python benchmarks/adapters.py [VARIANT …]      ten seconds for each variant; other rows are unchanged
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
BEGIN, END = "<!-- table: benchmarks/adapters.py -->\n", "<!-- end of the table -->\n"
HEAD = ("variant", "recipe", "loss, step 1 → 6", "killed at 3, resumed", "exported", "evaluated", "merged",
        "to peft's merge", "KL merged", "KL base")  # fmt: skip


def recipe_of(settings: Mapping[str, JsonValue]) -> str:
    """Return a variant's settings in the recipe, without those that all variants share."""
    from tests.variants import ALL

    parts = []
    for key, value in settings.items():
        value = ["all four", *value[len(ALL) :]] if isinstance(value, list) and value[: len(ALL)] == ALL else value
        parts.append(f"{key.replace('__', '.').removeprefix('peft_config.')}: {json.dumps(value).replace(chr(34), '')}")
    return "; ".join(parts)


def order_of(adapter: Path) -> str:
    """Return how an adapter's matrices are merged: the order of operations, and where sums are rounded."""
    from loraflow.adapters.adapter_config import AdapterConfig
    from loraflow.adapters.merge_plan import plan_merge

    plan = plan_merge(AdapterConfig.read(adapter), adapter)
    if plan is None:
        return "in memory, by peft"
    updates = plan.updates.values()
    found = {
        "W + s·BA in fp32, rounded once": any(update.magnitude is None and not update.embedding for update in updates),
        "m/‖W + s·BA‖ · (W + s·BA) in fp32, rounded once": any(update.magnitude is not None for update in updates),
        "embedding: fp32, rounded once": any(update.embedding for update in updates),
        "whole module: its own values, cast": bool(plan.replaced),
    }
    return "streamed: " + "; ".join(text for text, present in found.items() if present)


def line_of(name: str, settings: Mapping[str, JsonValue], base: Path, shards: Path, folder: Path) -> tuple[str, ...]:
    """Run a variant and return its cells."""
    from tests.variants import exercise

    result = exercise(settings, base, shards, folder)
    assert result["last_loss"] < result["first_loss"], "it does not learn"
    assert result["exported"] < 1e-5, "the saved adapter is not what was trained"
    same, distance = "same bits", result["merge_ulps"]
    return (
        name,
        recipe_of(settings),
        f"{result['first_loss']:.2f} → {result['last_loss']:.2f}",
        same if result["resumed"] == 0 else f"{result['resumed']:.1e}",
        f"loss {result['exported']:.0e} off" if result["exported"] else "same loss",
        f"{result['evaluated']:.2f}",
        order_of(result["folder"]),
        same if distance == 0 else f"{distance:g} ulp",
        f"{result['kl']:.1e}" if result["kl"] >= 1e-7 else "< 1e-7",  # below, fp32's own noise
        f"{result['moved']:.1e}",
    )


def refused_row() -> tuple[str, ...]:
    """Return LoftQ's row: the error for a recipe with LoftQ on a plain base."""
    from loraflow.failures import BadConfig
    from tests.unit.training.test_training import recipe

    settings = {"peft_config__init_lora_weights": "loftq"}
    try:
        recipe(**settings)
    except BadConfig as failure:
        reason = str(failure).split("loftq ", 1)[1].splitlines()[0].strip()
        return ("LoftQ", recipe_of(settings), f"refused: {reason}", *["needs nf4, CUDA"] * 2, *["–"] * 5)
    raise AssertionError("LoftQ was accepted on a plain base")


def rows_of(page: str) -> dict[str, str]:
    """Return a page's lines by variant."""
    lines = page.split(BEGIN)[1].split(END)[0].splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("|")}


def main() -> None:
    """Write the rows of the variants on the command line, by default of all."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.conftest import build_phi3
    from tests.unit.training.test_training import tokenize
    from tests.variants import VARIANTS

    names = sys.argv[1:] or list(VARIANTS)
    page = PAGE.read_text(encoding="utf-8")
    rows = rows_of(page)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):  # trl's own log
            base = build_phi3(folder / "phi3")
            shards = tokenize(base, folder)
        for number, name in enumerate(names):
            with contextlib.redirect_stdout(sys.stderr):
                cells = line_of(name, VARIANTS[name], base, shards, folder / str(number))
            rows[name] = f"| {' | '.join(cells)} |"
            print(rows[name], flush=True)
    rows["LoftQ"] = f"| {' | '.join(refused_row())} |"
    table = [
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
        *(rows[name] for name in (*VARIANTS, "LoftQ") if name in rows),
    ]
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(table) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
