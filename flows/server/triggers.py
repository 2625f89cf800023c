"""The triggers of a deployment in `prefect.yaml`. Prefect's own classes ignore keys that they do not know.

That is dangerous here: with `expct` for `expect`, Prefect's trigger starts a run at every event of the server, and the
events of that run start the next ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeGuard
from uuid import UUID

from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from pydantic import BaseModel, RootModel, ValidatorFunctionWrapHandler

# On the automation of each trigger: an automation without it was made by a person, and stays.
TAG = "prefect.yaml"
CONDITIONS = ("expect", "match", "match_related", "after")


def check_triggers(values: object, validate: ValidatorFunctionWrapHandler) -> list[DeploymentTriggerTypes]:
    """Validate triggers with Prefect's classes, and refuse what these would ignore.

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
        trigger: as it was read.
        number: its position in the list of the deployment, from 1.
        deployment: the deployment's name, without its flow's.
        deployment_id: the deployment's id on the server.
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
    for key in value.keys() - known:
        yield f"{path}.{key}: unknown key; known are {', '.join(sorted(map(str, known - {'id'})))}"
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


def _has_fields(part: object) -> TypeGuard[BaseModel]:
    """Tell whether a part has keys that Prefect defines; those of `match` and `match_related` are labels of resources."""
    return isinstance(part, BaseModel) and not isinstance(part, RootModel)
