"""Each model is scored on held-out rows that no model was scored on before, as long as the reserve lasts."""

import json
import threading

import pytest
from pydantic import ValidationError

from loraflow.config import load_recipe
from loraflow.config.data import Data
from loraflow.execution.deal import deal_for_scores, deal_heldout, use_dealt_rows
from loraflow.execution.launcher import run_job
from loraflow.execution.plan import gate_power, plan
from loraflow.execution.plan_notes import slice_power_lines
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, DamagedLog
from loraflow.registry.anchor import models_with
from loraflow.registry.backup import back_up
from loraflow.registry.deals import Deal, DealRecord, DealRequest
from loraflow.registry.log import models
from loraflow.registry.looks import LookRecord
from loraflow.registry.reserve import ReserveRow, deal, together
from loraflow.registry.runs import StageRun
from loraflow.stages import CHECK_DATASET, DEAL_ROWS, EVALUATE, VERSION_DATASET
from loraflow.store import LocalStore, Ref

RESERVE = DealRequest(reserve=0.8, max_rows=None, seed=0)


def rows_named(*names):
    return [ReserveRow(name) for name in names]


ROWS = rows_named(*(f"r{i}" for i in range(100)))


@pytest.fixture
def record(store):
    return DealRecord(store, "tickets")


def take(record, model, rows=ROWS, scored=frozenset(), request=RESERVE):
    return record.take(model, rows, lambda keys: keys & scored, request, actor="me")


def test_each_model_gets_rows_that_no_model_had_until_the_reserve_is_used_up(record):
    dealt = [take(record, f"m{i}") for i in range(6)]
    assert [dealt_rows.rows for dealt_rows in dealt] == [20, 20, 20, 20, 20, 100]
    assert len(frozenset().union(*(dealt_rows.keys for dealt_rows in dealt[:5]))) == 100, "no row was dealt twice"
    assert [(dealt_rows.state.fresh, dealt_rows.state.looks) for dealt_rows in dealt] == [
        (80, 4),
        (60, 3),
        (40, 2),
        (20, 1),
        (0, 0),
        (0, 0),
    ]
    assert [dealt_rows.state.is_fresh for dealt_rows in dealt] == [True] * 5 + [False]
    assert "used up" in str(dealt[5].state) and "enough for 4 more looks of 20 rows" in str(dealt[0].state)


def test_a_name_that_was_only_dealt_rows_is_no_model_of_the_registry(record, store):
    take(record, "m0")
    assert models(store) == []


def test_an_anchor_that_names_no_deal_is_damaged(record, store):
    take(record, "m0")
    store.write_document("anchors/tickets/deals.json", b"{}")
    with pytest.raises(DamagedLog):
        take(record, "m1")


def test_the_same_model_again_gets_its_rows_again_and_nothing_is_dealt(record, store):
    first = take(record, "m0")
    take(record, "m1")
    documents = list(store.documents("registry/"))
    again = take(record, "m0")
    assert again.keys == first.keys and not again.is_new
    appended = take(record, "m0", rows=[*ROWS, *rows_named("new1", "new2")])
    assert appended.keys == first.keys and appended.state.fresh == 62
    assert list(store.documents("registry/")) == documents


def test_rows_that_are_added_join_the_reserve_and_a_look_keeps_its_size(record):
    for i in range(5):
        take(record, f"m{i}")
    added = [*ROWS, *rows_named(*(f"new{i}" for i in range(25)))]
    next_one = take(record, "m5", rows=added)
    assert next_one.state.is_fresh and next_one.rows == 20 and all(key.startswith("new") for key in next_one.keys)
    after = take(record, "m6", rows=added)
    assert not after.state.is_fresh and after.rows == 120, "the 5 rows that are left wait for more"
    assert after.state.fresh == 5 and not any(key in after.keys for key in {row.key for row in added} - next_one.keys - {row.key for row in ROWS})  # fmt: skip


