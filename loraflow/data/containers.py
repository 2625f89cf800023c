"""Marks in the objects beside an answer, such as `metadata`, and what annotators said in lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from loraflow.data.beside import Beside, Said, is_object_text, objects_of, shown
from loraflow.data.chats import BadRow
from loraflow.data.container_text import Unreadable, parsed_text
from loraflow.data.judgements import label_inside, opinion, part_of_dataset, verdict
from loraflow.data.labels import as_number, judges_badly, label_side
from loraflow.data.mark_names import (
    CONTAINERS,
    EXCLUSIONS,
    JUDGEMENTS,
    KEYS,
    LABELS,
    OPINIONS,
    STATES,
    WEIGHTS,
    WITHOUT_LISTS,
    normal_name,
)

MAX_DEPTH = 50  # of objects in objects
_KEY_IN_TEXT = re.compile(r"([A-Za-z][\w -]*?)[\"']?\s*[:=]")


def contained(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return what the objects of a key say about an answer: of one that was flattened to the columns meta.weight, … too.

    Args:
        key: the key.
        here: the keys that lead to the value.
        value: the value.
        beside: the answer.

    Raises:
        BadRow: objects are nested too deeply, or a text that seems to have a mark cannot be parsed.
    """
    if len(here) > MAX_DEPTH:
        raise BadRow(f"{'.'.join(here[:3])}…: objects that are nested more than {MAX_DEPTH} deep")
    name = normal_name(key)
    if (name.endswith(("responses", "responses_status"))) and (said := _responses(key, here, value, beside)):
        return said
    base = name.removesuffix("_json")
    if base in CONTAINERS or (name in JUDGEMENTS | OPINIONS and isinstance(value, list)):
        return _of_objects(key, base, here, value, beside)
    container, found, member = key.partition(".")
    if found and normal_name(container) in CONTAINERS:
        return _of_member(member, here, value, beside)
    return None


def _of_objects(key: str, name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    items = objects_of(value)
    if isinstance(value, dict):
        return _strictest(_of_member(k, (*here, k), v, beside) for k, v in items[0].items() if isinstance(k, str))
    is_map = isinstance(value, list) and not any(isinstance(item, dict) for item in value)
    if name in WITHOUT_LISTS and not is_map:
        return None
    return _agreed([_of_item(key, here, item, beside) for item in items])


def _of_item(key: str, here: tuple[str, ...], item: Mapping[str, JsonValue], beside: Beside) -> Said | None:
    said = [_of_member(k, (*here, k), v, beside) for k, v in item.items() if isinstance(k, str)]
    if "value" in item:  # Argilla's: what each annotator said about the answer
        said.append(_of_member(key, here, item["value"], beside))
    return _strictest(said)


def _responses(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return what annotators said, in Argilla's columns `correct.responses` and `correct.responses.status`."""
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    if not isinstance(value, list) or not value:
        return None
    if key.endswith("responses.status"):
        return Said(False, shown(here, "discarded")) if all(status == "discarded" for status in value) else None
    head, found, _ = key.rpartition(".responses")
    return _agreed([_of_member(head, here, item, beside) for item in value]) if found else None


def _of_member(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return what a key of an object says. A weight between 0 and 1, and a `label` of 0, may be those of something else."""
    name, text = normal_name(key), shown(here, value)
    if name in WEIGHTS | EXCLUSIONS:
        number = as_number(value)
        return Said((number == 1) is (name in WEIGHTS), text) if number in (0, 1) else None
    if name == "label":
        return label_inside(here, value, beside)
    if name in LABELS:
        side = label_side(value)
        if isinstance(side, bool):
            return Said(side, text)
        if isinstance(value, str) and judges_badly(value):
            return Said(None, f"{text} may mark the answer as wrong: write true (it is learned) or false (it is not)")
        return None
    if name in JUDGEMENTS and not isinstance(value, list):
        is_learned = verdict(name, here, value, beside)
        return None if is_learned is None else Said(is_learned, text)
    said = opinion(name, here, value, beside) or part_of_dataset(name, here, value, beside)
    return said or (contained(key, here, value, beside) if isinstance(value, dict | list | str) else None)


def _strictest(found: Iterable[Said | None]) -> Said | None:
    """Return what excludes the answer, else what is unclear, else what says that it is learned."""
    said = [one for one in found if one is not None]
    return min(said, key=lambda one: (False, None, True).index(one.is_learned), default=None)


def _agreed(found: list[Said | None]) -> Said | None:
    """Return what a list says: it excludes the answer only if all items that judge agree; a mix says nothing."""
    has_both = len({one.is_learned is True for one in found if one is not None}) > 1
    return None if has_both else _strictest(found)


def _parsed(text: str, here: tuple[str, ...]) -> JsonValue:
    """Parse the text of an object; None if it is none and has no mark.

    Raises:
        BadRow: it cannot be parsed, and the name of a mark is in it.
    """
    try:
        return parsed_text(text)
    except Unreadable as error:
        names = (found.strip() for found in _KEY_IN_TEXT.findall(text))
        if mark := next((name for name in names if normal_name(name) in KEYS | OPINIONS | STATES), None):
            raise BadRow(
                f"{'.'.join(here)} is a text that begins as an object and has the mark {mark}, but cannot be read: {error}; "
                "write it as JSON, or rename the column"
            ) from None
        return None
