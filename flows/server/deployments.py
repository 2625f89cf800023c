"""What `prefect.yaml` says, put onto a server: pools, limits, deployments, triggers, automations.

Idempotent: what is there and equal is left alone, so that a second call changes nothing, and what a person paused in the
UI stays paused. (`prefect deploy --all` writes schedules anew as the file has them, and triggers under new ids.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flows import Flow
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from pydantic import ValidationError

import loraflow
from loraflow.failures import BadConfig, Network
from loraflow.flows.server.automations import Notifications, automations
from loraflow.tasks.gpu_lease import create_limit

log = logging.getLogger("loraflow")
FILE = "prefect.yaml"
ONLINE = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))


@dataclass(frozen=True)
class Spec:
    """One deployment of `prefect.yaml`, with its flow."""

    name: str
    flow: Flow
    values: dict[str, Any]
    pull_steps: list[dict[str, Any]]

    @property
    def full_name(self) -> str:
        """Return `flow/deployment`."""
        return f"{self.flow.name}/{self.name}"

    @property
    def pool(self) -> str:
        """Return the work pool's name."""
        return self.values["work_pool"]["name"]

    def wanted(self) -> dict[str, Any]:
        """Return what the server shall hold, apart from schedules and triggers, in the names of its API."""
        limit = self.values.get("concurrency_limit") or {}
        return {
            "entrypoint": self.values["entrypoint"],
            "description": self.values.get("description") or self.flow.description,
            "tags": self.values.get("tags", []),
            "parameters": self.values.get("parameters", {}),
            "parameter_openapi_schema": parameter_schema(self.flow).model_dump(exclude_unset=True),
            "enforce_parameter_schema": True,
            "work_pool_name": self.pool,
            "job_variables": self.values["work_pool"].get("job_variables", {}),
            "pull_steps": self.pull_steps,
            "concurrency_limit": limit.get("limit"),
            "concurrency_options": {k: v for k, v in limit.items() if k != "limit"} or None,
        }

    def schedules(self) -> list[DeploymentScheduleUpdate]:
        """Return the schedules as the file has them."""
        return [
            DeploymentScheduleUpdate(
                slug=one["slug"],
                schedule=CronSchedule(cron=one["cron"], timezone=one.get("timezone")),
                active=one["active"],
                parameters=one.get("parameters", {}),
            )
            for one in self.values.get("schedules", [])
        ]

    def triggers(self) -> list[DeploymentEventTrigger]:
        """Return the event triggers."""
        return [DeploymentEventTrigger.model_validate(one) for one in self.values.get("triggers", [])]


def find_file() -> Path:
    """Return `prefect.yaml` of the working directory, else of the checkout that loraflow is imported from.

    Raises:
        BadConfig: there is none.
    """
    for place in (Path(FILE), Path(loraflow.__file__).parent.parent / FILE):
        if place.is_file():
            return place
    raise BadConfig(
        f"There is no {FILE} here.", where=str(Path.cwd()), next_step=f"copy {FILE} of the loraflow repository"
    )


