"""`loraflow publish`: publish a model on the Hugging Face hub, with a card."""

from __future__ import annotations

import click

from loraflow.cli import quiet_logging, store_option
from loraflow.cli.model_options import base_option


@click.command()
@click.argument("model")
@click.option(
    "--repo", required=True, metavar="ORG/NAME", help="Repository on the hub; it is created if it does not exist."
)
@click.option(
    "--merged/--adapter", default=True, show_default=True, help="Publish the merged model, or only the adapter."
)
@click.option("--private/--public", default=True, show_default=True, help="Visibility of a new repository.")
@click.option("--license", "licence", help="Licence in the card. Default: the base's licence, if it is known.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and upload nothing.")
@base_option
@store_option
def publish(
    model: str, repo: str, merged: bool, private: bool, licence: str | None, dry_run: bool, base: str | None, store: str
) -> None:
    """Publish MODEL on the hub: weights, tokenizer, and a card. The token is read from HF_TOKEN."""
    quiet_logging()
    from loraflow.serving import publish as publishing
    from loraflow.serving.card import What
    from loraflow.serving.models import find_model
    from loraflow.store import open_store

    opened = open_store(store)
    what: What = "merged" if merged else "adapter"
    with opened.reader_lock():
        found = find_model(opened, model, base)
        if dry_run:
            with publishing.package(opened, found, repo, what, licence) as (folder, facts):
                click.echo(f"{repo}, one commit: {facts.subject}")
                for path in sorted(folder.iterdir()):
                    click.echo(f"{path.stat().st_size:>14,}  {path.name}")
                click.echo("\n" + (folder / "README.md").read_text(encoding="utf-8"))
            return
        publication = publishing.publish(opened, found, repo, what=what, private=private, licence=licence)
    click.echo(f"published  {publication.url}")
