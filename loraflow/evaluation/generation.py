"""Generate greedy answers in batches: rows are sorted by length and padded, and a shared prefix is computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.base.architecture import is_tested
from loraflow.base.generation_settings import ONE_ANSWER, forced_logits, forget_earlier_prompts
from loraflow.base.longrope import Side, fixed_angles
from loraflow.evaluation.answers_file import GeneratedAnswer as GeneratedAnswer
from loraflow.evaluation.answers_file import append_answers, read_answers
from loraflow.evaluation.prefix_cache import SharedPrefix, groups_of, has_plain_cache, innermost, shared_prefix
from loraflow.hardware.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


SINGLE_PROCESS = ProcessGroup()


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    batch_size: int,
    done_file: Path | None = None,
    owner: str = "",
    on_batch: Callable[[int], None] | None = None,
    inserted: str = "",
    group: ProcessGroup = SINGLE_PROCESS,
) -> list[GeneratedAnswer]:
    """Return an answer for each prompt, given as token ids.

    Finished batches are appended to `done_file`, so that a retry resumes after them. In a group, each device computes
    whole batches, so the answers equal those of a single device, and appends to its own file; a retry reads all files.

    Args:
        model: the model, in evaluation mode.
        done_file: finished answers, a line of JSON each; None keeps nothing.
        owner: identity of model, prompts and settings. Finished answers of another owner are not used.
        inserted: text that the chat template writes before each answer; it is removed from the answers.
    """
    finished = {} if done_file is None else read_answers(done_file, owner, len(prompts))
    answers = [finished.get(i) for i in range(len(prompts))]
    if done_file is not None and not group.is_main:
        done_file = done_file.with_stem(f"{done_file.stem}-{group.rank}")
    if len(prompts) > 1:
        counts_padding = _counts_padding(model.generation_config, min(map(len, prompts)))
        batch_size = 1 if counts_padding else _exact_batch_size(model, tokenizer, batch_size, group)
    number = 0
    for rows in groups_of(model, [len(prompt) for prompt in prompts], batch_size, max_new_tokens):
        with fixed_angles(model, rows.switch, rows.side):
            generator: _Generator | None = None
            for batch in rows.batches():
                number += 1
                if not group.owns(number - 1) or all(answers[i] is not None for i in batch):
                    continue
                if generator is None:
                    grouped = [prompts[i] for i in rows.rows]
                    generator = _Generator.prepare(
                        model, tokenizer, grouped, stop_ids, max_new_tokens, inserted, rows.side
                    )
                found = dict(zip(batch, generator.answer([prompts[i] for i in batch]), strict=True))
                for i, answer in found.items():
                    answers[i] = answer
                if done_file is not None:
                    append_answers(done_file, owner, found)
                if on_batch is not None:
                    # The other devices have done about as many.
                    done = min(number * batch_size, len(prompts))
                    on_batch(sum(answer is not None for answer in answers) if group.size == 1 else done)
    return [answer for answer in group.gather_results(answers) if answer is not None]


def _counts_padding(settings: GenerationConfig, shortest: int) -> bool:
    """Tell whether settings of generation_config.json count the padding of a row as its tokens."""
    if settings.no_repeat_ngram_size or settings.encoder_no_repeat_ngram_size or (settings.min_length or 0) > shortest:
        return True
    biases = settings.sequence_bias or []
    words = [*(settings.bad_words_ids or []), *(biases if isinstance(biases, dict) else (ids for ids, _ in biases))]
    # Of two tokens, the first is compared with the row's last one, which is no padding.
    return any(len(word) > 2 for word in words)


def _exact_batch_size(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, group: ProcessGroup
) -> int:
    """Return the batch size, or 1 if padding would change the model's answers."""
    if batch_size == 1:
        return 1
    # The main process decides: devices with other batches would leave rows out.
    is_exact = batches_are_exact(model, tokenizer.pad_token_id) if group.is_main else None
    return batch_size if group.broadcast(is_exact) else 1


