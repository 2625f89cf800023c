"""Documents that are read back have checksums: one that was damaged, or belongs to another run, is not believed."""

import json
import logging
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow import identity
from loraflow.base import hub
from loraflow.cli import cli
from loraflow.config import load_recipe
from loraflow.evaluation.answers_file import append_answers, read_answers
from loraflow.evaluation.values import Decision
from loraflow.execution.job_file import JobFile
from loraflow.execution.outcome import parse_outcome, report_outcome
from loraflow.failures import BadConfig, CorruptArtifact, DamagedLog
from loraflow.registry import PromotionLog
from loraflow.registry.anchor import write_anchor
from loraflow.registry.looks import LookRecord
from loraflow.registry.runs import LogHead, Publication, read_report, read_run, write_report
from loraflow.serving.publish import _write_publication, find_publication
from loraflow.store import Ref, Summary
from loraflow.store.artifact import Manifest
from loraflow.store.checkpoints import finalize_checkpoint, is_intact, prune_to_newest_intact
from loraflow.store.checksum import ChangedDocument, check_document, with_checksum
from loraflow.store.files import json_bytes
from loraflow.store.lock import flock
from loraflow.tasks.gate import _decided_before
from tests.job_factory import make_job
from tests.promoted_models import add_model, commit, promote, record_run

FIRST, SECOND = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb"
ROWS = {f"row{i}" for i in range(50)}


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def loraflow(store, *arguments):
    return CliRunner().invoke(cli, [*arguments, "--store", store.uri])


@pytest.fixture
def runs(store):
    score = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 80}
    for run, name in ((FIRST, "a"), (SECOND, "b")):
        summary = {"run": run, "recipe": "tickets", "metrics": {"tuned": {"heldout": {"exact_match": score}}}}
        record_run(store, run, add_model(store, name), summary=summary)
        write_report(store, run, f"# Run {run}\n\nexact_match 0.25\n")
    return store


HARMS = {
    "a number edited": lambda data, other: data.replace(b"0.25", b"0.95"),
    "cut off": lambda data, other: data[: len(data) // 2],
    "replaced by another run's": lambda data, other: other,
    "edited and formatted by another program": lambda data, other: json.dumps(
        json.loads(data.replace(b"0.25", b"0.95")), indent=2
    ).encode(),
}
REPORT_HARMS = {name: harm for name, harm in HARMS.items() if "formatted" not in name}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "command", [["show", FIRST], ["promote", FIRST, "--reason", "x"], ["compare", FIRST, SECOND], ["chat", FIRST]]
)
def test_a_changed_run_record_is_refused_by_whoever_reads_it(runs, command, harm):
    data, other = (runs.read_document(f"runs/{run}.json") for run in (FIRST, SECOND))
    runs.write_document(f"runs/{FIRST}.json", HARMS[harm](data, other))
    done = loraflow(runs, *command)
    assert isinstance(done.exception, CorruptArtifact) and f"runs/{FIRST}.json" in str(done.exception)
    assert PromotionLog(runs, "tickets").entries() == []


@pytest.mark.parametrize("harm", REPORT_HARMS)
def test_a_changed_report_is_refused_and_verify_names_it(runs, harm):
    assert loraflow(runs, "verify").exit_code == 0
    assert "checksum" not in loraflow(runs, "show", FIRST).output
    data, other = (runs.read_document(f"runs/{run}.md") for run in (FIRST, SECOND))
    runs.write_document(f"runs/{FIRST}.md", HARMS[harm](data, other))
    with pytest.raises(CorruptArtifact, match=f"{FIRST}.md"):
        read_report(runs, FIRST)
    assert f"damaged  runs/{FIRST}.md" in loraflow(runs, "verify").output


def test_each_flipped_bit_of_a_run_record_is_refused_or_changes_nothing(runs):
    before, name = read_run(runs, FIRST), f"runs/{FIRST}.json"
    data = runs.read_document(name)
    for position in range(0, len(data), 7):
        (runs.root / name).write_bytes(flipped(data, position))
        try:
            assert read_run(runs, FIRST) == before, position
        except CorruptArtifact:
            continue


def test_documents_of_earlier_versions_have_no_checksum_and_are_read(runs):
    name = f"runs/{FIRST}.json"
    plain = check_document(name, runs.read_document(name))
    runs.write_document(name, plain)
    runs.write_document(f"runs/{FIRST}.md", b"# Run\n")
    assert read_report(runs, FIRST) == "# Run\n"
    assert read_run(runs, FIRST).run == FIRST and b"checksum" not in plain


def test_a_document_with_another_name_is_refused():
    document = with_checksum("a", {"x": 1})
    assert json.loads(check_document("a", document)) == {"x": 1}
    with pytest.raises(ChangedDocument):
        check_document("b", document)


