"""`loraflow init`: create a recipe and a versioned dataset from a user's own file."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging
from loraflow.cli.data import unread_keys
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.readers import Row


RECIPE = """\
# {title}
#
#   loraflow plan {file}
#   loraflow run {file}
name: {name}

data:
  source: {source}                # pins every byte; a run refuses files that differ from it
  train: [{train}]{columns}
  {heldout}
  loss_on: assistant              # learn the answers, not the questions
  too_long: drop                  # rows beyond max_length are left out, and counted in the report

base:
  model: {base}{repack}
  dtype: {dtype}

training_config:                  # the names of trl.SFTConfig
  learning_rate: 2.0e-4           # LoRA takes ten times the rate of full fine-tuning
  lr_scheduler_type: cosine
  warmup_steps: 0.1               # a share of the steps
  num_train_epochs: {epochs}             # {rows} rows: {why_epochs}
  per_device_train_batch_size: 4  # times the next line: the global batch, which decides the result
  gradient_accumulation_steps: 4
  max_length: {max_length}                # the longest of your chats has about {longest} tokens
  bf16: {bf16}
  packing: {packing}                  # several short chats share a row; attention stays inside each chat
  gradient_checkpointing: null    # recompute activations only if memory needs it: a fifth slower
  logging_steps: 10
  seed: 0

peft_config:                      # the names of peft.LoraConfig
  r: 16
  lora_alpha: 32                  # twice the rank, as in the Phi-3 model card
  lora_dropout: 0.05
  target_modules: all-linear      # every projection of every layer, by any name

evaluation:
  metrics: [{metrics}]
  max_rows: 200
  max_new_tokens: {new_tokens}             # the longest of your answers has about {longest_answer} tokens
  dtype: float32                  # scores repeat exactly

gate:
  primary: {primary}             # must improve on base and champion
  guards: {guards}

register:
  model: {name}
