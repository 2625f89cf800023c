"""The record of looks: which held-out rows were used to compare a challenger, and how much error each look may make.

Every comparison of a new challenger is one more chance of a false promotion. All looks of a model share one budget, on
whatever rows; `budget.py` deals it out.

    registry/<model>/looks/000001.json   a look; written before its verdict is computed, never changed, hash-chained
    registry/<model>/rows/<digest>.json  the keys of the rows of looks; a copy is in anchors/ (`ScoredRows`)
    anchors/<model>/looks.json           number and hash of the last look, and the digests of all rows, so that a loss is
                                         noticed
    runs/<id>.json                       `looks_head`: the last look that the run saw or took, if the anchor is lost too
"""

from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path

from loraflow.failures import DamagedLog
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.registry.anchor import Claim, claims_of_runs, newest_claim, now, write_acceptance
from loraflow.registry.budget import Look as Look
from loraflow.registry.budget import NextLook, next_look
from loraflow.registry.entry import Chain, Entry, head_of, read_chain
from loraflow.registry.look_claims import LostLooks as LostLooks
from loraflow.registry.look_claims import ScoredRows, Sets, read_losses
from loraflow.registry.look_claims import row_key as row_key
from loraflow.registry.runs import LogHead
from loraflow.store import LocalStore, Store
from loraflow.store.checksum import check_document, first_problem, with_checksum


class _Anchor(LogHead):
    """The last look, and the digests of the sets of rows that were known then; None in anchors of earlier versions."""

    digests: list[str] | None = None
    accepted: int = 0  # losses that were accepted

    @property
    def known(self) -> frozenset[str]:
        return frozenset(self.digests or ())


_NO_ANCHOR = _Anchor()
_NEWEST_RUNS = 50  # run records to read if there is no anchor: stores of earlier versions have none


