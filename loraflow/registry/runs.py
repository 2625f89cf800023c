"""Run records: what each run did, one JSON document `runs/<id>.json` in the store.

A run writes its record when it ends, whether it succeeded or not. Keys that this version does not know are ignored, and
all but the names of run and recipe may be missing, so that records of other versions stay readable.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal

from pydantic import JsonValue, SerializerFunctionWrapHandler, model_serializer

from loraflow import identity
from loraflow.data.checks.check_report import DataDrift
from loraflow.evaluation.values import Scores, SeedScores, Slice
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.frozen import StoredModel
from loraflow.registry.reserve import ReserveState
from loraflow.registry.sweeps import SweepRecord
from loraflow.store import Ref, Store
from loraflow.store.artifact import FolderName
from loraflow.store.checksum import ChangedDocument, check_document, checksum, first_problem, with_checksum

log = logging.getLogger("loraflow")

RunState = Literal["running", "done", "waiting", "failed"]
PREFECT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
FOLDER = "runs/"
_COMMENT = "<!-- checksum: "


class StageRun(StoredModel):
    """A stage as one run saw it."""

    stage: str  # the label: evaluate runs several times, as `evaluate base` and so on
    state: Literal["cached", "computed"]
    fingerprint: FolderName
    digest: FolderName
    seconds: float = 0.0
    uri: str = ""

    def ref(self, store: Store) -> Ref:
        """Return the artifact in a store. Its stage is the label's first word, except for the trials of a sweep."""
        return Ref(stage=self.stage.split()[0], fingerprint=self.fingerprint, digest=self.digest, uri=store.uri)


class RecordedDecision(StoredModel):
    """The verdict and the reasons of the gate's decision: promote, reject, undecided or unchanged."""

    verdict: str
    reasons: list[str] = []


class Publication(StoredModel):
    """A model's upload to the hub: its commit, or the `problem` that prevented it."""

    repo: str
    what: Literal["merged", "adapter"] | None = None
    url: str | None = None
    commit: str | None = None
    time: str | None = None
    problem: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {key: value for key, value in handler(self).items() if value is not None}


class RowCount(StoredModel):
    """How many rows of the dataset were read, left out for a reason, or used. If `what` names tokens, their number."""

    what: str
    rows: int


class RowsSummary(StoredModel):
    """How many of the dataset's rows were used and left out, and notes about them for a person."""

    counts: list[RowCount] = []
    notes: list[str] = []