def test_a_number_of_rows_is_kept_in_reserve_as_a_share_is(record):
    dealt = take(record, "m0", request=DealRequest(70, None, 0))
    assert (dealt.rows, dealt.state.fresh, dealt.state.looks) == (30, 70, 2)
    more = take(
        record, "m1", rows=[*ROWS, *rows_named(*(f"n{i}" for i in range(50)))], request=DealRequest(70, None, 0)
    )
    assert (more.rows, more.state.fresh) == (30, 90)


def test_another_reserve_or_max_rows_deals_the_model_other_rows(record):
    first = take(record, "m0")
    assert take(record, "m0", request=DealRequest(0.8, 10, 0)).rows == 10
    larger = take(record, "m0", request=DealRequest(0.5, None, 0))
    assert larger.rows == 50 and first.keys.isdisjoint(larger.keys)


def test_rows_of_looks_without_a_reserve_are_not_fresh(record, store):
    looks = LookRecord(store, "tickets")
    used = {f"r{i}" for i in range(70)}
    looks.take("k", challenger="c", rows=used, error=0.05, horizon=365, promotions=(), actor="me")
    dealt = record.take("m0", ROWS, looks.scored_keys, RESERVE, actor="me")
    assert dealt.keys.isdisjoint(used) and dealt.state.fresh == 10
    other = record.take("m1", ROWS, looks.scored_keys, RESERVE, actor="me")
    assert not other.state.is_fresh and other.keys == used | dealt.keys


def test_a_look_at_dealt_rows_counts_all_of_them_as_fresh(record, store):
    looks = LookRecord(store, "tickets")
    for number in range(3):
        dealt = record.take(f"m{number}", ROWS, looks.scored_keys, RESERVE, actor="me")
        look = looks.take(f"k{number}", challenger=f"m{number}", rows=dealt.keys, error=0.05, horizon=365, promotions=(), actor="me")  # fmt: skip
        assert look.fresh == 20


def test_rows_of_a_group_or_with_one_prompt_are_dealt_together(record):
    rows = [ReserveRow(f"r{i // 2}", group=f"g{i // 10}" if i < 60 else None) for i in range(120)]
    units = together(rows)
    assert sorted(map(len, units)) == [2] * 30 + [10] * 6
    dealt = [take(record, f"m{i}", rows=rows, request=DealRequest(90, None, 0)) for i in range(4)]
    for dealt_rows in dealt:
        for unit in units:
            assert {row.key in dealt_rows.keys for row in unit} in ({True}, {False}), (
                "a unit is dealt as a whole or not at all"
            )
        assert 25 <= dealt_rows.rows <= 35 or not dealt_rows.state.is_fresh


def test_groups_that_share_a_prompt_are_one_part():
    rows = [ReserveRow("a", "g1"), ReserveRow("b", "g1"), ReserveRow("b", "g2"), ReserveRow("c", "g2"), ReserveRow("d")]
    assert sorted(map(len, together(rows))) == [1, 4]


def test_a_group_that_is_larger_than_a_look_is_dealt_as_a_whole():
    rows = [ReserveRow(f"r{i}", group=f"g{i // 50}") for i in range(100)]
    assert len(deal(rows, frozenset(), 20, 0).keys) == 50


def test_the_rows_of_a_deal_are_a_random_sample_that_the_seed_decides():
    dealt = {seed: deal(ROWS, frozenset(), 20, seed).keys for seed in range(200)}
    assert dealt[0] == deal(list(reversed(ROWS)), frozenset(), 20, 0).keys, "the order of the file does not matter"
    counts = [sum(row.key in keys for keys in dealt.values()) for row in ROWS]
    assert sum(counts) == 200 * 20 and min(counts) >= 15 and max(counts) <= 65, "each row in about a fifth"


def test_models_that_are_dealt_rows_at_once_get_rows_of_their_own(store):
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: take(DealRecord(store, "tickets"), f"m{i}").keys}))
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(frozenset().union(*found.values())) == 100
    assert json.loads(store.read_document("anchors/tickets/deals.json"))["seq"] == 5


