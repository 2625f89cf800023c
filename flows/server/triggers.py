"""The triggers of a deployment in `prefect.yaml`. Prefect's own classes ignore keys that they do not know.

That is dangerous here: with `expct` for `expect`, Prefect's trigger starts a run at every event of the server, and the
events of that run start the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefect.events.schemas.automations import EventTrigger
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from pydantic import BaseModel, ValidatorFunctionWrapHandler

CONDITIONS = ("expect", "match", "match_related", "after")


def check_triggers(values: object, validate: ValidatorFunctionWrapHandler) -> list[DeploymentTriggerTypes]:
    """Validate triggers with Prefect's classes, and refuse what these would ignore.

    Raises:
        ValueError: a key is unknown, a trigger has no condition, or two have no name.
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
    if sum(not trigger.name for trigger in triggers) > 1:
        raise ValueError("several triggers have no name, so each would replace the one before it; name them")
    return triggers


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
        if isinstance(inner, BaseModel) and key != "match":
            yield from _problems(part, inner, f"{path}.{key}")
        elif isinstance(inner, list) and isinstance(part, list):
            for number, (item, model) in enumerate(zip(part, inner, strict=False)):
                if isinstance(model, BaseModel):
                    yield from _problems(item, model, f"{path}.{key}.{number}")
