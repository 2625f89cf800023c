"""Describe the champion: who promoted it and why, and the run, data, base, recipe, scores and files behind it.

The promotion log names the model. The other facts come from the record of its run and from the manifests of its artifacts.
If one of these documents is missing, its facts are left empty. From a bucket, only these documents are downloaded.
"""

from typing import Literal, TypeAlias

from loraflow.evaluation.values import Scores, SeedScores, Slice
from loraflow.frozen import FrozenModel
from loraflow.registry.log import Entry, PromotionLog
from loraflow.registry.reserve import ReserveState
from loraflow.registry.runs import RunRecord, RunSummary, computed, has_model, read_runs
from loraflow.serving.card import Settings, training_settings
from loraflow.serving.lineage import Lineage, read_lineage
from loraflow.serving.models import champion_entry
from loraflow.store import Ref, Store, hash_memo

Contents: TypeAlias = Literal["intact", "not checked", "damaged"]


class PromotionEntry(FrozenModel):
    """An entry of the promotion log."""

    entry: int
    action: str  # promote or rollback
    time: str
    actor: str
    reasons: list[str]


class ModelRun(FrozenModel):
    """The run that made the model."""

    run: str
    computed: bool  # False: every run on record found the model in the cache, and this is the newest of them
    state: str
    started: float  # seconds since 1970
    seconds: float
    actor: str | None
    commit: str | None  # HEAD of the project's git repository
    uncommitted: bool | None = None  # whether tracked files differed from it


class MadeWith(FrozenModel):
    """What trained the model, and the artifacts that it was made from."""

    versions: dict[str, str]  # loraflow, python or library → version
    device: str | None  # the GPU's product name, or cpu
    machine: str | None  # architecture
    artifacts: dict[str, str]  # stage → fingerprint/digest


class Dataset(FrozenModel):
    """The dataset.

    `commit` is the git commit of the revision that the recipe names. Without a revision, the .dvc file came from the work
    tree of the project, and `commit` is its HEAD at the end of the run.
    """

    md5: str | None
    source: str | None
    repo: str | None
    revision: str | None
    commit: str | None
    rows: dict[str, int]


class BaseModelSource(FrozenModel):
    """The base model: its name in the recipe, what identifies its files, and the digest of its artifact."""

    model: str | None
    commit: str | None  # commit on the hub
    content: str | None  # sha256 over the files of a folder, or of the bundled GGUF file
    digest: str | None


class RecipeFacts(FrozenModel):
    """The recipe, and the settings that say how the model was made."""

    name: str | None
    method: str | None
    settings: Settings


class RunScores(FrozenModel):
    """The scores of a run: base, tuned (this model), and the champion at that time."""

    run: str
    confidence: float  # level of the intervals
    metrics: dict[str, Scores | None]
    slices: list[Slice] = []  # parts of the held-out rows
    seeds: list[SeedScores] = []  # by gate.seeds


class Files(FrozenModel):
    """An artifact's address, what is wrong with its files, and whether their contents are known to be intact.

    `contents` is not checked: the files were not hashed on this machine, or have changed since. Nothing is hashed here.
    """

    digest: str
    uri: str
    problems: list[str]
    contents: Contents


class Champion(FrozenModel):
    """The facts about the registered model in use. None: the store does not have this fact, or no longer has it."""

    model: str
    in_force: PromotionEntry
    promoted: PromotionEntry  # the same entry, unless a rollback returned to this model
    promoted_by_run: str | None
    run: ModelRun | None
    dataset: Dataset
    base: BaseModelSource
    recipe: RecipeFacts
    scores: RunScores | None
    made_with: MadeWith
    reserve: ReserveState | None  # what the newest run of this registry name left of data.heldout_reserve
    merged: Files
    adapter: Files | None