def test_a_stored_decision_that_was_edited_or_is_of_another_comparison_is_not_used(store):
    log = PromotionLog(store, "tickets")
    for digest in ("d" * 64, "e" * 64):
        log.write_decision(None, digest, "p" * 64, Decision("reject", (f"about {digest[0]}",)).to_dict())
    workspace = SimpleNamespace(log=log, seen_head=None)
    assert _decided_before(workspace, "d" * 64, "p" * 64).reasons == ("about d",)
    name, other = store.documents("registry/tickets/decisions/")
    data = store.read_document(name)
    for harmed in (store.read_document(other), data.replace(b"about d", b"about x"), b"[]", b'{"verdict": "no"}'):
        store.write_document(name, harmed)
        assert _decided_before(workspace, "d" * 64, "p" * 64) is None


def test_a_changed_record_of_an_upload_is_not_used(store):
    model = SimpleNamespace(ref=Ref(stage="merge", fingerprint="f" * 64, digest="d" * 64, uri=store.uri))
    _write_publication(store, model, Publication(repo="acme/x", what="merged", commit="abc"))
    assert find_publication(store, model, "acme/x", "merged").commit == "abc"
    (name,) = store.documents("runs/published/")
    data = store.read_document(name)
    for harmed in (data.replace(b"abc", b"abd"), b"", json_bytes({"repo": "acme/other", "what": "merged"})):
        store.write_document(name, harmed)
        assert find_publication(store, model, "acme/x", "merged") is None


def take(store, key):
    return LookRecord(store, "tickets").take(
        key, challenger="c", rows=ROWS, error=0.05, horizon=100, promotions=(), actor="me"
    )


def knows_look(store, run, look):
    record_run(store, run, add_model(store, run), looks_head=LogHead(seq=look.seq, hash=look.hash))


def test_an_older_copy_of_the_record_of_looks_and_its_anchor_gives_no_look_back(store, tmp_path):
    take(store, "a")
    for folder in ("registry", "anchors"):
        shutil.copytree(store.root / folder, tmp_path / folder)
    knows_look(store, FIRST, take(store, "b"))
    for folder in ("registry", "anchors"):
        shutil.rmtree(store.root / folder)
        shutil.copytree(tmp_path / folder, store.root / folder)
    with pytest.raises(DamagedLog, match=f"look 2, as runs/{FIRST}.json says"):
        take(store, "c")
    assert "damaged  record of looks" in loraflow(store, "verify").output
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost == 1
    assert take(store, "c").number == 3
    assert LookRecord(store, "tickets").accept_loss("again", "me") is None


@pytest.mark.parametrize("harm", ["removed", "edited"])
def test_an_accepted_loss_of_looks_that_is_lost_itself_gives_no_look_back(store, harm):
    for key in "abc":
        look = take(store, key)
    knows_look(store, FIRST, look)
    for number in (2, 3):
        store.remove_document(f"registry/tickets/looks/{number:06d}.json")
    assert LookRecord(store, "tickets").accept_loss("no backup", "me").lost == 2
    name = "anchors/tickets/looks-accepted-000001.json"
    if harm == "removed":
        store.remove_document(name)
    else:
        store.write_document(name, store.read_document(name).replace(b'"lost": 2', b'"lost": 0'))
    with pytest.raises(DamagedLog):
        take(store, "d")
    again = LookRecord(store, "tickets").accept_loss("no backup of that either", "me")
    assert again.lost == 2 and again.unknown_rows
    assert take(store, "d").number == 4


def test_an_older_copy_of_the_promotion_log_and_its_anchor_makes_no_older_model_the_champion(store):
    log = PromotionLog(store, "tickets")
    first = promote(log, add_model(store, "a"))
    merged = add_model(store, "b")
    second = promote(log, merged)
    record_run(store, FIRST, merged, promotion_head=LogHead(seq=2, hash=second.hash))
    store.remove_document("registry/tickets/log/000002.json")
    write_anchor(store, "tickets", LogHead(seq=1, hash=first.hash))
    with pytest.raises(DamagedLog, match=f"as runs/{FIRST}.json says"):
        PromotionLog(store, "tickets").head()


def answer(text):
    return {"text": text, "tokens": 3, "finish": "stop"}


def test_finished_answers_that_were_damaged_or_are_another_jobs_are_answered_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    append_answers(file, "job", {0: answer("zürich"), 1: answer("bern")})
    append_answers(tmp_path / "answers-1.jsonl", "job", {2: answer("basel")})
    assert read_answers(file, "job", 3) == {0: answer("zürich"), 1: answer("bern"), 2: answer("basel")}
    assert read_answers(file, "other", 3) == {} and set(read_answers(file, "job", 1)) == {0}
    data = file.read_bytes()
    for position in range(len(data)):
        file.write_bytes(flipped(data, position))
        found = read_answers(file, "job")
        assert all(found.get(i, answer(text)) == answer(text) for i, text in enumerate(("zürich", "bern"))), position
    file.write_bytes(data[: data.index("ü".encode()) + 1])  # cut off inside a character
    append_answers(file, "job", {1: answer("bern")})
    assert read_answers(file, "job") == {1: answer("bern"), 2: answer("basel")}