"""


@click.command()
@click.option(
    "--data",
    "data_file",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder with chats (JSONL, JSON, CSV, TSV, Parquet).",
)
@click.option("--base", required=True, help="Base model: bundled:smollm2, a folder, or a hub id.")
@click.option("--name", help="Name of the recipe. Default: the name of the file.")
def init(data_file: Path, base: str, name: str | None) -> None:
    """Write configs/NAME.yaml, a data folder with its .dvc file, and prefect.yaml, from a file or folder of chats."""
    quiet_logging()
    from loraflow.data import dvc
    from loraflow.data.guess_columns import columns_of
    from loraflow.data.readers import match_files, read_rows
    from loraflow.flows.server.new_prefect_yaml import write_prefect_yaml

    name = re.sub(r"[^a-z0-9._-]+", "-", (name or data_file.stem).lower()).strip("-.") or "mine"
    recipe = Path("configs", f"{name}.yaml")
    target = Path("data") if not Path("data").exists() and not Path("data.dvc").exists() else Path("datasets", name)
    for path in (recipe, target):
        if path.exists():
            raise BadConfig(f"{path} exists already.", next_step="choose another --name, or remove it")
    folder, patterns = (data_file, ["*"]) if data_file.is_dir() else (data_file.parent, [data_file.name])
    names = match_files(folder, patterns)
    columns = columns_of(folder / names[0], names[0])
    rows = list(read_rows(folder, names, "auto", columns))
    chats = _chats(rows, data_file)
    target.mkdir(parents=True)
    for file in names:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)
    pin = dvc.add(str(target))
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(_recipe(name, recipe, pin.dvc_file, names, base, chats, columns), encoding="utf-8")
    click.echo(f"chats: {len(chats)}; malformed rows: {len(rows) - len(chats)}")
    _, heldout, unused = _split_by_name(names)
    if heldout:
        click.echo(f"held out, by their names: {', '.join(heldout)}")
    if unused:
        click.echo(f"neither trained on nor held out: {', '.join(unused)}")
    click.echo(f"{recipe}   the recipe; its comments explain each line")
    click.echo(f"{pin.dvc_file}   the dataset's version, {pin.md5}")
    if deployments := write_prefect_yaml(Path(), name):
        click.echo(f"{deployments}   deployments for `loraflow up` and `loraflow deploy`")
    click.echo(f"next  loraflow plan {recipe}   ·   loraflow run {recipe}")


def _chats(rows: list[Row], data_file: Path) -> list[list[Message]]:
    """Return the well-formed rows; print the first malformed ones and the keys that are not read.

    Raises:
        BadData: no row is a valid chat.
    """
    chats = [row.messages for row in rows if row.messages is not None]
    malformed = [row for row in rows if row.messages is None]
    for row in malformed[:5]:
        click.echo(f"malformed  {row.place}: {row.problem}", err=True)
    if unread := unread_keys(rows):
        click.echo(unread, err=True)
    if not chats:
        raise BadData(
            "No row of this file is a valid chat.",
            where=str(data_file),
            got=malformed[0].problem or "" if malformed else "no rows",
            expected="messages, ShareGPT, Alpaca or prompt/completion",
            next_step="rename columns that have other names, or map them with data.columns in a recipe",
        )
    return chats


def _recipe(
    name: str,
    file: Path,
    source: str,
    names: list[str],
    base: str,
    chats: list[list[Message]],
    columns: dict[str, str],
) -> str:
    """Fill in the template from the lengths and formats of the chats, at about three characters a token: a safe guess."""
    longest = max(sum(len(message["content"]) for message in chat) for chat in chats) // 3 + 40
    answers = [chat[-1]["content"] for chat in chats]
    longest_answer = max(map(len, answers)) // 3 + 8
    as_json = all(_is_object(answer) for answer in answers)
    train, heldout, _ = _split_by_name(names)
    few, small = len(chats) < 2000, base.startswith("bundled:")
    return RECIPE.format(
        title=f"{name}: LoRA on {base}",
        name=name,
        file=file,
        source=source,
        train=", ".join(map(_plain, train)),
        heldout=f"heldout: [{', '.join(map(_plain, heldout))}]   # by their names; only the gate uses them"
        if heldout
        else "heldout_fraction: 0.1           # by a seeded hash of each prompt; only the gate uses them",
        columns=f"\n  columns: {json.dumps(columns)}  # guessed from the first row" if columns else "",
        base=base if re.fullmatch(r"[\w./:-]+", base) else json.dumps(base, ensure_ascii=False),
        repack="\n  repack: phi3                    # fused projections, as in Phi-3"
        if base.startswith("bundled:")
        else "",
        epochs=3 if few else 1,
        rows=f"{len(chats):,}",
        why_epochs="few, so train on each three times" if few else "enough to train on each once",
        max_length=min(2048, max(256, 1 << (longest - 1).bit_length())),
        longest=longest,
        dtype="float32                  # any CPU computes in it" if small else "bfloat16",
        bf16="false                     # as the base" if small else "true                      # as the base",
        packing="false" if base.startswith("bundled:") else "true",
        metrics="token_loss, exact_match, json_fields" if as_json else "token_loss, exact_match, token_f1, rouge, chrf",
        new_tokens=min(1024, max(32, 1 << (longest_answer - 1).bit_length())),
        longest_answer=longest_answer,
        primary="field_f1" if as_json else "token_loss",
        guards=f"{{json_valid: {_margin(len(chats), 0.01)}}}"
        if as_json
        else f"{{rougeL: {_margin(len(chats), 0.02)}}}",
    )


def _margin(chats: int, least: float) -> float:
    """Return a guard's margin that an unchanged model passes if a tenth of the rows is held out: whole hundredths."""
    from loraflow.evaluation.power import margin_of_unchanged

    of_unchanged = margin_of_unchanged(max(chats // 10, 1), 0.95, "rougeL") or least
    return min(max(least, math.ceil(100 * of_unchanged + 0.5) / 100), 0.5)


def _split_by_name(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the files to train on, to hold out, and to leave out, by the usual names of splits.

    Test files are held out. Validation files are held out if there are no test files, and left out otherwise.
    """
    splits: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
    for name in names:
        found = re.match(r"(?:(tests?|held-?out)|(valid(?:ation)?|val|dev|eval))(?![a-z])", Path(name).stem.lower())
        splits["train" if found is None else "test" if found[1] else "validation"].append(name)
    train, test, validation = splits.values()
    if not train:
        return names, [], []
    return (train, test, validation) if test else (train, validation, [])


def _plain(text: str) -> str:
    """Return a text as a YAML scalar, quoted if YAML would read it as another value."""
    return text if re.fullmatch(r"[A-Za-z_/.][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
