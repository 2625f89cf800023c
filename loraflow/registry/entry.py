"""The promotion log's entries, and what every log of chained, numbered entries has."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from loraflow.identity import canonical
from loraflow.registry.runs import LogHead
from loraflow.store import Ref
from loraflow.store.files import json_bytes

Action: TypeAlias = Literal["promote", "rollback"]
EntryInputs: TypeAlias = dict[str, str]  # origin of the model, for people: dataset md5, base, recipe or run

JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


class ChainedEntry(BaseModel):
    """An entry of a record that is only appended to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int  # from 1
    before: str | None  # hash of the entry before this one

    def stored(self) -> dict[str, JsonValue]:
        """Return the values of the entry's file."""
        return self.model_dump()

    @property
    def hash(self) -> str:
        """The hash that the next entry is chained to."""
        return hashlib.sha256(canonical(self.stored())).hexdigest()

    @property
    def document(self) -> bytes:
        """The entry's file."""
        return json_bytes({**self.stored(), "hash": self.hash})


class Entry(ChainedEntry):
    """A line of the log: a promotion or a rollback."""

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


E = TypeVar("E", bound=ChainedEntry)


class Chain(NamedTuple, Generic[E]):
    """The entries at the beginning of a record that are intact, the files after them, and what is wrong there."""

    entries: list[E]
    rest: dict[str, bytes]
    problem: str

    @property
    def head(self) -> LogHead:
        """The last intact entry."""
        return head_of(self.entries)


def head_of(entries: Sequence[ChainedEntry]) -> LogHead:
    """Return number and hash of the last entry: number 0 if there is none."""
    return LogHead(seq=entries[-1].seq, hash=entries[-1].hash) if entries else LogHead()


def read_chain(kind: type[E], files: Mapping[str, bytes]) -> Chain[E]:
    """Read a record up to the first entry that is missing or was changed."""
    found: list[E] = []
    for position, (name, content) in enumerate(files.items()):
        try:
            found.append(_parse(kind, content, found))
        except ValueError as error:
            problem = f"{name.rsplit('/', 1)[1]}: {error}".splitlines()[0]
            return Chain(found, dict(list(files.items())[position:]), problem)
    return Chain(found, {}, "")


def _parse(kind: type[E], content: bytes, before: Sequence[E]) -> E:
    """Parse an entry and check its hash, its number, and that it follows the entries before it.

    Raises:
        ValueError: it does not.
    """
    try:
        stored = JSON_OBJECT.validate_json(content)
        claimed = stored.pop("hash", None)
        entry = kind.model_validate(stored)
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
