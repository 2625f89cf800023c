"""An entry of a promotion log: its values, its hash, and how it follows the entries before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from loraflow.identity import canonical
from loraflow.store import Ref

Action: TypeAlias = Literal["promote", "rollback"]
EntryInputs: TypeAlias = dict[str, str]  # origin of the model, for people: dataset md5, base, recipe or run

JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


class Entry(BaseModel):
    """A line of the log: a promotion or a rollback."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    before: str | None  # hash of the entry before this one
    action: Action
    model: str
    merged: Ref
    adapter: Ref | None
    inputs: EntryInputs
    reasons: list[str]
    actor: str
    time: str

    @property
    def hash(self) -> str:
        """The hash that the next entry is chained to. The store's uri is not part of it: stores move."""
        plain = self.model_dump()
        for name in ("merged", "adapter"):
            if plain[name]:
                plain[name].pop("uri")
        return hashlib.sha256(canonical(plain)).hexdigest()


def parse_entry(content: bytes, before: Sequence[Entry]) -> Entry:
    """Parse an entry and check its hash, its number, and that it follows the entries before it.

    Raises:
        ValueError: it does not.
    """
    try:
        stored = JSON_OBJECT.validate_json(content)
        claimed = stored.pop("hash", None)
        entry = Entry.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}") from error
    if claimed != entry.hash:
        raise ValueError("hash mismatch")
    if entry.seq != len(before) + 1 or entry.before != (before[-1].hash if before else None):
        raise ValueError("an entry before it is missing or was changed")
    return entry


def active_promotions(entries: Sequence[Entry]) -> list[Entry]:
    """Return the promotions that are not rolled back, oldest first."""
    stack: list[Entry] = []
    for entry in entries:
        if entry.action == "promote":
            if not stack or stack[-1].merged.digest != entry.merged.digest:
                stack.append(entry)
        else:
            while stack and stack[-1].merged.digest != entry.merged.digest:
                stack.pop()
    return stack
