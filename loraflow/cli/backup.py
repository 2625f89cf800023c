"""`loraflow backup`: copy the store to a folder while runs use it."""

from __future__ import annotations

from pathlib import Path

import click

from loraflow.cli import quiet_logging, store_option
from loraflow.store import open_store


@click.command()
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@store_option
def backup(target: Path, store: str) -> None:
    """Copy the artifacts, promotion logs and run records of the store to the folder TARGET, which is a store itself.

    Runs may use the store meanwhile. Repeated with the same TARGET, it copies what is new. Each copy is hashed.
    """
    quiet_logging()
    from loraflow.registry.backup import back_up, require_complete

    opened = open_store(store)
    copied = failed = size = 0
    for item in back_up(opened, target):
        if item.problem:
            failed += 1
            click.echo(f"not copied  {item.ref}: {item.problem}", err=True)
        else:
            copied, size = copied + 1, size + item.size
    click.echo(
        f"{copied} artifacts copied ({size / 2**20:.1f} MiB), with the promotion logs and run records, to {target}"
    )
    require_complete(failed, opened, target)
