"""Stage tokenize: convert checked rows to ids, labels and lengths, plan the packing, and report on the loss mask.

`train/` and `validation/` open with `datasets.load_from_disk`, `packing.parquet` with pandas.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.tokens.chunk_encoder import Chunk, Problem, Problems, encoded_chunks, has_weights, key_of_job
from loraflow.data.tokens.loss_mask import ChatTemplate, vocabulary_of
from loraflow.data.tokens.mask_view import audit, sample_rows, warn_of_other_prompts
from loraflow.data.tokens.packing import best_fit_decreasing
from loraflow.data.tokens.positions import Positions
from loraflow.data.tokens.token_files import TokenBatch, batches_of, open_shard, write_packing
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.data.tokens.token_report import Lengths, LongRow, TokenReport, longest_of
from loraflow.failures import BadData, BadModel
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.chunk_cache import ChunkCache

log = logging.getLogger("loraflow")


@dataclass(frozen=True)
class TokenizedFile:
    """A file that was tokenized."""

    lengths: np.ndarray  # tokens of each row, int32
    supervised: int  # tokens that are learned
    largest_id: int
    read: Lengths  # of all rows, with those that are left out or cut

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Packing:
    """The figures of the packing plan."""

    rows: int
    utilisation: float  # share of the packed rows that holds tokens, not padding


@dataclass(frozen=True)
class Figures:
    """The figures of the stage."""

    train: TokenizedFile
    validation: TokenizedFile | None
    packing: Packing | None
    problems: Counter[Problem]  # rows that were dropped or truncated

    def as_json(self) -> dict[str, JsonValue]:
        """Return the figures as JSON values. Figures of parts that do not exist are left out."""
        train, validation, packing = self.train, self.validation, self.packing
        figures: dict[str, JsonValue] = {
            "train_rows": len(train.lengths),
            "train_tokens": train.tokens,
            "supervised_tokens": train.supervised,
        }
        if validation is not None:
            figures |= {"validation_rows": len(validation.lengths), "validation_tokens": validation.tokens}
        if packing is not None:
            figures |= {"packed_rows": packing.rows, "packing_utilisation": packing.utilisation}
        figures |= {
            "longest": int(train.lengths.max()),
            "median_length": int(np.median(train.lengths)),
            "supervised_share": round(train.supervised / train.tokens, 4),
        }
        return figures | {f"rows_{problem}": count for problem, count in self.problems.items()}


def run(job: Job[TokenizeConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Tokenize training and validation rows.

    Raises:
        BadData: a row is too long, or contains a control token, and the policy for that is error; or no row has a token
            to learn; or a row has more tokens than the model has positions.
        BadModel: a token has no row in the base's embeddings.
    """
    config, template = job.config, ChatTemplate(inputs["base"])
    processes = job.runtime.processes or os.cpu_count() or 1
    rows, vocabulary = inputs["rows"], vocabulary_of(inputs["base"])
    positions = Positions.of_folder(inputs["base"])
    problems: Counter[Problem] = Counter()
    cache = ChunkCache.beside(progress.work, job.stage)
    key = b"" if cache is None else key_of_job(job)

    def tokenize(name: str) -> TokenizedFile:
        chunks = encoded_chunks(rows / f"{name}.jsonl", template, config, processes, cache, key)
        weighted = has_weights(rows / f"{name}.jsonl")
        file = _write(chunks, out / name, config, progress, problems, weighted=weighted)
        refuse_ids_beyond(file.largest_id, vocabulary, template)
        positions.check([int(file.lengths.max(initial=0))], f"{name} rows")
        return file

    train = tokenize("train")
    validation = tokenize("validation") if (rows / "validation.jsonl").stat().st_size else None
    if len(train.lengths) == 0:
        raise BadData(
            "No training row has a token to learn.",
            where="tokenize",
            got=", ".join(f"{problem}: {count}" for problem, count in problems.items()) or "no rows",
            next_step="raise training_config.max_length, or see data.too_long and data.special_tokens",
        )
    packing = _pack(train, config.max_length, out) if config.packing else None
    figures = Figures(train, validation, packing, problems).as_json()
    audited = audit(rows / "train.jsonl", template, config)
    warn_of_other_prompts(audited)
    shown: list[JsonValue] = [asdict(row) for row in audited]
    text = json.dumps({"figures": figures, "audit": shown}, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    samples = sample_rows(rows / "train.jsonl", template, config)
    for_people: dict[str, JsonValue] = TokenReport(lengths=train.read, samples=samples).model_dump(mode="json")
    return Summary(figures=figures, report={"audit": shown[:2], **for_people})


def _write(
    chunks: Iterable[Chunk],
    target: Path,
    config: TokenizeConfig,
    progress: Progress,
    problems: Counter[Problem],
    *,
    weighted: bool,
) -> TokenizedFile:
    """Write encoded rows to an Arrow folder, and add their problems to `problems`. `weighted` adds the tokens' weights."""
    none = np.empty(0, np.int32)
    lengths, all_lengths = [none], [none]
    longest: list[LongRow] = []
    supervised = rows = largest_id = cached = 0

    def noted() -> Iterator[tuple[TokenBatch, np.ndarray]]:
        nonlocal longest, cached
        for chunk in chunks:
            problems.update(chunk.problems.counts)
            _refuse(chunk.problems, config)
            all_lengths.append(chunk.lengths)
            longest = longest_of([*longest, *chunk.longest])
            cached += 0 if chunk.is_new else len(chunk.lengths)
            yield chunk.batch, chunk.kept

    with open_shard(target, weighted=weighted) as append:
        for batch in batches_of(noted()):
            append(batch)
            lengths.append(batch.lengths)
            supervised += int((batch.labels != IGNORED).sum())
            rows += len(batch.lengths)
            largest_id = max(largest_id, int(batch.ids.max(initial=0)))
            progress(rows=rows)
    if cached:
        log.info("%s: %d of %d rows were tokenized before", target.name, cached, sum(map(len, all_lengths)))
    read = Lengths.of(np.concatenate(all_lengths), longest, max_length=config.max_length, too_long=config.too_long)
    return TokenizedFile(np.concatenate(lengths), supervised, largest_id, read)


def _pack(train: TokenizedFile, max_length: int, out: Path) -> Packing:
    row_of = best_fit_decreasing(train.lengths, max_length)
    write_packing(out / "packing.parquet", row_of)
    rows = int(row_of.max()) + 1
    return Packing(rows, utilisation=round(train.tokens / rows / max_length, 4))


def _refuse(problems: Problems, config: TokenizeConfig) -> None:
    if config.too_long == "error" and "too_long" in problems.first:
        raise BadData(
            "A row is longer than max_length.",
            where=problems.first["too_long"],
            expected=f"at most {config.max_length} tokens (training_config.max_length)",
            next_step="raise training_config.max_length, or set data.too_long to drop or truncate",
        )
    if config.special_tokens == "error" and "special_tokens" in problems.first:
        raise BadData(
            "A message contains one of the tokenizer's control tokens, which would start or end a turn.",
            where=problems.first["special_tokens"],
            next_step="correct the row, or set data.special_tokens to drop (or to allow, if the token is intended)",
        )


def refuse_ids_beyond(largest: int, rows: int | None, template: ChatTemplate) -> None:
    """Refuse token ids that the embeddings have no row for, before training starts.

    Raises:
        BadModel: the vocabulary was extended without its embeddings.
    """
    if rows is not None and largest >= rows:
        raise BadModel(
            "The chats contain tokens that have no embedding.",
            where="tokenize",
            expected=f"ids below {rows}",
            got=f"{template.tokenizer.id_to_token(largest)}, id {largest}",
            next_step="resize and save the base's embeddings first, then train on that base",
        )
