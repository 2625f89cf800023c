"""Looks at held-out rows are counted, and their errors add up to the budget."""

import hashlib
import json
import random
import threading

import pytest

from loraflow.identity import canonical
from loraflow.registry import Entry, PromotionLog
from loraflow.registry.budget import Look, next_look
from loraflow.registry.looks import LookRecord, row_key
from loraflow.store import Ref
from tests.looks import ROWS, nights_on_fresh_rows, take
from tests.promoted_models import add_model


@pytest.fixture
def record(store):
    return LookRecord(store, "tickets")


def test_half_of_the_error_is_spent_on_the_first_look_and_all_looks_together_spend_it_once(record):
    looks = [take(record, f"k{i}", horizon=9) for i in range(12)]
    assert looks[0].level == 0.025 and looks[1].level == pytest.approx(0.025 / 8)
    assert sum(look.level for look in looks) == pytest.approx(0.05)
    assert [look.level for look in looks[9:]] == [0, 0, 0], "after the horizon nothing is left"
    assert [look.number for look in looks] == list(range(1, 13))


def test_the_same_comparison_again_is_the_same_look(record):
    assert take(record, "a") == take(record, "a")
    assert len(record.entries()) == 1


def test_all_held_out_sets_of_a_model_share_one_budget_and_only_rows_that_were_never_scored_are_fresh(record):
    assert take(record, "a").fresh == 50
    appended = take(record, "b", rows={*ROWS, *(f"new{i}" for i in range(1000))})
    assert (appended.number, appended.fresh) == (2, 1000)
    assert take(record, "c", rows={"new5"}).fresh == 0
    assert take(record, "d", rows={"row1", "other"}, error=0.2, horizon=10).number == 4, "other rules"
    replaced = take(record, "e", rows={"fresh1", "fresh2"})
    assert (replaced.number, replaced.fresh, replaced.period) == (5, 2, 1)
    assert replaced.level < 0.025 / 100, "rows that were never scored do not get half of the error again"


def test_the_levels_of_a_year_on_new_rows_every_night_add_up_to_the_error(record):
    looks = [take(record, f"k{i}", rows={f"night{i}-{j}" for j in range(3)}, horizon=30) for i in range(30)]
    assert sum(look.level for look in looks) == pytest.approx(0.05)


def fresh_rows(night):
    return {f"night{night}-{j}" for j in range(3)}


def test_two_looks_at_fresh_rows_after_a_nearly_shown_gain_get_more_and_of_a_horizon_at_most_six_do():
    """Also at the end of a period and the beginning of the next: in 100 looks in a row they add up to 0.12 of the error."""
    looks = nights_on_fresh_rows(250, 100, lambda seq: seq % 7 == 0)
    more = [look.seq for look in looks if look.following]
    assert more[:7] == [8, 9, 15, 16, 22, 23, 113] and [look.period for look in looks[::100]] == [1, 2, 3]
    assert all(look.following == pytest.approx(0.001) for look in looks if look.following)
    for first in range(len(looks) - 100):
        window = looks[first : first + 100]
        assert sum(look.following or 0 for look in window) <= 0.006 * (1 + 1e-9)
        assert sum(look.level for look in window) <= 0.05 * (1 + 1e-9)


def test_a_look_at_rows_that_were_scored_gets_nothing_for_a_nearly_shown_gain(record):
    take(record, "a", rows=fresh_rows(0))
    given = {"error": 0.05, "horizon": 365, "promotions": ()}
    plain, more = (record.preview(fresh_rows(1), **given, nearly=nearly)[1] for nearly in (set(), {1}))
    assert record.preview(fresh_rows(1), **given)[1] == pytest.approx(0.025 / 364), "without gate.independent_rows"
    assert (plain, more) == (pytest.approx(0.019 / 364), pytest.approx(0.019 / 364 + 0.001))
    for rows in (fresh_rows(0), fresh_rows(0) | fresh_rows(1)):
        assert record.preview(rows, **given, nearly={1})[1] == plain, (
            "their scores are not independent of the ones before"
        )
    look = record.take("b", challenger="c", rows=fresh_rows(1), **given, actor="me", nearly={1})
    assert (look.level, look.following) == (pytest.approx(more), pytest.approx(0.001)) and look.spent == look.level
    assert record.entries()[-1] == look, "it is part of what is hashed"


