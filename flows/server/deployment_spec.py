"""A deployment as `prefect.yaml` describes it: Prefect's own keys, checked strictly, and as the server's API takes them.

A key that Prefect does not know, or that `loraflow deploy` does not apply, is refused instead of ignored. Schedules and
triggers are checked by Prefect's own classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TypeGuard
from uuid import UUID

from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from prefect.types import BANNED_CHARACTERS
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    RootModel,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from loraflow.flows.server.schedules import Schedule, StrictModel

# On the automation of each trigger: an automation without it was made by a person, and stays.
TAG = "prefect.yaml"
CONDITIONS = ("expect", "match", "match_related", "after")


def check_triggers(values: object, validate: ValidatorFunctionWrapHandler) -> list[DeploymentTriggerTypes]:
    """Validate triggers with Prefect's classes, and refuse what these would ignore.

    That is dangerous here: with `expct` for `expect`, Prefect's trigger starts a run at every event of the server, and the
    events of that run start the next ones.

    Raises:
        ValueError: a key is unknown, or a trigger has no condition.
    """
    triggers: list[DeploymentTriggerTypes] = validate(values)
    if isinstance(values, list):
        problems = [
            problem
            for number, (value, trigger) in enumerate(zip(values, triggers, strict=True))
            for problem in _problems(value, trigger, str(number))
        ]
        if problems:
            raise ValueError("; ".join(problems))
    return triggers


def automation_of(trigger: DeploymentTriggerTypes, number: int, deployment: str, deployment_id: UUID) -> AutomationCore:
    """Return the automation of a trigger; without a name it is called as `prefect deploy` calls it.

    Args:
        number: its position in the list of the deployment, from 1.
    """
    own = trigger.model_copy()
    own.set_deployment_id(deployment_id)
    name = trigger.name or f"{deployment}__automation_{number}"
    return own.as_automation().model_copy(update={"name": name, "tags": [TAG]})


def starts(automation: AutomationCore, deployment_id: UUID) -> bool:
    """Tell whether an automation starts runs of a deployment."""
    return any(getattr(action, "deployment_id", None) == deployment_id for action in automation.actions)


def is_trigger_of(automation: AutomationCore, deployment: str, deployment_id: UUID) -> bool:
    """Tell whether a deploy made an automation for a trigger of a deployment.

    It has the tag, or one of the names that `prefect deploy` and earlier versions of loraflow give a trigger without a name.
    """
    given = rf"{re.escape(deployment)}__automation_\d+|Automation for deployment {deployment_id}"
    is_made = TAG in automation.tags or re.fullmatch(given, automation.name) is not None
    return is_made and starts(automation, deployment_id)


def _problems(value: object, trigger: BaseModel, path: str) -> Iterator[str]:
    """Yield what is wrong with one trigger, or with a part of it, as it was written."""
    if not isinstance(value, dict):
        return
    fields = type(trigger).model_fields
    known = {name for key, field in fields.items() for name in (key, field.alias, field.validation_alias) if name}
    for key in sorted(value.keys() - known):
        yield f"{path}.{key}: unknown key{or_known(str(key), map(str, known - {'id'}))}"
    if isinstance(trigger, EventTrigger) and not any(value.get(name) for name in CONDITIONS):
        yield f"{path}: without expect or match, every event of the server would start a run"
    for key, part in value.items():
        inner = getattr(trigger, str(key), None)
        if _has_fields(inner):
            yield from _problems(part, inner, f"{path}.{key}")
        elif isinstance(inner, list) and isinstance(part, list):
            for number, (item, model) in enumerate(zip(part, inner, strict=False)):
                if _has_fields(model):
                    yield from _problems(item, model, f"{path}.{key}.{number}")


def or_known(key: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown key, as the end of a message: the key that was meant, or all of them."""
    names = sorted(known)
    meant = difflib.get_close_matches(key, names, 1, 0.6)
    return f" (did you mean {meant[0]}?)" if meant else f" (known: {', '.join(names)})"


def _has_fields(part: object) -> TypeGuard[BaseModel]:
    """Tell whether a part has keys that Prefect defines; those of `match` and `match_related` are labels of resources."""
    return isinstance(part, BaseModel) and not isinstance(part, RootModel)


DEFAULT_QUEUE = "default"  # the work queue that every pool has
ENTER_PROJECT = "loraflow.flows.server.project.enter"  # the pull step


def _name(value: str) -> str:
    """Check a name, which is part of addresses. The server would refuse it after other deployments were changed."""
    if not value.strip():
        raise ValueError("the name is empty")
    if found := [character for character in BANNED_CHARACTERS if character in value]:
        raise ValueError(f"Prefect's names must not contain {' '.join(found)}")
    return value


def _not_reserved(value: str) -> str:
    if value.lower().startswith("prefect"):
        raise ValueError(f"Prefect reserves names of work pools that begin with prefect: {value}")
    return value


Name = Annotated[str, AfterValidator(_name)]


class WorkPool(StrictModel):
    """The work pool and queue of a deployment, and what its runs change in the pool's job template."""

    name: Annotated[Name, AfterValidator(_not_reserved)]
    work_queue_name: Name = DEFAULT_QUEUE
    job_variables: dict[str, JsonValue] = {}


def _digits(value: object) -> object:
    """Read a whole number in quotes, as Prefect does."""
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


