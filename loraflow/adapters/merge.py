"""Stage merge: a base model and an adapter become a merged model, ready for `from_pretrained`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.logits import MAX_TOKENS, compare_logits, model_logits, trained_logits
from loraflow.adapters.merge_folders import MergeFigures, MergeOptions, merge
from loraflow.adapters.nf4 import Nf4
from loraflow.config import Runtime
from loraflow.config.stage_configs import MergeConfig, MergeNf4Config
from loraflow.data.tokens.token_files import TokenRows
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


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
        shards = inputs["tokens"] / "train" if "tokens" in inputs else None
        figures = merge_trained_in_nf4(base, adapter, out, shards, progress, job.runtime, config.nf4, options)
    else:
        figures = merge(base, adapter, out, progress=progress, **options)
    (out / "telemetry").mkdir()
    (out / "telemetry" / "timing.json").write_text(json.dumps({"merge_seconds": figures["seconds"]}))
    return Summary(figures={name: value for name, value in figures.items() if name != "seconds"})


COMPARED_ROWS = 8  # training rows on which the two merges are compared


def merge_trained_in_nf4(
    base: Path,
    adapter: Path,
    out: Path,
    shards: Path | None,
    progress: Progress,
    runtime: Runtime,
    config: MergeNf4Config,
    options: MergeOptions,
) -> MergeFigures:
    """Merge an adapter that was trained on a base in NF4, either into the original base or into the dequantized base.

    The adapter also learned to correct quantization errors, which the original base does not have. The dequantized base has
    them, but is less accurate. `merge.onto: auto` computes both merges and uses the one with the smaller KL divergence from
    the trained model, measured on training rows: only the gate may use held-out rows.

    Args:
        shards: tokenized training rows; needed where `config.onto` is auto.
        config: how training quantized the base, and into which weights to merge.

    Returns:
        Figures of `merge`; `onto`; for auto also `kl_base` and `kl_dequantized`, nats per token, to the trained model.
    """
    nf4, trust = Nf4(config.dtype, config.double), config.trust
    if config.onto != "auto":
        dequantized = nf4 if config.onto == "dequantized" else None
        figures = merge(base, adapter, out, progress=progress, nf4=dequantized, trust=trust, **options)
        return {**figures, "onto": config.onto}
    assert shards is not None and progress.work is not None
    rows = comparison_rows(shards)
    expected = trained_logits(base, adapter, nf4, rows, runtime, trust=trust)
    merges: dict[str, MergeFigures] = {}
    divergence: dict[str, float] = {}
    for onto, dequantized in (("base", None), ("dequantized", nf4)):
        work = progress.work / "onto" / onto
        merged = work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        parts = Progress(progress.path, work)  # the finished shards of each merge survive a kill
        merges[onto] = merge(base, adapter, merged, progress=parts, nf4=dequantized, trust=trust, **options)
        divergence[onto] = compare_logits(expected, model_logits(merged, rows, runtime, trust=trust)).mean_kl
    best = min(divergence, key=divergence.__getitem__)
    log.info("merged onto %s: KL to the trained model %s", best, divergence)
    for file in sorted((progress.work / "onto" / best / "merged").iterdir()):
        shutil.move(file, out / file.name)
    shutil.rmtree(progress.work / "onto")
    return {
        **merges[best],
        "seconds": round(sum(figures["seconds"] for figures in merges.values()), 2),
        "onto": best,
        "kl_base": divergence["base"],
        "kl_dequantized": divergence["dequantized"],
    }


def comparison_rows(shards: Path) -> list[torch.Tensor]:
    """Return the ids of the first tokenized training rows, [1, tokens] each."""
    import torch

    rows = TokenRows(shards)
    count = min(COMPARED_ROWS, len(rows.documents))
    return [torch.tensor(rows.document(n)[0][:MAX_TOKENS].tolist())[None] for n in range(count)]
