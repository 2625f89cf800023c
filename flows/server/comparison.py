"""Compare what a server has with what it should have, so that a deploy changes only what differs."""

from __future__ import annotations

from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from pydantic import JsonValue

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
