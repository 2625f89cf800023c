"""Commands and runs at the same moment: whoever is interrupted by another, at any step, leaves what some order leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loraflow.cli.upgrade import _write
from loraflow.failures import BadConfig
from loraflow.registry import PromotionLog, signature
from loraflow.registry.backup import back_up
from loraflow.registry.deals import DealRecord, DealRequest
from loraflow.registry.log import HeadChanged
from loraflow.registry.looks import LookRecord
from loraflow.registry.reserve import ReserveRow
from loraflow.store import LocalStore, Ref
from tests.preempted import each_preemption


def model(number):
    return Ref(stage="merge", fingerprint="0" * 64, digest=f"{number:064x}", uri="")


def promote(store, number):
    log = PromotionLog(store, "tickets")
    while True:
        try:
            log.append(
                log.head(), action="promote", merged=model(number), adapter=None, inputs={}, reasons=[], actor="me"
            )
            return
        except HeadChanged:
            continue


def look(store, number, rows):
    LookRecord(store, "tickets").take(
        f"comparison {number}",
        challenger=f"{number:064x}",
        rows=rows,
        error=0.05,
        horizon=10,
        promotions=[],
        actor="me",
    )


def test_the_anchor_names_the_last_entry_in_whatever_order_two_promotions_are_written(tmp_path):
    orders = 0
    for store in each_preemption(tmp_path, lambda store: promote(store, 1), lambda store: promote(store, 2)):
        assert len(PromotionLog(store, "tickets").entries(all_runs=True)) == 2
        assert json.loads(store.read_document("anchors/tickets/head.json"))["seq"] == 2, "a loss would not be noticed"
        orders += 1
    assert orders > 15


def test_each_of_two_looks_is_recorded_and_anchored_in_whatever_order_they_are_written(tmp_path):
    first, second = (lambda store: look(store, 1, ["a", "b"])), (lambda store: look(store, 2, ["b", "c"]))
    for store in each_preemption(tmp_path, first, second):
        record = LookRecord(store, "tickets")
        looks = record.entries(all_runs=True)
        anchor = json.loads(store.read_document("anchors/tickets/looks.json"))
        assert [look.number for look in looks] == [1, 2] and record.scored_keys({"a", "b", "c"}) == {"a", "b", "c"}
        assert anchor["seq"] == 2 and {look.rows for look in looks} <= set(anchor["digests"])


def test_two_models_are_never_dealt_the_same_fresh_rows_in_whatever_order_they_are_dealt(tmp_path):
    rows = [ReserveRow(str(number)) for number in range(30)]

    def take(store, number):
        scored = LookRecord(store, "tickets").scored_keys
        DealRecord(store, "tickets").take(
            f"{number:064x}", rows, scored, DealRequest(reserve=20, max_rows=None, seed=0), actor="me"
        )

    for store in each_preemption(tmp_path, lambda store: take(store, 1), lambda store: take(store, 2)):
        first, second = (DealRecord(store, "tickets").of_model(f"{number:064x}", 20) for number in (1, 2))
        assert len(first) == len(second) == 10 and not first & second


def test_the_signature_of_a_later_entry_is_not_replaced_by_that_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setenv(signature.KEY, "key")
    monkeypatch.setattr(signature, "_ssh_keygen", lambda *_: b"signature")
    for store in each_preemption(tmp_path, lambda store: promote(store, 1), lambda store: promote(store, 2)):
        assert json.loads(store.read_document("anchors/tickets/signed.json"))["seq"] == 2


class Interrupted(LocalStore):
    """A store to which another process writes while the registry's documents are listed for the n-th time."""

    def __init__(self, root, listing, seen_before, write):
        super().__init__(root)
        self.listing, self.seen_before, self.write = listing, seen_before, write

    def documents(self, prefix):
        self.listing -= prefix == "registry/"
        if prefix != "registry/" or self.listing != 0:
            return super().documents(prefix)
        before = [name for name in super().documents(prefix) if self.seen_before(name)]
        self.write(LocalStore(self.root))
        return sorted({*before, *(name for name in super().documents(prefix) if not self.seen_before(name))})


def late_entries(store):
    promote(store, 2)
    promote(store, 3)


@pytest.mark.parametrize(
    ("seen_before", "write"),
    [
        (lambda name: "/rows/" in name, lambda store: look(store, 2, ["c"])),
        (lambda name: "/looks/" in name, lambda store: look(store, 2, ["c"])),
        (lambda name: not name.endswith("000003.json"), late_entries),  # a listing that lacks entry 2, and has entry 3
    ],
)
def test_a_backup_has_all_that_its_documents_refer_to_wherever_a_listing_is_interrupted(tmp_path, seen_before, write):
    for listing in range(1, 10):
        store = LocalStore(tmp_path / str(listing) / "store")
        promote(store, 1)
        look(store, 1, ["a", "b"])
        interrupted = Interrupted(store.root, listing, seen_before, write)
        list(back_up(interrupted, tmp_path / str(listing) / "copy"))
        if interrupted.listing > 0:
            break
        copy = LocalStore(tmp_path / str(listing) / "copy")
        assert PromotionLog(copy, "tickets").entries(all_runs=True)
        assert LookRecord(copy, "tickets").entries(all_runs=True)
        assert LookRecord(copy, "tickets").scored_keys({"a", "b"}) == {"a", "b"}
    assert listing > 2


def test_a_file_that_two_upgrades_write_is_never_cut_off(tmp_path):
    old, new = b"old\n", b"new\n" * 1000

    def upgrade(store):
        _write(store.root / "recipe.yaml", old, new)

    def second(store):
        (store.root / "recipe.yaml").write_bytes(old)
        upgrade(store)

    def first(store):
        store.root.mkdir()
        (store.root / "recipe.yaml").write_bytes(old)
        try:
            upgrade(store)
        except BadConfig:
            pass

    for store in each_preemption(tmp_path, first, lambda store: store.root.exists() and second(store)):
        assert [path.read_bytes() for path in store.root.iterdir()] == [new]


def test_processes_that_run_commands_at_once_leave_a_whole_store():
    script = Path(__file__).parents[3] / "benchmarks" / "races.py"
    done = subprocess.run([sys.executable, script, "--rounds", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
