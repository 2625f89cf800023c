"""Stage verify: compare the merged model's logits with those of base and adapter, on held-out chats, in fp32.

Merging rounds W + ΔW to the weights' dtype, so the two differ a little. A base that training quantized to NF4 is
compared as training saw it. The report says how much they differ; `check_limits` compares that with the recipe's limit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from loraflow.adapters.logits import MAX_TOKENS, compare_logits, model_logits, trained_logits
from loraflow.config.stage_configs import VerifyConfig
from loraflow.data.chats import ChatRecord
from loraflow.data.checks.split import label_values, prompt_key, spread_sample
from loraflow.failures import LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

SEED = 0  # seed of the sample of rows: not a setting, because any rows will do


def run(job: Job[VerifyConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write report.json, with the fields of `LogitsComparison`."""
    import torch

    from loraflow.adapters.nf4 import Nf4
    from loraflow.data.tokens.loss_mask import ChatTemplate, name_row

    trust = job.config.trust_remote_code
    rows = sample_rows(inputs["rows"] / "heldout.jsonl", job.config.prompts)
    with name_row([row.get("place", "") for row in rows]):
        chats = ChatTemplate(inputs["base"]).encode([row["messages"] for row in rows], "last_assistant", "context")
    batches = [torch.tensor(chat.ids[:MAX_TOKENS].tolist())[None] for chat in chats]

    quantization = job.config.nf4
    nf4 = Nf4(quantization.dtype, quantization.double) if quantization is not None else None
    expected = trained_logits(inputs["base"], inputs["adapter"] / "adapter", nf4, batches, job.runtime, trust=trust)
    progress(done=1, total=2)
    figures = asdict(compare_logits(expected, model_logits(inputs["merged"], batches, job.runtime, trust=trust)))
    (out / "report.json").write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    progress(done=2, total=2)
    return Summary(figures=figures, report=figures)


def sample_rows(file: Path, size: int) -> list[ChatRecord]:
    """Return a seeded sample of held-out rows, spread over the sets and, in classification sets, over the labels."""
    with file.open(encoding="utf-8") as lines:
        rows: list[ChatRecord] = [json.loads(line) for line in lines]
    labels = label_values([row["messages"][-1]["content"] or "" for row in rows]) or [""] * len(rows)
    values = [json.dumps([row["set"], label]) for row, label in zip(rows, labels, strict=True)]
    keys = [prompt_key(row["messages"]) for row in rows]
    return [rows[number] for number in spread_sample(keys, values, size, SEED, "verify")]


def check_limits(report: Mapping[str, float], max_kl: float) -> None:
    """Stop the run if the merged model differs from base and adapter by more than the recipe's limit.

    Args:
        max_kl: nats per token.

    Raises:
        LimitExceeded: the mean KL divergence is above the limit.
    """
    if not report["mean_kl"] <= max_kl:
        raise LimitExceeded(
            "The merged model's outputs differ too much from base plus adapter.",
            where="verify",
            expected=f"mean KL at most {max_kl} nats per token (merge.max_kl)",
            got=f"{report['mean_kl']}; the most likely token is the same in {report['same_best_token']:.1%}",
            next_step="merge in a wider dtype (merge.dtype: float32), or raise merge.max_kl if you accept it",
        )