def test_a_deal_with_rows_that_were_removed_is_replaced(record):
    first = take(record, "m0")
    left = [row for row in ROWS if row.key != min(first.keys)]
    other = take(record, "m0", rows=left)
    assert other.is_new and first.keys.isdisjoint(other.keys)


def test_a_smaller_dataset_than_a_look_is_used_as_a_whole(record):
    take(record, "m0")
    few = rows_named("x", "y", "z")
    dealt = take(record, "m1", rows=few)
    assert (dealt.rows, dealt.state.is_fresh) == (3, False)


@pytest.mark.parametrize("what", ["a value of the deal", "a row", "the rows are gone"])
def test_a_changed_deal_stops_the_run_and_names_the_file(record, store, what):
    take(record, "m0")
    (deals,) = store.documents("registry/tickets/deals/")
    (rows,) = store.documents("registry/tickets/dealt/")
    if what == "a value of the deal":
        document = json.loads(store.read_document(deals))
        store.write_document(deals, json.dumps({**document, "challenger": "m9"}).encode())
    elif what == "a row":
        keys = json.loads(store.read_document(rows))
        store.write_document(rows, json.dumps(["r99", *keys[1:]]).encode())
    else:
        store.remove_document(rows)
    with pytest.raises(DamagedLog, match=r"dealt held-out rows is damaged") as caught:
        take(record, "m1")
    assert (deals if what == "a value of the deal" else rows) in caught.value.where


@pytest.mark.parametrize("reserve", [100, 150, 0.999])
def test_a_reserve_of_all_rows_is_refused(record, reserve):
    with pytest.raises(BadConfig, match="no row is left for a look"):
        take(record, "m0", request=DealRequest(reserve, None, 0))


@pytest.mark.parametrize("value", [0, 0.0, 1.0, 1.5, -3, "half", True])
def test_a_reserve_is_a_share_below_1_or_a_number_of_rows(value):
    with pytest.raises(ValidationError):
        Data(heldout_reserve=value)
    assert (Data(heldout_reserve=1).heldout_reserve, Data(heldout_reserve=0.5).heldout_reserve) == (1, 0.5)


# -- in a run -------------------------------------------------------------------------------------------------------


def add_rows(dataset, count):
    file = dataset / "heldout.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"new {i}"}, {"role": "assistant", "content": "red"}]} for i in range(count)]  # fmt: skip
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def model(name):
    return Ref(stage="merge", fingerprint=name * 64, digest=name * 64, uri="")


def checked(recipe, settings):
    workspace = Workspace(load_recipe(recipe, {"evaluation.max_rows": None, **settings}))
    dataset = run_job(workspace.job(VERSION_DATASET, {}), workspace.store)
    return workspace, run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), workspace.store)


def scored(workspace, rows, merged):
    """Deal rows to a model; return the rows' artifact and the fingerprint of its scores."""
    deal_heldout(workspace, rows, merged)
    dealt = run_job(workspace.job(DEAL_ROWS, {"rows": rows}), workspace.store)
    return dealt, workspace.job(EVALUATE, {"model": merged, "rows": dealt}).fingerprint


def texts(store, ref):
    return store.read(ref, "heldout.jsonl").decode().splitlines()


