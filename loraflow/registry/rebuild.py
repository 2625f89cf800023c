"""Name the command that rebuilds an artifact: the run that made it recorded its recipe and all its settings."""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import JsonValue

from loraflow.config import Recipe, yaml
from loraflow.config.load import parse_recipe
from loraflow.config.recipe_text import find_recipe, recipe_files
from loraflow.credentials import mask
from loraflow.failures import Failure
from loraflow.registry.runs import RunRecord, computed, read_runs
from loraflow.store import Ref, Store, open_store

UNKNOWN = (
    "no run record names it: run its recipe again (`loraflow registry` names it); "
    "if it is the champion, `loraflow rollback --reason …` goes back to the model before it"
)
_PRINT_RECIPE = "import json, sys; print(json.load(sys.stdin)['recipe_text'], end='')"


def how_to_rebuild(store: Store, ref: Ref, force: str = "") -> str:
    """Return the next step after an artifact was damaged: the command, with `force` at its end, that computes it again."""
    record = made_by(store, ref)
    if record is None:
        return UNKNOWN
    found = _recipe_file(record)
    file = found or Path(f"{record.recipe}.yaml")
    command = f"`{_command(store, record, file, _text(found) if found else record.recipe_text)}{force}` rebuilds it"
    if found:
        return f"{command}, with the settings of run {record.run}"
    show = f"loraflow show {record.run} --store {shlex.quote(store.uri)} --json"
    return (
        f'write its recipe, which run {record.run} recorded: `{show} | python3 -c "{_PRINT_RECIPE}" > '
        f"{shlex.quote(str(file))}`; then {command}"
    )


def how_to_restore_champion(store: Store, ref: Ref) -> str:
    """Return the next steps after the champion's model was lost or damaged: rebuild it, or go back to the one before."""
    rebuild = how_to_rebuild(store, ref)
    return rebuild if rebuild == UNKNOWN else f"{rebuild}; or `loraflow rollback --reason …`"


def made_by(store: Store, ref: Ref) -> RunRecord | None:
    """Return the run that computed an artifact, else the newest that found it in the cache."""
    runs = [
        (run, stage.stage)
        for run in reversed(read_runs(store))
        for stage in run.stages
        if (stage.fingerprint, stage.digest) == (ref.fingerprint, ref.digest) and run.recipe_text
    ]
    return next((run for run, label in runs if computed(run, label)), runs[0][0] if runs else None)


def _recipe_file(record: RunRecord) -> Path | None:
    for file in sorted([*recipe_files(), *Path().glob("*.yaml")]):
        if mask(_text(file)) == record.recipe_text:
            return file
    try:
        return find_recipe(record.recipe)
    except Failure:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _command(store: Store, record: RunRecord, file: Path, text: str) -> str:
    """Return the command for a recipe's file with this text; `--set` has what differs from the run's settings."""
    command = f"loraflow run {shlex.quote(str(file))}"
    try:
        recipe = parse_recipe(text, name=str(file), is_recorded=True)
    except Failure:  # a recipe of another version; `loraflow run` says what to correct
        return command
    settings = {**dict(_differences(record, recipe)), **revision_of(store, record), **_store_setting(store, record)}
    sets = [f"--set {shlex.quote(f'{key}={_written(value)}')}" for key, value in settings.items()]
    return " ".join([command, *sets])


def _written(value: JsonValue) -> str:
    """Return a value as `--set` takes it: a text without quotes where it needs none."""
    if isinstance(value, str):
        with suppress(yaml.Syntax):
            if yaml.scalar(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False)


def _differences(record: RunRecord, recipe: Recipe) -> Iterator[tuple[str, JsonValue]]:
    """Yield (dotted key, recorded value) of the settings in which a run differs from a recipe.

    A setting that is a mapping, such as data.columns, is compared and given as a whole: its keys are not those of recipes.
    """
    now = dict(_settings(recipe.model_dump(by_alias=True, mode="json")))
    for key, value in _settings(record.resolved):
        if key in now and now[key] != value:
            yield key, value


def _store_setting(store: Store, record: RunRecord) -> dict[str, JsonValue]:
    """Return the setting for a store that has another location than in the run, such as a restored backup."""
    named = record.section("runtime").get("store")
    if not isinstance(named, str) or named == store.uri:
        return {}
    with suppress(Failure):  # a store that cannot be opened is not this store
        if open_store(named).uri == store.uri:
            return {}
    return {"runtime.store": store.uri}


def _settings(values: Mapping[str, JsonValue]) -> Iterator[tuple[str, JsonValue]]:
    """Yield (dotted key, value) of a recipe: its sections' settings, and what is in no section."""
    for section, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{name}", setting) for name, setting in value.items())
        else:
            yield section, value


def revision_of(store: Store, record: RunRecord) -> dict[str, JsonValue]:
    """Return the setting for the run's version of the dataset, if the work tree pins another version by now."""
    from loraflow.data.versions import dvc

    data, stage = record.section("data"), record.stage("version_dataset")
    source = data.get("source")
    in_work_tree = (
        isinstance(source, str)
        and source.endswith(".dvc")
        and data.get("repo") == "."
        and not data.get("rev")
        and not data.get("sources")
    )
    if not (in_work_tree and isinstance(source, str) and stage and record.commit):
        return {}
    try:
        config = store.manifest(stage.ref(store)).payload["config"]
        pinned = dvc.read_pin(".", source, None).md5
    except (Failure, OSError):  # unknown; the command still names all other settings
        return {}
    return {} if isinstance(config, dict) and config.get("md5") == pinned else {"data.rev": record.commit}