class LookRecord:
    """The looks of one model in a store; `store` may be the folder of a local store."""

    def __init__(self, store: Store | Path, model: str):
        self.store: Store = LocalStore(store) if isinstance(store, Path) else store
        self.model = model
        self.folder = f"registry/{model}/looks/"
        self.scored = ScoredRows(self.store, model)
        self.last_seen: LogHead | None = None  # the last look when the record was read or extended last

    def entries(self, *, all_runs: bool = False) -> list[Look]:
        """Return all looks, oldest first. With `all_runs`, they are also compared with all run records.

        Raises:
            DamagedLog: a look is missing or was changed.
        """
        try:
            looks = self._checked(all_runs)
        except DamagedLog:  # a listing can miss a file that another process adds at this moment
            looks = self._checked(all_runs)
        self.last_seen = head_of(looks)
        return looks

    def check(self) -> None:
        """Read all looks and the rows that they used, and compare them with the anchor and with all run records.

        Raises:
            DamagedLog: a look, or a set of rows, is missing or was changed.
        """
        self._sets(self._named(self.entries(all_runs=True)), self.scored.read(), ())

    def take(
        self,
        key: str,
        *,
        challenger: str,
        rows: Collection[str],
        error: float,
        horizon: int,
        promotions: Sequence[Entry],
        actor: str,
        nearly: Set[int] | None = None,
    ) -> Look:
        """Record a look and return it, with the level at which its challenger may be tested.

        The look is in the store before this returns, so a crash afterwards loses it. Of several processes, each gets a
        look of its own. The same comparison again returns the same look.

        Args:
            key: identity of the comparison: scores, rules, champion.
            challenger: digest of the merged model.
            rows: keys of the held-out rows (`row_key`).
            nearly: numbers (seq) of looks that nearly showed a gain (`near_gains`); None without gate.independent_rows.

        Raises:
            DamagedLog: a look is missing or was changed.
        """
        is_new = False
        while True:
            looks = self.entries(all_runs=True)  # before anything is written: a damaged record stays as it is
            known = next((look for look in looks if look.key == key), None)
            if known is not None:
                return known
            digest, is_created = self.scored.add(rows)
            is_new = is_new or is_created
            sets, known_rows = self._sets_before(looks, rows, digest, is_new=is_new)
            upcoming = self._next(looks, sets, rows, error, horizon, promotions, nearly)
            look = Look(
                seq=len(looks) + 1,
                before=looks[-1].hash if looks else None,
                model=self.model,
                key=key,
                challenger=challenger,
                rows=digest,
                horizon=horizon,
                error=error,
                actor=actor,
                time=now(),
                **upcoming._asdict(),
            )
            if self.store.create_document(f"{self.folder}{look.seq:06d}.json", look.document):
                self.last_seen = head_of([look])
                self._anchor(self.last_seen, known_rows)
                return look

    def _sets_before(
        self, looks: Sequence[Look], rows: Collection[str], digest: str, *, is_new: bool
    ) -> tuple[dict[str, set[str]], set[str]]:
        """Return the sets of rows of the looks before this one, and the digests of all sets that the anchor must know."""
        named, stored = self._named(looks), self.scored.read()
        sets = self._sets(named, stored, rows)
        self.scored.write_copies(stored)  # a store of an earlier version has none
        known_rows = (sets.keys() | named | {digest}) - {""}
        if is_new and digest not in named:
            sets.pop(digest, None)  # this look is the first at these rows
        return sets, known_rows

    def preview(
        self,
        rows: Collection[str],
        *,
        error: float,
        horizon: int,
        promotions: Sequence[Entry],
        nearly: Set[int] | None = None,
    ) -> tuple[int, float]:
        """Return number and level of the next look at these rows, without taking it.

        Raises:
            DamagedLog: a look is missing or was changed.
        """
        looks = self.entries()
        sets = self._sets(self._named(looks), self.scored.read(), rows)
        upcoming = self._next(looks, sets, rows, error, horizon, promotions, nearly)
        return upcoming.number, upcoming.level

    def scored_keys(self, rows: Set[str]) -> set[str]:
        """Return those of the rows that were scored in a look, or may have been: only the others are fresh.

        Raises:
            DamagedLog: a look is missing or was changed.
        """
        sets = self._sets(self._named(self.entries()), self.scored.read(), rows)
        return set(rows).intersection(set().union(*sets.values()))

    def _next(
        self,
        looks: Sequence[Look],
        sets: Mapping[str, set[str]],
        rows: Collection[str],
        error: float,
        horizon: int,
        promotions: Sequence[Entry],
        nearly: Set[int] | None,
    ) -> NextLook:
        assumed, given = self._assumed(len(looks), promotions), set(rows)
        return next_look(
            looks, sets, given, error=error, horizon=horizon, assumed=assumed, promotions=promotions, nearly=nearly
        )

    def _named(self, looks: Sequence[Look]) -> set[str]:
        """Return the digests of the sets of rows that must be there: looks or the anchor name them."""
        return {look.rows for look in looks} | (self._read_anchor() or _NO_ANCHOR).known

    def _sets(self, named: Collection[str], stored: Sets, rows: Collection[str]) -> dict[str, set[str]]:
        """Return the keys of all sets of rows that are known, whether or not a look or the anchor names them.

        A set whose loss was accepted may have had any row, so it counts as `rows`, those of the next look.
        """
        sets, damaged, accepted = dict(stored.intact), stored.damaged, self._acceptances()
        lost = {digest for loss in accepted for digest in loss.lost_rows}
        if any(loss.unknown_rows for loss in accepted):
            sets[""] = set(rows)
        for digest in named:
            keys = None if digest in damaged else sets.get(digest) or self.scored.find(digest)
            if digest in damaged or (keys is None and digest not in lost):
                got = "others" if digest in damaged else "nothing"
                raise self._damaged(self.scored.name(digest), f"row keys with the hash {digest[:12]}", got)
            sets[digest] = set(rows) if keys is None else keys
        return sets

    def accept_loss(self, reason: str, actor: str) -> LostLooks | None:
        """Continue with the looks that are intact, and store who decided this and why; None if nothing is damaged.

        Lost looks are counted: their number is added to the next look. If it is unknown which rows they used, no row
        counts as fresh any more.
        """
        read, is_readable = self._read(), True
        try:
            anchor = self._read_anchor()
        except DamagedLog:
            anchor, is_readable = self._head_of_runs(), False
        looks, losses = read.entries, read_losses(self.store, self.model)
        claims = _unmet(claims_of_runs(self.store, self.model, "looks"), looks, losses.intact)
        stored = self.scored.read()
        named = {look.rows for look in looks} | (anchor or _NO_ANCHOR).known
        lost_rows = _lost_rows(named, stored, losses.intact)
        restored_rows = sorted(named & stored.damaged & stored.intact.keys())
        is_met = is_readable and not claims and (anchor is None or _is_met(anchor, looks))
        forgot = bool(losses.damaged) or (anchor or _NO_ANCHOR).accepted > len(losses.intact)
        if not read.rest and is_met and not forgot and not lost_rows and not restored_rows:
            return None
        has_lost_looks = bool(read.rest) or not is_met or forgot
        kept = len(looks)
        lost = max(kept + len(read.rest), anchor.seq if anchor else 0, *(claim.head.seq for claim in claims)) - kept
        removed = {**losses.damaged, **read.rest}
        acceptance = LostLooks(
            reason=reason,
            actor=actor,
            time=now(),
            kept=read.head,
            lost=max(lost, 1) if has_lost_looks else 0,
            lost_heads=[claim.head for claim in claims],
            set_aside={name: data.decode(errors="backslashreplace") for name, data in removed.items()},
            lost_rows=lost_rows,
            restored_rows=restored_rows,
            unknown_rows=forgot or (has_lost_looks and not _has_all_sets(anchor, stored)),
        )
        write_acceptance(self.store, f"{ANCHORS}/{self.model}/looks-accepted-", acceptance)
        for name in reversed(removed):
            self.store.remove_document(name)
        self.scored.restore(named)
        self._write_anchor(read.head, named | stored.intact.keys())
        return acceptance

    def _checked(self, all_runs: bool) -> list[Look]:
        anchor = self._read_anchor()  # before the looks, which may only be ahead of it
        claims = claims_of_runs(self.store, self.model, "looks") if all_runs else []
        accepted = self._acceptances()
        if anchor is not None and anchor.accepted > len(accepted):
            raise self._damaged(f"{ANCHORS}/{self.model}", f"accepted losses: {anchor.accepted}", str(len(accepted)))
        if self.last_seen and not accepted:  # the store's disk may be gone
            claims.append(Claim(self.last_seen, "what this process read before"))
        read = self._read()
        if read.rest:
            raise self._damaged(next(iter(read.rest)), "", read.problem)
        looks = read.entries
        if anchor is not None and not _is_met(anchor, looks):
            got = f"intact looks: {len(looks)}" if anchor.seq > len(looks) else "another look with this number"
            raise self._damaged(self.folder, f"look {anchor.seq}, as the anchor or the newest run says", got)
        for claim in _unmet(claims, looks, accepted):
            raise self._damaged(self.folder, f"look {claim.head.seq}, as {claim.source} says", "another look, or none")
        return looks

    def _read(self) -> Chain[Look]:
        return read_chain(Look, self.store.read_documents(self.folder, ".json"))

    def _assumed(self, seen: int, promotions: Sequence[Entry]) -> int:
        """Return how many looks must be counted that have no record: those of earlier versions, and lost ones."""
        accepted = self._acceptances()
        lost = sum(loss.lost for loss in accepted if loss.kept.seq == seen)
        if seen or accepted:
            return lost
        names = [name.rsplit("/", 1)[1] for name in self.store.documents(f"registry/{self.model}/decisions/")]
        decided = {name.split("-")[1] for name in names if name.count("-") >= 2}
        others = {entry.merged.digest[:12] for entry in promotions if entry.action == "promote"} - decided
        return len(names) + len(others)

    def _acceptances(self) -> list[LostLooks]:
        """Return the accepted losses. Their looks are counted, so a lost or damaged document is refused."""
        found = read_losses(self.store, self.model)
        if found.damaged:
            name = min(found.damaged)
            raise self._damaged(name, "the decision that a person took", "another document, or a damaged one")
        return found.intact

    def _read_anchor(self) -> _Anchor | None:
        data = self.store.read_document(self._anchor_name)
        if data is None:
            return self._head_of_runs()
        try:
            return _Anchor.model_validate_json(check_document(self._anchor_name, data))
        except ValueError as error:  # ValidationError is a subclass
            raise self._damaged(self._anchor_name, "number and hash of a look", first_problem(error)) from error

    def _head_of_runs(self) -> _Anchor | None:
        claim = newest_claim(self.store, self.model, "looks", among=_NEWEST_RUNS)
        return _Anchor(seq=claim.head.seq, hash=claim.head.hash) if claim is not None else None

    def _anchor(self, head: LogHead, digests: Collection[str]) -> None:
        """Write the anchor, unless another process has recorded a look since. The last writer names the last look."""
        rows = set(digests)
        while True:
            anchor = self._read_anchor()
            if anchor is None or anchor.seq <= head.seq:
                self._write_anchor(head, rows | (anchor or _NO_ANCHOR).known)
            read = self._read()
            if read.head.seq <= head.seq:
                return
            head = read.head
            rows |= {look.rows for look in read.entries}

    def _write_anchor(self, head: LogHead, digests: Collection[str]) -> None:
        accepted = len(read_losses(self.store, self.model).intact)
        values = {**head.model_dump(), "digests": sorted(digests), "accepted": accepted, "time": now()}
        self.store.write_document(self._anchor_name, with_checksum(self._anchor_name, values))

    def _damaged(self, where: str, expected: str, got: str) -> DamagedLog:
        return DamagedLog(
            "The record of looks at held-out rows is damaged.",
            where=f"{self.store.uri}/{where}",
            expected=expected,
            got=got,
            next_step="restore it from a backup of the store (docs/backup.md). Without a backup, `loraflow registry accept "
            f"--model {self.model} --reason …` counts the lost looks as spent. Until then the gate promotes nothing",
        )

    @property
    def _anchor_name(self) -> str:
        return f"{ANCHORS}/{self.model}/looks.json"


def _is_met(anchor: LogHead, looks: Sequence[Look]) -> bool:
    return anchor.seq == 0 or (anchor.seq <= len(looks) and looks[anchor.seq - 1].hash == anchor.hash)


def _lost_rows(named: set[str], stored: Sets, losses: Sequence[LostLooks]) -> list[str]:
    """Return those of the digests of which no intact copy is left, and whose loss is not accepted yet."""
    accepted = {digest for loss in losses for digest in loss.lost_rows}
    lost = named - stored.intact.keys()
    return sorted((lost - accepted) | (lost & stored.damaged))


def _has_all_sets(anchor: _Anchor | None, stored: Sets) -> bool:
    """Tell whether the store has all sets of rows that the anchor names: then it knows those of lost looks."""
    return anchor is not None and anchor.digests is not None and anchor.known <= stored.intact.keys()


def _unmet(claims: Sequence[Claim], looks: Sequence[Look], accepted: Sequence[LostLooks]) -> list[Claim]:
    """Return the claims of run records that a record of looks does not meet, without losses that were accepted."""
    unmet = [claim for claim in claims if not _is_met(claim.head, looks)]
    return [claim for claim in unmet if not any(loss.explains(claim.head) for loss in accepted)]
