"""What is known about a promotion log outside of it, so that lost and edited entries are noticed.

    anchors/<model>/head.json              number and hash of the last entry; written after each append
    anchors/<model>/accepted-000001.json   a person accepted a loss: which entries, why, and what was set aside
    runs/<id>.json                         `promotion_head`: the last entry that the run saw or wrote

The entry is written before the anchor, so the log may be ahead of the anchor, but never behind it. The next append
writes it; stores of earlier versions have none until then.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import Field

from loraflow.failures import DamagedLog
from loraflow.frozen import StoredModel
from loraflow.identity import short
from loraflow.registry.runs import FOLDER as RUNS
from loraflow.registry.runs import LogHead, run_ids
from loraflow.store import Store
from loraflow.store.checksum import check_document, first_problem, with_checksum

log = logging.getLogger("loraflow")
FOLDER = "anchors"
_NEWEST_RUNS = 10  # run records to read beside an anchor


class Claim(NamedTuple):
    """A document's statement that a promotion log has had an entry. The hash is empty in records of earlier versions."""

    head: LogHead
    source: str  # the document's name in the store

    def is_met_by(self, hashes: Sequence[str]) -> bool:
        """Tell whether a log with entries of these hashes has the entry."""
        return self.head.seq <= len(hashes) and self.head.hash in ("", *hashes[self.head.seq - 1 : self.head.seq])

    def __str__(self) -> str:
        digest = f" with hash {short(self.head.hash)}" if self.head.hash else ""
        return f"entry {self.head.seq}{digest}, as {self.source} says"


class Acceptance(StoredModel):
    """A person's decision to continue without entries that were lost or changed."""

    reason: str
    actor: str
    time: str
    problem: str = ""
    kept: LogHead = LogHead()  # the last entry that was left
    lost: list[LogHead] = []
    set_aside: dict[str, str] = {}  # {name: content} of entries that were in the log, but could not be kept


@dataclass(frozen=True)
class Known:
    """What documents outside the log say about it."""

    anchor: Claim | None = None
    accepted: list[Acceptance] = field(default_factory=list)
    from_runs: list[Claim] = field(default_factory=list)
    problem: str = ""  # why the anchor cannot be read

    def unmet(self, hashes: Sequence[str]) -> list[Claim]:
        """Return the claims that a log with entries of these hashes does not meet, without losses that were accepted."""
        lost = {head for acceptance in self.accepted for head in acceptance.lost}
        claims = [*([self.anchor] if self.anchor else []), *self.from_runs]
        return [claim for claim in claims if not claim.is_met_by(hashes) and claim.head not in lost]


def read_known(store: Store, model: str, *, all_runs: bool) -> Known:
    """Read what is known about a model's log.

    Run records are read, the newest first, until one knows the log: at most ten if there is an anchor; all with `all_runs`.
    """
    accepted, anchor, problem = [], None, ""
    for name, data in store.read_documents(f"{FOLDER}/{model}/", ".json").items():
        try:
            if name == _anchor_name(model):
                anchor = Claim(LogHead.model_validate_json(check_document(name, data)), name)
            elif name.startswith(f"{FOLDER}/{model}/accepted-"):
                accepted.append(Acceptance.model_validate_json(check_document(name, data)))
        except ValueError as error:  # ValidationError is a subclass
            text = f"{name} cannot be read: {first_problem(error)}"
            if name == _anchor_name(model):
                problem = text
            else:  # without this decision, the loss has to be accepted again
                log.warning("%s", text)
    if all_runs:
        from_runs = claims_of_runs(store, model, "promotions")
    else:  # an anchor of an earlier time, beside a log of that time, is noticed by the newest run
        newest = newest_claim(store, model, "promotions", among=None if anchor is None else _NEWEST_RUNS)
        from_runs = [newest] if newest is not None else []
    return Known(anchor, accepted, [claim for claim in from_runs if claim.head.seq], problem)


def write_anchor(store: Store, model: str, head: LogHead, name: str = "") -> None:
    """Name the last entry of a model's log, or of the record whose anchor has this name."""
    name, values = name or _anchor_name(model), {**head.model_dump(), "model": model, "time": now()}
    store.write_document(name, with_checksum(name, values))


def read_anchor(store: Store, name: str) -> LogHead:
    """Return what the anchor of this name says: number 0 if there is none.

    Raises:
        ValueError: it is damaged.
    """
    data = store.read_document(name)
    if data is None:
        return LogHead()
    head = LogHead.model_validate_json(check_document(name, data))
    if not head.seq:
        raise ValueError("it names no entry")
    return head


