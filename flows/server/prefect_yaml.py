"""Read `prefect.yaml`: the deployments with their flows, and who is notified."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect import Flow
from prefect.exceptions import MissingFlowError, ScriptError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, JsonValue, ValidationError

import loraflow
from loraflow.config import yaml
from loraflow.config.project import FILE, read_prefect_yaml
from loraflow.config.recipe_text import recipe_files, recipe_names
from loraflow.failures import BadConfig
from loraflow.flows.server.automations import Notifications, Project
from loraflow.flows.server.deployed_parameters import (
    check_parameters,
    check_settings,
    is_filled_in_later,
    recipe_file,
    texts,
    warn_of_missing_branches,
    with_recipe_values,
)
from loraflow.flows.server.deployment_spec import (
    ENTER_PROJECT,
    ConcurrencyLimit,
    DeploymentEntry,
    DeploymentSpec,
    WorkPool,
    or_known,
    project_of,
)
from loraflow.flows.server.new_prefect_yaml import write_prefect_yaml
from loraflow.flows.server.project import import_own_flow, refuse_shadowed_modules
from loraflow.flows.server.schedules import Schedule

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logging.getLogger("loraflow")
DOCUMENT_KEYS = ("name", "prefect-version", "build", "push", "pull", "definitions", "notifications", "deployments")
STEP_INPUTS = ("project", "id", "requires")  # of loraflow's pull step; the last two are Prefect's, of any step
MAX_PROBLEMS = 5
# the keys of each section; those of a deployment itself are DeploymentEntry's
MODELS: dict[str | int, type[BaseModel]] = {
    "work_pool": WorkPool,
    "concurrency_limit": ConcurrencyLimit,
    "schedules": Schedule,
    "notifications": Notifications,
}


class Place(NamedTuple):
    """A section of the file, for messages."""

    file: Path
    lines: dict[yaml.Path, int]
    path: yaml.Path

    def __str__(self) -> str:
        name, *rest = self.path
        names = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        return f"{self.file}:{yaml.nearest_line(self.lines, self.path)}: {name}{names}"


def find_prefect_yaml() -> Path:
    """Return the path of the project's `prefect.yaml`.

    It is in the working directory. A project with recipes and without this file gets one. A folder without recipes is no
    project; there, the file of the checkout that loraflow is imported from is used.

    Raises:
        BadConfig: there is no such file.
    """
    if Path(FILE).is_file():
        return Path(FILE)
    if recipe_files():
        written = write_prefect_yaml(Path())
        log.warning("%s was written, with deployments for the recipes in configs/; you can edit it", FILE)
        return written or Path(FILE)
    checkout = Path(loraflow.__file__).parent.parent / FILE
    if checkout.is_file():
        return checkout
    raise BadConfig(
        f"{FILE} was not found, and there are no recipes.",
        where=str(Path.cwd()),
        expected=f"a project's folder, with configs/ and {FILE}",
        next_step="go to the project's folder; or loraflow init --data FILE --base MODEL",
    )


def read_all(file: Path, only: list[str] | None = None) -> tuple[list[DeploymentSpec], Notifications]:
    """Read the notifications, and the deployments: all of them or those named `flow/deployment`.

    Raises:
        BadConfig: the file cannot be read, has no such deployment, an unknown key, or a wrong value; or a module beside it
            has the name of a library's.
    """
    document = _read(file)
    specs = _specs(document, file, only)
    refuse_shadowed_modules(file.parent)
    return specs, _notifications(document, file)


def _read(file: Path) -> dict[str, JsonValue]:
    document = read_prefect_yaml(file)
    if not isinstance(document, dict):
        raise BadConfig(
            f"{FILE} is empty, or is not a mapping.",
            where=str(file),
            expected="pull and deployments",
            next_step=f"remove {FILE}, and `loraflow deploy` writes one",
        )
    return document


def read_project(file: Path) -> Project | None:
    """Return the project of a file, with all of its retrainings; None if its deployments name no project."""
    specs = _all_specs(_read(file), file).values()
    names = [spec.project for spec in specs if spec.project is not None]
    if not names:
        return None
    retrains = sorted(spec.name for spec in specs if spec.flow_name == "retrain" and spec.project == names[0])
    return Project(names[0], tuple(retrains))


def _all_specs(document: dict[str, JsonValue], file: Path) -> dict[str, DeploymentSpec]:
    entries = document.get("deployments")
    if not isinstance(entries, list) or not entries:
        raise BadConfig(
            f"{FILE} has no deployments.",
            where=str(file),
            expected="a list under `deployments`",
            next_step=f"add one; without a {FILE}, `loraflow deploy` writes one for the recipes in configs/",
        )
    lines = yaml.first_lines(file.read_text(encoding="utf-8-sig"))
    _check_document(document, file, lines)
    specs: dict[str, DeploymentSpec] = {}
    for number, entry in enumerate(entries):
        if _is_empty(entry):
            continue
        spec = _to_spec(entry, document, Place(file, lines, ("deployments", number)))
        if spec.full_name in specs:
            raise BadConfig(
                "Two deployments have the same name.",
                where=str(file),
                got=spec.full_name,
                next_step=f"rename one of them in {FILE}",
            )
        specs[spec.full_name] = spec
    if not specs:
        raise BadConfig(
            f"{FILE} has no deployment with a name.",
            where=str(file),
            expected="a list under `deployments`",
            next_step="give a deployment a name and an entrypoint",
        )
    return specs


def _is_empty(entry: JsonValue) -> bool:
    """Tell whether an entry is the form that `prefect init` writes. `prefect deploy` skips it, too."""
    return isinstance(entry, dict) and "name" in entry and not entry["name"] and not entry.get("entrypoint")


def _refuse_equal_triggers(spec: DeploymentSpec, where: str) -> None:
    """Refuse two triggers of a deployment with one name, by which a deploy finds a trigger's automation again."""
    names = [trigger.name for trigger in spec.triggers if trigger.name]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BadConfig(
            "Two triggers have the same name.",
            where=f"{where}.triggers",
            got=repeated[0],
            next_step=f"give each trigger of the deployment a name of its own in {FILE}",
        )


