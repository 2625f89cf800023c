"""What must hold after commands ran at the same moment (`races.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

from race_commands import MODEL, Place

from loraflow.cli.store import verify
from loraflow.failures import Failure
from loraflow.registry.looks import LookRecord
from loraflow.store import LocalStore


def store_is_whole(place: Place) -> Iterator[str]:
    """Yield what is wrong with a store: its artifacts, its log, the log's anchor, and the models that the log needs."""
    store = place.store
    for ref in store.artifacts():
        if problems := store.verify(ref):
            yield f"{ref}: {problems}"
    entries = place.log.entries(all_runs=True)
    anchor = json.loads(store.read_document(f"anchors/{MODEL}/head.json") or b'{"seq": 0}')
    if anchor["seq"] != len(entries):
        yield f"the anchor names entry {anchor['seq']} of {len(entries)}"
    for entry in place.log.active_promotions()[-2:]:
        if problems := store.verify(entry.merged):
            yield f"the model of entry {entry.seq}: {problems}"
    looks = LookRecord(store, MODEL).entries(all_runs=True)
    anchored = json.loads(store.read_document(f"anchors/{MODEL}/looks.json") or b'{"seq": 0, "digests": []}')
    if anchored["seq"] != len(looks):
        yield f"the anchor names look {anchored['seq']} of {len(looks)}"
    if missing := {look.rows for look in looks} - set(anchored["digests"]):
        yield f"the anchor of looks does not name the rows of {len(missing)} looks"
    if isinstance(store, LocalStore):
        drafts = [path for path in store.root.rglob(".*") if path.is_file()]
        if drafts or any((store.root / "staging").glob("*")):
            yield f"left: {drafts or list((store.root / 'staging').glob('*'))}"


def promotions_took_place(place: Place, outcomes: list[str], before: int = 2) -> Iterator[str]:
    """Yield what is wrong, if each process that ended well has added one entry."""
    yield from store_is_whole(place)
    entries = len(place.log.entries())
    if entries != before + outcomes.count("done"):
        yield f"{entries} entries after {outcomes}"
    if "done" not in outcomes:
        yield "no process ended well"


def copy_is_whole(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong with the store, or with a backup of it that says that it is complete, after it is restored."""
    yield from store_is_whole(place)
    if outcomes[0] != "done":
        yield f"the backup ended with {outcomes[0]}"
        return
    restored = Place(place.folder / "elsewhere")
    shutil.copytree(place.copy, restored.folder / "store")
    shutil.rmtree(
        place.folder / "store", ignore_errors=True
    )  # nothing may be read from there; a bucket is at another uri
    try:
        restored.run_command(verify, "--deep")
    except Failure as failure:
        yield f"the backup, restored: {failure}"
    for entry in restored.log.active_promotions()[-2:]:
        if problems := restored.store.verify(entry.merged):
            yield f"the backup's model of entry {entry.seq}: {problems}"
    LookRecord(restored.store, MODEL).entries(all_runs=True)


def copy_is_whole_or_refused(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if a backup was made before or after a loss was accepted: before, it is refused."""
    if outcomes[0].startswith("DamagedLog"):
        yield from store_is_whole(place)
    else:
        yield from copy_is_whole(place, outcomes)


def looks_are_apart(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if each process has a look of its own, and all of them keep to the budget."""
    yield from store_is_whole(place)
    looks = LookRecord(place.store, MODEL).entries()
    if len(looks) != len(outcomes) or len({look.number for look in looks}) != len(looks):
        yield f"{len(looks)} looks, numbered {[look.number for look in looks]}, after {outcomes}"
    if sum(look.level for look in looks) > 0.05:
        yield f"the looks may make an error of {sum(look.level for look in looks)}"


def deals_are_apart(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if each model was scored on rows of its own."""
    yield from looks_are_apart(place, outcomes)
    dealt = [set(json.loads(path.read_text())) for path in place.folder.glob("dealt-*.json")]
    if sum(map(len, dealt)) != len(set().union(*dealt)):
        yield "two models were dealt the same rows"


def nothing_is_lost(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if the first process repaired a store of which nothing was damaged or missing."""
    yield from store_is_whole(place)
    if outcomes[0] != "done":
        yield f"the repair ended with {outcomes[0]}"
    store = place.store
    if isinstance(store, LocalStore) and any((store.root / "set-aside").glob("*")):
        yield "something was quarantined"


def one_is_current(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if all processes committed the same artifact."""
    yield from store_is_whole(place)
    if set(outcomes) - {"done", "Failure: Cannot clean up while a run is using the store."}:
        yield f"ended with {outcomes}"


def everything_is_signed(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if each entry of the log was signed by whoever wrote it."""
    yield from store_is_whole(place)
    try:
        place.run_command(verify, "--signers", place.folder / "signers")
    except Failure as failure:
        yield f"{failure} after {outcomes}"


def output_is_of_one(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if several processes wrote one folder: it is that of the only one that ended well."""
    found = {path.name: path.read_text() for path in place.output.glob("*")}
    if outcomes.count("done") != 1 or {text.partition(":")[0] for text in outcomes} != {"done", "BadConfig"}:
        yield f"ended with {outcomes}"
    elif found != dict.fromkeys("abc", f"process {outcomes.index('done')}"):
        yield f"the output of process {outcomes.index('done')} is {found}"
    yield from (f"left: {path}" for path in place.folder.glob("output.*"))


def files_are_upgraded(place: Place, outcomes: list[str]) -> Iterator[str]:
    """Yield what is wrong, if each file was replaced as a whole."""
    yield from (f"left: {path}" for path in place.folder.rglob(".*.upgrade*"))
    if not {text.partition(":")[0] for text in outcomes} <= {"done", "BadConfig"}:
        yield f"ended with {outcomes}"
    text = (place.folder / "configs" / "old.yaml").read_text()
    if "max_length: 256" not in text or not text.endswith("# the end\n"):
        yield "the recipe is not upgraded, or is cut off"
