"""Each top-level value of each document in a store is edited to another plausible one: no reader believes it silently.

The text around the value stays as it is, as in an editor. A reader must then return what it returned before the edit, miss
(the result is computed again), or fail.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow import identity
from loraflow.cli import cli
from loraflow.execution.repair import find_damage
from loraflow.failures import CorruptArtifact, Failure
from loraflow.registry import PromotionLog
from loraflow.registry.champions import missing_models
from loraflow.registry.deals import DealRecord, DealRequest
from loraflow.registry.looks import LookRecord
from loraflow.registry.reserve import ReserveRow
from loraflow.registry.runs import LogHead, Publication, StageRun, read_runs, require_consistent
from loraflow.serving.compared import compare_models
from loraflow.serving.models import find_model
from loraflow.serving.publish import _write_publication, find_publication
from loraflow.store import LocalStore, Summary
from tests.promoted_models import add_model, commit, promote, record_run

ROWS = {f"row{i}" for i in range(50)}
RESERVE = [ReserveRow(key=f"key{i}", group=f"group{i}") for i in range(40)]
RUN = "20260101-000000-aaaaaa"
DECISION = {"verdict": "reject", "reasons": ["worse"]}
MISS = (None, "miss")


def look(store, key):
    return LookRecord(store, "tickets").take(
        key, challenger="c", rows=ROWS, error=0.05, horizon=100, promotions=(), actor="me"
    )


def scored(keys):
    return set()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store with each kind of document, of which losses were accepted too."""
    store = LocalStore(tmp_path_factory.mktemp("original") / "store")
    log = PromotionLog(store, "tickets")
    merged = [add_model(store, name) for name in "abc"]
    for ref in merged:
        entry = promote(log, ref)
    store.remove_document("registry/tickets/log/000003.json")
    log.accept_loss("disk failure", "me")
    entry = promote(log, merged[2])
    for key in "abc":
        newest = look(store, key)
    store.remove_document("registry/tickets/looks/000003.json")
    LookRecord(store, "tickets").accept_loss("disk failure", "me")
    newest = look(store, "d")
    DealRecord(store, "tickets").take("m" * 64, RESERVE, scored, DealRequest(0.5, None, 0), actor="me")
    log.write_decision(entry, "d" * 64, "p" * 64, DECISION)
    record_run(
        store,
        RUN,
        merged[2],
        promotion_head=LogHead(seq=entry.seq, hash=entry.hash),
        looks_head=LogHead(seq=newest.seq, hash=newest.hash),
    )
    _write_publication(store, SimpleNamespace(ref=merged[2]), Publication(repo="acme/x", what="merged", commit="abc"))
    damaged = commit(store, "tokenize", "rows")
    (store.path(damaged) / "weights").write_text("tokenize rowz")
    assert store.quarantine(damaged, ["weights: hash mismatch"])
    return store


def uses(store, kind):
    """Return what each reader of the store's documents answers: {reader: value, MISS, or the failure's class}."""
    log, looks, deals = PromotionLog(store, "tickets"), LookRecord(store, "tickets"), DealRecord(store, "tickets")
    merged = sorted((ref for ref in store.artifacts() if ref.stage == "merge"), key=str)
    readers = {
        "entries": lambda: log.entries(all_runs=True),
        "entries of a quick read": log.entries,
        "accepted losses": lambda: log.acceptances(),
        "looks": lambda: looks.entries(all_runs=True),
        "level of the next look": lambda: looks.preview(ROWS, error=0.05, horizon=100, promotions=()),
        "rows that were scored": lambda: looks.scored_keys(ROWS),
        "dealt rows": lambda: deals.of_model("m" * 64, 0.5),
        "decision": lambda: log.read_decision(log.head(), "d" * 64, "p" * 64),
        "runs": lambda: read_runs(store),
        "upload": lambda: find_publication(store, SimpleNamespace(ref=merged[-1]), "acme/x", "merged"),
        "champions": lambda: list(missing_models(log)),
        **{f"lookup of {ref}": lambda ref=ref: store.find(ref.stage, ref.fingerprint) for ref in merged},
        **{f"manifest of {ref}": lambda ref=ref: store.manifest(ref) for ref in merged},
        **{f"check of {ref}": lambda ref=ref: store.check(ref) for ref in merged},
    }
    if kind == "quarantine":  # otherwise it would move away what the edit damages
        readers["lost"] = lambda: [str(lost.ref) for lost in find_damage(store).artifacts]
    return {name: answer(read) for name, read in readers.items()}


def answer(read):
    try:
        found = read()
    except Failure as failure:
        return failure.__class__
    return MISS if found is None else found


def is_refused(name, found, expected):
    """Tell whether a reader says that something is wrong, or does without the document."""
    if isinstance(found, type) or found == MISS:
        return True
    if name.startswith("check of") or name == "champions":
        return len(found) > len(expected)  # problems
    return name in ("runs", "accepted losses") and len(found) < len(expected)  # left out, with a warning