def _specs(document: dict[str, JsonValue], file: Path, only: list[str] | None) -> list[DeploymentSpec]:
    specs = _all_specs(document, file)
    if missing := set(only or []) - specs.keys():
        raise BadConfig(
            "There is no such deployment.",
            where=str(file),
            expected=", ".join(sorted(specs)),
            got=", ".join(sorted(missing)),
            next_step="correct --only",
        )
    selected = [_with_recipe(spec, file) for name, spec in specs.items() if not only or name in only]
    for spec in selected:
        check_settings(spec, file.parent, f"{file}: {spec.full_name}")
        warn_of_missing_branches(spec, file.parent, f"{file}: {spec.full_name}")
    return [with_recipe_values(spec, file.parent, f"{file}: {spec.full_name}") for spec in selected]


def _check_document(document: dict[str, JsonValue], file: Path, lines: dict[yaml.Path, int]) -> None:
    unknown = [str(key) for key in document if key not in DOCUMENT_KEYS and not str(key).startswith("x-")]
    if unknown:
        raise BadConfig(
            f"{FILE} has a key that has no effect.",
            where=str(file),
            got="; ".join(
                f"line {yaml.nearest_line(lines, (key,))}: {key}{or_known(key, DOCUMENT_KEYS)}"
                for key in unknown[:MAX_PROBLEMS]
            ),
            next_step="remove it, or correct its name",
        )
    _refuse_steps(document, FILE, f"{file}: ")
    pulls: list[tuple[yaml.Path, JsonValue]] = [(("pull",), document.get("pull"))]
    entries = document.get("deployments")
    for number, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            pulls.append((("deployments", number, "pull"), entry.get("pull")))
    for path, pull in pulls:
        _check_project(pull, document.get("name"), Place(file, lines, path))