def test_what_follows_a_nearly_shown_gain_is_not_passed_on_by_a_promotion(store, record):
    merged = add_model(store, "better")
    given = {"error": 0.05, "horizon": 365}
    take(record, "a", rows=fresh_rows(0))
    rules = {**given, "rows": fresh_rows(1), "promotions": (), "nearly": {1}, "actor": "me"}
    look = record.take("b", challenger=merged.digest, **rules)
    log = PromotionLog(store, "tickets")
    log.append(None, action="promote", merged=merged, adapter=None, inputs={"look": "2"}, reasons=[], actor="x")
    after = record.preview(fresh_rows(1), **given, promotions=log.entries(), nearly=set())[1]
    assert look.following and after == pytest.approx(1.5 * 0.019 / 364)


def test_a_period_that_an_earlier_version_began_spends_no_more_than_the_error():
    """Its looks took half of the error evenly, so less is kept for looks after a nearly shown gain."""
    looks = nights_on_fresh_rows(30, 30, lambda seq: seq >= 20, of_earlier_version=range(2, 20))
    assert all(look.level for look in looks) and sum(look.level for look in looks) == pytest.approx(0.05)


@pytest.mark.parametrize("seed", range(8))
def test_gate_independent_rows_may_be_set_and_unset_and_no_looks_in_a_row_spend_more_than_the_error(seed):
    rng = random.Random(seed)
    blocks = [rng.random() < 0.5 for _ in range(100)]
    looks = nights_on_fresh_rows(
        90, 30, lambda seq: seq % 3 == 0, independent=lambda seq: blocks[seq // (1 + 4 * (seed % 3))]
    )
    assert any(look.following for look in looks)
    for first in range(len(looks)):
        assert sum(look.level for look in looks[first : first + 30]) <= 0.05 * (1 + 1e-9), first


@pytest.mark.parametrize("lost", [1, 3, 6, 20, 60])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("first", [2, 30])
def test_lost_looks_count_as_if_each_had_followed_a_nearly_shown_gain(lost, independent, first):
    """They may have had all of the 0.12, so the looks that are known, and these, together spend at most the error."""
    looks = nights_on_fresh_rows(first + lost, 100, lambda seq: first < seq + 1 < first + 6)
    gone, kept = looks[first:], looks[:first]
    sets = {look.rows: {look.rows} for look in kept}
    for number in range(first + lost + 1, 101):
        seq, row = len(kept) + 1, f"later{number}"
        nearly, assumed = {seq - 1} if independent else None, lost if seq == first + 1 else 0
        found = next_look(kept, sets, {row}, error=0.05, horizon=100, assumed=assumed, promotions=(), nearly=nearly)
        fixed = {"seq": seq, "before": None, "model": "m", "key": "", "challenger": "c", "rows": row}
        kept.append(Look(**fixed, **found._asdict(), horizon=100, error=0.05, actor="", time=""))
        sets[row] = {row}
    assert len(gone) == lost and kept[-1].number == 100
    assert sum(look.spent for look in (*gone, *kept)) <= 0.05 * (1 + 1e-9)
    more = sum(max(look.spent - 0.019 / 99, 0) for look in (*gone, *kept) if look.number > 1)
    assert more <= 0.006 * (1 + 1e-9), "the further 0.12"


def test_after_the_horizon_the_next_budget_starts_with_rows_that_were_never_scored(record):
    for i in range(4):
        take(record, f"k{i}", horizon=4)
    late = take(record, "seen", rows={"row1", "new"}, horizon=4)
    assert (late.number, late.level, late.period) == (5, 0, 1)
    more = take(record, "more looks in the recipe", horizon=1000)
    assert more.level == 0
    first = take(record, "fresh", rows={"fresh1", "fresh2"}, horizon=4)
    assert (first.number, first.level, first.period) == (1, 0.025, 2)
    second = take(record, "then", rows={"fresh1", "row1"}, horizon=4)
    assert (second.number, second.level, second.period) == (2, pytest.approx(0.025 / 3), 2)


def test_fewer_looks_in_the_recipe_do_not_end_a_period_early(record):
    take(record, "a")
    assert take(record, "b", rows={"fresh"}, horizon=1).level == 0


def test_looks_of_an_earlier_version_stay_valid_and_count_for_the_rows_that_they_share(store, record):
    """The record as it was written when each set of rows had a budget of its own."""
    before = None
    for seq, (rows, number) in enumerate([(ROWS, 1), ({"other"}, 1), (ROWS, 2)], 1):
        take(LookRecord(store, "scratch"), f"s{seq}", rows=rows)  # writes the keys of the rows
        digest = LookRecord(store, "scratch").entries()[-1].rows
        spent = 0.025 if number == 1 else 0.025 / 364
        values = {"seq": seq, "before": before, "model": "tickets", "key": f"o{seq}", "challenger": "c", "rows": digest}
        values |= {"number": number, "horizon": 365, "error": 0.05, "spent": spent, "level": spent, "assumed": 0}
        values |= {"actor": "me", "time": "2026-11-01T00:00:00Z"}
        before = hashlib.sha256(canonical(values)).hexdigest()  # the hash of that version
        store.write_document(f"registry/tickets/looks/{seq:06d}.json", json.dumps({**values, "hash": before}).encode())
        store.write_document(
            f"registry/tickets/rows/{digest}.json", store.read_document(f"registry/scratch/rows/{digest}.json")
        )
    assert [look.hash for look in record.entries()][-1] == before and isinstance(record.entries()[0], Look)
    assert record.preview({"row1"}, error=0.05, horizon=365, promotions=())[0] == 3
    assert record.preview({"never seen"}, error=0.05, horizon=365, promotions=()) == (1, 0.025)
    assert take(record, "n1", rows={"row1"}).number == 3
    assert take(record, "n2", rows={"never seen"}).number == 4, "from now on there is one budget"
    joined = take(record, "n3", rows={"other"})
    assert joined.number == 6 and joined.level == 0, "both budgets are spent by half, so nothing is left of one"


def test_more_error_in_the_recipe_does_not_give_back_what_was_spent(record):
    for i in range(5):
        take(record, f"k{i}", horizon=5)
    assert take(record, "more", horizon=1000).level == 0


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red?"}],
        [{"role": "user", "content": " what  is RED?\n"}],
    ],
)
def test_a_row_with_another_system_message_case_or_space_was_seen_before(messages):
    assert row_key(json.dumps(messages)) == row_key(json.dumps([{"role": "user", "content": "What is red?"}]))
    assert row_key(json.dumps(messages)) != row_key(json.dumps([{"role": "user", "content": "What is blue?"}]))


