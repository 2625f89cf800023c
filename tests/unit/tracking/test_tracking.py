"""The mirror in MLflow: a view of the store that catches up after any interruption, and never harms a run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow.config.load import parse_recipe
from loraflow.failures import BudgetSpent, MissingExtra, Network
from loraflow.registry import PromotionLog
from loraflow.store import LocalStore, Summary
from loraflow.tasks.run import mirror_run as mirror_run_of_flow
from loraflow.tracking import mirror
from loraflow.tracking import tracker as content_module
from loraflow.tracking.mirror import read_marks
from loraflow.tracking.tracker import TrackedRun, Tracking, content_of, find_tracking, is_news
from tests.promoted_models import add_model, promote, record_run

RUNS = ("20260101-000000-aaaaaa", "20260102-000000-bbbbbb", "20260103-000000-cccccc")
MLFLOW = {"resolved": {"register": {"model": "tickets"}, "runtime": {"mlflow": {"uri": "http://mlflow:5000"}}}}


class FakeTracker:
    """A server in memory, which does not answer from its `dies_at`-th request on: before, or after it was carried out."""

    def __init__(self):
        self.runs, self.contents, self.versions, self.alias = {}, {}, {}, None
        self.aliases_seen = [None]
        self.count, self.dies_at, self.dies_after = 0, None, False

    def _request(self, change):
        self.count += 1
        dead = self.dies_at is not None and self.count >= self.dies_at
        if dead and not (self.dies_after and self.count == self.dies_at):
            raise Network("MLflow did not answer, or refused a request.", got="gone")
        result = change()
        if dead:
            raise Network("MLflow did not answer, or refused a request.", got="the answer was lost")
        return result

    def find_runs(self):
        return self._request(lambda: dict(self.runs))

    def start_run(self, content):
        def create():
            self.runs[content.run] = TrackedRun(f"id-{content.run}", False)
            return self.runs[content.run]

        return self._request(create)

    def write_run(self, run, content):
        self._request(lambda: self.contents.update({content.run: content}))

    def finish_run(self, run, content):
        self._request(lambda: self.runs.update({content.run: TrackedRun(run.id, True)}))

    def find_versions(self):
        return self._request(lambda: dict(self.versions))

    def create_version(self, digest, run, tags, description):
        assert digest not in self.versions
        return self._request(lambda: self.versions.setdefault(digest, str(len(self.versions) + 1)))

    def champion(self):
        return self._request(lambda: self.alias)

    def set_champion(self, version):
        def move():
            self.alias = version
            self.aliases_seen.append(version)

        self._request(move)

    def state(self):
        return self.runs, sorted(self.contents), self.versions, self.alias


@pytest.fixture
def store(tmp_path):
    """Three models that were promoted one after another, and a rollback to the second."""
    found = LocalStore(tmp_path / "store")
    log = PromotionLog(found, "tickets")
    for number, run in enumerate(RUNS):
        merged = add_model(found, f"m{number}")
        record_run(found, run, merged, **MLFLOW)
        promote(log, merged)
    log.rollback("worse in use", "me")
    return found


def test_the_alias_names_the_model_of_the_last_entry_also_after_a_rollback(store):
    tracker = FakeTracker()
    done = mirror.sync(store, "tickets", tracker)
    entries = PromotionLog(store, "tickets").entries()
    assert (done.runs, done.versions) == (3, 3)
    assert tracker.alias == tracker.versions[entries[-1].merged.digest] == "2"
    assert all(run.is_complete for run in tracker.runs.values())


def test_a_second_synchronisation_sends_nothing(store):
    tracker = FakeTracker()
    mirror.sync(store, "tickets", tracker)
    before = tracker.state()
    tracker.start_run = tracker.write_run = tracker.create_version = tracker.set_champion = None  # would fail
    assert mirror.sync(store, "tickets", tracker).runs == 0
    assert tracker.state() == before


@pytest.mark.parametrize("dies_after", [False, True], ids=["request lost", "answer lost"])
def test_after_a_death_at_any_request_the_next_synchronisation_reaches_the_same_state(store, dies_after):
    whole = FakeTracker()
    mirror.sync(store, "tickets", whole)
    for dies_at in range(1, whole.count + 1):
        tracker = FakeTracker()
        tracker.dies_at, tracker.dies_after = dies_at, dies_after
        with pytest.raises(Network):
            mirror.sync(store, "tickets", tracker)
        assert tracker.alias in (None, whole.alias)  # never another model's version
        tracker.dies_at = None
        mirror.sync(store, "tickets", tracker)
        assert tracker.state() == whole.state()


def test_the_alias_follows_a_promotion_that_another_process_makes_during_the_move(store):
    tracker, move = FakeTracker(), FakeTracker.set_champion
    newest = add_model(store, "m9")
    others = [lambda: promote(PromotionLog(store, "tickets"), newest)]

    def move_while_another_promotes(version):
        move(tracker, version)
        if others:
            others.pop()()

    tracker.set_champion = move_while_another_promotes
    mirror.sync(store, "tickets", tracker)
    assert tracker.alias == tracker.versions[newest.digest]


def test_a_promoted_model_without_a_run_record_is_registered_too(tmp_path):
    store = LocalStore(tmp_path / "store")
    merged = add_model(store, "old")
    promote(PromotionLog(store, "tickets"), merged)
    tracker = FakeTracker()
    mirror.sync(store, "tickets", tracker)
    assert tracker.alias == tracker.versions[merged.digest]
    assert store.location(merged) in tracker.contents["entry-1"].files["model/location.json"].decode()


def test_a_server_that_is_away_costs_one_warning_and_the_next_run_sends_all(store, monkeypatch, caplog):
    tracker, records = FakeTracker(), [record_run(store, run, add_model(store, "m0"), **MLFLOW) for run in RUNS]
    tracker.dies_at = 1
    monkeypatch.setattr(mirror, "is_installed", lambda: True)
    monkeypatch.setattr(mirror, "open_tracker", lambda _: tracker)
    mirror.mirror_run(store, records[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MLflow at http://mlflow:5000 was not updated (gone); the next run or `loraflow mlflow sync`" in caplog.text
    tracker.dies_at = None
    unchanged = records[2].model_copy(update={"stages": [], "summary": None})
    mirror.mirror_run(store, unchanged)  # even one that changed nothing
    assert set(RUNS) <= set(tracker.contents) and tracker.alias is not None
    tracker.find_runs = None  # would fail: nothing is left to send
    mirror.mirror_run(store, unchanged)


@pytest.fixture
def serve(monkeypatch):
    """Make every synchronisation talk to the tracker that is given to a call."""
    monkeypatch.setattr(mirror, "is_installed", lambda: True)
    return lambda tracker: monkeypatch.setattr(mirror, "open_tracker", lambda _: tracker)


def test_a_rollback_sends_the_runs_that_were_not_sent(store, serve):
    away, there = FakeTracker(), FakeTracker()
    away.dies_at = 1
    record = record_run(store, "20260104-000000-dddddd", add_model(store, "rejected"), **MLFLOW)
    serve(away)
    mirror.mirror_run(store, record)
    serve(there)
    PromotionLog(store, "tickets").rollback("worse in use", "me")
    mirror.mirror_log(store, "tickets")
    assert record.run in there.contents and there.runs[record.run].is_complete
    assert not read_marks(store, "tickets")


def test_a_run_that_is_sent_keeps_the_mark_of_one_whose_sending_fails_meanwhile(store, serve):
    first, second = (record_run(store, run, add_model(store, "m0"), **MLFLOW) for run in RUNS[:2])
    away, there = FakeTracker(), FakeTracker()
    away.dies_at = 1
    find_runs = there.find_runs

    def find_runs_while_another_fails():
        serve(away)
        mirror.mirror_run(store, second)
        return find_runs()

    there.find_runs = find_runs_while_another_fails
    serve(there)
    mirror.mirror_run(store, first)
    assert [Path(name).stem for name in read_marks(store, "tickets")] == [RUNS[1]]


def test_a_run_whose_sending_fails_is_marked_though_another_removed_its_mark_meanwhile(store, serve):
    first, second = (record_run(store, run, add_model(store, "m0"), **MLFLOW) for run in RUNS[:2])
    away = FakeTracker()

    def die_after_another_succeeds():
        serve(FakeTracker())
        mirror.mirror_run(store, second)
        raise Network("MLflow did not answer, or refused a request.", got="gone")

    away.find_runs = die_after_another_succeeds
    serve(away)
    mirror.mirror_run(store, first)
    assert [Path(name).stem for name in read_marks(store, "tickets")] == [RUNS[0]]


def test_the_mark_of_an_earlier_version_is_read_and_removed(store, serve):
    store.write_document("mlflow/tickets/pending.json", b"{}\n")
    tracker = FakeTracker()
    serve(tracker)
    mirror.mirror_log(store, "tickets")
    assert set(RUNS) <= set(tracker.contents) and not read_marks(store, "tickets")


@pytest.mark.parametrize("broken", ["tracking_of_model", "open_tracker"])
def test_a_mistake_in_the_mirror_does_not_fail_a_rollback(store, monkeypatch, caplog, broken):
    import loraflow.cli.registry  # noqa: F401  (before the patch: it binds the functions)
    from loraflow.cli import cli

    monkeypatch.setattr(mirror, "is_installed", lambda: True)
    monkeypatch.setattr(mirror, broken, lambda *_: 1 / 0)
    done = CliRunner().invoke(cli, ["rollback", "--reason", "worse", "--store", str(store.root)])
    assert (done.exception, done.exit_code) == (None, 0)
    assert "MLflow was not updated (ZeroDivisionError: division by zero)" in caplog.text


def test_a_part_of_mlflow_that_cannot_be_imported_is_a_missing_extra(monkeypatch, store, caplog):
    monkeypatch.setattr(mirror, "is_installed", lambda: True)
    for name in ("loraflow.tracking.mlflow_tracker", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="A part of the extra mlflow"):
        mirror.open_tracker(Tracking("http://mlflow:5000", "loraflow", "tickets"))
    mirror.mirror_log(store, "tickets")
    assert "MLflow at http://mlflow:5000 was not updated (" in caplog.text


def test_sync_with_an_address_keeps_the_model_and_experiment_of_the_newest_run(store, monkeypatch):
    from loraflow.cli import cli
    from loraflow.cli import registry as command

    section = {"uri": "http://old:5000", "experiment": "nightly", "model": "tickets-shown"}
    resolved = {"register": {"model": "tickets"}, "runtime": {"mlflow": section}}
    record_run(store, RUNS[2], add_model(store, "m2"), resolved=resolved)
    asked = []
    monkeypatch.setattr(command, "open_tracker", lambda tracking: asked.append(tracking) or FakeTracker())
    arguments = ["mlflow", "sync", "--store", str(store.root), "--uri", "http://new:5000"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    assert asked == [Tracking("http://new:5000", "nightly", "tickets-shown")]


@pytest.mark.parametrize("sides", [("tuned",), ("base", "tuned"), ("base", "tuned", "champion")])
def test_the_table_of_answers_shares_its_rows_among_the_models_that_are_there(store, monkeypatch, sides):
    import pandas as pd

    table = pd.DataFrame({"answer": [str(i) for i in range(20)]})
    monkeypatch.setattr(content_module, "MAX_ROWS", 12)
    monkeypatch.setattr(content_module, "_artifact", lambda _s, _r, label: label.split()[1] in sides or None)
    monkeypatch.setattr(content_module, "read_table", lambda *_: table.copy())
    table = content_module._answers(store, None)
    assert [table["model"].count(side) for side in sides] == [12 // len(sides)] * len(sides)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), BudgetSpent("The time is used up.")])
def test_a_run_that_is_asked_to_end_sends_nothing_and_leaves_that_to_the_next(store, monkeypatch, error):
    monkeypatch.setattr(mirror, "open_tracker", lambda _: pytest.fail("a request"))
    record = record_run(store, RUNS[0], add_model(store, "m0"), **MLFLOW)
    mirror_run_of_flow(SimpleNamespace(workspace=SimpleNamespace(store=store)), record, error)
    assert read_marks(store, "tickets")


def test_a_mistake_in_the_mirror_does_not_fail_a_run(store, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "mirror_run", lambda *_: 1 / 0)
    record = record_run(store, RUNS[0], add_model(store, "m0"), **MLFLOW)
    mirror_run_of_flow(SimpleNamespace(workspace=SimpleNamespace(store=store)), record, None)
    assert "ZeroDivisionError" in caplog.text


def test_a_run_that_found_everything_cached_imports_no_mlflow(store):
    unchanged = {
        "stages": [],
        "summary": {"run": RUNS[0], "recipe": "tickets", "decision": {"verdict": "unchanged"}},
    }
    record = record_run(store, RUNS[0], add_model(store, "m0"), **{**MLFLOW, **unchanged})
    assert not is_news(record)
    script = (
        "import sys; from loraflow.store import LocalStore; from loraflow.registry.runs import read_run;"
        "from loraflow.tracking.mirror import mirror_run;"
        f"s = LocalStore({str(store.root)!r}); mirror_run(s, read_run(s, {RUNS[0]!r}));"
        "sys.exit('mlflow' in sys.modules or 'requests' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


def test_the_recipe_goes_before_the_environment_and_neither_means_no_mirror():
    found = find_tracking({"uri": "sqlite:///a.db", "experiment": "night"}, "m", {"MLFLOW_TRACKING_URI": "http://b"})
    assert found == Tracking("sqlite:///a.db", "night", "m")
    assert find_tracking(None, "m", {"MLFLOW_TRACKING_URI": "http://b"}) == Tracking("http://b", "loraflow", "m", False)
    assert find_tracking(None, "m", {}) is None and find_tracking({}, "m", {}) is None


def test_the_password_of_an_address_is_masked():
    found = find_tracking({"uri": "https://me:a-long-password@mlflow.example"}, "m", {})
    assert found is not None and "a-long-password" not in found.uri


def test_where_runs_are_mirrored_is_not_part_of_the_stages_configs():
    text = "name: t\nbase: {model: bundled:smollm2}\n"
    plain, mirrored = parse_recipe(text), parse_recipe(text + "runtime: {mlflow: {uri: 'sqlite:///x.db'}}\n")
    assert plain.model_dump(exclude={"runtime"}) == mirrored.model_dump(exclude={"runtime"})
    assert mirrored.runtime.mlflow is not None


def test_settings_curves_and_scores_with_intervals_are_sent_without_credentials(tmp_path):
    from loraflow import identity

    store = LocalStore(tmp_path / "store")
    payload = identity.payload("train", 1, {}, {"x": "1"})
    staged = store.staging("train", identity.fingerprint(payload))
    (staged / "telemetry").mkdir()
    (staged / "adapter").write_text("weights")
    (staged / "telemetry" / "curves.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "lr": 0.1}\n{"step": 2, "loss": NaN}\n'
    )
    train = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})
    merged = add_model(store, "m")
    value = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    stage = {"stage": "train", "state": "computed", "fingerprint": train.fingerprint, "digest": train.digest}
    record = record_run(
        store,
        RUNS[0],
        merged,
        stages=[stage],
        resolved={"data": {"repo": "https://me:a-long-password@host/x"}, "training_config": {"learning_rate": 1e-4}},
        summary={"run": RUNS[0], "recipe": "t", "metrics": {"tuned": {"heldout": {"token_loss": value}}}},
    )
    content = content_of(store, record)
    assert [tuple(point) for point in content.points] == [
        ("train/loss", 2.5, 1),
        ("train/lr", 0.1, 1),
        ("tuned/heldout/token_loss", 0.5, 0),
        ("tuned/heldout/token_loss.low", 0.4, 0),
        ("tuned/heldout/token_loss.high", 0.6, 0),
    ]
    assert content.params["training_config.learning_rate"] == "0.0001"
    assert "a-long-password" not in str(content)
    assert b"<svg" in content.files["loss.svg"]


def test_the_real_mlflow_shows_runs_versions_and_the_alias_and_rollback_moves_it(store, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    from loraflow.cli import cli

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(
        mirror, "tracking_of_model", lambda _, model: find_tracking({"uri": uri, "experiment": "nightly"}, model)
    )
    arguments = ["mlflow", "sync", "--store", str(store.root), "--uri", uri, "--experiment", "nightly"]
    for _ in range(2):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert len(done.stdout.splitlines()) == 1  # MLflow would print the address of each run
    assert "0 runs sent, 0 models registered, champion is version 2" in done.output
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("nightly").experiment_id])
    assert {run.data.tags["loraflow.run"] for run in runs} == set(RUNS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert client.get_model_version_by_alias("tickets", "champion").version == 2
    CliRunner().invoke(cli, ["rollback", "--reason", "worse", "--store", str(store.root)], catch_exceptions=False)
    version = client.get_model_version_by_alias("tickets", "champion")
    assert version.version == 1
    location = json.loads(Path(version.source.removeprefix("file://"), "location.json").read_text())
    assert location["run"] == RUNS[0]
    assert version.tags["loraflow.location"] == store.location(PromotionLog(store, "tickets").entries()[0].merged)