def test_a_job_or_outcome_that_was_changed_or_is_of_another_job_is_not_used(tmp_path):
    files = []
    for name in ("a", "b"):
        work = tmp_path / name
        work.mkdir()
        job = make_job("version_dataset", load_recipe(Path("configs/quickstart.yaml")))
        files.append(JobFile(job, tmp_path / "out", {"tokens": tmp_path / name}, work))
        files[-1].write()
        report_outcome(files[-1], "outcome.json", None, None, Summary(figures={"loss": 0.25}))
    one, other = (file.work for file in files)
    assert JobFile.read(one / "job.json") == files[0]
    assert parse_outcome(one / "outcome.json")["summary"]["figures"] == {"loss": 0.25}
    data = (one / "outcome.json").read_bytes()
    for harmed in (data.replace(b"0.25", b"0.15"), (other / "outcome.json").read_bytes(), data[:-9]):
        (one / "outcome.json").write_bytes(harmed)
        assert parse_outcome(one / "outcome.json") is None
    shutil.copy(other / "job.json", one / "job.json")
    with pytest.raises(ValueError, match="checksum"):
        JobFile.read(one / "job.json")


def test_a_checkpoint_of_another_job_or_another_step_is_not_resumed_from(tmp_path):
    for job in ("a", "b"):
        for step in (2, 4):
            folder = tmp_path / job / "checkpoints" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "weights").write_text(f"{job} {step}")
            finalize_checkpoint(folder)
    folder = tmp_path / "a" / "checkpoints"
    assert prune_to_newest_intact(folder) == folder / "checkpoint-4"
    shutil.rmtree(folder / "checkpoint-4")
    shutil.copytree(tmp_path / "b" / "checkpoints" / "checkpoint-4", folder / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-6")
    assert not is_intact(folder / "checkpoint-4") and not is_intact(folder / "checkpoint-6")
    assert prune_to_newest_intact(folder) == folder / "checkpoint-2"


def test_a_manifest_that_was_edited_and_has_lost_its_pointer_is_not_committed_again(store):
    ref = commit(store, "merge", "a")
    file = store.path(ref) / "manifest.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"figures": {}', b'"figures": {"gain": 1}'))
    (file.parents[1] / "current.json").unlink()
    assert store.find("merge", ref.fingerprint) is None
    again = commit(store, "merge", "a")
    assert again == ref and store.manifest(again).figures == {} and store.verify(again) == []


@pytest.mark.parametrize("provenance", [{}, {"seconds": 1.5, "versions": {"torch": "2"}}])
def test_each_flipped_bit_of_a_manifest_without_a_pointer_is_noticed_or_changes_nothing(store, provenance):
    fingerprint = identity.fingerprint(payload := identity.payload("merge", 1, {}, {"x": "a"}))
    staged = store.staging("merge", fingerprint)
    (staged / "model").write_text("a")
    ref = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance=provenance)
    file, before = store.path(ref) / "manifest.json", store.manifest(ref)
    assert before.provenance == provenance
    data = file.read_bytes()
    for position in range(0, len(data), 3):
        try:
            found = Manifest.parse(flipped(data, position))
        except ValueError:
            continue
        known = {key: value for key, value in found.provenance.items() if key in provenance}
        assert found.model_copy(update={"provenance": known}) == before, position  # the key of the checksum was hit
    for other in (json.dumps(json.loads(data)).encode(), data.replace(b'"figures": {}', b'"figures": {"gain": 1}')):
        with pytest.raises(ValueError, match="hash mismatch"):
            Manifest.parse(other)


@pytest.mark.parametrize("content", [b"", b'{"a@main": "1', b"[]", b'{"a@main": "abc"}', b'{"a@main": 3}', b"\xff"])
def test_a_damaged_lock_file_of_base_models_is_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    hub.LOCK.write_bytes(content)
    with pytest.raises(BadConfig, match=r"loraflow\.lock"):
        hub.commit_of("a", "main")


@pytest.mark.parametrize("content", [b"", b'{"pid": 12}{"p', b'{"pid"}', b"{}", b"[]", b"\xff"])
def test_waiting_for_a_lock_whose_file_is_damaged_is_no_error(tmp_path, caplog, content):
    path, waiting = tmp_path / "lock", threading.Event()
    with caplog.at_level(logging.INFO), flock(path, shared=True):
        path.write_bytes(content)

        def wait():
            waiting.set()
            with flock(path):
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(10)
        while "held by another process" not in caplog.text and thread.is_alive():
            time.sleep(0.01)
    thread.join(10)
    assert "held by another process" in caplog.text and not thread.is_alive()
