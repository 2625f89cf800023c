"""Stage verify: does the merged model say what base and adapter say? Logits on held-out chats, computed in fp32.

Merging rounds W + ΔW to the weights' dtype, so that the two differ a little. A base that training had packed in NF4 is
packed and unpacked first: what was trained is the measure. The report says how much; `admit` compares it with the
recipe's bound.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraflow.config import Runtime
from loraflow.config.stage_configs import VerifyConfig
from loraflow.failures import Inadmissible
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

if TYPE_CHECKING:
    from loraflow.adapters.nf4 import Nf4

MAX_TOKENS = 512  # of a chat; the rest is left out


def run(job: Job[VerifyConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write report.json: largest logit difference, mean and largest KL (nats per token), agreement of the best token."""
    import torch

    from loraflow.adapters.nf4 import Nf4
    from loraflow.data.loss_mask import ChatTemplate

    trust = job.config.trust_remote_code
    with (inputs["rows"] / "heldout.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(job.config.prompts), strict=False)]
    encoded = ChatTemplate(inputs["base"]).encode([row["messages"] for row in rows], "all")
    batches = [torch.tensor(one.ids[:MAX_TOKENS].tolist())[None] for one in encoded]

    packed = job.config.nf4
    nf4 = Nf4(packed.dtype, packed.double) if packed is not None else None
    wanted = trained_logits(inputs["base"], inputs["adapter"] / "adapter", nf4, batches, job.runtime, trust=trust)
    progress(done=1, total=2)
    figures = compare(wanted, logits_at(inputs["merged"], batches, job.runtime, trust=trust))
    (out / "report.json").write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    progress(done=2, total=2)
    return Summary(figures=figures, report=figures)


def trained_logits(
    base: Path, adapter: Path, nf4: Nf4 | None, batches: list[Any], runtime: Runtime, *, trust: bool
) -> list[Any]:
    """Return the logits of what was trained, a tensor [tokens, vocabulary] for each batch of one row, in fp32."""
    from peft import PeftModel

    from loraflow.base.load import load_model

    model = load_model(base, "float32", runtime, trust=trust)
    if nf4 is not None:
        nf4.apply(model)
    logits = _logits(PeftModel.from_pretrained(model, str(adapter)).eval(), batches)
    del model
    gc.collect()  # one model at a time: two of Phi-3 mini in fp32 are more than most hosts have
    return logits


def logits_at(folder: Path, batches: list[Any], runtime: Runtime, *, trust: bool) -> list[Any]:
    """Return the logits of a model in a folder, a tensor [tokens, vocabulary] for each batch of one row, in fp32."""
    from loraflow.base.load import load_model

    model = load_model(folder, "float32", runtime, trust=trust)
    logits = _logits(model, batches)
    del model
    gc.collect()
    return logits


def _logits(model: Any, batches: list[Any]) -> list[Any]:
    import torch

    with torch.inference_mode():
        return [model(input_ids=batch.to(model.device)).logits[0].float().cpu() for batch in batches]


def compare(wanted: list[Any], got: list[Any]) -> dict[str, float]:
    """Compare logits [tokens, vocabulary] of the same texts."""
    import torch

    difference = max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True))
    divergences, agree = [], []
    for a, b in zip(wanted, got, strict=True):
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        agree.append(a.argmax(-1) == b.argmax(-1))
    kl, same = torch.cat(divergences), torch.cat(agree)
    return {
        "max_logit_difference": round(difference, 6),
        "mean_kl": round(float(kl.mean()), 9),
        "max_kl": round(float(kl.max()), 9),
        "same_best_token": round(float(same.float().mean()), 6),
        "tokens": len(kl),
    }


def admit(report: dict[str, Any], max_kl: float) -> None:
    """Decide whether a merged model is the one that was trained.

    Raises:
        Inadmissible: it differs by more than the recipe allows.
    """
    if not report["mean_kl"] <= max_kl:
        raise Inadmissible(
            "The merged model does not say what base and adapter say.",
            where="verify",
            expected=f"mean KL at most {max_kl} nats per token (merge.max_kl)",
            got=f"{report['mean_kl']}, best token the same in {report['same_best_token']:.1%}",
            next_step="merge in a wider dtype (merge.dtype: float32), or raise merge.max_kl if you accept it",
        )