def now() -> str:
    """Return the time as documents have it: UTC, in seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_acceptance(store: Store, prefix: str, acceptance: StoredModel) -> None:
    """Store a person's decision under the next free number."""
    number, values = 1, acceptance.model_dump()
    while not store.create_document(name := f"{prefix}{number:06d}.json", with_checksum(name, values)):
        number += 1


def anchored_models(store: Store) -> set[str]:
    """Return the names of the models whose logs have an anchor."""
    paths = [name.split("/") for name in store.documents(f"{FOLDER}/")]
    return {path[1] for path in paths if path[2:] and not path[2].startswith(("deals", "looks"))}


def models_with(record: str, store: Store) -> list[str]:
    """Return the names of the models that have, or had, a record (`looks` or `deals`), sorted."""
    paths = [name.split("/") for folder in ("registry/", f"{FOLDER}/") for name in store.documents(folder)]
    return sorted({path[1] for path in paths if path[2:3] in ([record], [f"{record}.json"])})


def models_of_runs(store: Store) -> set[str]:
    """Return the names of the models of which a run record names an entry."""
    documents = store.read_documents(RUNS, ".json").items()
    runs = (_parse_run(name, data) for name, data in documents)
    heads = ((run.model, run.head("promotions")) for run in runs if run is not None)
    return {model for model, head in heads if head is not None and head.seq}


def damaged_log(store: Store, model: str, where: str, *, got: str, expected: str = "", intact: int) -> DamagedLog:
    """Return the failure for a log that lost entries or was changed; its first `intact` entries can be kept."""
    return DamagedLog(
        "The promotion log is damaged.",
        where=f"{store.uri}/{where}",
        expected=expected,
        got=got,
        next_step="restore it from a backup of the store (docs/backup.md). Without a backup, `loraflow registry accept "
        f"--model {model} --reason …` continues with {_entries(intact)}. Until then no model of it is used or promoted",
    )


def _entries(number: int) -> str:
    return {0: "an empty log", 1: "the first entry"}.get(number, f"the first {number} entries")


def _anchor_name(model: str) -> str:
    return f"{FOLDER}/{model}/head.json"


class _Register(StoredModel):
    model: str = ""


class _Resolved(StoredModel):
    register_: _Register = Field(_Register(), alias="register")


class _Summary(StoredModel):
    registered: int | None = None


Record = Literal["promotions", "looks"]


class _RunHeads(StoredModel):
    """The part of a run record that is about promotion log and looks: much smaller than the record."""

    resolved: _Resolved = _Resolved()
    summary: _Summary | None = None
    promotion_head: LogHead | None = None
    looks_head: LogHead | None = None

    @property
    def model(self) -> str:
        """The name that the run's model is registered under."""
        return self.resolved.register_.model

    def head(self, record: Record) -> LogHead | None:
        """Return the last entry that the run knew; of earlier versions, the number of the promotion that it wrote."""
        if record == "looks":
            return self.looks_head
        registered = self.summary.registered if self.summary else None
        return self.promotion_head or (LogHead(seq=registered) if registered else None)


def claims_of_runs(store: Store, model: str, record: Record) -> list[Claim]:
    """Return the last entries of a model's record that all run records name."""
    return list(_claims(store.read_documents(RUNS, ".json").items(), model, record))


def newest_claim(store: Store, model: str, record: Record, *, among: int | None) -> Claim | None:
    """Return the last entry that the newest run record names: number 0 if that run saw an empty record.

    Args:
        among: how many run records are read, the newest first; None: all.
    """
    names = (f"{RUNS}{run}.json" for run in run_ids(store)[::-1][:among])
    return next(_claims(((name, store.read_document(name) or b"") for name in names), model, record), None)


def _claims(documents: Iterable[tuple[str, bytes]], model: str, record: Record) -> Iterator[Claim]:
    for name, data in documents:
        run = _parse_run(name, data)
        head = run.head(record) if run is not None and run.model == model else None
        if head is not None:
            yield Claim(head, name)


def _parse_run(name: str, data: bytes) -> _RunHeads | None:
    """Return what a run record says; None for damaged ones, which `loraflow verify` reports."""
    try:
        return _RunHeads.model_validate_json(check_document(name, data))
    except ValueError:
        return None