def read_specs(file: Path, only: list[str] | None = None) -> list[Spec]:
    """Read deployments, all of them or those named `flow/deployment`.

    Raises:
        BadConfig: the file cannot be read, or has no such deployment.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        entries = document["deployments"]
        specs = []
        for values in entries:
            if only and f"{values['entrypoint'].rpartition('.')[2]}/{values['name']}" not in only:
                continue
            specs.append(Spec(values["name"], import_object(values["entrypoint"]), values, document["pull"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise BadConfig(
            "The deployments cannot be read.", where=str(file), got=f"{type(error).__name__}: {error}"
        ) from error
    if missing := set(only or []) - {spec.full_name for spec in specs}:
        have = sorted(f"{one['entrypoint'].rpartition('.')[2]}/{one['name']}" for one in entries)
        raise BadConfig(
            "There is no such deployment.", where=str(file), expected=", ".join(have), got=", ".join(sorted(missing))
        )
    return specs


def read_notifications(file: Path) -> Notifications:
    """Read who is told of what.

    Raises:
        BadConfig: the section has other keys or values than it can have.
    """
    try:
        return Notifications.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")).get("notifications") or {})
    except ValidationError as error:
        one = error.errors()[0]
        raise BadConfig(
            "The notifications cannot be read.",
            where=f"{file}: notifications.{'.'.join(map(str, one['loc']))}",
            got=one["msg"],
        ) from error


class Setup:
    """Brings a server to what the file says, and counts what it changed."""

    def __init__(self, client: SyncPrefectClient):
        self.client = client
        self.changes: list[str] = []

    def everything(self, specs: list[Spec], notifications: Notifications) -> list[str]:
        """Create or update all; return a line for each change."""
        for pool in sorted({spec.pool for spec in specs}):
            self.pool(pool)
        if create_limit(self.client):
            self.changes.append("limit of one GPU stage at a time on this host created")
        for spec in specs:
            self.deployment(spec)
        for wanted in automations(self.client, notifications):
            self.automation(wanted)
        return self.changes

    def pool(self, name: str) -> None:
        """Create a pool of processes; one that is there is left as it is, whatever its type."""
        try:
            self.client.read_work_pool(name)
        except ObjectNotFound:
            self.client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            self.changes.append(f"pool {name} created")

    def deployment(self, spec: Spec) -> None:
        """Create a deployment, or update what differs in it. Whether a schedule is active is asked once, at first."""
        wanted = spec.wanted()
        try:
            there = self.client.read_deployment_by_name(spec.full_name)
        except ObjectNotFound:
            flow_id = self.client.create_flow_from_name(spec.flow.name)
            schedules = [one.model_dump(exclude_unset=True) for one in spec.schedules()]
            id_ = self.client.create_deployment(flow_id, spec.name, schedules=schedules, **wanted)  # type: ignore[arg-type]
            self.changes.append(f"deployment {spec.full_name} created")
            self._triggers(spec, id_)
            return
        is_now = there.model_dump(mode="json")
        is_now["concurrency_limit"] = there.global_concurrency_limit and there.global_concurrency_limit.limit
        options = is_now["concurrency_options"]
        is_now["concurrency_options"] = options and {k: v for k, v in options.items() if v is not None}
        differs = sorted(key for key, value in wanted.items() if not _same(value, is_now.get(key)))
        known = {one.slug: one for one in there.schedules}

        def is_stale(one: DeploymentScheduleUpdate) -> bool:
            old = known.get(one.slug)
            return old is None or (old.schedule, old.parameters) != (one.schedule, one.parameters)

        stale = [one for one in spec.schedules() if is_stale(one)]
        if differs or stale:
            update = DeploymentUpdate(**wanted)
            if stale:
                update.schedules = [
                    one if one.slug not in known else one.model_copy(update={"active": known[one.slug].active})
                    for one in spec.schedules()
                ]
            self.client.update_deployment(there.id, update)
            what = ", ".join([*differs, *(f"schedule {one.slug}" for one in stale)])
            self.changes.append(f"deployment {spec.full_name} updated: {what}")
        self._triggers(spec, there.id)

    def _triggers(self, spec: Spec, id_: Any) -> None:
        for trigger in spec.triggers():
            trigger.set_deployment_id(id_)
            self.automation(trigger.as_automation())

    def automation(self, wanted: Any) -> None:
        """Create an automation, or update it. Whether it is enabled is left to who looks at it in the UI."""
        there = self.client.read_automations_by_name(wanted.name)
        if not there:
            self.client.create_automation(wanted)
            self.changes.append(f"automation {wanted.name!r} created")
            return
        ignored = {"id", "enabled", "owner_resource", "created", "updated"}
        if not _same(_core(wanted, ignored), _core(there[0], ignored)):
            # Not by update_automation: it leaves out the actions' types, and sends an owner, which the server refuses.
            body = wanted.model_dump(mode="json", exclude={"owner_resource"}) | {"enabled": there[0].enabled}
            self.client.request("PUT", "/automations/{id}", path_params={"id": there[0].id}, json=body)
            self.changes.append(f"automation {wanted.name!r} updated")


def _core(automation: Any, ignored: set[str]) -> dict[str, Any]:
    out = automation.model_dump(mode="json", exclude=ignored)
    out["trigger"].pop("id", None)
    return _in_order(out)


def _in_order(value: Any) -> Any:
    """Sort lists of names: they were sets, which come in another order in each process."""
    if isinstance(value, dict):
        return {key: _in_order(one) for key, one in value.items()}
    if isinstance(value, list):
        return sorted(value) if all(isinstance(one, str) for one in value) else [_in_order(one) for one in value]
    return value


def _same(wanted: Any, there: Any) -> bool:
    """Compare as JSON, where what nobody wants counts for nothing."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(_same(value, there.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(there, list):
        return len(wanted) == len(there) and all(map(_same, wanted, there))
    return wanted == there


def reach() -> None:
    """Ask the configured server for its version.

    Raises:
        BadConfig: none is configured, or it refuses our credentials.
        Network: it does not answer.
    """
    url = get_current_settings().api.url
    if not url:
        raise BadConfig(
            "No Prefect server is configured.",
            where="PREFECT_API_URL",
            next_step="`loraflow up` starts one here; or export PREFECT_API_URL=http://HOST:4200/api",
        )
    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except PrefectHTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise BadConfig(
                "The Prefect server refuses the credentials.",
                where=str(url),
                got=f"HTTP {error.response.status_code}",
                expected="the server's auth string",
                next_step="export PREFECT_API_AUTH_STRING=USER:PASSWORD",
            ) from error
        raise Network(
            "What answers at this address is no Prefect server.",
            where=str(url),
            got=f"HTTP {error.response.status_code}",
            next_step="the address ends in /api, as in http://127.0.0.1:4200/api",
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise Network(
            "No Prefect server answers.",
            where=str(url),
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            next_step="`loraflow up` starts one here; or mend PREFECT_API_URL",
        ) from error


def deploy(only: list[str] | None = None) -> tuple[list[Spec], list[str]]:
    """Put the deployments onto the configured server; return them, and a line for each change."""
    file = find_file()
    specs, notifications = read_specs(file, only), read_notifications(file)
    reach()
    with get_client(sync_client=True) as client:
        return specs, Setup(client).everything(specs, notifications)


def idle_pools(
    specs: list[Spec], wait: float, expected: set[str] | None = None, look: Callable[[], None] | None = None
) -> list[str]:
    """Return the pools that have no worker, having given those of `expected` (default all) `wait` seconds to appear."""
    until = time.monotonic() + wait
    with get_client(sync_client=True) as client:
        while True:
            pools = sorted({spec.pool for spec in specs})
            idle = [pool for pool in pools if not client.read_workers_for_work_pool(pool, ONLINE, offset=0, limit=1)]
            if not set(idle) & (expected if expected is not None else set(pools)) or time.monotonic() > until:
                return idle
            if look is not None:
                look()
            time.sleep(1)
