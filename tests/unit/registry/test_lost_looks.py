"""A record of looks that was damaged is refused. An accepted loss counts as spent, and its rows are not fresh again."""

import json
import shutil

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import DamagedLog
from loraflow.registry.anchor import models_with
from loraflow.registry.backup import back_up
from loraflow.registry.look_claims import ScoredRows, Sets
from loraflow.registry.looks import LookRecord
from loraflow.store import LocalStore
from tests.looks import ROWS, take


@pytest.fixture
def record(store):
    return LookRecord(store, "tickets")


HARMS = {
    "the last look deleted": lambda root: (root / "registry/tickets/looks/000003.json").unlink(),
    "a look in between deleted": lambda root: (root / "registry/tickets/looks/000002.json").unlink(),
    "all looks deleted": lambda root: [file.unlink() for file in (root / "registry/tickets/looks").iterdir()],
    "a level edited": lambda root: edit(root / "registry/tickets/looks/000002.json", level=0.04),
    "the anchor unreadable": lambda root: (root / "anchors/tickets/looks.json").write_text("{"),
    "rows edited": lambda root: next((root / "registry/tickets/rows").iterdir()).write_text('["x"]'),
}


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("harm", HARMS)
def test_a_record_that_lost_looks_or_was_edited_is_refused(store, record, harm):
    for i in range(3):
        take(record, f"k{i}")
    HARMS[harm](store.root)
    with pytest.raises(DamagedLog, match=r"record of looks(.|\n)*registry accept"):
        take(LookRecord(store, "tickets"), "next", rows={"row0", "another"})


@pytest.mark.parametrize("harm", ["the last look deleted", "all looks deleted", "a level edited"])
def test_accepted_losses_count_as_spent(store, record, harm):
    for i in range(3):
        take(record, f"k{i}")
    HARMS[harm](store.root)
    accepted = LookRecord(store, "tickets").accept_loss("no backup", "me")
    assert accepted is not None and accepted.kept.seq + accepted.lost == 3
    after = take(LookRecord(store, "tickets"), "next")
    assert after.number == 4 and after.level <= 0.025 / 364 * 1.001
    assert LookRecord(store, "tickets").accept_loss("again", "me") is None


def test_a_record_whose_anchor_is_deleted_too_is_missed_by_the_newest_run(store, record):
    look = take(record, "a")
    head = {"seq": look.seq, "hash": look.hash}
    run = {"run": "x", "recipe": "x", "resolved": {"register": {"model": "tickets"}}, "looks_head": head}
    store.write_document("runs/20260101-000000-abcdef.json", json.dumps(run).encode())
    for file in [*(store.root / "registry/tickets/looks").iterdir(), store.root / "anchors/tickets/looks.json"]:
        file.unlink()
    with pytest.raises(DamagedLog):
        take(LookRecord(store, "tickets"), "b")


def test_a_backup_has_the_record_and_refuses_a_damaged_one(store, record, tmp_path):
    take(record, "a")
    list(back_up(store, tmp_path / "copy"))
    assert LookRecord(LocalStore(tmp_path / "copy"), "tickets").entries() == record.entries()
    assert models_with("looks", store) == ["tickets"]
    HARMS["all looks deleted"](store.root)
    with pytest.raises(DamagedLog):
        list(back_up(store, tmp_path / "copy"))


def lose_looks(root):
    for file in (root / "registry/tickets/looks").iterdir():
        file.unlink()


def lose_registry(root):
    shutil.rmtree(root / "registry/tickets")


def lose_all_but_runs(root):
    for folder in ("registry", "anchors"):
        shutil.rmtree(root / folder / "tickets")


def as_of_an_earlier_version(root):
    """Looks were lost in a store without copies of rows, and without their digests in the anchor."""
    lose_registry(root)
    shutil.rmtree(root / "anchors/tickets/rows")
    without_digests(root)


def as_of_a_version_with_counts(root):
    lose_registry(root)
    without_digests(root, sets=2)


def without_digests(root, **values):
    anchor = root / "anchors/tickets/looks.json"
    values |= json.loads(anchor.read_text())
    assert len(values.pop("digests")) == 2
    anchor.write_text(json.dumps(values))


def lose_the_copy_of_the_oldest_rows_too(root):
    """As many sets as the anchor knew are left, because a run with new rows added its own."""
    oldest = json.loads((root / "registry/tickets/looks/000001.json").read_text())["rows"]
    lose_registry(root)
    (root / f"anchors/tickets/rows/{oldest}.json").unlink()
    ScoredRows(LocalStore(root), "tickets").add({"added"})


EARLIER = [as_of_an_earlier_version, as_of_a_version_with_counts]


@pytest.mark.parametrize(
    "harm", [lose_looks, lose_registry, lose_all_but_runs, lose_the_copy_of_the_oldest_rows_too, *EARLIER]
)
def test_rows_of_looks_whose_loss_was_accepted_are_not_fresh_again(store, record, harm):
    old = {"old1", "old2"}
    for name, rows in (("a", old), ("b", ROWS)):
        look = take(record, name, rows=rows, horizon=2)
    run = {"run": "x", "recipe": "x", "resolved": {"register": {"model": "tickets"}}}
    run["looks_head"] = {"seq": look.seq, "hash": look.hash}
    store.write_document("runs/20260101-000000-abcdef.json", json.dumps(run).encode())
    harm(store.root)
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost == 2
    take(LookRecord(store, "tickets"), "c", rows={"another"}, horizon=2)  # the one that counts the lost looks
    again = take(LookRecord(store, "tickets"), "d", rows=old, horizon=2)
    assert (again.fresh, again.period, again.level) == (0, 1, 0), "the error that was spent on these rows came back"