@pytest.mark.parametrize("harm", ["the last one", "all", "an edited one with its hash"])
def test_lost_or_edited_deals_are_noticed_and_their_rows_are_not_dealt_again(record, store, tmp_path, harm):
    for number in range(3):
        take(record, f"m{number}")
    back_up_all(store, tmp_path / "copy")
    names = store.documents("registry/tickets/deals/")
    if harm == "an edited one with its hash":
        values = {**json.loads(store.read_document(names[0])), "challenger": "m9"}
        del values["hash"]
        store.write_document(names[0], json.dumps({**values, "hash": Deal.model_validate(values).hash}).encode())
    for name in {"the last one": names[2:], "all": names}.get(harm, []):
        store.remove_document(name)
    with pytest.raises(DamagedLog, match="3 deals, as anchors/tickets/deals.json says"):
        take(record, "m3")
    assert models_with("deals", store) == ["tickets"], "`loraflow verify` reads the record"
    with pytest.raises(DamagedLog):
        back_up_all(store, tmp_path / "copy")
    copy = LocalStore(tmp_path / "copy")
    assert len(copy.documents("registry/tickets/deals/")) == 3, "an earlier backup keeps its deals"
    assert take(DealRecord(copy, "tickets"), "m2").is_new is False


def back_up_all(store, target):
    assert [copied for copied in back_up(store, target) if copied.problem] == []


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_anchor_that_a_crash_left_behind_is_written_when_the_model_asks_again(record, store, is_lost):
    take(record, "m0")
    anchor = store.read_document("anchors/tickets/deals.json")
    second = take(record, "m1")
    if is_lost:
        store.remove_document("anchors/tickets/deals.json")  # a store of an earlier version has none
    else:
        store.write_document("anchors/tickets/deals.json", anchor)
    assert take(record, "m1").keys == second.keys
    store.remove_document("registry/tickets/deals/000002.json")
    with pytest.raises(DamagedLog, match="2 deals"):
        take(record, "m1")


@pytest.mark.parametrize("harm", ["lost", "swapped", "copied"])
def test_a_deal_that_is_lost_or_in_the_place_of_another_stops_the_run(record, store, harm):
    for number in range(3):
        take(record, f"m{number}")
    first, second = (store.root / f"registry/tickets/deals/00000{number}.json" for number in (1, 2))
    old, new = first.read_bytes(), second.read_bytes()
    if harm == "lost":
        first.unlink()
    else:
        first.write_bytes(new)
        second.write_bytes(old if harm == "swapped" else new)
    with pytest.raises(DamagedLog, match="000001"):
        take(record, "m3")


def test_scores_depend_on_the_dealt_rows_and_on_no_other_row(recipe, dataset):
    settings = {"data.heldout_reserve": 16}
    workspace, rows = checked(recipe, settings)
    dealt, fingerprint = scored(workspace, rows, model("a"))
    every = texts(workspace.store, rows)
    mine = texts(workspace.store, dealt)
    assert len([line for line in mine if json.loads(line)["set"] == "heldout"]) == 4 and set(mine) < set(every)
    assert [line for line in every if line in mine] == mine, "in the order of the dataset"
    add_rows(dataset, 5)
    later, more_rows = checked(recipe, settings)
    assert len(texts(later.store, more_rows)) == len(every) + 5
    assert scored(later, more_rows, model("a"))[1] == fingerprint, "a repeated run is cached"
    assert scored(later, more_rows, model("b"))[1] != fingerprint


def test_a_model_that_gets_all_rows_is_scored_as_without_a_reserve(recipe):
    workspace, rows = checked(recipe, {"data.heldout_reserve": 10})
    for name in "abc":
        _, fingerprint = scored(workspace, rows, model(name))
    assert not workspace.reserve.is_fresh
    assert fingerprint == workspace.job(EVALUATE, {"model": model("c"), "rows": rows}).fingerprint


def test_without_a_reserve_a_plan_has_no_step_that_deals(recipe):
    workspace, _ = checked(recipe, {})
    assert DEAL_ROWS.name not in {step.stage for step in plan(workspace)} and workspace.reserve is None


