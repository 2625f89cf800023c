"""The promotion log of one model: numbered files, each with the hash of the one before it.

An entry is created under its number by `create_document`, which fails if the number exists. If two writers append at the
same time, one succeeds; the other reads the new head and decides again. The anchor outside of the log (`anchor.py`) tells
whether entries were lost or edited.
"""

import getpass
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from loraflow.failures import BadConfig, DamagedLog, Failure
from loraflow.identity import short
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.registry.anchor import (
    Acceptance,
    Claim,
    Known,
    anchored_models,
    damaged_log,
    models_of_runs,
    now,
    read_known,
    write_acceptance,
    write_anchor,
)
from loraflow.registry.entry import JSON_OBJECT, Action, Chain, active_promotions, head_of, read_chain
from loraflow.registry.entry import Entry as Entry
from loraflow.registry.runs import LogHead
from loraflow.registry.signature import sign, signing_key
from loraflow.store import LocalStore, Ref, Store
from loraflow.store.checksum import check_document, with_checksum

log = logging.getLogger("loraflow")
_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # as in the recipe: register.model
_ENTRY_NAME = re.compile(r"\d{6,}\.json")
_stray_files_warned: set[tuple[str, ...]] = set()  # once per process


def actor() -> str:
    """Return the login name of the user who runs this, or the uid if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class HeadChanged(Exception):
    """Another writer appended an entry first, so the log has a new head."""


def models(store: Store, *, of_runs: bool = False) -> list[str]:
    """Return the names of the models that have a promotion log, sorted. A model that was only rejected has none.

    A model whose log was deleted is among them if its anchor is there; with `of_runs`, also if only run records know it.
    """
    paths = [name.split("/") for name in store.documents("registry/")]
    found = {path[1] for path in paths if path[2:3] == ["log"]} | anchored_models(store)
    if of_runs or not found:
        found |= models_of_runs(store)
    return sorted(filter(_MODEL_NAME.fullmatch, found))


class PromotionLog:
    """The log of one model in a store; `store` may be the folder of a local store.

    Raises:
        BadConfig: the model's name cannot be one, such as a path.
    """

    def __init__(self, store: Store | Path, model: str):
        if not _MODEL_NAME.fullmatch(model):
            raise BadConfig(
                "This is not a name of a model in the registry.",
                where="register.model, or --model",
                expected="lower-case letters, digits, and . _ - after the first",
                got=model[:80],
                next_step="correct the name",
            )
        self.store: Store = LocalStore(store) if isinstance(store, Path) else store
        self.folder = f"registry/{model}"
        self.model = model
        self.last_seen: LogHead | None = None  # the head when the log was read or extended last

    def entries(self, *, all_runs: bool = False) -> list[Entry]:
        """Return all entries, oldest first: their chain is verified, and compared with the anchor.

        With `all_runs`, the log is also compared with all run records.

        Raises:
            DamagedLog: an entry is missing or was changed.
        """
        try:
            entries = self._checked_entries(all_runs)
        except DamagedLog:  # a listing can miss a file that another process adds at this moment
            entries = self._checked_entries(all_runs)
        self.last_seen = head_of(entries)
        return entries

    def _checked_entries(self, all_runs: bool) -> list[Entry]:
        known = self._known(all_runs)  # read before the log, which may only be ahead of it
        if self.last_seen and not known.accepted:  # the store's disk may be gone, and leave an empty folder
            known.from_runs.append(Claim(self.last_seen, "what this process read before"))
        read = self._read()
        intact = len(read.entries)
        if read.rest:
            raise damaged_log(self.store, self.model, next(iter(read.rest)), got=read.problem, intact=intact)
        if known.problem:
            raise damaged_log(self.store, self.model, "anchors", got=known.problem, intact=intact)
        unmet = known.unmet([entry.hash for entry in read.entries])
        if unmet:
            claim = max(unmet, key=lambda claim: claim.head.seq)
            got = f"intact entries: {intact}" if claim.head.seq > intact else "another entry with this number"
            raise damaged_log(self.store, self.model, f"{self.folder}/log", expected=str(claim), got=got, intact=intact)
        return read.entries

    def _known(self, all_runs: bool) -> Known:
        return read_known(self.store, self.model, all_runs=all_runs)

    def _read(self) -> Chain[Entry]:
        """Read the log. Its models are those of this store, which may have moved."""
        read = read_chain(Entry, self._files())
        return read._replace(entries=[self._in_store(entry) for entry in read.entries])

    def _files(self) -> dict[str, bytes]:
        """Return the files of the entries. Other files beside them are ignored, with one warning."""
        prefix = f"{self.folder}/log/"
        documents = self.store.read_documents(prefix)
        stray = [name for name in documents if not _ENTRY_NAME.fullmatch(name.removeprefix(prefix))]
        warned = (self.store.uri, *stray)
        if stray and warned not in _stray_files_warned:
            _stray_files_warned.add(warned)
            log.warning("ignored in the promotion log, remove them: %s", ", ".join(stray))
        return {name: data for name, data in documents.items() if name not in stray}

    def _in_store(self, entry: Entry) -> Entry:
        refs = {"merged": entry.merged, "adapter": entry.adapter}
        here = {name: ref.model_copy(update={"uri": self.store.uri}) for name, ref in refs.items() if ref}
        return entry.model_copy(update=here)

    def head(self) -> Entry | None:
        """Return the last entry, whose model is the champion; None if there is none."""
        entries = self.entries()
        return entries[-1] if entries else None

    def is_intact(self) -> bool:
        """Tell whether the log has all entries that the anchor and run records know."""
        try:
            self.entries(all_runs=True)
        except DamagedLog:
            return False
        return True

    def accept_loss(self, reason: str, actor: str) -> Acceptance:
        """Continue with the entries that are intact, and store who decided this and why.

        Files after the last intact entry are moved into the stored decision.

        Raises:
            Failure: the log is not damaged.
        """
        known, read = self._known(all_runs=True), self._read()
        lost = {claim.head for claim in known.unmet([entry.hash for entry in read.entries])}
        if not (read.rest or lost or known.problem):
            raise Failure(
                "The promotion log is not damaged.",
                where=f"{self.store.uri}/{self.folder}/log",
                next_step="nothing has to be accepted; `loraflow registry` shows the log",
            )
        acceptance = Acceptance(
            reason=reason,
            actor=actor,
            time=now(),
            problem=read.problem or known.problem,
            kept=read.head,
            lost=sorted(lost, key=lambda head: (head.seq, head.hash)),
            set_aside={name: data.decode(errors="backslashreplace") for name, data in read.rest.items()},
        )
        write_acceptance(self.store, f"{ANCHORS}/{self.model}/accepted-", acceptance)
        for name in reversed(read.rest):
            self.store.remove_document(name)
        write_anchor(self.store, self.model, read.head)
        return acceptance

    def acceptances(self) -> list[Acceptance]:
        """Return the losses that were accepted, oldest first."""
        return self._known(all_runs=False).accepted

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
        """Write the next entry, then the anchor; `seen` is the head at the time of the decision.

        Raises:
            HeadChanged: the head has changed since.
            DamagedLog: an entry is missing or was changed, or a run record knows one that the log does not have.
        """
        head = next(reversed(self.entries(all_runs=True)), None)
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
            time=now(),
        )
        name = f"{self.folder}/log/{entry.seq:06d}.json"
        if not self.store.create_document(name, entry.document):
            raise self._not_created(name, head)
        self.last_seen = head_of([entry])
        self._anchor(self.last_seen)
        self._sign(self.last_seen)
        return entry

    def _not_created(self, name: str, head: Entry | None) -> Exception:
        if self.head() != head:
            return HeadChanged()
        return Failure(
            "The next entry of the promotion log cannot be written.",
            where=f"{self.store.uri}/{name}",
            got="a file or folder with this name that is not an entry",
            next_step="move it away",
        )

    def _anchor(self, head: LogHead) -> None:
        """Write the anchor, unless another writer has appended an entry and written it since.

        Another writer may do both after this one has read the anchor, and before it writes it. So the log is read again
        afterwards: the last writer names the last entry.

        If that fails, the entry is valid nevertheless, and the next append writes the anchor.
        """
        try:
            while True:
                anchor, hashes = self._known(all_runs=False).anchor, self.hashes()
                if anchor is None or anchor.head.seq <= head.seq or not anchor.is_met_by(hashes):
                    write_anchor(self.store, self.model, head)
                newest = self._read().head
                if newest.seq <= head.seq:
                    return
                head = newest
        except (Failure, OSError) as error:
            log.warning("entry %d is written, but not its anchor: %s", head.seq, error)

    def _sign(self, head: LogHead) -> None:
        """Sign the entry, if the environment names a key. If that fails, the entry is valid, but not signed."""
        key = signing_key()
        if key is not None:
            try:
                sign(self.store, self.model, head, key, self.hashes)
            except (Failure, OSError) as error:
                log.warning("entry %d is written, but not signed: %s", head.seq, error)

    def hashes(self) -> list[str]:
        """Return the hashes of the intact entries, read now."""
        return [entry.hash for entry in self._read().entries]

    def active_promotions(self) -> list[Entry]:
        """Return the promotions that are not rolled back, oldest first. The last is the champion, the one before it its
        rollback target.
        """
        return active_promotions(self.entries())

    def rollback_reason(self, digest: str) -> str | None:
        """Return the reason of a model's rollback; None if it was not rolled back, or was promoted again since."""
        entries = self.entries()
        for number in range(len(entries) - 1, 0, -1):
            if entries[number].action == "rollback" and entries[number - 1].merged.digest == digest:
                return "; ".join(entries[number].reasons) or "rolled back"
            if entries[number].merged.digest == digest and entries[number].action == "promote":
                return None
        return None

    def rollback(self, reason: str, actor: str, pick: Callable[[Sequence[Entry]], Entry] | None = None) -> Entry:
        """Make the model before the champion the champion again. Models that were rolled back are skipped.

        `pick` chooses another of the earlier promotions, which it gets with the newest first, or raises if the model
        cannot be used.

        Raises:
            Failure: there is no earlier model.
            HeadChanged: another writer appended an entry at the same time.
        """
        entries = self.entries()
        targets = active_promotions(entries)[-2::-1]
        if not targets:
            raise Failure(
                "There is no earlier model to roll back to.",
                where=f"registry of {self.model}",
                got=f"{len(entries)} entries",
                next_step="`loraflow registry` lists the entries",
            )
        target = pick(targets) if pick else targets[0]
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
        """Return the stored decision about a model, against this head, under these rules; None if there is none.

        A damaged one, or that of another comparison, counts as missing: the models are compared again, in the same look.
        """
        return self._read_decision(self._decision_name(head, digest, protocol))

    def decisions_about(self, digest: str) -> list[dict[str, JsonValue]]:
        """Return all stored decisions about a model, without damaged ones."""
        names = self.store.documents(f"{self.folder}/decisions/")
        about = [name for name in names if name.rsplit("/", 1)[1].split("-")[1:2] == [short(digest)]]
        return [found for name in about if (found := self._read_decision(name)) is not None]

    def _read_decision(self, name: str) -> dict[str, JsonValue] | None:
        document = self.store.read_document(name)
        if document is None:
            return None
        try:
            return JSON_OBJECT.validate_json(check_document(name, document))
        except ValueError as error:  # ValidationError is a subclass
            log.warning("a stored decision is not used, %s: %s", name, str(error).splitlines()[0])
            return None

    def write_decision(self, head: Entry | None, digest: str, protocol: str, decision: Mapping[str, JsonValue]) -> None:
        """Store a decision about a model against this head."""
        name = self._decision_name(head, digest, protocol)
        self.store.write_document(name, with_checksum(name, decision))

    def _decision_name(self, head: Entry | None, digest: str, protocol: str) -> str:
        seen = short(head.hash) if head else "none"
        return f"{self.folder}/decisions/{seen}-{short(digest)}-{short(protocol)}.json"
