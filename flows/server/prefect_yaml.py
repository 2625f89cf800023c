"""Read `prefect.yaml`: the deployments with their flows, and who is notified."""

from __future__ import annotations

from pathlib import Path

from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentScheduleUpdate, DeploymentUpdate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

import loraflow
from loraflow.config import yaml
from loraflow.failures import BadConfig
from loraflow.flows.server.automations import Notifications

FILE = "prefect.yaml"
_ENTRIES = TypeAdapter(list[dict[str, JsonValue]])


class WorkPool(BaseModel):
    """The work pool of a deployment, and what its runs change in the pool's job template."""

    model_config = ConfigDict(frozen=True)

    name: str
    job_variables: dict[str, JsonValue] = {}


class ConcurrencyLimit(BaseModel):
    """How many runs of a deployment there are at a time, and what happens to the next one."""

    model_config = ConfigDict(frozen=True)

    limit: int
    collision_strategy: ConcurrencyLimitStrategy | None = None
    grace_period_seconds: int | None = None

    def options(self) -> ConcurrencyOptions | None:
        """Return everything but the limit itself; None leaves it to the server."""
        options = self.model_dump(exclude={"limit"}, exclude_none=True)
        return ConcurrencyOptions.model_validate(options) if options else None


class Schedule(BaseModel):
    """A cron schedule. Its slug lets a later deploy find it again; `active` counts only when it is created."""

    model_config = ConfigDict(frozen=True)

    slug: str
    cron: str
    active: bool
    timezone: str | None = None
    parameters: dict[str, JsonValue] = {}


class DeploymentSpec(BaseModel):
    """One deployment of `prefect.yaml`, with what its flow says of itself."""

    model_config = ConfigDict(frozen=True)

    name: str
    flow_name: str
    entrypoint: str
    description: str | None
    parameter_openapi_schema: dict[str, JsonValue]
    pull_steps: list[dict[str, JsonValue]]
    work_pool: WorkPool
    tags: list[str] = []
    parameters: dict[str, JsonValue] = {}
    concurrency_limit: ConcurrencyLimit | None = None
    schedules: list[Schedule] = []
    triggers: list[DeploymentEventTrigger] = []

    @property
    def full_name(self) -> str:
        """Return `flow/deployment`."""
        return f"{self.flow_name}/{self.name}"

    def to_update(self) -> DeploymentUpdate:
        """Return everything but schedules and triggers, as the server's API takes it."""
        limit = self.concurrency_limit
        return DeploymentUpdate(
            entrypoint=self.entrypoint,
            description=self.description,
            tags=self.tags,
            parameters=self.parameters,
            parameter_openapi_schema=self.parameter_openapi_schema,
            enforce_parameter_schema=True,
            work_pool_name=self.work_pool.name,
            job_variables=self.work_pool.job_variables,
            pull_steps=self.pull_steps,
            concurrency_limit=limit.limit if limit else None,
            concurrency_options=limit.options() if limit else None,
        )

    def new_schedules(self) -> list[DeploymentScheduleCreate]:
        """Return the schedules, as the server's API takes them with a new deployment."""
        return [
            DeploymentScheduleCreate.model_validate(schedule.model_dump(exclude_unset=True))
            for schedule in self.schedule_updates()
        ]

    def schedule_updates(self) -> list[DeploymentScheduleUpdate]:
        """Return the schedules, as the server's API takes them with an update."""
        return [
            DeploymentScheduleUpdate(
                slug=schedule.slug,
                schedule=CronSchedule(cron=schedule.cron, timezone=schedule.timezone),
                active=schedule.active,
                parameters=schedule.parameters,
            )
            for schedule in self.schedules
        ]


def find_prefect_yaml() -> Path:
    """Return the path of `prefect.yaml`: in the working directory, else in the checkout that loraflow is imported from.

    Raises:
        BadConfig: there is no such file.
    """
    for file in (Path(FILE), Path(loraflow.__file__).parent.parent / FILE):
        if file.is_file():
            return file
    raise BadConfig(
        f"{FILE} was not found.", where=str(Path.cwd()), next_step=f"copy {FILE} from the loraflow repository"
    )


def read_all(file: Path, only: list[str] | None = None) -> tuple[list[DeploymentSpec], Notifications]:
    """Read deployments and notifications, from one reading of the file. See `read_specs` and `read_notifications`."""
    document = _read(file)
    return _specs(document, file, only), _notifications(document, file)


def read_specs(file: Path, only: list[str] | None = None) -> list[DeploymentSpec]:
    """Read the deployments, all of them or those named `flow/deployment`.

    Raises:
        BadConfig: the file cannot be read, or has no such deployment.
    """
    return _specs(_read(file), file, only)


def read_notifications(file: Path) -> Notifications:
    """Read who is notified of what.

    Raises:
        BadConfig: the section has an unknown key, or a wrong value.
    """
    return _notifications(_read(file), file)


def _read(file: Path) -> dict[str, JsonValue]:
    try:
        document = yaml.load_plain(file.read_text(encoding="utf-8-sig"))
    except yaml.Syntax as error:
        raise BadConfig(f"{FILE} is not plain YAML.", where=f"{file}:{error.line}", got=str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{FILE} cannot be read.", where=str(file), got=str(error)) from error
    if not isinstance(document, dict):
        raise BadConfig(f"{FILE} is empty, or is not a mapping.", where=str(file), expected="pull and deployments")
    return document


def _specs(document: dict[str, JsonValue], file: Path, only: list[str] | None) -> list[DeploymentSpec]:
    try:
        deployments, pull_steps = _ENTRIES.validate_python(document["deployments"]), document["pull"]
        entries = {f"{str(entry['entrypoint']).rpartition('.')[2]}/{entry['name']}": entry for entry in deployments}
        specs = [_to_spec(entry, pull_steps) for name, entry in entries.items() if not only or name in only]
    except KeyError as error:
        raise BadConfig(
            "The deployments cannot be read.", where=str(file), expected=f"the key {error.args[0]}", got="none"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadConfig("The deployments cannot be read.", where=f"{file}: {where}", got=first["msg"]) from error
    except (TypeError, ImportError, AttributeError) as error:
        raise BadConfig(
            "The deployments cannot be read.", where=str(file), got=f"{type(error).__name__}: {error}"
        ) from error
    if missing := set(only or []) - {spec.full_name for spec in specs}:
        raise BadConfig(
            "There is no such deployment.",
            where=str(file),
            expected=", ".join(sorted(entries)),
            got=", ".join(sorted(missing)),
        )
    return specs


def _to_spec(entry: dict[str, JsonValue], pull_steps: JsonValue) -> DeploymentSpec:
    flow = import_object(str(entry["entrypoint"]))
    return DeploymentSpec.model_validate(
        {
            **entry,
            "flow_name": flow.name,
            "description": entry.get("description") or flow.description,
            "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
            "pull_steps": pull_steps,
        }
    )


def _notifications(document: dict[str, JsonValue], file: Path) -> Notifications:
    try:
        return Notifications.model_validate(document.get("notifications") or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadConfig(
            "The notifications cannot be read.",
            where=f"{file}: notifications.{'.'.join(map(str, first['loc']))}",
            got=first["msg"],
        ) from error
