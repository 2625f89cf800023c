"""Small merged models in a store, with the adapter that they were made from, and promotions of them."""

from __future__ import annotations

from collections.abc import Mapping

from loraflow import identity
from loraflow.registry import Entry, PromotionLog
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.store import Ref, Store, Summary


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
    document = {"run": run, "recipe": "tickets", "resolved": {"register": {"model": model}}, "stages": stages}
    record = RunRecord.model_validate({"summary": summary, **document, **values})
    store.write_document(f"runs/{run}.json", record.document)
    return record


def remove(store: Store, name: str) -> None:
    """Delete a document of a local store or of a bucket behind the store's back."""
    from loraflow.store import LocalStore

    if isinstance(store, LocalStore):
        (store.root / name).unlink()
    else:
        store.bucket.delete([name])  # type: ignore[attr-defined]
