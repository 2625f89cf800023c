"""Stage tokenize: checked rows to Arrow shards of ids, labels and lengths; the packing plan; a report on the mask.

`train/` and `validation/` open with `datasets.load_from_disk`; `packing.parquet` with pandas.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.loss_mask import IGNORED, ChatTemplate
from loraflow.data.packing import best_fit_decreasing
from loraflow.failures import BadData, BadModel, Killed
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

log = logging.getLogger(__name__)
CHUNK = 500  # rows that go to a process at a time
_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())],
    metadata={
        b"huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
                        "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
                        "length": {"dtype": "int32", "_type": "Value"},
                    }
                }
            }
        ).encode()
    },
)


@dataclass
class Chunk:
    """What a process returns for some rows: flat arrays, lengths, and what happened to the others."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    counts: Counter[str]
    first: dict[str, str]  # kind of trouble → its first row


def run(job: Job[TokenizeConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Tokenize training and validation rows.

    Raises:
        BadData: a row is too long and the policy is error, or holds a control token and the policy is error; or no
            row has a token to learn.
        BadModel: a row has a token without a row in the base's embeddings; or the template renders each prompt otherwise
            than it stands in the chats that are learned.
    """
    config, template = job.config, ChatTemplate(inputs["base"])
    processes = job.runtime.processes or os.cpu_count() or 1
    figures: dict[str, Any] = {}
    lengths = np.empty(0, np.int32)
    counts: Counter[str] = Counter()
    for name in ("train", "validation"):
        source = inputs["rows"] / f"{name}.jsonl"
        if name == "validation" and source.stat().st_size == 0:
            continue
        found, part, largest = _tokenize_file(source, template, out / name, config, processes, progress, counts)
        refuse_ids_beyond(largest, vocabulary_of(inputs["base"]), template)
        figures[f"{name}_rows"], figures[f"{name}_tokens"] = len(found), int(found.sum())
        if name == "train":
            lengths, figures["supervised_tokens"] = found, part
    if len(lengths) == 0:
        raise BadData(
            "No training row has a token to learn.",
            where="tokenize",
            got=", ".join(f"{kind}: {n}" for kind, n in counts.items()) or "no rows",
            next_step="raise training_config.max_length, or see data.too_long and data.special_tokens",
        )
    if config.packing:
        row_of = best_fit_decreasing(lengths, config.max_length)
        pq.write_table(pa.table({"row": _arrow(row_of)}), out / "packing.parquet")
        figures["packed_rows"] = int(row_of.max()) + 1
        figures["packing_utilisation"] = round(float(lengths.sum() / figures["packed_rows"] / config.max_length), 4)
    figures |= {
        "longest": int(lengths.max()),
        "median_length": int(np.median(lengths)),
        "supervised_share": round(figures["supervised_tokens"] / figures["train_tokens"], 4),
        **{f"rows_{kind}": n for kind, n in counts.items()},
    }
    audit = _audit(inputs["rows"] / "train.jsonl", template, config)
    _check_prompts(audit)
    text = json.dumps({"figures": figures, "audit": audit}, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    return Summary(figures=figures, report={"audit": audit[:2]})


def _tokenize_file(
    source: Path,
    template: ChatTemplate,
    target: Path,
    config: TokenizeConfig,
    processes: int,
    progress: Progress,
    counts: Counter[str],
) -> tuple[np.ndarray, int, int]:
    """Write one Arrow folder; return the lengths of its rows, the number of tokens that are learned, and the largest id."""
    target.mkdir()
    lengths: list[np.ndarray] = []
    supervised = done = largest = 0
    with pa.OSFile(str(target / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        for chunk in _encoded_chunks(source, template, config, processes):
            counts.update(chunk.counts)
            for kind, policy in (("too_long", config.too_long), ("special_tokens", config.special_tokens)):
                if kind in chunk.first and policy == "error":
                    raise _refusal(kind, chunk.first[kind], config)
            if len(chunk.lengths):
                writer.write_batch(_batch(chunk))
                largest = max(largest, int(chunk.ids.max()))
            lengths.append(chunk.lengths)
            supervised += int((chunk.labels != IGNORED).sum())
            done += len(chunk.lengths)
            progress(rows=done)
    found = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
    # What datasets.save_to_disk writes, but with a fingerprint that is the same every time.
    state: dict[str, Any] = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "loraflow",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (target / "state.json").write_text(json.dumps(state, indent=1))
    features = json.loads(_SCHEMA.metadata[b"huggingface"])["info"]["features"]
    (target / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": features,
                                                          "homepage": "", "license": ""}, indent=1))  # fmt: skip
    return found, supervised, largest


def vocabulary_of(base: Path) -> int | None:
    """Return how many rows a base's embeddings have, by its configuration; None where it does not say."""
    file = base / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return None if found is None else int(found)


def refuse_ids_beyond(largest: int, rows: int | None, template: ChatTemplate) -> None:
    """Refuse tokens that the embeddings have no row for, before anything is trained.

    Raises:
        BadModel: the vocabulary grew without its embeddings.
    """
    if rows is not None and largest >= rows:
        raise BadModel(
            "The tokenizer has tokens that the embeddings have no row for, and the chats use them.",
            where="tokenize",
            expected=f"ids below {rows}",
            got=f"{template.tokenizer.id_to_token(largest)}, id {largest}",
            next_step="resize and save the base's embeddings first, then train on that base",
        )


def _encoded_chunks(source: Path, template: ChatTemplate, config: TokenizeConfig, processes: int) -> Iterator[Chunk]:
    """Encode a file's rows, in order, by as many processes as asked for; one is this process itself."""
    _start(template, config)
    chunks = _lines(source)
    if processes == 1 or source.stat().st_size < 1_000_000:
        yield from map(_encode, chunks)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # A fork has the tokenizer already; frozen objects are not walked through, and copied, by its garbage collector.
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=gc.freeze) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for lines in chunks:
                waiting.append(pool.submit(_encode, lines))
                if len(waiting) > 4 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise Killed("A tokenizer process was killed.", where="tokenize", next_step="run again") from error


def _lines(source: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    with source.open(encoding="utf-8") as file:
        for line in file:
            lines.append(line)
            if len(lines) == CHUNK:
                yield lines
                lines = []
    if lines:
        yield lines


_template: ChatTemplate
_config: TokenizeConfig


def _start(template: ChatTemplate, config: TokenizeConfig) -> None:
    global _template, _config
    _template, _config = template, config


def _encode(lines: list[str]) -> Chunk:
    max_length, too_long, special_tokens = (
        _config.max_length,
        _config.too_long,
        _config.special_tokens,
    )
    rows = [json.loads(line) for line in lines]
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    counts, first = Counter[str](), dict[str, str]()
    for row, one in zip(rows, _template.encode([row["messages"] for row in rows], _config.loss_on), strict=True):
        here, learned = one.ids, one.labels
        if one.special_in_text and special_tokens != "allow":
            counts["special_tokens"] += 1
            first.setdefault("special_tokens", f"{row['place']}: {one.special_in_text}")
            continue
        if len(here) > max_length:
            counts["too_long"] += 1
            first.setdefault("too_long", f"{row['place']}: {len(here)} tokens")
            if too_long != "truncate":
                continue
            # No stop token is put at the cut: a model would learn to stop in the middle of a sentence.
            here, learned = here[:max_length], learned[:max_length]
        if not (learned[1:] != IGNORED).any():  # the first token is never predicted
            counts["nothing_to_learn"] += 1
            first.setdefault("nothing_to_learn", row["place"])
            continue
        ids.append(here)
        labels.append(learned)
    none = np.empty(0, np.int32)
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    return Chunk(np.concatenate([none, *ids]), np.concatenate([none, *labels]), lengths, counts, first)


def _batch(chunk: Chunk) -> pa.RecordBatch:
    offsets = np.zeros(len(chunk.lengths) + 1, np.int32)
    np.cumsum(chunk.lengths, out=offsets[1:])
    return pa.record_batch(
        [
            pa.ListArray.from_arrays(_arrow(offsets), _arrow(chunk.ids)),
            pa.ListArray.from_arrays(_arrow(offsets), _arrow(chunk.labels)),
            _arrow(chunk.lengths),
        ],
        schema=_SCHEMA,
    )


def _arrow(values: np.ndarray) -> pa.Array:
    """Return int32 values as an Arrow array; `pa.array` would import pandas first."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _refusal(kind: str, place: str, config: TokenizeConfig) -> BadData:
    if kind == "too_long":
        return BadData(
            "A row is longer than max_length.",
            where=place,
            expected=f"at most {config.max_length} tokens (training_config.max_length)",
            next_step="raise training_config.max_length, or set data.too_long to drop or truncate",
        )
    return BadData(
        "A message's text holds one of the tokenizer's control tokens; it would end or begin a turn.",
        where=place,
        next_step="mend the row, or set data.special_tokens to drop (or to allow, if you mean it)",
    )


def _audit(source: Path, template: ChatTemplate, config: TokenizeConfig) -> list[dict[str, Any]]:
    """Show what is learned in the first rows, and check on them that training reads what serving will send."""
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(20), strict=False)]
    chats = [row["messages"] for row in rows]
    shown = []
    for row, one, prompt in zip(rows, template.encode(chats, config.loss_on), template.prompt_ids(chats), strict=True):
        learned = one.ids[one.labels != IGNORED]
        shown.append(
            {
                "place": row["place"],
                "learned": template.tokenizer.decode(learned.tolist(), skip_special_tokens=False)[:500],
                "tokens": len(one.ids),
                "learned_tokens": len(learned),
                "prompt_is_what_serving_sends": one.ids[: one.prompt].tolist() == prompt,
            }
        )
    return shown


def _check_prompts(audit: list[dict[str, Any]]) -> None:
    """Compare what is learned with what will be asked.

    A row can differ by itself: an answer that begins with a new line makes one token with the one before it. Where all do,
    it is the template.

    Raises:
        BadModel: no row's prompt is what serving would send for it.
    """
    unlike = [one["place"] for one in audit if not one["prompt_is_what_serving_sends"]]
    if unlike and len(unlike) == len(audit):
        raise BadModel(
            "The chat template renders a prompt otherwise than it stands in a whole chat: the model would be asked in other "
            "tokens than it learned.",
            where="chat_template",
            expected="the same ids before the answer with add_generation_prompt and without",
            got=f"{len(unlike)} of the first {len(audit)} rows differ, such as {unlike[0]}",
            next_step="make what add_generation_prompt adds the head of an answer, and put {% generation %} behind it",
        )
    if unlike:
        log.warning("%d of the first %d rows' prompts are other tokens than serving will send, such as %s.",
                    len(unlike), len(audit), unlike[0])  # fmt: skip
