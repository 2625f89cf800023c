"""The promotion log of one model: numbered files, each with the hash of the one before it.

An entry is created under its number or not at all (a hard link, which fails if the number is taken), so that of two
writers one wins, and the other reads the new head and decides again.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from loraflow.failures import CorruptArtifact, Failure
from loraflow.identity import canonical, short
from loraflow.store import Ref
from loraflow.store.files import fsync_path, write_json


def actor() -> str:
    """Return who acts: the login name, or the uid where there is none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


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


class PromotionLog:
    """The log of one model in a store's folder."""

    def __init__(self, root: Path, model: str):
        self.folder = root / "registry" / model
        self.model = model
        self.root = root

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first, their chain verified.

        Raises:
            CorruptArtifact: an entry is missing or was changed.
        """
        found: list[Entry] = []
        for number, path in enumerate(sorted(self.folder.glob("log/[0-9]*.json")), 1):
            try:
                stored = json.loads(path.read_bytes())
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
        return ref.model_copy(update={"uri": str(self.root)}) if ref else None

    def _broken(self, path: Path, why: str) -> CorruptArtifact:
        return CorruptArtifact(
            "The promotion log is damaged.",
            where=str(path),
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
        log = self.folder / "log"
        log.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"draft-{uuid.uuid4().hex[:8]}.json"
        write_json(draft, {**entry.model_dump(), "hash": entry.hash})
        try:
            os.link(draft, log / f"{entry.seq:06d}.json")
            fsync_path(log)
        except FileExistsError:
            raise Moved from None
        finally:
            draft.unlink()
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
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._decision_file(head, digest, protocol).read_bytes())
        return None

    def remember(self, head: Entry | None, digest: str, protocol: str, decision: dict[str, Any]) -> None:
        """Keep a decision."""
        file = self._decision_file(head, digest, protocol)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, decision)

    def _decision_file(self, head: Entry | None, digest: str, protocol: str) -> Path:
        seen = short(head.hash) if head else "none"
        return self.folder / "decisions" / f"{seen}-{short(digest)}-{short(protocol)}.json"