def describe_champion(store: Store, model: str) -> Champion:
    """Collect the facts about the champion of a registered model.

    Raises:
        BadConfig: the model has no champion.
        CorruptArtifact: the promotion log is damaged.
    """
    head = champion_entry(store, model)
    promoted = _promotion(PromotionLog(store, model), head)
    records = list(reversed(read_runs(store)))
    runs = [run for run in records if has_model(run, head.merged)]
    newest = next((run for run in records if run.model == model and run.summary is not None), None)
    made_by = next((run for run in runs if computed(run, "merge")), runs[0] if runs else None)
    promoted_by = next((run for run in runs if _promoted(run, promoted)), None)
    scored = next((run for run in (promoted_by, made_by, *runs) if run is not None and run.summary is not None), None)
    adapter = _adapter(store, head)
    lineage = read_lineage(adapter)
    return Champion(
        model=model,
        in_force=_entry(head),
        promoted=_entry(promoted),
        promoted_by_run=promoted_by.run if promoted_by else promoted.inputs.get("run"),
        run=_run(made_by) if made_by else None,
        dataset=_dataset(lineage, made_by, promoted),
        base=_base(lineage, made_by, promoted),
        recipe=_recipe(made_by, promoted),
        scores=_scores(scored) if scored else None,
        made_with=MadeWith(**{name: getattr(lineage, name) for name in MadeWith.model_fields}),
        reserve=newest.summary.reserve if newest and newest.summary else None,
        merged=_files(store, head.merged),
        adapter=_files(store, adapter, "/adapter") if adapter else None,
    )


def _promotion(log: PromotionLog, head: Entry) -> Entry:
    """Return the newest promotion of the model in force: a rollback returns to an earlier one."""
    promotions = [
        entry for entry in log.entries() if entry.action == "promote" and entry.merged.digest == head.merged.digest
    ]
    return promotions[-1] if promotions else head


def _promoted(run: RunRecord, entry: Entry) -> bool:
    """Tell whether a run wrote an entry, or a person promoted its model with this entry."""
    if entry.inputs.get("run") == run.run:
        return True
    return run.model == entry.model and run.summary is not None and run.summary.registered == entry.seq


def _adapter(store: Store, head: Entry) -> Ref | None:
    if head.adapter is not None or store.check(head.merged):
        return head.adapter
    return store.manifest(head.merged).input_refs(store.uri).get("adapter")


def _entry(entry: Entry) -> PromotionEntry:
    return PromotionEntry(entry=entry.seq, **entry.model_dump(include={"action", "time", "actor", "reasons"}))


def _run(record: RunRecord) -> ModelRun:
    same = set(ModelRun.model_fields) - {"computed"}
    return ModelRun(computed=computed(record, "merge"), **record.model_dump(include=same))


def _dataset(lineage: Lineage, record: RunRecord | None, promoted: Entry) -> Dataset:
    source, repo, revision = (_setting(record, "data", key) for key in ("source", "repo", "rev"))
    if record and _sources(record):  # data.source has only its default then
        source, repo, revision = ", ".join(_sources(record)), None, None
    commit = lineage.dataset_commit
    if record and source and source.endswith(".dvc") and repo == "." and revision is None:
        commit = record.commit
    return Dataset(
        md5=lineage.dataset or promoted.inputs.get("dataset"),
        source=source,
        repo=repo,
        revision=revision,
        commit=commit,
        rows=lineage.rows,
    )


def _sources(record: RunRecord) -> list[str]:
    sources = record.section("data").get("sources")
    found = sources if isinstance(sources, list) else []
    return [str(source.get("source")) for source in found if isinstance(source, dict)]


def _base(lineage: Lineage, record: RunRecord | None, promoted: Entry) -> BaseModelSource:
    stage = record.stage("resolve_base") if record else None
    return BaseModelSource(
        model=_setting(record, "base", "model") or promoted.inputs.get("base") or lineage.base.hub,
        commit=lineage.base.commit,
        content=lineage.base.content or lineage.base.gguf,
        digest=lineage.base_digest or (stage.digest if stage else None),
    )


def _recipe(record: RunRecord | None, promoted: Entry) -> RecipeFacts:
    method = record.resolved.get("method") if record else None
    return RecipeFacts(
        name=record.recipe if record else promoted.inputs.get("recipe"),
        method=method if isinstance(method, str) else None,
        settings=training_settings(record) if record and record.resolved else {},
    )


def _scores(record: RunRecord) -> RunScores:
    found = record.summary or RunSummary(run=record.run, recipe=record.recipe)
    return RunScores(
        run=record.run, confidence=record.confidence, metrics=found.metrics, slices=found.slices, seeds=found.seeds
    )


def _files(store: Store, ref: Ref, folder: str = "") -> Files:
    problems = store.check(ref)
    contents: Contents = "not checked"
    if problems:
        contents = "damaged"
    elif store.is_remembered(ref, hash_memo(store)):
        contents = "intact"
    return Files(digest=ref.digest, uri=store.location(ref) + folder, problems=problems, contents=contents)


def _setting(record: RunRecord | None, section: str, key: str) -> str | None:
    value = record.section(section).get(key) if record else None
    return value if isinstance(value, str) else None