def test_after_an_accepted_loss_rows_that_were_never_scored_still_begin_a_period_if_those_of_the_lost_looks_are_known(
    store, record
):
    for name in ("a", "b"):
        take(record, name, horizon=2)
    lose_registry(store.root)
    LookRecord(store, "tickets").accept_loss("no backup", "me")
    assert take(LookRecord(store, "tickets"), "c", rows={"another"}, horizon=2).level == 0
    new = take(LookRecord(store, "tickets"), "d", rows={"new"}, horizon=2)
    assert (new.fresh, new.period, new.level) == (1, 2, 0.025)


def test_lost_row_keys_are_read_from_their_copy_and_accepted_as_any_rows_if_that_is_lost_too(store, record):
    look = take(record, "a", horizon=1)
    (store.root / f"registry/tickets/rows/{look.rows}.json").unlink()
    assert take(LookRecord(store, "tickets"), "b", rows={"row1", "x"}, horizon=1).fresh == 1
    for folder in ("registry", "anchors"):  # that look wrote the missing document again
        (store.root / f"{folder}/tickets/rows/{look.rows}.json").unlink()
    with pytest.raises(DamagedLog, match="registry accept"):
        take(LookRecord(store, "tickets"), "c", rows={"y"}, horizon=1)
    accepted = LookRecord(store, "tickets").accept_loss("no backup", "me")
    assert (accepted.lost, accepted.lost_rows) == (0, [look.rows])
    after = take(LookRecord(store, "tickets"), "c", rows={"y"}, horizon=1)
    assert (after.fresh, after.number, after.level) == (0, 3, 0)


def test_an_edited_set_of_rows_is_restored_from_its_copy_by_an_acceptance(store, record):
    take(record, "a", horizon=1)
    HARMS["rows edited"](store.root)
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost == 0
    assert take(LookRecord(store, "tickets"), "b", rows={"row1", "y"}, horizon=1).number == 2
    assert LookRecord(store, "tickets").accept_loss("again", "me") is None


def test_an_unreadable_anchor_of_looks_can_be_accepted(store, record):
    take(record, "a")
    HARMS["the anchor unreadable"](store.root)
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost == 1
    assert take(LookRecord(store, "tickets"), "b").number == 3


@pytest.mark.parametrize("harm", ["the last look deleted", "all looks deleted", "a level edited"])
def test_a_look_at_a_damaged_record_writes_nothing(store, record, harm):
    for i in range(3):
        take(record, f"k{i}")
    HARMS[harm](store.root)
    before = sorted(store.root.rglob("*"))
    with pytest.raises(DamagedLog):
        take(LookRecord(store, "tickets"), "next", rows={"never seen"})
    assert sorted(store.root.rglob("*")) == before


def test_each_look_writes_the_missing_copies_of_all_rows(store, record):
    """A store of an earlier version has no copies."""
    rows = [take(record, name, rows={name}).rows for name in ("a", "b")]
    shutil.rmtree(store.root / "anchors/tickets/rows")
    take(record, "c", rows={"b"})
    assert {file.stem for file in (store.root / "anchors/tickets/rows").iterdir()} == set(rows)
    lose_registry(store.root)
    assert not LookRecord(store, "tickets").accept_loss("no backup", "me").unknown_rows


def test_rows_that_only_the_anchor_names_are_missed_when_they_are_lost(store, record):
    """Their look was lost and accepted, so no look names them."""
    digest = take(record, "a", rows={"old"}, horizon=1).rows
    lose_looks(store.root)
    LookRecord(store, "tickets").accept_loss("no backup", "me")
    take(record, "b", horizon=1)
    for folder in ("registry", "anchors"):
        (store.root / f"{folder}/tickets/rows/{digest}.json").unlink()
    with pytest.raises(DamagedLog, match=digest[:12]):
        take(record, "c", rows={"new"}, horizon=1)
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost_rows == [digest]
    assert take(record, "c", rows={"new"}, horizon=1).fresh == 0
    assert LookRecord(store, "tickets").accept_loss("again", "me") is None


def test_rows_that_are_lost_at_the_moment_of_a_look_at_them_are_no_raw_error(store, record, monkeypatch):
    """A listing can miss documents that were just written."""
    monkeypatch.setattr(ScoredRows, "read", lambda _: Sets({}, set(), set()))
    assert take(record, "a").fresh == 50


def accept(store):
    done = CliRunner().invoke(cli, ["registry", "accept", "--reason", "x", "--store", store.uri, "--model", "tickets"])
    return done.output


def test_registry_accept_says_what_is_lost_and_what_was_restored(store, record):
    digest = take(record, "a").rows
    HARMS["rows edited"](store.root)
    restored = accept(store)
    assert restored.startswith(f"restored from its copy: the record of scored rows {digest[:8]}")
    assert "lost: " not in restored and "not known" not in restored
    for folder in ("registry", "anchors"):
        (store.root / f"{folder}/tickets/rows/{digest}.json").unlink()
    lost = accept(store)
    assert "lost: the record of scored rows" in lost and "every row counts as scored before" in lost
    assert "counted as spent" not in lost
    lose_looks(store.root)
    assert "lost: 1 look after look 0; counted as spent" in accept(store)