class ConcurrencyLimit(StrictModel):
    """How many runs of a deployment there are at a time, and what happens to the next one."""

    # 0 would let no run start; `paused` says that
    limit: Annotated[int, Field(ge=1, strict=True), BeforeValidator(_digits)]
    collision_strategy: ConcurrencyLimitStrategy | None = None
    grace_period_seconds: int | None = None

    @model_validator(mode="after")
    def _fits_prefect(self) -> ConcurrencyLimit:
        if self.grace_period_seconds is not None and self.collision_strategy is None:
            raise ValueError("grace_period_seconds needs a collision_strategy: ENQUEUE or CANCEL_NEW")
        self.options()
        return self

    def options(self) -> ConcurrencyOptions | None:
        """Return everything but the limit itself; None leaves it to the server."""
        options = self.model_dump(exclude={"limit"}, exclude_none=True)
        return ConcurrencyOptions.model_validate(options) if options else None


def _limit(value: object) -> object:
    """Read a limit alone as one without options."""
    return {"limit": value} if isinstance(value, int | float | str) else value


def _tags(value: object) -> object:
    """Read tags as a list, or as one text with commas; each tag once."""
    if isinstance(value, str):
        value = [tag.strip() for tag in value.split(",")]
    return list(dict.fromkeys(tag for tag in value if tag != "")) if isinstance(value, list) else value


def _steps(value: object) -> object:
    """Read a single step as a list of one, as Prefect does."""
    return ([value] if value else []) if isinstance(value, dict) else value


def _one_key(steps: list[dict[str, JsonValue]] | None) -> list[dict[str, JsonValue]] | None:
    for number, step in enumerate(steps or []):
        if len(step) != 1:
            raise ValueError(f"step {number} has {len(step)} keys; a step is one function with its inputs")
    return steps


Steps = Annotated[list[dict[str, JsonValue]] | None, BeforeValidator(_steps), AfterValidator(_one_key)]


class DeploymentEntry(StrictModel):
    """One item of `deployments`."""

    name: Name
    entrypoint: str
    description: str | None = None
    version: str | None = None
    tags: Annotated[list[str], BeforeValidator(_tags)] = []
    parameters: dict[str, JsonValue] = {}
    enforce_parameter_schema: bool = True
    paused: bool = False  # counts when the deployment is created
    work_pool: WorkPool
    concurrency_limit: Annotated[ConcurrencyLimit | None, BeforeValidator(_limit)] = None
    schedules: list[Schedule] = []
    triggers: Annotated[list[DeploymentTriggerTypes], WrapValidator(check_triggers)] = []
    pull: Steps = None  # None: the file's own `pull`

    @model_validator(mode="before")
    @classmethod
    def _one_schedule(cls, values: Any) -> Any:
        """Take `schedule` as a list of one, as Prefect does, and drop keys that say nothing."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None and value != {}}
        values = {key: value for key, value in values.items() if value != [] or key not in ("build", "push")}
        if "schedule" in values and values.get("schedules"):
            raise ValueError("both schedule and schedules are given; write all of them under schedules")
        if "schedule" in values:
            values["schedules"] = [values.pop("schedule")]
        return values

    @field_validator("schedules", mode="after")
    @classmethod
    def _name_schedules(cls, schedules: list[Schedule]) -> list[Schedule]:
        """Give a schedule without a slug one by its position."""
        named = [
            schedule if schedule.slug else schedule.model_copy(update={"slug": f"schedule-{number}"})
            for number, schedule in enumerate(schedules, 1)
        ]
        slugs = [schedule.slug for schedule in named]
        if repeated := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(f"two schedules have the slug {sorted(repeated)[0]}")
        return named


class DeploymentSpec(DeploymentEntry):
    """One deployment of `prefect.yaml`, with what its flow says of itself."""

    flow_name: str
    parameter_openapi_schema: dict[str, JsonValue]
    pull_steps: Annotated[list[dict[str, JsonValue]], BeforeValidator(_steps), AfterValidator(_one_key)]

    @property
    def full_name(self) -> str:
        """Return `flow/deployment`."""
        return f"{self.flow_name}/{self.name}"

    @property
    def project(self) -> str | None:
        """Return the project that the deployment belongs to; None if its pull step does not say."""
        return project_of(self.pull_steps)

    def to_update(self) -> DeploymentUpdate:
        """Return everything but schedules and triggers, as the server's API takes it."""
        limit = self.concurrency_limit
        update = DeploymentUpdate(
            entrypoint=self.entrypoint,
            description=self.description,
            tags=self.tags,
            parameters=self.parameters,
            parameter_openapi_schema=self.parameter_openapi_schema,
            enforce_parameter_schema=self.enforce_parameter_schema,
            work_pool_name=self.work_pool.name,
            work_queue_name=self.work_pool.work_queue_name,
            job_variables=self.work_pool.job_variables,
            pull_steps=self.pull_steps,
            concurrency_limit=limit.limit if limit else None,
            concurrency_options=limit.options() if limit else None,
        )
        if self.version is not None:
            update.version = self.version
        return update

    def new_schedules(self) -> list[DeploymentScheduleCreate]:
        """Return the schedules, as the server's API takes them when they are created."""
        return [
            DeploymentScheduleCreate(
                slug=schedule.slug,
                schedule=schedule.to_prefect(),
                active=schedule.active,
                parameters=schedule.parameters,
            )
            for schedule in self.schedules
        ]


def project_of(pull_steps: list[dict[str, Any]] | None) -> str | None:
    """Return the project that loraflow's pull step names; None if there is no such step, or it names none."""
    for step in pull_steps or []:
        inputs = step.get(ENTER_PROJECT)
        if isinstance(inputs, dict) and inputs.get("project"):
            return str(inputs["project"])
    return None
