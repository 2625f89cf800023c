"""Write the table of docs/models.md from the families and the rules of `loraflow.training.preview`.

PYTHONPATH=. python -m tests.families.page
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from loraflow.adapters.targets import find_targets
from loraflow.config.lora import PeftConfig
from loraflow.training.preview import Support
from tests.families.tiny import FAMILIES, family_config

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"
VERSION = "5.23"  # of transformers, which the page is written with
BEGIN, END = "<!-- table: tests/families/page.py -->\n", "<!-- end of the table -->\n"
HEAD = (
    "family",
    "architecture",
    "engine",
    "rows",
    "attention of padded rows",
    "quantization",
    "all-linear leaves out",
    "refused",
)


def row_of(family: str) -> tuple[str, ...]:
    """Return a family's cells."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(family))
    support, targets = Support.of(model.config), find_targets(model, PeftConfig())
    left_out = sorted({*targets.left_out.values(), *(["experts"] if targets.experts else [])})
    return (
        family,
        f"`{support.architecture}`",
        support.engine + (f": {support.engine_why}" if support.engine_why else ""),
        support.rows + (f": {support.rows_why}" if support.rows_why else ""),
        support.attention,
        ", ".join(support.quantizations) or "none",
        ", ".join(left_out) or "nothing",
        "; ".join(support.refused) or "nothing",
    )


def table() -> str:
    """Return the table as markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *map(row_of, FAMILIES)]
    return "".join(
        f"| {' | '.join(cells)} |\n".replace("| --- ", "|---").replace("---|---", "---|---") for cells in lines
    )


def main() -> None:
    """Replace the page's table."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
