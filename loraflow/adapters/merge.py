"""Stage merge: a base model and an adapter become a merged model, ready for `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

from loraflow.adapters.merge_folders import MergeOptions, merge
from loraflow.config.stage_configs import MergeConfig
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary


def run(job: Job[MergeConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write the merged model to `out/`.

    Raises:
        BadModel: the adapter cannot be merged into this base; see `merge`.
    """
    config = job.config
    options: MergeOptions = {
        "dtype": config.dtype,
        "max_shard_bytes": int(config.max_shard_size_gb * 1e9),
        "threads": job.runtime.threads,
        "base_digest": job.inputs["base"].digest,
        "checked": True,
    }
    base, adapter = inputs["base"], inputs["adapter"] / "adapter"
    if config.nf4 is not None:
        from loraflow.adapters.merge_nf4 import merge_trained_in_nf4

        shards = inputs["tokens"] / "train" if "tokens" in inputs else None
        figures = merge_trained_in_nf4(base, adapter, out, shards, progress, job.runtime, config.nf4, options)
    else:
        figures = merge(base, adapter, out, progress=progress, **options)
    (out / "telemetry").mkdir()
    (out / "telemetry" / "timing.json").write_text(json.dumps({"merge_seconds": figures["seconds"]}))
    return Summary(figures={name: value for name, value in figures.items() if name != "seconds"})
