"""The promotion log of one model: numbered files, each with the hash of the one before it.

An entry is created under its number by `create_document`, which fails if the number exists. If two writers append at the
same time, one succeeds; the other reads the new head and decides again.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from loraflow.failures import CorruptArtifact, Failure
from loraflow.identity import canonical, short
from loraflow.store import LocalStore, Ref, Store
from loraflow.store.files import json_bytes

Action: TypeAlias = Literal["promote", "rollback"]
EntryInputs: TypeAlias = dict[str, str]  # origin of the model, for people: dataset md5, base, recipe or run

_JSON_OBJECT = TypeAdapter(dict[str, JsonValue])


def actor() -> str:
    """Return the login name of the user who runs this, or the uid if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class HeadChanged(Exception):
    """Another writer appended an entry first, so the log has a new head."""


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


def models(store: Store) -> list[str]:
    """Return the names of the models that have a promotion log, sorted. A model that was only rejected has none."""
    paths = (name.split("/") for name in store.documents("registry/"))
    return sorted({path[1] for path in paths if path[2] == "log"})


class PromotionLog:
    """The log of one model in a store; `store` may be the folder of a local store."""

    def __init__(self, store: Store | Path, model: str):
        self.store: Store = LocalStore(store) if isinstance(store, Path) else store
        self.folder = f"registry/{model}"
        self.model = model

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first, their chain verified.

        Raises:
            CorruptArtifact: an entry is missing or was changed.
        """
        found: list[Entry] = []
        for number, (path, content) in enumerate(self.store.read_documents(f"{self.folder}/log/").items(), 1):
            try:
                stored = _JSON_OBJECT.validate_json(content)
                claimed = stored.pop("hash")
                entry = Entry.model_validate(stored)
            except (ValueError, KeyError) as error:
                raise self._damaged(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
            if claimed != entry.hash:
                raise self._damaged(path, "hash mismatch")
            if entry.seq != number or entry.before != (found[-1].hash if found else None):
                raise self._damaged(path, "an entry before it is missing or was changed")
            found.append(
                entry.model_copy(
                    update={"merged": self._in_store(entry.merged), "adapter": self._in_store(entry.adapter)}
                )
            )
        return found

    def _in_store(self, ref: Ref | None) -> Ref | None:
        return ref.model_copy(update={"uri": self.store.uri}) if ref else None

    def _damaged(self, name: str, why: str) -> CorruptArtifact:
        return CorruptArtifact(
            "The promotion log is damaged.",
            where=f"{self.store.uri}/{name}",
            got=why,
            next_step="restore the file from a backup; until then nothing is promoted",
        )

    def head(self) -> Entry | None:
        """Return the last entry, whose model is the champion; None if there is none."""
        entries = self.entries()
        return entries[-1] if entries else None

    def append(
        self,
        seen: Entry | None,
        *,
        action: Action,
        merged: Ref,
        adapter: Ref | None,
        inputs: Mapping[str, str],
        reasons: Sequence[str],
        actor: str,
    ) -> Entry:
        """Write the next entry; `seen` is the head at the time of the decision.

        Raises:
            HeadChanged: the head has changed since.
        """
        head = self.head()
        if (head.hash if head else None) != (seen.hash if seen else None):
            raise HeadChanged
        entry = Entry(
            seq=(head.seq if head else 0) + 1,
            before=head.hash if head else None,
            action=action,
            model=self.model,
            merged=merged,
            adapter=adapter,
            inputs=dict(inputs),
            reasons=list(reasons),
            actor=actor,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        document = json_bytes({**entry.model_dump(), "hash": entry.hash})
        if not self.store.create_document(f"{self.folder}/log/{entry.seq:06d}.json", document):
            raise HeadChanged
        return entry

    def active_promotions(self) -> list[Entry]:
        """Return the promotions that are not rolled back, oldest first. The last is the champion, the one before it its
        rollback target.

        A rollback removes promotions from the end until the last one is of the model that the rollback names.
        """
        stack: list[Entry] = []
        for entry in self.entries():
            if entry.action == "promote":
                if not stack or stack[-1].merged.digest != entry.merged.digest:
                    stack.append(entry)
            else:
                while stack and stack[-1].merged.digest != entry.merged.digest:
                    stack.pop()
        return stack

    def rollback_reason(self, digest: str) -> str | None:
        """Return the reason of a model's rollback; None if it was not rolled back, or was promoted again since."""
        entries = self.entries()
        for number in range(len(entries) - 1, 0, -1):
            if entries[number].action == "rollback" and entries[number - 1].merged.digest == digest:
                return "; ".join(entries[number].reasons) or "rolled back"
            if entries[number].merged.digest == digest and entries[number].action == "promote":
                return None
        return None

    def rollback(self, reason: str, actor: str) -> Entry:
        """Make the model before the champion the champion again. Models that were rolled back are skipped.

        Raises:
            Failure: there is no earlier model.
            HeadChanged: another writer appended an entry at the same time.
        """
        entries = self.entries()
        stack = self.active_promotions()
        if len(stack) < 2:
            raise Failure(
                "There is no earlier model to roll back to.",
                where=f"registry of {self.model}",
                got=f"{len(entries)} entries",
                next_step="look at `loraflow registry`",
            )
        target = stack[-2]
        return self.append(
            entries[-1],
            action="rollback",
            merged=target.merged,
            adapter=target.adapter,
            inputs=target.inputs,
            reasons=[reason],
            actor=actor,
        )

    # Decisions that add no entry are stored too, so that the same challenger is not compared again with the same head.

    def read_decision(self, head: Entry | None, digest: str, protocol: str) -> dict[str, JsonValue] | None:
        """Return the stored decision about a model, against this head, under these rules; None if there is none."""
        document = self.store.read_document(self._decision_name(head, digest, protocol))
        try:
            return _JSON_OBJECT.validate_json(document) if document is not None else None
        except ValidationError:  # a damaged document counts as missing: the models are compared again
            return None

    def write_decision(self, head: Entry | None, digest: str, protocol: str, decision: Mapping[str, JsonValue]) -> None:
        """Store a decision about a model against this head."""
        self.store.write_document(self._decision_name(head, digest, protocol), json_bytes(decision))

    def _decision_name(self, head: Entry | None, digest: str, protocol: str) -> str:
        seen = short(head.hash) if head else "none"
        return f"{self.folder}/decisions/{seen}-{short(digest)}-{short(protocol)}.json"
