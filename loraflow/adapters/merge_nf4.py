"""QLoRA's merge: onto the base in 16 bits, or onto the base as training saw it, whichever says more of what was trained.

Training adapted weights that had gone through NF4. The update makes up for their errors too, so that on the plain base it
is a little off; on the unpacked base it is not, but that base is the worse one. KL to the trained model decides, on rows of
the training set: held-out rows are the gate's alone.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from loraflow.adapters.merge_folders import MergeOptions, merge
from loraflow.adapters.nf4 import Nf4
from loraflow.adapters.verify import MAX_TOKENS, compare, logits_at, trained_logits
from loraflow.config import Runtime
from loraflow.config.stage_configs import MergeNf4Config
from loraflow.data.token_rows import TokenRows
from loraflow.job import Progress

log = logging.getLogger(__name__)
PROBES = 8  # rows of the training set that the two are compared on


def merge_trained_in_nf4(
    base: Path,
    adapter: Path,
    out: Path,
    shards: Path | None,
    progress: Progress,
    runtime: Runtime,
    config: MergeNf4Config,
    options: MergeOptions,
) -> dict[str, Any]:
    """Merge an adapter that was trained on a base in NF4.

    Args:
        base: the model's folder.
        adapter: PEFT's folder.
        out: an empty folder for the merged model.
        shards: tokenized training rows; needed where `config.onto` is auto.
        progress: reports tensors; its `work` folder holds the merges that are compared.
        runtime: the job's.
        config: how training packed the base, and onto which weights to merge.
        options: of `merge`.

    Returns:
        Figures of `merge`; `onto`; for auto also `kl_base` and `kl_dequantized`, nats per token, to the trained model.
    """
    nf4, onto, trust = Nf4(config.dtype, config.double), config.onto, config.trust
    ways: dict[str, Nf4 | None] = {"base": None, "dequantized": nf4}
    if onto != "auto":
        figures = merge(base, adapter, out, progress=progress, nf4=ways[onto], trust=trust, **options)
        return {**figures, "onto": onto}
    assert shards is not None and progress.work is not None
    probes = _probes(shards)
    wanted = trained_logits(base, adapter, nf4, probes, runtime, trust=trust)
    found: dict[str, dict[str, Any]] = {}
    divergence: dict[str, float] = {}
    for name, way in ways.items():
        place = progress.work / "onto" / name
        shutil.rmtree(place / "merged", ignore_errors=True)
        (place / "merged").mkdir(parents=True)
        parts = Progress(progress.path, place)  # finished shards of each survive a kill
        found[name] = merge(base, adapter, place / "merged", progress=parts, nf4=way, trust=trust, **options)
        divergence[name] = compare(wanted, logits_at(place / "merged", probes, runtime, trust=trust))["mean_kl"]
    best = min(ways, key=lambda name: divergence[name])
    log.info("merged onto %s: KL to the trained model %s", best, divergence)
    for file in sorted((progress.work / "onto" / best / "merged").iterdir()):
        shutil.move(file, out / file.name)
    shutil.rmtree(progress.work / "onto")
    seconds = round(sum(one["seconds"] for one in found.values()), 2)
    kl = {f"kl_{name}": value for name, value in divergence.items()}
    return {**found[best], "seconds": seconds, "onto": best, **kl}


def _probes(shards: Path) -> list[Any]:
    import torch

    rows = TokenRows(shards)
    return [
        torch.tensor(rows.document(n)[0][:MAX_TOKENS].tolist())[None] for n in range(min(PROBES, len(rows.documents)))
    ]