KEYS = {  # of prompts in looks and deals that exist
    "What is red?": "0b68b1dc4a2f8c8e",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645": "200ac775b7be9d7e",  # Persian, with a zero-width non-joiner
    "I \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467": "52f847c2ee070d7c",
    "co\u00adoperate\u200b \ufb01ne": "70f1bfd0978dfeef",
}


@pytest.mark.parametrize("text", KEYS)
def test_the_keys_of_rows_in_existing_looks_and_deals_do_not_change(text):
    """Rows with other keys would count as never scored, and get a new period of levels."""
    assert row_key(json.dumps([{"role": "user", "content": text}])) == KEYS[text]


def test_the_level_of_a_promotion_is_passed_on_once_half_to_the_next_look_and_half_to_later_ones(store, record):
    merged = add_model(store, "better")
    first = take(record, "a", challenger=merged.digest, horizon=20)
    log = PromotionLog(store, "tickets")
    log.append(None, action="promote", merged=merged, adapter=None, inputs={"look": "1"}, reasons=[], actor="x")
    looks = [take(record, f"b{i}", promotions=log.entries(), horizon=20) for i in range(19)]
    gained = [look.level - look.spent for look in looks]
    assert gained == pytest.approx([first.level / 2, *[first.level / 8] * 4, *[0] * 14])
    assert sum(look.level for look in looks) == pytest.approx(0.05), (
        "the first one was right, so its level is free again"
    )


