"""Small merged models in a store, with the adapter that they were made from, and promotions of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from loraflow import identity
from loraflow.registry import Entry, PromotionLog
from loraflow.registry.runs import RunRecord, StageRun, read_runs
from loraflow.store import LocalStore, Ref, Store, Summary


def commit(
    store: Store,
    stage: str,
    name: str,
    content: str = "",
    inputs: Mapping[str, Ref] | None = None,
    replace: bool = False,
) -> Ref:
    """Commit an artifact with one file; its fingerprint depends on stage, inputs and name."""
    inputs = inputs or {}
    payload = identity.payload(stage, 1, {key: ref.digest for key, ref in inputs.items()}, {"x": name})
    staged = store.staging(stage, identity.fingerprint(payload))
    (staged / "weights").write_text(content or f"{stage} {name}")
    return store.commit(staged, payload=payload, inputs=inputs, summary=Summary(), provenance={}, replace=replace)


def add_model(store: Store, name: str) -> Ref:
    """Commit a base, an adapter trained on it, and their merged model; return the merged model's ref."""
    base = commit(store, "resolve_base", "base")
    adapter = commit(store, "train", name, inputs={"base": base})
    return commit(store, "merge", name, inputs={"adapter": adapter, "base": base})


def promote(log: PromotionLog, merged: Ref) -> Entry:
    """Promote a model that `add_model` made."""
    adapter = log.store.manifest(merged).input_refs(log.store.uri)["adapter"]
    return log.append(
        log.head(), action="promote", merged=merged, adapter=adapter, inputs={}, reasons=["better"], actor="me"
    )


def record_run(store: Store, run: str, merged: Ref, model: str = "tickets", **values: object) -> RunRecord:
    """Write the record of a run that computed a merged model."""
    adapter = store.manifest(merged).input_refs(store.uri)["adapter"]
    stages = [
        StageRun(stage=ref.stage, state="computed", fingerprint=ref.fingerprint, digest=ref.digest)
        for ref in (adapter, merged)
    ]
    summary = {"run": run, "recipe": "tickets"}
    document = {
        "run": run,
        "recipe": "tickets",
        "recipe_text": "name: tickets\n",
        "resolved": {"register": {"model": model}},
        "stages": stages,
    }
    record = RunRecord.model_validate({"summary": summary, **document, **values})
    store.write_document(f"runs/{run}.json", record.document)
    return record


def forget_promotions(store: LocalStore) -> None:
    """Delete all promotion logs of a store, and what anchors and run records know of them."""
    for folder in ("registry", "anchors"):
        shutil.rmtree(store.root / folder, ignore_errors=True)
    for record in read_runs(store):
        summary = record.summary.model_copy(update={"registered": None}) if record.summary else None
        record = record.model_copy(update={"summary": summary, "promotion_head": None, "looks_head": None})
        store.write_document(f"runs/{record.run}.json", record.document)