def _refuse_steps(section: dict[str, JsonValue], what: str, where: str) -> None:
    for key in ("build", "push"):
        if section.get(key):
            raise BadConfig(
                f"{what} has {key} steps, which loraflow deploy does not run.",
                where=where + key,
                next_step="remove them, or use `prefect deploy`",
            )


def _check_project(pull: JsonValue, name: JsonValue, place: Place) -> None:
    listed = [pull] if isinstance(pull, dict) else pull if isinstance(pull, list) else []
    steps = [step for step in listed if isinstance(step, dict)]
    for number, step in enumerate(listed):
        inputs = step.get(ENTER_PROJECT) if isinstance(step, dict) else None
        if inputs and not (isinstance(inputs, dict) and inputs.keys() <= set(STEP_INPUTS)):
            unknown = [key for key in inputs if key not in STEP_INPUTS] if isinstance(inputs, dict) else [str(inputs)]
            at = (*place.path, number, ENTER_PROJECT)
            raise BadConfig(
                f"A pull step of {FILE} has an input that it does not take, so each run would crash.",
                where=str(place),
                got="; ".join(
                    f"line {yaml.nearest_line(place.lines, (*at, key))}: {key}: unknown input{or_known(key, STEP_INPUTS)}"
                    for key in unknown[:MAX_PROBLEMS]
                ),
                next_step=f"correct {FILE}",
            )
    entered = project_of(steps)
    if entered is not None and entered != (None if name is None else str(name)):
        raise BadConfig(
            f"A pull step of {FILE} names another project than the file.",
            where=str(place),
            expected=f"project: {name}",
            got=f"project: {entered}",
            next_step=f"write the same project in both places of {FILE}",
        )


def _to_spec(entry: JsonValue, document: Mapping[str, JsonValue], place: Place) -> DeploymentSpec:
    where = str(place)
    if isinstance(entry, dict) and entry.get("name"):
        where += f" ({entry['name']})"
    if isinstance(entry, dict):
        _refuse_steps(entry, "A deployment", f"{where}.")
    for path, text in texts(entry):
        if "{{" in text and not is_filled_in_later(path, text):
            raise BadConfig(
                "A deployment contains a template, which loraflow deploy does not fill in.",
                where=where + path,
                got=text[:80],
                next_step="write the value itself, or use `prefect deploy` for this deployment",
            )
    try:
        checked = DeploymentEntry.model_validate(entry)
    except ValidationError as error:
        raise _problems("A deployment is not valid.", where, error, place) from None
    flow = _load_flow(checked.entrypoint, where)
    pull: object = checked.pull if checked.pull is not None else document.get("pull")
    has_folder = any(checked.work_pool.job_variables.get(key) for key in ("working_dir", "image"))
    if pull in (None, {}) and document.get("name") and not has_folder:  # [] means no steps
        pull = [{ENTER_PROJECT: {"project": document["name"]}}]
    try:
        spec = DeploymentSpec.model_validate(
            {
                **dict(checked),
                "flow_name": flow.name,
                "description": checked.description or flow.description,
                "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
                "pull_steps": pull or [],
            }
        )
    except ValidationError as error:
        raise _problems("The pull steps are not valid.", where, error, place) from None
    _refuse_equal_triggers(spec, where)
    check_parameters(spec, flow, where)
    for number, schedule in enumerate(spec.schedules):
        if schedule.has_ended:
            log.warning(
                "%s.schedules[%d]: all dates of this schedule are in the past, so it starts no run", where, number
            )
    return spec


