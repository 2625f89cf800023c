"""An artifact in a store, for tests."""

import time

from loraflow import identity
from loraflow.store import (
    LocalStore,
    Ref,
    Summary,
)

PAYLOAD = identity.payload("tokenize", 1, {}, {"x": 1})
FP = identity.fingerprint(PAYLOAD)


def put(store: LocalStore, payload=PAYLOAD, content="hello", **options) -> Ref:
    staged = store.staging(payload["stage"], identity.fingerprint(payload))
    (staged / "sub").mkdir()
    (staged / "sub" / "a.txt").write_text(content)
    (staged / "telemetry").mkdir()
    (staged / "telemetry" / "time.json").write_text(str(time.time_ns()))
    return store.commit(
        staged,
        payload=payload,
        inputs={},
        summary=Summary(facets={"sub": ["sub/"]}),
        provenance={"seconds": 1},
        **options,
    )


def rewrite(store, ref: Ref, name: str, content: str | None) -> None:
    """Change a file of an artifact behind the store's back; None deletes it."""
    if isinstance(store, LocalStore):
        path = store.path(ref) / name
        path.write_text(content) if content is not None else path.unlink()
    else:
        key = f"{ref.stage}/{ref.fingerprint}/{ref.digest}/{name}"
        store.bucket.put(key, content.encode()) if content is not None else store.bucket.delete([key])


def remember(monkeypatch) -> None:
    """Let a memo remember hashes of files that were just written."""
    monkeypatch.setattr("loraflow.store.files.SETTLED", -1)