@dataclass(frozen=True)
class _Generator:
    """A model, and what all batches of prompts have in common."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    max_new_tokens: int
    prefix: SharedPrefix | None  # computed once for all batches
    preallocates: bool  # the model can use a preallocated cache
    use_cuda_graph: bool  # capture the decoding step as a CUDA graph
    inserted: str  # removed from the start of answers

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        stop_ids: list[int],
        max_new_tokens: int,
        inserted: str,
        side: Side = "unchanged",
    ) -> _Generator:
        """Compute the shared prefix, and choose how to decode. The model's angles are those of the side."""
        from loraflow.evaluation import greedy_decoding

        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths, default=0) + max_new_tokens
        use_cuda_graph = greedy_decoding.is_supported(model)
        # transformers' generate drops a longrope model's cache of fewer tokens than the switch, in some versions with
        # the tokens that are in it.
        keeps_prefix = bool(prompts) and (side != "long" or use_cuda_graph)
        # At least one id of each row is left for its batch, whose logits begin the answer.
        prefix = shared_prefix(model, prompts, min(lengths) - 1, longest, side) if keeps_prefix else None
        if prefix is not None and not prefix_is_exact(model, tokenizer.pad_token_id):
            prefix = None
        preallocates = bool(prompts) and has_plain_cache(model, longest, side)
        return cls(model, tokenizer, stop_ids, max_new_tokens, prefix, preallocates, use_cuda_graph, inserted)

    def answer(self, prompts: Sequence[list[int]]) -> list[GeneratedAnswer]:
        """Return the answers of one batch."""
        ids, mask = self._pad(prompts)
        new_ids = self._generate(ids.to(self.model.device), mask.to(self.model.device), self._cache(*ids.shape))
        return [self._read(new) for new in new_ids.tolist()]

    def _pad(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids [rows, width] and their mask. Padding is on the left, but behind the shared prefix."""
        import torch

        rows, width = len(prompts), max(len(prompt) for prompt in prompts)
        prefix = self.prefix.ids if self.prefix else []
        shared = len(prefix)
        ids = torch.full((rows, width), self.tokenizer.pad_token_id)
        mask = torch.zeros((rows, width), dtype=torch.long)
        settings = self.model.generation_config
        penalties = settings.repetition_penalty, settings.encoder_repetition_penalty
        penalizes = any(penalty not in (None, 1) for penalty in penalties)
        for row, prompt in enumerate(prompts):
            if penalizes:  # padding too, so it is a token of the row
                ids[row] = prompt[0]
            rest = prompt[shared:]
            ids[row, width - len(rest) :] = torch.tensor(rest)
            mask[row, width - len(rest) :] = 1
        if prefix:
            ids[:, :shared], mask[:, :shared] = torch.tensor(prefix), 1
        return ids, mask

    def _cache(self, rows: int, width: int) -> DynamicCache | None:
        """Return a cache for one batch, with the shared prefix; None for a model that brings its own kind."""
        from loraflow.evaluation.greedy_decoding import ALIGNED, preallocated_cache

        capacity = width + self.max_new_tokens
        if self.use_cuda_graph:
            capacity = -(-capacity // ALIGNED) * ALIGNED
        if self.prefix:
            return self.prefix.cache(rows, capacity)
        return preallocated_cache(self.model.config.num_hidden_layers, capacity) if self.preallocates else None

    def _generate(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Return the new ids [rows, up to max_new_tokens]; pads follow a row's stop id."""
        import torch

        from loraflow.evaluation import greedy_decoding

        if self.use_cuda_graph and cache is not None:
            return greedy_decoding.decode(
                self.model,
                ids,
                mask,
                cache,
                stop_ids=self.stop_ids,
                max_new_tokens=self.max_new_tokens,
                pad_id=self.tokenizer.pad_token_id,
            )
        forget_earlier_prompts(self.model)
        with torch.inference_mode():
            output: Tensor = self.model.generate(  # type: ignore[operator]  # hidden by __getattr__ of nn.Module
                input_ids=ids,
                attention_mask=mask,
                **({"past_key_values": cache} if cache is not None else {}),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                **ONE_ANSWER,
            )
        return output[:, ids.shape[1] :]

    def _read(self, new_ids: list[int]) -> GeneratedAnswer:
        """Return the answer up to its stop id."""
        end = next((at for at, token in enumerate(new_ids) if token in self.stop_ids), None)
        answer = new_ids[:end]
        text = self.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list of texts is for a list of lists
        return {
            "text": text.removeprefix(self.inserted),
            "tokens": len(answer),
            "finish": "length" if end is None else "stop",
        }


_LENGTHS = (5, 14)  # tokens of two prompts
_PREFIX = 6  # tokens that both share
_NEW = 3  # tokens of their answers
_TOLERANCE = {"float32": 1e-3}  # share of the logits' norm; layers with a state that reads padding change by far more
_ROUNDING = 0.1  # the same in 16 bits, where experts may change


def batches_are_exact(model: PreTrainedModel, pad_id: int) -> bool:
    """Compare a prompt's logits in a padded batch with those of the prompt alone, for untested architectures.

    Some layers with a state, and some with an index of earlier tokens, ignore the mask and read the padding.
    """
    return is_tested(model.config) or _is_exact(model, pad_id, 0, "Answers are generated one at a time")


def prefix_is_exact(model: PreTrainedModel, pad_id: int) -> bool:
    """Compare the same with padding between a shared prefix and the rest of a prompt, for untested architectures.

    MPT's bias for distances counts the padding: the prefix would be farther away.
    """
    return is_tested(model.config) or _is_exact(model, pad_id, _PREFIX, "Prompts are computed without a shared prefix")


def _is_exact(model: PreTrainedModel, pad_id: int, prefix: int, otherwise: str) -> bool:
    import torch

    model = innermost(model)  # a stand-in that samples would draw other tokens in both passes
    size = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, size, (length,), generator=draw) for length in _LENGTHS]
    shared = torch.randint(0, size, (prefix,), generator=draw)
    width = prefix + max(_LENGTHS)
    ids = torch.full((2, width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for part, at in ((shared, 0), (prompt, width - len(prompt))):
            ids[row, at : at + len(part)], mask[row, at : at + len(part)] = part, 1
    try:
        together = forced_logits(model, ids, mask, pad_id, _NEW)[:, 0]
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning("%s: this architecture does not support batches: %s", otherwise, error)
        return False
    first = torch.cat([shared, prompts[0]])[None]
    alone = forced_logits(model, first, torch.ones_like(first), pad_id, _NEW)[:, 0]
    difference = float(((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    if difference <= _TOLERANCE.get(str(model.dtype).removeprefix("torch."), _ROUNDING):
        return True
    log.warning(
        "%s: padding changes the logits of architecture %s by %.2g of their norm.",
        otherwise,
        model.config.model_type,
        difference,
    )
    return False
