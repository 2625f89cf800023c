"""Generate answers for evaluation on the CPU: batches against single prompts, with and without a shared prefix.

python benchmarks/generation.py MODEL_FOLDER [DTYPE [ROWS [NEW_TOKENS]]]

Compares the answers too. Prints wall and CPU seconds of each way; CPU seconds are reliable on a loaded machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from measure import print_row

from loraflow.base.load import load_model, load_tokenizer, stop_ids
from loraflow.config import Runtime
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.evaluation import generation, likelihood
from loraflow.evaluation.generation import GeneratedAnswer
from loraflow.evaluation.prefix_cache import common_prefix_length, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraflow.data.tokens.loss_mask import Encoded

BATCH = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A result with the seconds that it took."""

    result: T
    wall: float
    cpu: float


def main() -> None:
    """Print the table."""
    folder, dtype = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "float32"
    rows, new = (int(sys.argv[k]) if len(sys.argv) > k else default for k, default in ((3, 64), (4, 64)))
    chats = [json.loads(line)["messages"] for line in Path("data/heldout.jsonl").open()][:rows]
    template, tokenizer = ChatTemplate(folder), load_tokenizer(folder)
    model = load_model(folder, dtype, Runtime(device="cpu"))
    prompts = template.prompt_ids(chats)
    answers = partial(time_answers, model, tokenizer, stop_ids(folder))

    shared, total = common_prefix_length(prompts, 10**6), sum(map(len, prompts))
    saved = shared * (rows - 1) / total
    print(f"{dtype}, {rows} prompts of {total / rows:.0f} tokens, of which {shared} are shared: {saved:.0%} of all")
    answers(prompts[:4], 4, 2, shared=True)  # warm up
    print_row("what", "rows", "wall s", "CPU s", "tokens/s")
    separate = answers(prompts, BATCH, new, shared=False)
    print_row(f"{BATCH} at a time", rows, separate.wall, separate.cpu, speed(separate))
    with_prefix = answers(prompts, BATCH, new, shared=True)
    print_row(f"{BATCH} at a time, shared prefix", rows, with_prefix.wall, with_prefix.cpu, speed(with_prefix))
    prompts_only = answers(prompts, BATCH, 1, shared=False)
    print_row("the prompts alone", rows, "", prompts_only.cpu, "")
    predicted = separate.cpu / (separate.cpu - saved * prompts_only.cpu)
    measured = separate.cpu / with_prefix.cpu
    print(f"shared prefix: {measured:.2f} × by CPU; predicted, from the prompts' share, {predicted:.2f} ×")
    print(f"{differences(separate.result, with_prefix.result)} of {rows} answers differ from those without it")
    compare_losses(model, template.encode(chats, "last_assistant"), tokenizer.pad_token_id)
    some = min(16, rows)
    single = answers(prompts[:some], 1, new, shared=False)
    print_row("single prompts", some, single.wall, single.cpu, speed(single))
    print(f"{differences(single.result, separate.result[:some])} of {some} differ from single prompts")


def compare_losses(model: PreTrainedModel, rows: list[Encoded], pad_id: int) -> None:
    """Print the time of likelihoods without and with a shared prefix, and how far they differ."""

    def losses(*, shared: bool) -> Timed[list[tuple[float, int]]]:
        share_prefixes(shared)
        return timed(lambda: likelihood.answer_losses(model, rows, pad_id, BATCH))

    separate = losses(shared=False)
    print_row("losses", len(rows), separate.wall, separate.cpu, "")
    with_prefix = losses(shared=True)
    print_row("losses, shared prefix", len(rows), with_prefix.wall, with_prefix.cpu, "")
    largest = max(abs(a - b) / max(1, n) for (a, n), (b, _) in zip(separate.result, with_prefix.result, strict=True))
    ratio = separate.cpu / with_prefix.cpu
    print(f"shared prefix: {ratio:.2f} × by CPU; losses differ by at most {largest:.1e} nats per token")


def time_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    prompts: list[list[int]],
    batch: int,
    tokens: int,
    *,
    shared: bool,
) -> Timed[list[GeneratedAnswer]]:
    share_prefixes(shared)
    return timed(
        lambda: generation.generate_answers(
            model, tokenizer, prompts, batch_size=batch, stop_ids=stops, max_new_tokens=tokens
        )
    )


def share_prefixes(shared: bool) -> None:
    for module in (generation, likelihood):
        module.shared_prefix = shared_prefix if shared else lambda *_: None


def speed(answers: Timed[list[GeneratedAnswer]]) -> float:
    return sum(answer["tokens"] for answer in answers.result) / answers.wall


def differences(answers: list[GeneratedAnswer], others: list[GeneratedAnswer]) -> int:
    return sum(answer != other for answer, other in zip(answers, others, strict=True))


def timed(work: Callable[[], T]) -> Timed[T]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Timed(result, time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
