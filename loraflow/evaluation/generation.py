"""Greedy answers and likelihoods in batches: sorted by length, padded, all stop ids, what they share computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraflow.base.load import head_is_plain
from loraflow.data.loss_mask import IGNORED
from loraflow.evaluation.prefix import plain_cache, shared_prefix
from loraflow.hardware.process_group import ProcessGroup

ALONE = ProcessGroup()
HEAD_ROWS = 512  # positions whose logits are in memory at a time


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    done_file: Path | None = None,
    on_batch: Callable[[int], None] | None = None,
    group: ProcessGroup = ALONE,
) -> list[dict[str, Any]]:
    """Return an answer for each prompt: `text`, `tokens` (how many), `finish` (stop or length).

    Finished batches are kept in `done_file`, so that a retry goes on behind them. A group's devices get whole batches:
    the numbers of a row depend on what it is batched with, so that they are the ones of a single device. Each keeps a
    file of its own, and all of them are read.
    """
    import torch

    from loraflow.evaluation.greedy_decoding import ALIGNED, decodes, greedy

    answers = _kept(done_file, len(prompts))
    if done_file is not None and not group.is_main:
        done_file = done_file.with_stem(f"{done_file.stem}-{group.rank}")
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    # At least one id of each row is left for its batch, whose logits begin the answer.
    lengths = [len(prompt) for prompt in prompts]
    prefix = shared_prefix(model, prompts, min(lengths) - 1, max(lengths) + max_new_tokens) if prompts else None
    shared = len(prefix.ids) if prefix else 0
    plain = bool(prompts) and plain_cache(model, max(lengths) + max_new_tokens)
    recording = decodes(model)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        if not group.owns(first // batch_size) or all(answers[i] is not None for i in batch):
            continue
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, i in enumerate(batch):
            rest = prompts[i][shared:]
            ids[row, width - len(rest) :] = torch.tensor(rest)
            mask[row, width - len(rest) :] = 1
        if prefix:
            ids[:, :shared], mask[:, :shared] = torch.tensor(prefix.ids), 1
        room = -(-(width + max_new_tokens) // ALIGNED) * ALIGNED if recording else width + max_new_tokens
        cache = prefix.cache(len(batch), room) if prefix else None
        if plain and not prefix:
            from loraflow.evaluation.kv_cache import roomy_cache

            cache = roomy_cache(model.config.num_hidden_layers, room)
        ids, mask = ids.to(model.device), mask.to(model.device)
        if recording and cache is not None:
            new_ids = greedy(
                model, ids, mask, cache, stop_ids=stop_ids, max_new_tokens=max_new_tokens, pad_id=tokenizer.pad_token_id
            )
        else:
            with torch.inference_mode():
                new_ids = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    **({"past_key_values": cache} if cache is not None else {}),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=stop_ids,
                    pad_token_id=tokenizer.pad_token_id,
                )[:, width:]
        lines = []
        for i, new in zip(batch, new_ids.tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in stop_ids), None)
            said = new[:end]
            text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answer = {"text": text, "tokens": len(said), "finish": "length" if end is None else "stop"}
            answers[i] = answer
            lines.append(json.dumps({"index": i, **answer}, ensure_ascii=False))
        if done_file is not None:
            with done_file.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        if on_batch is not None:
            # The others are about as far in the order as this one.
            on_batch(sum(a is not None for a in answers) if group.size == 1 else first + len(batch))
    return [answer for answer in group.merge(answers) if answer is not None]


def _kept(done_file: Path | None, rows: int) -> list[dict[str, Any] | None]:
    """Return the answers that earlier attempts kept, on however many devices."""
    answers: list[dict[str, Any] | None] = [None] * rows
    if done_file is None:
        return answers
    for file in (done_file, *sorted(done_file.parent.glob(f"{done_file.stem}-*{done_file.suffix}"))):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line at which an earlier attempt was killed
                continue
            answers[row.pop("index")] = row
    return answers


def answer_losses(
    model: Any, rows: Sequence[Any], pad_id: int, batch_size: int, group: ProcessGroup = ALONE
) -> list[tuple[float, int]]:
    """Return (sum of -log p in nats, tokens) of each row's learned tokens. Rows are `mask.Encoded`.

    The head is applied where a token is learned only: a vocabulary's width of logits for every position of a batch
    would be gigabytes.
    """
    import torch

    found: list[tuple[float, int] | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    plain = head_is_plain(model)
    # The hidden state before the first learned token must be one of the batch's own.
    learned = [np.flatnonzero(row.labels[1:] != IGNORED) for row in rows]
    own = min((int(at[0]) for at in learned if len(at)), default=0)
    prefix = shared_prefix(model, [row.ids for row in rows], own, max((len(row.ids) for row in rows), default=0))
    shared = len(prefix.ids) if prefix else 0
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        if not group.owns(first // batch_size):
            continue
        width = max(len(rows[i].ids) for i in batch) - shared
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros((len(batch), shared + width), dtype=torch.long)
        labels = torch.full((len(batch), width), IGNORED)
        for row, i in enumerate(batch):
            n = len(rows[i].ids) - shared
            ids[row, :n], mask[row, : shared + n] = torch.from_numpy(rows[i].ids[shared:].astype("int64")), 1
            labels[row, 1:n] = torch.from_numpy(rows[i].labels[shared + 1 :].astype("int64"))
        ids, mask = ids.to(model.device), mask.to(model.device)
        at = (labels[:, 1:] != IGNORED).to(model.device)
        target = labels[:, 1:].to(model.device)[at]
        if not len(target):
            continue
        cached = {"past_key_values": prefix.cache(len(batch), shared + width)} if prefix else {}
        values = {"input_ids": ids, "attention_mask": mask, "use_cache": bool(prefix), **cached}
        with torch.inference_mode():
            if not plain:
                source = model(**values).logits[:, :-1][at]
                head: Callable[[Any], Any] = lambda x: x  # noqa: E731
            else:
                source = model.get_decoder()(**values).last_hidden_state[:, :-1][at]
                head = model.get_output_embeddings()
            losses = torch.cat(
                [
                    torch.nn.functional.cross_entropy(
                        head(source[k : k + HEAD_ROWS]).float(), target[k : k + HEAD_ROWS], reduction="none"
                    )
                    for k in range(0, len(source), HEAD_ROWS)
                ]
            ).double()
        owner = at.nonzero()[:, 0]
        for row, i in enumerate(batch):
            mine = losses[owner == row]
            found[i] = (float(mine.sum()), len(mine))
    return [one or (0.0, 0) for one in group.merge(found)]
