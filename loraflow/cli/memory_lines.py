"""Lines about the memory of stages: the estimate by part against the measured peak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loraflow.failures import Failure
from loraflow.registry.runs import StageRun
from loraflow.store import Manifest, Ref, Store


def memory_of(manifest: Manifest) -> str | None:
    """Return a line about the memory of the stage that made an artifact; None if it was not measured."""
    from loraflow.training.memory_parts import describe

    recorded = manifest.provenance.get("memory")
    if not isinstance(recorded, dict):
        return None
    peaks, estimate = recorded.get("peak_bytes"), recorded.get("estimate_bytes")
    sizes = {key: size for key, size in peaks.items() if isinstance(size, int)} if isinstance(peaks, dict) else {}
    peak = sizes.get("gpu") or sizes.get("host")
    if not peak:
        return None
    place = "on the GPU" if sizes.get("gpu") else "of main memory"
    line = f"peak {peak / 2**30:.2f} GiB {place}"
    parts = {key: size for key, size in estimate.items() if isinstance(size, int)} if isinstance(estimate, dict) else {}
    if parts:
        total = sum(parts.values())
        line += f", estimated {total / 2**30:.2f} ({total / peak:.0%}): {describe(parts)}"
    return line


def run_memory_lines(store: Store, stages: Iterable[StageRun]) -> Iterator[str]:
    """Yield a line for each stage of a run whose artifact is still in the store and whose memory was measured."""
    shown = list(stages)
    width = max((len(stage.stage) for stage in shown), default=0) + 2
    for stage in shown:
        ref = Ref(stage=stage.stage.split()[0], fingerprint=stage.fingerprint, digest=stage.digest, uri=store.uri)
        try:
            line = memory_of(store.manifest(ref))
        except Failure:  # removed since then
            continue
        if line:
            yield f"  {stage.stage:<{width}}{line}"
