"""Decide whether a job's artifact can be reused, and say why not. Runs, plans and single commands all ask `look_up`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow import identity
from loraflow.config.stage_configs import StageConfig
from loraflow.execution.code_digest import is_current
from loraflow.identity import short
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Ref, Store


@dataclass(frozen=True)
class Lookup:
    """The answer of the artifact store for a job. `ref` is the artifact to reuse; None means that the stage has to run."""

    store: Store
    job: Job[StageConfig]
    ref: Ref | None
    forced: bool = False

    def why(self) -> list[str]:
        """Return why the artifact is reused, or why the stage has to run: one reason per line."""
        if self.ref is not None:
            started = self.store.manifest(self.ref).provenance.get("started", "earlier")
            return [
                f"same inputs, settings and stage version as {self.job.short}, computed {started} "
                f"(digest {short(self.ref.digest)})"
            ]
        if self.forced:
            return ["--force"]
        state = self.store.previous_state(self.job.stage, self.job.fingerprint)
        if state == "damaged":
            return ["its artifact is incomplete or was changed"]
        if state == "removed":
            return ["its artifact was removed"]
        nearest = self.store.newest_payload(self.job.stage, self.job.payload)
        if nearest is None:
            return [NEVER_COMPUTED]
        return identity.explain(nearest, self.job.payload) or ["its artifact is missing"]

    def by_other_code(self) -> bool:
        """Return whether the artifact was computed by other code of the same stage version, which may be a mistake."""
        if self.ref is None:
            return False
        return not is_current(STAGES[self.job.stage], str(self.store.manifest(self.ref).provenance.get("code")))


def known_changes(store: Store, known: Mapping[str, JsonValue], unknown: Collection[str]) -> list[str]:
    """Return why a job runs whatever its unknown inputs are; empty if an artifact may be reused.

    Args:
        known: the job's payload, without the inputs that are not computed yet.
        unknown: the names of those inputs.
    """
    nearest = store.newest_payload(str(known["stage"]), known)
    if nearest is None:
        return [NEVER_COMPUTED]
    recorded = nearest["inputs"]
    assert isinstance(recorded, Mapping)
    comparable = {name: digest for name, digest in recorded.items() if name not in unknown}
    return identity.explain({**nearest, "inputs": comparable}, known)


NEVER_COMPUTED = "not in the store yet"
OTHER_CODE = "computed by other code of the same stage version; --force recomputes it"


def look_up(store: Store, job: Job[StageConfig], *, force: bool = False) -> Lookup:
    """Look for a job's artifact. It is reused if its manifest, its files' names and their sizes are right.

    Contents are hashed where they are read: by the stage that has the artifact as an input.
    """
    return Lookup(store, job, None if force else store.find(job.stage, job.fingerprint), force)