def _problems(what: str, where: str, error: ValidationError, place: Place) -> BadConfig:
    """Return a failure that lists the first problems, each with its line and field."""
    problems = [
        f"line {yaml.nearest_line(place.lines, (*place.path, *problem['loc']))}: "
        f"{'.'.join(map(str, problem['loc'])) or 'the entry'}: {_message(problem, place)}"
        for problem in error.errors(include_url=False)[:MAX_PROBLEMS]
    ]
    return BadConfig(what, where=where, got="; ".join(problems), next_step=f"correct {FILE}")


def _message(problem: ErrorDetails, place: Place) -> str:
    """Return pydantic's message, or what to write where it does not say that."""
    if problem["loc"] == ("work_pool",) and isinstance(problem["input"], str):
        return f"expected {{name: {problem['input']}}}"
    if problem["type"] != "extra_forbidden":
        return problem["msg"].removeprefix("Value error, ")
    *section, key = problem["loc"]
    kind = MODELS.get((section or place.path)[0], DeploymentEntry)
    return f"loraflow deploy does not know or apply this key{or_known(str(key), kind.model_fields)}"


def _load_flow(entrypoint: str, where: str) -> Flow[..., Any]:
    try:
        import_own_flow(entrypoint)
        flow: object = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (ScriptError, MissingFlowError, ImportError, AttributeError, OSError, ValueError) as error:
        raise BadConfig(
            "The flow of a deployment cannot be imported.",
            where=f"{where}.entrypoint",
            expected="package.module.flow or path/of/file.py:flow",
            got=f"{entrypoint}: {type(error).__name__}: {error}",
            next_step="correct the entrypoint, or install what the flow's file imports",
        ) from error
    if not isinstance(flow, Flow):
        raise BadConfig(
            "The entrypoint of a deployment is not a flow.",
            where=f"{where}.entrypoint",
            got=f"{entrypoint} is a {type(flow).__name__}",
            next_step="name a function with the decorator @flow",
        )
    return flow


def _with_recipe(spec: DeploymentSpec, file: Path) -> DeploymentSpec:
    """Return a deployment of loraflow's flows with its recipe: without one, the only one of the project.

    Raises:
        BadConfig: a recipe does not exist, or none is named and the project has several. It is enough that each
            schedule and trigger names one.
    """
    if not spec.entrypoint.startswith("loraflow.flows."):
        return spec
    if "recipe" not in inspect.signature(_load_flow(spec.entrypoint, str(file)).fn).parameters:
        return spec
    known = recipe_names(file.parent)
    if spec.parameters.get("recipe", "") == "" and len(known) == 1:
        spec = spec.model_copy(update={"parameters": {**spec.parameters, "recipe": known[0]}})
    found: list[tuple[str, JsonValue]] = []
    for kind, items in (("schedules", spec.schedules), ("triggers", spec.triggers)):
        found += [(f"{kind}[{n}].parameters", (item.parameters or {}).get("recipe")) for n, item in enumerate(items)]
    if "recipe" in spec.parameters or not found or not all(name for _, name in found):
        found.append(("parameters", spec.parameters.get("recipe", "")))
    for part, name in found:
        if not isinstance(name, str) or "{{" in name or recipe_file(file.parent, name):
            continue
        raise BadConfig(
            "A deployment names a recipe that does not exist." if name else "A deployment names no recipe.",
            where=f"{file}: {spec.full_name}.{part}.recipe",
            expected=f"one of configs/: {', '.join(known) or 'there is none'}",
            got=name or "none",
            next_step=f"write {part}: {{recipe: {known[0]}}}" if known else "`loraflow init` makes a recipe",
        )
    return spec


def _notifications(document: dict[str, JsonValue], file: Path) -> Notifications:
    try:
        return Notifications.model_validate(document.get("notifications") or {})
    except ValidationError as error:
        place = Place(file, yaml.first_lines(file.read_text(encoding="utf-8-sig")), ("notifications",))
        raise _problems("The notifications are not valid.", str(place), error, place) from error