def test_a_promotion_that_was_rolled_back_passes_nothing_on(store, record):
    log, before = PromotionLog(store, "tickets"), None
    for number in (1, 2):
        merged = add_model(store, f"model{number}")
        take(record, f"a{number}", challenger=merged.digest, promotions=log.entries())
        inputs = {"look": str(number)}
        before = log.append(before, action="promote", merged=merged, adapter=None, inputs=inputs, reasons=[], actor="x")
    assert take(record, "b", promotions=log.entries()).level > 0.006
    log.rollback("wrong", "x")
    after = take(record, "c", promotions=log.entries())
    assert after.level == pytest.approx(after.spent + 0.025 / 2 / 73), "of the first promotion only"


def test_a_promotion_by_hand_passes_nothing_on(store, record):
    merged = add_model(store, "better")
    take(record, "a", challenger=merged.digest)
    log = PromotionLog(store, "tickets")
    log.append(None, action="promote", merged=merged, adapter=None, inputs={"run": "1"}, reasons=[], actor="x")
    assert take(record, "b", promotions=log.entries()).level == pytest.approx(0.025 / 364)


def test_looks_at_the_same_time_each_spend_one(store):
    start = threading.Barrier(8)

    def look(number):
        start.wait()
        take(LookRecord(store, "tickets"), f"k{number}")

    threads = [threading.Thread(target=look, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    looks = LookRecord(store, "tickets").entries()
    assert [look.number for look in looks] == list(range(1, 9))
    assert sum(look.level for look in looks) == pytest.approx(0.025 + 7 * 0.025 / 364)


def test_a_store_without_a_record_starts_with_the_looks_that_decisions_and_promotions_show(store, record):
    log = PromotionLog(store, "tickets")
    for name in ("a", "b", "c"):
        log.write_decision(None, name * 64, "rules" * 13, {"verdict": "undecided"})
    merged = add_model(store, "first")
    log.append(None, action="promote", merged=merged, adapter=None, inputs={}, reasons=[], actor="x")
    look = take(record, "k", promotions=log.entries())
    assert (look.number, look.assumed) == (5, 4) and look.level == pytest.approx(0.025 / 364)
    assert take(record, "l", promotions=log.entries()).number == 6


def test_whatever_is_promoted_the_levels_of_the_other_looks_of_a_period_add_up_to_at_most_the_error():
    """So the probability of any false promotion is at most the error: promotions of other looks only pass levels on."""
    rng = random.Random(0)
    for _ in range(100):
        horizon, share = rng.choice([1, 2, 5, 10, 30]), rng.random()
        looks, promotions, others = [], [], 0.0
        for seq in range(1, horizon + 1):
            row, name = f"row{rng.randrange(50)}", f"c{seq}"
            sets = {look.rows: {look.rows} for look in looks}
            nearly = {look.seq for look in looks if rng.random() < share}
            found = next_look(
                looks, sets, {row}, error=0.05, horizon=horizon, assumed=0, promotions=promotions, nearly=nearly
            )._asdict()
            values = {"seq": seq, "before": None, "model": "m", "key": name, "challenger": name, "rows": row}
            looks.append(Look(**values, **found, horizon=horizon, error=0.05, actor="", time=""))
            if rng.random() < share:
                merged = Ref(stage="merge", fingerprint="f", digest=name, uri="")
                entry = {"action": "promote", "model": "m", "merged": merged, "adapter": None, "reasons": []}
                fixed = {"seq": len(promotions) + 1, "before": None, "actor": "", "time": ""}
                promotions.append(Entry(**entry, **fixed, inputs={"look": str(seq)}))
            else:
                others += looks[-1].level
        assert others <= 0.05 * (1 + 1e-9), (horizon, share)
