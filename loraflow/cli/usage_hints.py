"""What a wrong call says beyond click's own message: what the missing value is, and which recipes there are."""

from __future__ import annotations

from pathlib import Path

import click

SHOWN = 8  # recipes


def usage_hint(error: click.ClickException) -> str:
    """Return a line that says what a missing option or recipe would be; empty for other errors."""
    if not isinstance(error, click.MissingParameter) or error.param is None:
        return ""
    if isinstance(error.param, click.Option):
        return f"  {error.param.opts[0]}  {error.param.help}" if error.param.help else ""
    if error.param.name != "recipe":
        return ""
    names = sorted(path.stem for path in Path("configs").glob("*.yaml"))
    if not names:
        return "  There are no recipes in configs/ here. To make one: loraflow init --data FILE --base MODEL"
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  Recipes here: {', '.join(names[:SHOWN])}{more}"