KINDS = {
    "manifest": "merge/*/*/manifest.json",
    "manifest without its pointer": "merge/*/*/manifest.json",
    "pointer": "merge/*/current.json",
    "entry": "registry/tickets/log/000003.json",
    "anchor": "anchors/tickets/head.json",
    "accepted loss": "anchors/tickets/accepted-000001.json",
    "look": "registry/tickets/looks/000003.json",
    "anchor of looks": "anchors/tickets/looks.json",
    "accepted loss of looks": "anchors/tickets/looks-accepted-000001.json",
    "scored rows": "registry/tickets/rows/*.json",
    "deal": "registry/tickets/deals/000001.json",
    "anchor of deals": "anchors/tickets/deals.json",
    "dealt rows": "registry/tickets/dealt/*.json",
    "decision": "registry/tickets/decisions/*.json",
    "run record": f"runs/{RUN}.json",
    "upload": "runs/published/**/*.json",
    "quarantine": "set-aside/*.json",
}


def others(value):
    """Return plausible other values."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [0, value + 1, value - 1] if value else [1]
    if isinstance(value, str):
        return ["", value[::-1], f"{value}x"] if len(value) > 1 else ["a", ""]
    if isinstance(value, list):
        return [value[1:], [*value, *value[:1]]] if value else [["a"]]
    if isinstance(value, dict):
        first = dict(list(value.items())[1:])
        return (
            [first, *({**value, key: other} for key in value for other in others(value[key])[:1])]
            if value
            else [{"a": 1}]
        )
    return ["a", 1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_value_of_a_document_is_noticed_or_changes_nothing(original, tmp_path, kind):
    file = sorted(original.root.glob(KINDS[kind]))[0].relative_to(original.root)
    if kind == "manifest without its pointer":
        shutil.copytree(original.root, tmp_path / "original")
        original = LocalStore(tmp_path / "original")
        (original.root / file.parents[1] / "current.json").unlink()
    store = LocalStore(tmp_path / "store")
    shutil.copytree(original.root, store.root)
    expected = uses(store, kind)
    believed = []
    text = (store.root / file).read_text()
    content = json.loads(text)
    whole = {"": content} if isinstance(content, list) else content
    for key in [key for key in whole if key != "checksum"]:
        for other in others(whole[key]):
            edited = other if key == "" else {**content, key: other}
            # In the place and format in which it was: `checksum` stays the first line.
            (store.root / file).write_text(json.dumps(edited, indent=1, ensure_ascii=False) + "\n")
            for name, found in uses(store, kind).items():
                if found != expected[name] and not is_refused(name, found, expected[name]):
                    believed.append(f"{key}: {whole[key]!r} → {other!r}: {name}: {found!r:.200}")
    (store.root / file).write_text(text)
    assert uses(store, kind) == expected
    assert believed == []


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("entry", "promotion log of tickets"),
        ("look", "record of looks of tickets"),
        ("scored rows", "record of looks of tickets"),
        ("deal", "record of deals of tickets"),
        ("dealt rows", "record of deals of tickets"),
        ("run record", f"runs/{RUN}.json"),
    ],
)
def test_verify_names_a_damaged_record(original, tmp_path, kind, named):
    store = LocalStore(shutil.copytree(original.root, tmp_path / "store"))
    assert CliRunner().invoke(cli, ["verify", "--store", store.uri]).exit_code == 0
    file = sorted(store.root.glob(KINDS[kind]))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = CliRunner().invoke(cli, ["verify", "--store", store.uri])
    assert isinstance(done.exception, CorruptArtifact) and f"damaged  {named}" in done.output


@pytest.mark.parametrize("label", ["merge", "train", "evaluate tuned"])
def test_a_record_that_names_results_of_two_runs_is_refused_although_its_checksum_is_right(original, tmp_path, label):
    """Otherwise another model than the run's is promoted, with its adapter, or compared by another model's scores."""
    store = LocalStore(shutil.copytree(original.root, tmp_path / "store"))
    record = read_runs(store)[0]
    require_consistent(store, record)
    others = {ref.stage: ref for ref in store.artifacts() if ref.digest not in {s.digest for s in record.stages}}
    payload = identity.payload("evaluate", 1, {"model": others["merge"].digest}, {})
    staged = store.staging("evaluate", identity.fingerprint(payload))
    (staged / "scores.parquet").write_text("of another model")
    others["evaluate"] = store.commit(
        staged, payload=payload, inputs={"model": others["merge"]}, summary=Summary(), provenance={}
    )
    ref = others[label.split()[0]]
    other = StageRun(stage=label, state="computed", fingerprint=ref.fingerprint, digest=ref.digest)
    stages = [other, *(stage for stage in record.stages if stage.stage != label)]
    store.write_document(f"runs/{RUN}.json", record.model_copy(update={"stages": stages}).document)
    promoting = ["promote", RUN, "--reason", "by hand", "--store", store.uri]
    assert isinstance(CliRunner().invoke(cli, promoting).exception, CorruptArtifact)
    for use in (lambda: find_model(store, RUN), lambda: compare_models(store, (RUN, RUN))):
        with pytest.raises(
            CorruptArtifact if label.startswith("evaluate") else Failure, match="belong together|did not score"
        ):
            use()
    assert len(PromotionLog(store, "tickets").entries()) == len(PromotionLog(original, "tickets").entries())
