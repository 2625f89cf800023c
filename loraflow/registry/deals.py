"""The record of deals: which held-out rows each model of a registry name is scored on (data.heldout_reserve).

    registry/<model>/deals/000001.json    a deal: a model, and the digest of its rows; never changed
    registry/<model>/dealt/<digest>.json  the keys of these rows
    anchors/<model>/deals.json            number and hash of all deals, so that lost and edited ones are noticed

A deal is recorded before a model is scored. The same model gets the same rows again, so a repeated run is cached.
Rows of a deal are no longer fresh, whether or not a look followed.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from pydantic import ValidationError

from loraflow.failures import DamagedLog
from loraflow.frozen import StoredModel
from loraflow.identity import canonical
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.registry.anchor import now, read_anchor, write_anchor
from loraflow.registry.entry import JSON_OBJECT
from loraflow.registry.look_claims import digest_of, keys_of
from loraflow.registry.reserve import ReserveRow, ReserveState, deal, rows_of_a_look, state
from loraflow.registry.runs import LogHead
from loraflow.store import Store
from loraflow.store.checksum import first_problem
from loraflow.store.files import json_bytes


class Deal(StoredModel):
    """The rows that one model is scored on."""

    seq: int
    model: str  # the registry's name
    challenger: str  # digest of the merged model
    reserve: int | float  # data.heldout_reserve
    outside: int  # rows that were not in the reserve when the first model was dealt rows
    size: int  # rows of a look: `outside`, or evaluation.max_rows if that is less
    rows: str  # digest of the rows' keys
    is_fresh: bool  # whether no model was scored on them before
    actor: str
    time: str

    @property
    def hash(self) -> str:
        """Hash of all values, which is stored beside them."""
        return hashlib.sha256(canonical(self.model_dump())).hexdigest()


class DealRequest(NamedTuple):
    """What a recipe asks for."""

    reserve: int | float  # data.heldout_reserve
    max_rows: int | None  # evaluation.max_rows
    seed: int  # data.seed


class DealtRows(NamedTuple):
    """The rows that a model is scored on, and what is left."""

    keys: frozenset[str]
    rows: int
    state: ReserveState
    is_new: bool  # they are dealt now; otherwise the model has these rows already


Scored = Callable[[Set[str]], Set[str]]


class DealRecord:
    """The deals of one model in a store. Each method raises DamagedLog if a deal or its rows are missing or were changed."""

    def __init__(self, store: Store, model: str):
        self._store, self._model = store, model
        self._folder, self._rows = f"registry/{model}/deals/", f"registry/{model}/dealt/"
        self._anchor = f"{ANCHORS}/{model}/deals.json"

    def take(
        self, challenger: str, rows: Sequence[ReserveRow], scored: Scored, request: DealRequest, *, actor: str
    ) -> DealtRows:
        """Return the rows that a model is scored on. If it has none yet, they are dealt and recorded.

        Args:
            scored: returns those of some keys that were scored in a look (`LookRecord.scored_keys`).

        Raises:
            BadConfig: no row is left for a look.
            DamagedLog: a deal or its rows are missing or were changed.
        """
        while True:
            entries, dealt = self._read()
            found = _find(entries, dealt, challenger, rows, scored, request)
            if not found.is_new:
                self._write_anchor(entries)  # a crash may have left it behind the deals
                return found
            outside, size = _sizes(entries, rows, request)
            digest = self._write_rows(found.keys)
            new = Deal(
                seq=len(entries) + 1,
                model=self._model,
                challenger=challenger,
                reserve=request.reserve,
                outside=outside,
                size=size,
                rows=digest,
                is_fresh=found.state.is_fresh,
                actor=actor,
                time=now(),
            )
            if self._store.create_document(self._name(new.seq), json_bytes({**new.model_dump(), "hash": new.hash})):
                self._write_anchor([*entries, new])
                return found

    def preview(
        self, challenger: str | None, rows: Sequence[ReserveRow], scored: Scored, request: DealRequest
    ) -> DealtRows:
        """Return what `take` would, without dealing. `challenger` is None for a model that is not trained yet.

        Raises:
            BadConfig: no row is left for a look.
            DamagedLog: a deal or its rows are missing or were changed.
        """
        entries, dealt = self._read()
        return _find(entries, dealt, challenger, rows, scored, request)

    def for_scores(self, model: str, rows: Sequence[ReserveRow]) -> frozenset[str] | None:
        """Return the keys of rows to score a model on without a look: its own, or else those that were dealt last.

        None if no rows were dealt, or some of them are not in the dataset any more.

        Raises:
            DamagedLog: a deal or its rows are missing or were changed.
        """
        entries, dealt = self._read()
        present = {row.key for row in rows}
        there = [entry for entry in entries if dealt[entry.rows] <= present]
        own = [entry for entry in there if entry.challenger == model]
        return dealt[(own or there)[-1].rows] if there else None

    def of_model(self, challenger: str, reserve: int | float) -> frozenset[str] | None:
        """Return the keys of the rows that a model was dealt last with this reserve; None if it was dealt none.

        Raises:
            DamagedLog: a deal or its rows are missing or were changed.
        """
        entries, dealt = self._read()
        own = [entry for entry in entries if (entry.challenger, entry.reserve) == (challenger, reserve)]
        return dealt[own[-1].rows] if own else None

    def check(self) -> None:
        """Read all deals and their rows.

        Raises:
            DamagedLog: a deal or its rows are missing or were changed.
        """
        self._read()

    def _read(self) -> tuple[list[Deal], dict[str, frozenset[str]]]:
        """Return the deals, oldest first, and the keys of their rows by digest."""
        try:
            return self._read_once()
        except DamagedLog:  # a listing can miss a file that another process adds at this moment
            return self._read_once()

    def _read_once(self) -> tuple[list[Deal], dict[str, frozenset[str]]]:
        anchor = self._read_anchor()  # before the deals, which may only be ahead of it
        found: list[Deal] = []
        for name, content in sorted(self._store.read_documents(self._folder, ".json").items()):
            try:
                values = JSON_OBJECT.validate_json(content)
                claimed = values.pop("hash", None)
                entry = Deal.model_validate(values)
            except ValidationError as error:
                raise self._damaged(name, "a deal of held-out rows", str(error).splitlines()[0]) from error
            if claimed != entry.hash or entry.model != self._model:
                raise self._damaged(name, f"values with the hash {str(claimed)[:12]}", f"the hash {entry.hash[:12]}")
            # The rows of a missing deal would count as fresh.
            if entry.seq != len(found) + 1 or name != self._name(entry.seq):
                raise self._damaged(self._name(len(found) + 1), f"deal {len(found) + 1}", f"deal {entry.seq} in {name}")
            found.append(entry)
        if anchor != _head(found[: anchor.seq]):
            expected = f"{anchor.seq} deals, as {self._anchor} says"
            raise self._damaged(self._folder, expected, f"{len(found)} deals, or others with these numbers")
        stored = self._store.read_documents(self._rows, ".json") if found else {}
        return found, {digest: self._keys(digest, stored) for digest in {entry.rows for entry in found}}

    def _keys(self, digest: str, stored: Mapping[str, bytes]) -> frozenset[str]:
        name = f"{self._rows}{digest}.json"
        data = stored.get(name) or self._store.read_document(name)  # a listing can miss a new file
        keys = keys_of(digest, data)
        if keys is None:
            raise self._damaged(name, f"row keys with the hash {digest[:12]}", "others" if data else "nothing")
        return frozenset(keys)

    def _read_anchor(self) -> LogHead:
        try:
            return read_anchor(self._store, self._anchor)
        except ValueError as error:  # ValidationError is a subclass
            raise self._damaged(self._anchor, "number and hash of all deals", first_problem(error)) from error

    def _write_anchor(self, entries: Sequence[Deal]) -> None:
        """Bring the anchor up to date. The last writer names the last deal."""
        while self._read_anchor().seq < len(entries):
            write_anchor(self._store, self._model, _head(entries), self._anchor)
            entries = self._read()[0]

    def _write_rows(self, keys: frozenset[str]) -> str:
        digest = digest_of(sorted(keys))
        self._store.create_document(f"{self._rows}{digest}.json", json_bytes(sorted(keys)))
        return digest

    def _name(self, seq: int) -> str:
        return f"{self._folder}{seq:06d}.json"

    def _damaged(self, name: str, expected: str, got: str) -> DamagedLog:
        return DamagedLog(
            "The record of dealt held-out rows is damaged.",
            where=f"{self._store.uri}/{name}",
            expected=expected,
            got=got,
            next_step="restore it from a backup of the store (docs/backup.md). Without a backup, remove the folders "
            f"{self._folder} and {self._rows}, and {self._anchor}: rows that no look has scored may then be dealt again",
        )


def _find(
    entries: Sequence[Deal],
    dealt: Mapping[str, frozenset[str]],
    challenger: str | None,
    rows: Sequence[ReserveRow],
    scored: Scored,
    request: DealRequest,
) -> DealtRows:
    _, size = _sizes(entries, rows, request)
    present = frozenset(row.key for row in rows)
    used = frozenset(scored(present)).union(*(dealt[entry.rows] for entry in entries))
    for entry in reversed(entries):
        keys = dealt[entry.rows]
        is_same = (entry.challenger, entry.reserve, entry.size) == (challenger, request.reserve, size)
        if is_same and keys <= present:  # if rows were removed since, the model gets others
            left = state(rows, used, size, is_fresh=entry.is_fresh)
            return DealtRows(keys, _count(rows, keys), left, is_new=False)
    new = deal(rows, used, size, request.seed)
    left = state(rows, used | new.keys, size, is_fresh=new.is_fresh)
    return DealtRows(new.keys, _count(rows, new.keys), left, is_new=True)


def _count(rows: Sequence[ReserveRow], keys: Set[str]) -> int:
    return sum(row.key in keys for row in rows)


def _sizes(entries: Sequence[Deal], rows: Sequence[ReserveRow], request: DealRequest) -> tuple[int, int]:
    """Return the rows outside of the reserve, and the rows of a look. Rows that are added later join the reserve."""
    before = next((entry.outside for entry in reversed(entries) if entry.reserve == request.reserve), None)
    outside = rows_of_a_look(request.reserve, len(rows)) if before is None else before
    return outside, min(outside, request.max_rows or outside)


def _head(entries: Sequence[Deal]) -> LogHead:
    return LogHead(seq=len(entries), hash=digest_of([entry.hash for entry in entries])) if entries else LogHead()
