"""`loraflow show, compare`: a run's report, an artifact's manifest, the facts about the champion; runs side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic_core import to_json

from loraflow.cli import json_option, model_option, quiet_logging, store_option
from loraflow.credentials import mask
from loraflow.failures import BadConfig, CorruptArtifact, Failure
from loraflow.identity import short
from loraflow.registry.runs import PREFECT_ID, RUN_ID, RunRecord, StageRun, find_named_run, read_report
from loraflow.store import Manifest, Ref, Store, open_store

if TYPE_CHECKING:
    from pydantic import JsonValue

    from loraflow.serving.champion import Champion, Files, MadeWith, PromotionEntry, RunScores


LABEL = 10  # width of the first column
MIN_PREFIX = 4  # shortest beginning of a fingerprint or digest that is looked up


@click.command()
@click.argument("what")
@model_option
@store_option
@json_option
def show(what: str, model: str | None, store: str, as_json: bool) -> None:
    """Show WHAT: a run's id, `champion` or `champion:NAME`, or the fingerprint or digest of an artifact.

    The first characters of a fingerprint or digest are enough, from four. For the champion: who promoted it and why, and
    the run, data, base, recipe, scores and files behind it. Exit status 1 if the champion's files are missing or incomplete.
    """
    quiet_logging()
    opened = open_store(store)
    if what.split(":")[0] == "champion":
        _show_champion(opened, what.partition(":")[2] or None, model, as_json)
        return
    if model is not None:
        raise BadConfig("--model belongs to `loraflow show champion`.", where=what, next_step="leave --model out")
    is_run = RUN_ID.fullmatch(what) or PREFECT_ID.fullmatch(what)
    record = find_named_run(opened, what) if is_run else None
    if record is not None:
        report = None if as_json else read_report(opened, record.run)
        click.echo(report or json.dumps(record.model_dump(), indent=1, sort_keys=True, ensure_ascii=False))
        if not as_json:
            _show_memory(opened, record)
        return
    ref = _find_artifact(opened, what)
    if ref is None:
        raise BadConfig("There is no such run or artifact.", where=what, next_step="`loraflow runs` lists the runs")
    manifest = opened.manifest(ref)
    if as_json:
        click.echo(manifest.model_dump_json())
        return
    for line in _artifact_lines(opened, ref, manifest):
        click.echo(line)


def _show_memory(store: Store, record: RunRecord) -> None:
    lines = list(run_memory_lines(store, record.stages))
    if lines:
        click.echo("\nMemory of the stages in GiB, measured when they were computed\n")
        click.echo("\n".join(lines))


def _find_artifact(store: Store, prefix: str) -> Ref | None:
    if len(prefix) < MIN_PREFIX:
        return None
    found = (ref for ref in store.artifacts() if ref.fingerprint.startswith(prefix) or ref.digest.startswith(prefix))
    return next(found, None)


def _artifact_lines(store: Store, ref: Ref, manifest: Manifest) -> Iterator[str]:
    yield f"{ref}   {store.location(ref)}"
    yield f"  computed  {manifest.provenance['started']} in {manifest.provenance['seconds']} s"
    yield f"  size      {manifest.size:,} bytes in {len(manifest.files)} files"
    if memory := memory_of(manifest):
        yield f"  memory    {memory}"
    for name, used in manifest.input_refs(store.uri).items():
        yield f"  input     {name}: {used}"
    for key, value in manifest.figures.items():
        yield f"  {key}: {value}"
    yield f"  config    {json.dumps(manifest.payload['config'], ensure_ascii=False)}"


def _show_champion(store: Store, named: str | None, model: str | None, as_json: bool) -> None:
    from loraflow.registry.rebuild import how_to_restore_champion
    from loraflow.serving.champion import describe_champion
    from loraflow.serving.models import champion_entry, only_model

    if named and model and named != model:
        raise BadConfig("Two models are named.", where=f"champion:{named} --model {model}", next_step="leave one out")
    champion = describe_champion(store, named or model or only_model(store))
    if as_json:
        click.echo(json.dumps(champion.model_dump(), ensure_ascii=False))
    else:
        for line in _champion_lines(champion):
            click.echo(line)
    if champion.merged.problems:
        raise CorruptArtifact(
            "The champion's merged model is gone or incomplete.",
            where=champion.merged.uri,
            got="; ".join(champion.merged.problems[:3]),
            next_step=how_to_restore_champion(store, champion_entry(store, champion.model).merged),
        )


def _champion_lines(champion: Champion) -> Iterator[str]:
    yield f"champion of {champion.model}: merge {short(champion.merged.digest)}"
    yield ""
    if champion.in_force.action == "rollback":
        yield from _entry_lines("rollback", champion.in_force)
    yield from _entry_lines("promoted", champion.promoted)
    yield from _run_lines(champion)
    yield from _rows("recipe", *_recipe_parts(champion))
    yield from _rows("data", *_data_parts(champion))
    yield from _rows("base", *_base_parts(champion))
    yield from _rows("made with", *_made_with_parts(champion.made_with))
    if champion.scores is None:
        yield from _rows("scores", "not recorded: no run with this model has a summary in the store")
    else:
        yield from _score_lines(champion.scores)
    if champion.reserve is not None:
        yield from _rows("reserve", str(champion.reserve))
    yield from _rows("merged", *_file_parts(champion.merged))
    if champion.adapter is None:
        yield from _rows("adapter", "not recorded")
    else:
        yield from _rows("adapter", *_file_parts(champion.adapter))


def _rows(label: str, *values: str) -> Iterator[str]:
    """Yield a labelled value; further values are indented below it."""
    for number, value in enumerate(values):
        yield f"{label if number == 0 else '':<{LABEL}}{value}"


def _entry_lines(label: str, entry: PromotionEntry) -> Iterator[str]:
    yield from _rows(label, f"{entry.time} by {entry.actor}, entry {entry.entry} of the promotion log", *entry.reasons)


def _run_lines(champion: Champion) -> Iterator[str]:
    run, promoted_by = champion.run, champion.promoted_by_run
    if run is None:
        missing = "not recorded: the store has no record of a run with this model"
        yield from _rows("run", missing, *([f"promoted with run {promoted_by}"] if promoted_by else []))
        return
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started))
    lines = [f"{run.run}, started {started} by {run.actor or 'unknown'}, {run.seconds:.0f} s"]
    if not run.computed:
        lines.append("the model was cached in this run; the record of the run that computed it is gone")
    if promoted_by and promoted_by != run.run:
        lines.append(f"promoted with run {promoted_by}, which found the model in the cache")
    changed = {True: ", with uncommitted changes", False: ", nothing uncommitted", None: ""}[run.uncommitted]
    lines.append(
        f"git commit {run.commit}{changed}"
        if run.commit
        else "no git commit: not in a repository, or before its first commit"
    )
    yield from _rows("run", *lines)


def _recipe_parts(champion: Champion) -> list[str]:
    recipe = champion.recipe
    adapter, training = recipe.settings.get("peft_config", {}), recipe.settings.get("training_config", {})
    shown = {"r": adapter.get("r"), "lora_alpha": adapter.get("lora_alpha")}
    shown |= {key: training.get(key) for key in ("learning_rate", "max_steps", "num_train_epochs", "seed")}
    if training.get("max_steps", -1) == -1:
        del shown["max_steps"]
    else:
        del shown["num_train_epochs"]  # max_steps overrides it
    texts = {
        key: f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in shown.items()
        if value is not None
    }
    settings = ", ".join(f"{key} {text}" for key, text in texts.items())
    lines = [f"{recipe.name or 'not recorded'}" + (f" ({recipe.method})" if recipe.method else "")]
    return lines + ([settings] if settings else [])


def _data_parts(champion: Champion) -> list[str]:
    data = champion.dataset
    names = {"train": "training", "heldout": "held-out"}
    rows = ", ".join(f"{count} {names.get(name, name)} rows" for name, count in data.rows.items())
    lines = [f"md5 {data.md5 or 'not recorded'}" + (f", {rows}" if rows else "")]
    if data.source:
        repo = f" of {mask(data.repo)}" if data.repo not in (None, ".") else ""
        lines.append(data.source + repo + (f" at revision {data.revision}" if data.revision else ""))
    if data.commit:
        lines.append(f"git commit {data.commit}" + ("" if data.revision else ", HEAD at the end of the run"))
    return lines


def _base_parts(champion: Champion) -> list[str]:
    base = champion.base
    lines = [base.model or "not recorded"]
    lines += [f"hub commit {base.commit}"] if base.commit else []
    lines += [f"content {base.content}"] if base.content else []
    return [*lines, f"artifact {base.digest}" if base.digest else "artifact not recorded"]


def _made_with_parts(made: MadeWith) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in made.versions.items()) or "not recorded"
    yield f"trained on {made.device or 'a device that is not recorded'}{f', {made.machine}' if made.machine else ''}"
    for stage, name in made.artifacts.items():
        fingerprint, _, digest = name.partition("/")
        yield f"{stage} {short(fingerprint)}/{short(digest)}"


def _score_lines(scores: RunScores) -> Iterator[str]:
    sides = [side for side in ("base", "tuned", "champion") if scores.metrics.get(side)]
    which = "; tuned is this model, champion the one that it was compared with" if "champion" in sides else ""
    yield from _rows("scores", f"of run {scores.run}, with {100 * scores.confidence:.4g}% intervals{which}")
    for rows, tuned in (scores.metrics.get("tuned") or {}).items():
        by_side = [(scores.metrics.get(side) or {}).get(rows, {}) for side in sides]
        table = [_cells(metric, [of_side.get(metric) for of_side in by_side]) for metric in tuned]
        yield from _table_lines([[f"{rows}, {next(iter(tuned.values())).n} rows", *sides], *table])
    for by in dict.fromkeys(part.by for part in scores.slices):
        table = [
            _cells(
                f"{part.name}, {part.rows} rows, {metric}", [part.values.get(side, {}).get(metric) for side in sides]
            )
            for part in scores.slices
            if part.by == by
            for metric in part.values["tuned"]
        ]
        yield from _table_lines([[f"by {by}", *sides], *table])
    if scores.seeds:
        table = [
            _cells(s.metric, [f"{x:.3f}" for x in (*s.values.values(), s.mean, s.deviation)]) for s in scores.seeds
        ]
        yield from _table_lines([["by training seed", *scores.seeds[0].values, "mean", "deviation"], *table])


def _cells(label: str, values: Iterable[object]) -> list[str]:
    return [f"  {label}", *("" if value is None else str(value) for value in values)]


def _table_lines(table: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"{'':<{LABEL}}{line}".rstrip()


def _file_parts(files: Files) -> list[str]:
    if files.problems:
        return [files.uri, f"gone or incomplete: {'; '.join(files.problems[:3])}"]
    if files.contents == "intact":
        return [files.uri, "intact: hashed on this machine, and not changed since"]
    return [files.uri, "contents not checked since they were written or copied; `loraflow verify --deep` hashes them"]


def memory_of(manifest: Manifest) -> str | None:
    """Return a line about the memory of the stage that made an artifact; None if it was not measured."""
    return memory_line(manifest.provenance.get("memory"))


def memory_line(recorded: JsonValue) -> str | None:
    """Return peak, estimate and its parts, as `read_memory` gives them; None if nothing was measured."""
    from loraflow.training.memory import describe

    if not isinstance(recorded, dict):
        return None
    peaks, estimate = recorded.get("peak_bytes"), recorded.get("estimate_bytes")
    sizes = {key: size for key, size in peaks.items() if isinstance(size, int)} if isinstance(peaks, dict) else {}
    peak = sizes.get("gpu") or sizes.get("host")
    if not peak:
        return None
    memory = "on the GPU" if sizes.get("gpu") else "of main memory"
    line = f"peak {peak / 2**30:.2f} GiB {memory}"
    parts = {key: size for key, size in estimate.items() if isinstance(size, int)} if isinstance(estimate, dict) else {}
    if parts:
        total = sum(parts.values())
        line += f", estimated {total / 2**30:.2f} ({total / peak:.0%}): {describe(parts)}"
    return line


def run_memory_lines(store: Store, stages: Iterable[StageRun]) -> Iterator[str]:
    """Yield a line for each stage of a run whose artifact is still in the store and whose memory was measured."""
    shown = list(stages)
    width = max((len(stage.stage) for stage in shown), default=0) + 2
    for stage in shown:
        try:
            line = memory_of(store.manifest(stage.ref(store)))
        except Failure:  # removed since then
            continue
        if line:
            yield f"  {stage.stage:<{width}}{line}"


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B [C]")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page with everything to this file.")
@store_option
@json_option
def compare(models: tuple[str, ...], html: str | None, store: str, as_json: bool) -> None:
    """Compare the models of two or three runs, or `champion`: B and C against A, on the held-out rows that both have.

    Shown are the scores, paired differences with intervals and bounds, changed settings, and the rows that changed most.
    No look at the held-out rows is counted, so do not choose a model by it: that is what the gate is for.
    """
    quiet_logging()
    if not 2 <= len(models) <= 3:
        raise BadConfig(
            "Two or three models can be compared.",
            where="loraflow compare",
            got=str(len(models)),
            next_step="`loraflow runs` lists the runs",
        )
    from loraflow.serving.compared import compare_models, html_page, terminal_lines

    comparison = compare_models(open_store(store), models)
    if html is not None:
        Path(html).write_text(html_page(comparison), encoding="utf-8")
    if as_json:
        click.echo(to_json({"models": models, "against_first": comparison.pairings}, inf_nan_mode="null"))
        return
    for line in terminal_lines(comparison):
        click.echo(line)
    if html is not None:
        click.echo(f"page: {html}")