def test_the_plan_says_what_would_be_dealt_and_deals_nothing(recipe):
    settings = {"data.heldout_reserve": 0.5, "evaluation.max_rows": None}
    workspace, rows = checked(recipe, settings)
    step = next(step for step in plan(workspace) if step.stage == DEAL_ROWS.name)
    assert (step.status, step.why) == ("depends", ["deals 10 rows that were never scored, unless the model has its rows already"])  # fmt: skip
    assert (workspace.reserve.fresh, workspace.reserve.looks, gate_power(workspace).rows) == (10, 1, 10)
    assert not list(workspace.store.documents("registry/"))
    for name in "ab":
        scored(workspace, rows, model(name))
    after = Workspace(load_recipe(recipe, settings))
    step = next(step for step in plan(after) if step.stage == DEAL_ROWS.name)
    assert "deals 20 rows that were scored before: the reserve is used up" in step.why[0]


def test_a_model_that_is_scored_without_a_look_sees_no_row_of_the_reserve(recipe):
    workspace, rows = checked(recipe, {"data.heldout_reserve": 0.5})
    deal_for_scores(workspace, rows, model("a"))
    own = workspace.dealt
    deal_for_scores(workspace, rows, model("b"))
    assert workspace.dealt == own and len(own) == 10, "the rows that were dealt last"
    dealt = deal_heldout(workspace, rows, model("c"))
    assert own.isdisjoint(dealt.keys)
    deal_for_scores(workspace, rows, model("a"))
    assert workspace.dealt == own, "a model's own rows"


def test_a_run_that_is_repeated_in_another_store_uses_the_rows_of_that_time(recipe, tmp_path):
    settings = {"data.heldout_reserve": 0.5}
    workspace, rows = checked(recipe, settings)
    for name in "ab":
        scored(workspace, rows, model(name))
    fresh = Workspace(load_recipe(recipe, {**settings, "runtime.store": str(tmp_path / "fresh")}))
    use_dealt_rows(fresh, workspace.store, model("b").digest)
    assert fresh.dealt == workspace.dealt


def test_the_rows_of_a_run_are_those_that_it_recorded_though_the_model_was_dealt_others_later(recipe, tmp_path):
    settings = {"data.heldout_reserve": 0.5, "evaluation.max_rows": 4}
    workspace, rows = checked(recipe, settings)
    dealt, _ = scored(workspace, rows, model("a"))
    first = workspace.dealt
    later = Workspace(load_recipe(recipe, {**settings, "evaluation.max_rows": None}))
    deal_heldout(later, rows, model("a"))
    assert later.dealt != first
    recorded = StageRun(stage="deal_rows", state="computed", fingerprint=dealt.fingerprint, digest=dealt.digest)
    fresh = Workspace(load_recipe(recipe, {**settings, "runtime.store": str(tmp_path / "fresh")}))
    use_dealt_rows(fresh, workspace.store, model("a").digest, recorded)
    assert fresh.dealt == first


def test_rows_of_a_look_on_which_the_reserve_was_used_up_are_not_dealt_as_fresh_later(record):
    """After a dataset that was smaller for a while, some of its rows had been scored by the second model only."""
    first = take(record, "m0")
    small = [row for row in ROWS if row.key in first.keys][:10] + [row for row in ROWS if row.key not in first.keys][:9]
    second = take(record, "m1", rows=small)
    assert not second.state.is_fresh
    third = take(record, "m2")
    assert third.state.is_fresh and third.keys.isdisjoint(first.keys | second.keys)


def test_the_plan_counts_the_rows_that_are_scored_when_the_reserve_is_used_up(recipe):
    settings = {"data.heldout_reserve": 0.8, "evaluation.max_rows": 4, "gate.slices": {"length": {"exact_match": 0.9}}}
    workspace, rows = checked(recipe, settings)
    plan(workspace)
    assert gate_power(workspace).rows == 4 and "needs 20 rows" in slice_power_lines(workspace)[0]
    for name in "abcde":
        scored(workspace, rows, model(name))
    after = Workspace(load_recipe(recipe, settings))
    plan(after)
    assert not after.reserve.is_fresh and len(after.dealt) == 20
    assert gate_power(after).rows == 4, "evaluation.max_rows of the rows that were scored before"