class RunSummary(StoredModel):
    """The outcome of a run that reached its decision; `loraflow run --json` prints it."""

    run: str
    recipe: str
    stages: list[StageRun] = []
    rows: RowsSummary | None = None
    metrics: dict[str, Scores | None] = {}  # scores of base, tuned and champion
    slices: list[Slice] = []  # by evaluation.slices
    seeds: list[SeedScores] = []  # by gate.seeds
    drift: DataDrift | None = None  # how the training rows changed since the champion, in a retraining
    decision: RecordedDecision | None = None
    advice: list[str] = []  # after `undecided`: what would decide
    registered: int | None = None  # number of the entry in the promotion log
    reserve: ReserveState | None = None  # with data.heldout_reserve: what was left of it after this run
    adapter: str = ""
    merged: str = ""
    published: Publication | None = None
    sweep: SweepRecord | None = None  # the trials, in a run that chose among several

    @model_serializer(mode="wrap")
    def _without_absent_sweep(self, handler: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        return {key: value for key, value in handler(self).items() if key != "sweep" or value is not None}


class LogHead(StoredModel):
    """The last entry of a promotion log: its number and its hash. Number 0: the log was empty."""

    seq: int = 0
    hash: str = ""


class RunRecord(StoredModel):
    """The record of a run."""

    run: str
    recipe: str  # the recipe's name
    state: RunState = "done"
    error: str | None = None
    started: float = 0.0  # seconds since 1970
    seconds: float = 0.0
    actor: str | None = None
    loraflow: str | None = None  # version
    commit: str | None = None  # HEAD of the project's git repository when the run ended
    uncommitted: bool | None = None  # whether tracked files differed from it
    prefect_run: str | None = None
    recipe_text: str = ""  # the file's text when the run started
    # {dotted key: value} of `--set` and the form, which replaced the file's values
    overrides: dict[str, JsonValue] = {}
    resolved: dict[str, JsonValue] = {}  # the recipe with all its defaults
    stages: list[StageRun] = []
    summary: RunSummary | None = None
    promotion_head: LogHead | None = None  # the last entry that the run read or wrote in the log of the recipe's model
    looks_head: LogHead | None = None  # the last look at held-out rows that the run took

    @property
    def document(self) -> bytes:
        """The record as the bytes of its file, with a checksum."""
        return with_checksum(f"{FOLDER}{self.run}.json", self.model_dump())

    @property
    def model(self) -> str | None:
        """The name in the registry that the recipe asks for."""
        return _text(self.section("register").get("model"))

    @property
    def system_message(self) -> str | None:
        """The system message that the run put before chats that had none."""
        return _text(self.section("data").get("system"))

    @property
    def confidence(self) -> float:
        """The level of the scores' intervals."""
        level = self.section("evaluation").get("confidence")
        return level if isinstance(level, float) else 0.95

    def section(self, name: str) -> dict[str, JsonValue]:
        """Return a section of the resolved recipe; empty if the record does not have it."""
        found = self.resolved.get(name)
        return found if isinstance(found, dict) else {}

    def stage(self, label: str) -> StageRun | None:
        """Return a stage of the run."""
        return next((stage for stage in self.stages if stage.stage == label), None)


def _text(value: JsonValue) -> str | None:
    return value if isinstance(value, str) else None


def run_ids(store: Store) -> list[str]:
    """Return the ids of all recorded runs, oldest first."""
    names = (name.removeprefix(FOLDER).removesuffix(".json") for name in store.documents(FOLDER))
    return sorted(filter(RUN_ID.fullmatch, names))


def read_run(store: Store, run: str) -> RunRecord | None:
    """Return the record of a run; None if there is none.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    name = f"{FOLDER}{run}.json"
    data = store.read_document(name)
    return None if data is None else _parse(store, name, data)


def require_run(store: Store, run: str) -> RunRecord:
    """Return the record of a run.

    Raises:
        BadConfig: there is none.
        CorruptArtifact: it cannot be read.
    """
    if (record := read_run(store, run)) is None:
        raise BadConfig("There is no such run.", where=run, next_step="`loraflow runs` lists the runs")
    return record


def find_named_run(store: Store, name: str) -> RunRecord | None:
    """Return the record of a run by its own id, or by the id that Prefect's UI shows in the address of a run's page.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    if PREFECT_ID.fullmatch(name):
        return next((record for record in reversed(read_runs(store)) if record.prefect_run == name), None)
    return read_run(store, name)


def write_report(store: Store, run: str, text: str) -> None:
    """Write the markdown report of a run. Its last line is a comment with the checksum."""
    name, content = f"{FOLDER}{run}.md", text.rstrip("\n") + "\n"
    store.write_document(name, f"{content}{_comment(name, content)}".encode())


def read_report(store: Store, run: str) -> str | None:
    """Return the markdown report of a run, without its checksum; None if there is none.

    Raises:
        CorruptArtifact: it was changed, or is the report of another run.
    """
    name = f"{FOLDER}{run}.md"
    data = store.read_document(name)
    return None if data is None else _checked_report(store, name, data)


def _checked_report(store: Store, name: str, data: bytes) -> str:
    text = data.decode(errors="replace")
    content, start, _ = text.rpartition(_COMMENT)
    if not start and not _has_checksum(store, f"{name.removesuffix('.md')}.json"):  # a report of an earlier version
        return text
    if not start or text != content + _comment(name, content):
        raise CorruptArtifact(
            "The report of a run was changed, or belongs to another run.",
            where=f"{store.uri}/{name}",
            next_step="restore the file from a backup, or remove it",
        )
    return content


def _has_checksum(store: Store, name: str) -> bool:
    """Tell whether a run record has a checksum. Then the run wrote one into its report, too."""
    data = store.read_document(name)
    try:
        return data is not None and check_document(name, data) != data
    except ChangedDocument:
        return True


def _comment(name: str, content: str) -> str:
    return f"{_COMMENT}{checksum(name, content.encode())} -->\n"


def read_runs(store: Store) -> list[RunRecord]:
    """Return the records of all runs, oldest first. Records that cannot be read are logged and left out."""
    found = []
    for name, data in store.read_documents(FOLDER, ".json").items():
        if RUN_ID.fullmatch(name.removeprefix(FOLDER).removesuffix(".json")):
            try:
                found.append(_parse(store, name, data))
            except CorruptArtifact as failure:
                _warn_once(str(failure))
    return found


@cache
def _warn_once(text: str) -> None:
    """Log a warning once in a process: a run reads all records several times."""
    log.warning("%s", text)


def damaged_runs(store: Store) -> dict[str, CorruptArtifact]:
    """Return the failure of each run record and report that was changed or cannot be read, by its name in the store."""
    found = {}
    for name, data in store.read_documents(FOLDER).items():
        run, _, suffix = name.removeprefix(FOLDER).partition(".")
        check = {"json": _parse, "md": _checked_report}.get(suffix) if RUN_ID.fullmatch(run) else None
        try:
            if check is not None:
                check(store, name, data)
        except CorruptArtifact as failure:
            found[name] = failure
    return found


def find_run(store: Store, merged: Ref) -> RunRecord | None:
    """Return the record of the finished run that computed a merged model, else of the newest that found it cached."""
    newest = None
    for run in reversed(run_ids(store)):
        try:
            record = read_run(store, run)
        except CorruptArtifact as failure:
            _warn_once(str(failure))
            continue
        if record is None or record.summary is None or not has_model(record, merged):
            continue
        if computed(record, "merge"):
            return record
        newest = newest or record
    return newest


_MADE_FROM = {"merge": ("adapter", "train"), "evaluate tuned": ("model", "merge")}


def require_consistent(store: Store, record: RunRecord) -> None:
    """Refuse a record whose model was not merged from its adapter, or whose scores are of another model.

    Raises:
        CorruptArtifact: the record was changed. Artifacts that were removed since are not compared.
    """
    for label, (name, source) in _MADE_FROM.items():
        made, used = record.stage(label), record.stage(source)
        if made is None or used is None:
            continue
        try:
            inputs = store.manifest(made.ref(store)).payload["inputs"]
            known = {used.digest, *store.manifest(used.ref(store)).facets.values()}
        except CorruptArtifact:  # reported where it is used
            continue
        if isinstance(inputs, dict) and inputs.get(name) not in known:
            raise CorruptArtifact(
                "A run's record names results that do not belong together.",
                where=f"{store.uri}/{FOLDER}{record.run}.json",
                expected=f"{label} of {inputs.get(name)}",
                got=f"{source} {used.digest}",
                next_step="restore the file from a backup, or remove it",
            )


def has_model(record: RunRecord, merged: Ref) -> bool:
    """Tell whether a run computed a merged model, or found it in the cache."""
    stage = record.stage("merge")
    return stage is not None and stage.digest == merged.digest


def computed(record: RunRecord, label: str) -> bool:
    """Tell whether a run computed a stage, rather than finding it in the cache."""
    stage = record.stage(label)
    return stage is not None and stage.state == "computed"


def _parse(store: Store, name: str, data: bytes) -> RunRecord:
    try:
        record = RunRecord.model_validate_json(check_document(name, data))
        if f"{FOLDER}{record.run}.json" != name:
            raise ChangedDocument(f"it is the record of run {record.run}")
        return record
    except ValueError as error:  # ValidationError is a subclass
        raise CorruptArtifact(
            "A run's record cannot be read.",
            where=f"{store.uri}/{name}",
            got=first_problem(error),
            next_step="restore the file from a backup, or remove it",
        ) from error


_NOT_ABOUT_THE_MODEL = {"runtime", "publish", "name"}  # sections of a recipe


def changes(first: RunRecord, second: RunRecord) -> Iterator[str]:
    """Yield what differs in the second run, one line each, such as `training_config.seed 0 → 1`."""
    yield from identity.explain(_settings(first), _settings(second))
    for label in ("version_dataset", "resolve_base"):
        before, after = first.stage(label), second.stage(label)
        if before and after and before.digest != after.digest:
            yield f"{label} {identity.short(before.digest)} → {identity.short(after.digest)}"
    if first.loraflow != second.loraflow:
        yield f"loraflow {first.loraflow} → {second.loraflow}"
    if first.commit != second.commit:
        yield f"git commit {(first.commit or 'none')[:12]} → {(second.commit or 'none')[:12]}"


def _settings(record: RunRecord) -> Mapping[str, JsonValue]:
    return {section: values for section, values in record.resolved.items() if section not in _NOT_ABOUT_THE_MODEL}
