"""Records of runs: what a run wrote is read back, old records stay readable, and a damaged one does not hide the others."""

import json
import logging
import math

import pytest

from loraflow.failures import BudgetSpent, CorruptArtifact
from loraflow.registry.runs import Publication, RunRecord, RunSummary, find_named_run, find_run, read_run, read_runs
from loraflow.store import Ref

FIRST, SECOND, THIRD = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb", "20260103-000000-cccccc"
MERGED = Ref(stage="merge", fingerprint="f" * 64, digest="d" * 64, uri="/somewhere")


def merge(state):
    return {"stage": "merge", "state": state, "fingerprint": MERGED.fingerprint, "digest": MERGED.digest}


def write(store, run, **values):
    record = RunRecord.model_validate({"run": run, "recipe": "tiny", **values})
    store.write_document(f"runs/{run}.json", record.document)
    return record


def test_a_record_is_unchanged_by_writing_and_reading_even_with_infinite_bounds(store):
    score = {"value": 0.5, "low": -math.inf, "high": math.inf, "n": 1}
    summary = {
        "run": FIRST,
        "recipe": "tiny",
        "metrics": {"base": None, "tuned": {"heldout": {"exact_match": score}}},
        "decision": {"verdict": "reject", "reasons": ["worse"]},
        "published": {"repo": "acme/x", "problem": "no network"},
    }
    written = write(
        store, FIRST, stages=[merge("computed")], resolved={"data": {"system": "be brief"}}, summary=summary
    )
    assert read_run(store, FIRST) == written
    assert read_run(store, FIRST).document == store.read_document(f"runs/{FIRST}.json")
    assert written.system_message == "be brief" and written.summary.metrics["base"] is None


def test_a_run_is_found_by_the_id_that_prefects_page_has_in_its_address(store):
    prefect = "1736bff6-7f1f-4f02-900f-b93b4e13749f"
    for run, flow_run in ((FIRST, None), (SECOND, prefect), (THIRD, prefect[::-1])):
        write(store, run, prefect_run=flow_run)
    assert find_named_run(store, prefect).run == SECOND and find_named_run(store, FIRST).run == FIRST
    assert find_named_run(store, prefect.replace("1", "2")) is None


def test_old_records_with_unknown_and_missing_keys_are_readable(store):
    old = {
        "run": FIRST,
        "recipe": "tiny",
        "colour": "red",
        "stages": [{**merge("cached"), "host": "a"}],
        "summary": None,
    }
    store.write_document(f"runs/{FIRST}.json", json.dumps(old).encode())
    record = read_run(store, FIRST)
    assert (record.state, record.model, record.system_message, record.confidence) == ("done", None, None, 0.95)
    assert record.stage("merge").digest == MERGED.digest and record.section("peft_config") == {}


def test_a_damaged_record_is_named_and_the_others_are_listed(store, caplog):
    write(store, FIRST)
    store.write_document(f"runs/{SECOND}.json", b'{"run": 3')
    with caplog.at_level(logging.WARNING, logger="loraflow"):
        assert [record.run for record in read_runs(store)] == [FIRST]
        read_runs(store)  # a run reads all records several times
    assert caplog.text.count(f"runs/{SECOND}.json") == 1
    with pytest.raises(CorruptArtifact, match="record cannot be read") as caught:
        read_run(store, SECOND)
    assert caught.value.where.endswith(f"runs/{SECOND}.json")
    assert read_run(store, THIRD) is None


def test_only_records_of_runs_are_read(store):
    write(store, FIRST)
    store.write_document(f"runs/{FIRST}.md", b"# tiny")
    store.write_document("runs/published/abc-merged-acme--x.json", b'{"repo": "acme/x"}')
    assert [record.run for record in read_runs(store)] == [FIRST]


def test_the_run_of_a_model_is_the_run_that_computed_it_or_the_newest_with_a_cache_hit(store):
    summary = RunSummary(run="x", recipe="tiny").model_dump()
    write(store, FIRST, stages=[merge("cached")], summary=summary)
    write(store, SECOND, stages=[merge("cached")], summary=summary)
    write(store, THIRD, stages=[merge("computed")])
    assert find_run(store, MERGED).run == SECOND, "the third did not finish"
    write(store, THIRD, stages=[merge("cached")], summary=summary)
    write(store, FIRST, stages=[merge("computed")], summary=summary)
    assert find_run(store, MERGED).run == FIRST
    assert find_run(store, MERGED.model_copy(update={"digest": "e" * 64})) is None


def test_a_publication_is_written_without_unset_keys():
    assert Publication(repo="acme/x", problem="no network").model_dump() == {"repo": "acme/x", "problem": "no network"}


def test_a_record_says_that_a_run_was_preempted_or_interrupted():
    from prefect.exceptions import TerminationSignal

    from loraflow.tasks.run_record import error_line

    for preempted in (SystemExit(143), TerminationSignal(signal=15)):
        assert error_line(preempted) == "Preempted: the run was asked to stop (SIGTERM); another run resumes"
    assert "Ctrl-C" in error_line(KeyboardInterrupt())
    assert error_line(BudgetSpent("The run has used its time.", where="x")) == "BudgetSpent: The run has used its time."
    assert error_line(SystemExit(1)) == "SystemExit: 1"
