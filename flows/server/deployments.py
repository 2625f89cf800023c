"""Create or update on a server what `prefect.yaml` describes: work pools, limits, deployments, triggers, automations.

A second call changes nothing, and what a person paused in the UI stays paused. (`prefect deploy --all` resets schedules
to the file, and gives triggers new ids.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.objects import DeploymentSchedule, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from prefect.exceptions import ObjectNotFound
from pydantic import JsonValue

from loraflow.config.project import PROJECT_ID, id_of
from loraflow.failures import BadConfig
from loraflow.flows.server.automations import Notifications, Project, automations_of
from loraflow.flows.server.connection import require_server
from loraflow.flows.server.deployed_parameters import refuse_ignored_job_variables
from loraflow.flows.server.deployment_spec import DeploymentSpec, automation_of, is_trigger_of, project_of, starts
from loraflow.flows.server.prefect_yaml import find_prefect_yaml, read_all, read_project
from loraflow.tasks.gpu_lease import create_limit

log = logging.getLogger("loraflow")
OLD_PULL_STEP = "flows.project.enter"  # while loraflow's flows were a top-level package
PAGE = 200


def deploy(only: list[str] | None = None) -> tuple[list[DeploymentSpec], list[str]]:
    """Create or update the deployments on the configured server; return them, and a line for each change."""
    file = find_prefect_yaml()
    specs, notifications = read_all(file, only)
    require_server()
    with get_client(sync_client=True) as client:
        deployer = Deployer(client)
        changes = deployer.deploy_all(specs, notifications, read_project(file))
        if not only:
            deployer.warn_of_removed_deployments(specs)
        return specs, changes


class Deployer:
    """Creates and updates objects on a server, and lists the changes."""

    def __init__(self, client: SyncPrefectClient):
        self.client = client
        self.changes: list[str] = []

    def deploy_all(
        self, specs: list[DeploymentSpec], notifications: Notifications, project: Project | None = None
    ) -> list[str]:
        """Create or update everything; return a line for each change.

        Notifications are about `project`; without one, about all projects of the server.

        Raises:
            BadConfig: a deployment on the server belongs to another project, or its work pool would ignore its job
                variables. Nothing was changed then.
        """
        for spec in specs:
            self._refuse_another_projects(spec)
            refuse_ignored_job_variables(spec, self._find_pool(spec.work_pool.name))
        for pool in sorted({spec.work_pool.name for spec in specs}):
            self.create_work_pool(pool)
            self._warn_of_a_closed_pool(pool)
        if create_limit(self.client):
            self.changes.append("limit of one GPU stage at a time on this host created")
        for spec in specs:
            self.deploy(spec)
        for automation in automations_of(self.client, notifications, project):
            self.deploy_automation(automation)
        self.warn_of_old_deployments()
        return self.changes

    def _refuse_another_projects(self, spec: DeploymentSpec) -> None:
        existing = self._find(spec)
        owner = project_of(existing.pull_steps) if existing else None
        if owner is not None and spec.project is not None and owner != spec.project:
            raise BadConfig(
                f"The deployment {spec.full_name} on this server belongs to another project.",
                where="prefect.yaml",
                expected=f"the project {spec.project}",
                got=f"the project {owner}",
                next_step="give the deployments of this project other names in prefect.yaml, such as "
                f"{spec.project}-{spec.name}; or delete the other one: prefect deployment delete {spec.full_name}",
            )
        own, other = id_of(spec.work_pool.job_variables), id_of(existing.job_variables) if existing else None
        if own is not None and other is not None and own != other:
            raise BadConfig(
                f"The deployment {spec.full_name} on this server belongs to another project of the same name.",
                where=f"prefect.yaml: {PROJECT_ID}",
                expected=own,
                got=other,
                next_step=f"replace the name {spec.project or spec.name} everywhere in prefect.yaml; "
                f"or, if both are the same project, write the server's id ({other}) into it",
            )

    def _find(self, spec: DeploymentSpec) -> DeploymentResponse | None:
        try:
            return self.client.read_deployment_by_name(spec.full_name)
        except ObjectNotFound:
            return None

    def create_work_pool(self, name: str) -> None:
        """Create a work pool of type process, unless a pool of this name exists, of any type."""
        if self._find_pool(name) is None:
            self.client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            self.changes.append(f"pool {name} created")

    def _warn_of_a_closed_pool(self, name: str) -> None:
        """Warn of a pool that a person has closed, and which stays so: runs wait in it, and nothing else says why."""
        pool = self._find_pool(name)
        if pool is not None and pool.is_paused:
            log.warning("the work pool %s is paused, so its runs do not start: prefect work-pool resume %s", name, name)
        elif pool is not None and pool.concurrency_limit == 0:
            log.warning(
                "the work pool %s has a concurrency limit of 0, so its runs do not start: "
                "prefect work-pool clear-concurrency-limit %s",
                name,
                name,
            )

    def _find_pool(self, name: str) -> WorkPool | None:
        try:
            return self.client.read_work_pool(name)
        except ObjectNotFound:
            return None

    def deploy(self, spec: DeploymentSpec) -> None:
        """Create a deployment with its triggers, or update what differs."""
        existing = self._find(spec)
        if existing is None:
            deployment_id = self._create(spec)
        else:
            deployment_id = existing.id
            self._update(spec, existing)
        self.deploy_triggers(spec.triggers, spec.name, deployment_id)

    def deploy_triggers(self, triggers: list[DeploymentTriggerTypes], name: str, deployment_id: UUID) -> None:
        """Create or update the automations of a deployment's triggers, and remove those of triggers that are gone.

        Automations that a person made in the UI stay.
        """
        automations = [
            automation_of(trigger, number, name, deployment_id) for number, trigger in enumerate(triggers, 1)
        ]
        for automation in automations:
            self.deploy_automation(automation, self._find_trigger(automation.name, deployment_id))
        names = {automation.name for automation in automations}
        for found in self.client.read_resource_related_automations(f"prefect.deployment.{deployment_id}"):
            if is_trigger_of(found, name, deployment_id) and found.name not in names:
                self.client.delete_automation(found.id)
                self.changes.append(f"automation {found.name!r} removed")

    def _find_trigger(self, name: str, deployment_id: UUID) -> list[Automation]:
        """Find the automation of a trigger: a deployment of another flow or project may have one of the same name.

        Earlier versions of loraflow left Prefect's name for a trigger without a name. An automation whose deployment was
        deleted is taken over.
        """
        for known in (name, f"Automation for deployment {deployment_id}"):
            found = self.client.read_automations_by_name(known)
            if own := [automation for automation in found if starts(automation, deployment_id)]:
                return own
            if unused := [automation for automation in found if self._starts_deleted_deployments(automation)]:
                return unused
        return []

    def _starts_deleted_deployments(self, automation: Automation) -> bool:
        ids = {getattr(action, "deployment_id", None) for action in automation.actions}
        return bool(ids) and all(isinstance(key, UUID) and not self._exists(key) for key in ids)

    def _exists(self, deployment_id: UUID) -> bool:
        try:
            self.client.read_deployment(deployment_id)
        except ObjectNotFound:
            return False
        return True

    def _create(self, spec: DeploymentSpec) -> UUID:
        fields = spec.to_update()
        deployment_id = self.client.create_deployment(
            self.client.create_flow_from_name(spec.flow_name),
            spec.name,
            schedules=spec.new_schedules(),
            concurrency_limit=fields.concurrency_limit,
            concurrency_options=fields.concurrency_options,
            parameters=fields.parameters,
            description=fields.description,
            work_pool_name=fields.work_pool_name,
            work_queue_name=fields.work_queue_name,
            version=fields.version,
            paused=spec.paused,
            tags=fields.tags,
            entrypoint=fields.entrypoint,
            parameter_openapi_schema=fields.parameter_openapi_schema,
            pull_steps=fields.pull_steps,
            enforce_parameter_schema=fields.enforce_parameter_schema,
            job_variables=fields.job_variables,
        )
        self.changes.append(f"deployment {spec.full_name} created")
        return deployment_id

    def _update(self, spec: DeploymentSpec, existing: DeploymentResponse) -> None:
        update = spec.to_update()
        changes = changed_fields(update, existing)
        if changes:
            self.client.update_deployment(existing.id, update)  # leaves the schedules as they are
        changes += self._update_schedules(spec, existing)
        if changes:
            self.changes.append(f"deployment {spec.full_name} updated: {', '.join(changes)}")

    def _update_schedules(self, spec: DeploymentSpec, existing: DeploymentResponse) -> list[str]:
        """Create, change and remove schedules one by one; return the changes.

        A schedule keeps the state that a person gave it. Schedules without a slug were added in the UI and stay.
        """
        changes, old = [], {schedule.slug: schedule for schedule in existing.schedules if schedule.slug}
        for schedule in spec.new_schedules():
            assert schedule.slug is not None
            found = old.pop(schedule.slug, None)
            if found is None:
                self.client.create_deployment_schedules(existing.id, [schedule])
                changes.append(f"schedule {schedule.slug} created")
            elif not same_schedule(schedule, found):
                self.client.update_deployment_schedule(
                    existing.id, found.id, schedule=schedule.schedule, parameters=schedule.parameters
                )
                changes.append(f"schedule {schedule.slug}")
        for slug, unwanted in old.items():
            self.client.delete_deployment_schedule(existing.id, unwanted.id)
            changes.append(f"schedule {slug} removed")
        return changes

    def warn_of_old_deployments(self) -> None:
        """Warn of deployments that an earlier loraflow created and this call does not update.

        They stay as they are: their workers may still have that version.
        """
        for deployment in self._all_deployments():
            if any(OLD_PULL_STEP in step for step in deployment.pull_steps or []):
                log.warning(
                    "deployment %s was created by an earlier version of loraflow; its runs may crash on workers of "
                    "this version (`loraflow deploy` without --only updates all deployments in prefect.yaml)",
                    deployment.name,
                )

    def warn_of_removed_deployments(self, specs: list[DeploymentSpec]) -> None:
        """Warn of deployments of this project that `prefect.yaml` does not have: their schedules and triggers still count.

        They are not deleted, because a deployment may be described in another file, and its runs would lose it.
        """
        projects = {spec.project for spec in specs} - {None}
        known = {spec.full_name for spec in specs}
        for deployment in self._all_deployments():
            if project_of(deployment.pull_steps) not in projects:
                continue
            name = f"{self.client.read_flow(deployment.flow_id).name}/{deployment.name}"
            if name not in known:
                log.warning(
                    "deployment %s of this project is on the server, but not in prefect.yaml; its schedules and triggers "
                    "still start runs. To delete it: prefect deployment delete '%s'",
                    name,
                    name,
                )

    def _all_deployments(self) -> Iterator[DeploymentResponse]:
        offset = 0
        while page := self.client.read_deployments(limit=PAGE, offset=offset):
            yield from page
            offset += len(page)

    def deploy_automation(self, automation: AutomationCore, found: list[Automation] | None = None) -> None:
        """Create or update an automation: `found`, or by default the one of its name.

        It stays enabled or disabled as a person left it in the UI.
        """
        if found is None:
            found = self.client.read_automations_by_name(automation.name)
        if not found:
            self.client.create_automation(automation)
            self.changes.append(f"automation {automation.name!r} created")
            return
        existing = found[0]
        if not same_automation(automation, existing):
            # Not update_automation: it omits the actions' types, and sends an owner, which the server refuses.
            body = automation.model_dump(mode="json", exclude={"owner_resource"}) | {"enabled": existing.enabled}
            self.client.request("PUT", "/automations/{id}", path_params={"id": existing.id}, json=body)
            self.changes.append(f"automation {automation.name!r} updated")


# The server sets these, or a person does in the UI.
NOT_COMPARED = {"id", "enabled", "owner_resource", "created", "updated"}


def changed_fields(desired: DeploymentUpdate, existing: DeploymentResponse) -> list[str]:
    """Return the names of the fields in which a deployment differs, schedules apart."""
    fields = desired.model_dump(mode="json", exclude_unset=True)
    found = existing.model_dump(mode="json", exclude_none=True, include={"concurrency_options"})
    found |= existing.model_dump(mode="json", include=fields.keys() - {"concurrency_options", "concurrency_limit"})
    # The server answers with the limit as an object of its own.
    limit = existing.global_concurrency_limit
    found["concurrency_limit"] = limit.limit if limit else None
    return sorted(name for name, value in fields.items() if value != found.get(name))


def same_schedule(desired: DeploymentScheduleCreate, existing: DeploymentSchedule) -> bool:
    """Tell whether two schedules start the same runs. Whether one is paused does not matter."""
    return (desired.schedule, desired.parameters) == (existing.schedule, existing.parameters)


def same_automation(desired: AutomationCore, existing: AutomationCore) -> bool:
    """Tell whether two automations do the same. Whether one is disabled does not matter."""
    desired_fields, existing_fields = (
        automation.model_dump(mode="json", exclude=NOT_COMPARED) for automation in (desired, existing)
    )
    return same_automation_fields(desired_fields, existing_fields)


def same_automation_fields(desired: dict[str, JsonValue], existing: dict[str, JsonValue]) -> bool:
    """Tell whether two automations, as JSON, do the same. The ids in their triggers are ignored."""
    desired_trigger, existing_trigger = (_comparable_trigger(fields["trigger"]) for fields in (desired, existing))
    return {**desired, "trigger": desired_trigger} == {**existing, "trigger": existing_trigger}


def _comparable_trigger(part: JsonValue) -> JsonValue:
    """Drop the ids of a trigger's parts and sort lists of names: they were sets, whose order differs by process."""
    if isinstance(part, dict):
        return {key: _comparable_trigger(value) for key, value in part.items() if key != "id"}
    if isinstance(part, list):
        if all(isinstance(name, str) for name in part):
            return sorted(part, key=str)
        return [_comparable_trigger(value) for value in part]
    return part
