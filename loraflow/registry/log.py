"""The promotion log of one model: numbered files, each with the hash of the one before it.

An entry is created under its number or not at all (`create_document` fails if the number is taken), so that of two
writers one wins, and the other reads the new head and decides again.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loraflow.failures import CorruptArtifact, Failure
from loraflow.identity import canonical, short
from loraflow.store import LocalStore, Ref, Store


def actor() -> str:
    """Return who acts: the login name, or the uid where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


class Moved(Exception):
    """Somebody else wrote an entry first: the head is another one now."""


class Entry(BaseModel):
    """A line of the log."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    before: str | None  # hash of the entry before this one
    action: Literal["promote", "rollback"]
    model: str
    merged: Ref
    adapter: Ref | None
    inputs: dict[str, str]  # lineage in short: dataset md5, base, recipe
    reasons: list[str]
    actor: str
    time: str

    @property
    def hash(self) -> str:
        """What the next entry is chained to. Where the store lies is no part of it: stores move."""
        plain = self.model_dump()
        for name in ("merged", "adapter"):
            if plain[name]:
                plain[name].pop("uri")
        return hashlib.sha256(canonical(plain)).hexdigest()


def models(store: Store) -> list[str]:
    """Return the names in the registry, sorted."""
    return sorted({name.split("/")[1] for name in store.documents("registry/")})


class PromotionLog:
    """The log of one model in a store; `store` may be the folder of a local one."""

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
                stored = json.loads(content)
                claimed = stored.pop("hash")
                entry = Entry.model_validate(stored)
            except (ValueError, KeyError, AttributeError) as error:
                raise self._broken(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
            if claimed != entry.hash:
                raise self._broken(path, "its content is not what was written")
            if entry.seq != number or entry.before != (found[-1].hash if found else None):
                raise self._broken(path, "an entry before it is missing or was changed")
            found.append(
                entry.model_copy(update={"merged": self._here(entry.merged), "adapter": self._here(entry.adapter)})
            )
        return found

    def _here(self, ref: Ref | None) -> Ref | None:
        return ref.model_copy(update={"uri": self.store.uri}) if ref else None

    def _broken(self, name: str, why: str) -> CorruptArtifact:
        return CorruptArtifact(
            "The promotion log is damaged.",
            where=f"{self.store.uri}/{name}",
            got=why,
            next_step="restore the file from a backup; nothing is promoted meanwhile",
        )

    def head(self) -> Entry | None:
        """Return the entry in force: the champion."""
        entries = self.entries()
        return entries[-1] if entries else None

    def append(self, seen: Entry | None, **values: Any) -> Entry:
        """Write the next entry, decided in sight of the head `seen`.

        Raises:
            Moved: the head is another one by now.
        """
        head = self.head()
        if (head.hash if head else None) != (seen.hash if seen else None):
            raise Moved
        entry = Entry(
            seq=(head.seq if head else 0) + 1,
            before=head.hash if head else None,
            model=self.model,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **values,
        )
        document = _json({**entry.model_dump(), "hash": entry.hash})
        if not self.store.create_document(f"{self.folder}/log/{entry.seq:06d}.json", document):
            raise Moved
        return entry

    def in_force(self) -> list[Entry]:
        """Return the promotions that stand, oldest first: the last is the champion, the one before it the rollback target.

        A rollback takes promotions off the end until the one that it names is the last.
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

    def rolled_back(self, digest: str) -> str | None:
        """Return why a model was rolled back, if it was and was not promoted again since."""
        entries = self.entries()
        for number in range(len(entries) - 1, 0, -1):
            if entries[number].action == "rollback" and entries[number - 1].merged.digest == digest:
                return "; ".join(entries[number].reasons) or "rolled back"
            if entries[number].merged.digest == digest and entries[number].action == "promote":
                return None
        return None

    def rollback(self, reason: str, actor: str) -> Entry:
        """Go back to the model before the champion: to another one than any that was rolled back since.

        Raises:
            Failure: there is none.
        """
        entries = self.entries()
        stack = self.in_force()
        if len(stack) < 2:
            raise Failure(
                "There is no earlier model to go back to.",
                where=f"registry of {self.model}",
                got=f"{len(entries)} entries",
                next_step="loraflow registry",
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

    # decisions that led to no entry are remembered too: the same challenger against the same head is not news

    def decision(self, head: Entry | None, digest: str, protocol: str) -> dict[str, Any] | None:
        """Return what was decided about a model in sight of this head, by these rules, if anything was."""
        with suppress(ValueError):
            return json.loads(self.store.read_document(self._decision(head, digest, protocol)) or b"")
        return None

    def remember(self, head: Entry | None, digest: str, protocol: str, decision: dict[str, Any]) -> None:
        """Keep a decision."""
        self.store.write_document(self._decision(head, digest, protocol), _json(decision))

    def _decision(self, head: Entry | None, digest: str, protocol: str) -> str:
        seen = short(head.hash) if head else "none"
        return f"{self.folder}/decisions/{seen}-{short(digest)}-{short(protocol)}.json"
