"""What `loraflow plan` says beside the stages: sources of a mixture, tokens, memory, guards with too few rows to pass."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraflow.config.data_sources import DataSource
from loraflow.data.chats import GENERAL_FILE
from loraflow.data.checks.check_report import CheckReport
from loraflow.data.checks.row_limits import source_lines
from loraflow.evaluation.power import MINIMUM_ROWS, is_too_strict, margin_of_unchanged, not_passed, rows_for_margin
from loraflow.execution.cache import look_up
from loraflow.execution.deal import checked_rows, compared_rows, group_sizes, rows_of_a_look
from loraflow.execution.plan import base_config, vocabulary_of
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, DamagedLog
from loraflow.stages import CHECK_GENERAL, EVALUATE, RESOLVE_BASE, TOKENIZE
from loraflow.store import Ref, read_table
from loraflow.training import memory
from loraflow.training.adapter_rank import adapter_rank
from loraflow.training.memory import MemoryParts, Recompute, StepMemory, generation_parts, training_parts

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.config import Recipe
    from loraflow.evaluation.score import HeldoutRow

log = logging.getLogger("loraflow")


def slice_power_lines(workspace: Workspace) -> list[str]:
    """Return which guards of parts even an unchanged model does not pass; none if the rows are not in the store yet.

    Lengths are those of the references' characters, because nothing is tokenized yet.
    """
    recipe, store = workspace.recipe, workspace.store
    rules = recipe.gate.slices
    rows = checked_rows(workspace) if rules else None
    compared = rows_of_a_look(workspace, rows) if rows else []
    if rows is None or not compared:
        return []
    from loraflow.data.checks.heldout_fields import FILE, parse_field_values
    from loraflow.evaluation.guards import power_lines, unscored_parts
    from loraflow.evaluation.power import largest_differences
    from loraflow.evaluation.slices import divide

    fields = parse_field_values(store.read(rows, FILE)) if recipe.slice_fields else {}
    scored = {row.id: row for _, row in compared}
    table = _table([row for _, row in compared])
    everything = _table([row for _, row in compared_rows(store.read(rows, "heldout.jsonl"), None, 0)])
    reaches = largest_differences(math.log(vocabulary_of(workspace)), recipe.gate.score_ranges)
    found: list[str] = []
    for by, margins in rules.items():
        parts = {str(part): group_sizes([scored[row] for row in part.ids]) for part in divide(table, by, fields)}
        found += power_lines(parts, margins, recipe.gate.confidence, reaches)
    unscored = unscored_parts(everything, scored.keys(), rules, fields)
    return [*found, *(f"  {part}: no row is scored, so no model is promoted (gate.slices)" for part in unscored)]


def _table(rows: Sequence[HeldoutRow]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "prompt": [json.dumps(row.messages[:-1], ensure_ascii=False) for row in rows],
            "reference": [row.messages[-1]["content"] or "" for row in rows],
            "reference_tokens": 0,
        }
    )


def planned_sources(workspace: Workspace) -> list[str]:
    """Return a line for each source: its rows if they have been checked, otherwise where it is read."""
    sources = workspace.recipe.data.sources
    if not sources:
        return []
    rows = checked_rows(workspace)
    if rows is None:
        return [_line(source) for source in sources]
    return source_lines(CheckReport.model_validate(workspace.store.manifest(rows).report))


def _line(source: DataSource) -> str:
    settings = {
        "weight": None if source.weight == 1 else f"{source.weight:g}",
        "limit": source.limit,
        "split": source.split,
    }
    return f"source {source.key}: {source.source}" + "".join(f", {k} {v}" for k, v in settings.items() if v is not None)


def forgetting_lines(workspace: Workspace) -> list[str]:
    """Return for each score of gate.forgetting how many rows unchanged outputs need to pass, and how many there are.

    Empty if the recipe asks for nothing, or if the general rows are not in the store yet.
    """
    store, gate = workspace.store, workspace.recipe.gate
    rows = checked_rows(workspace) if gate.forgetting else None
    general = look_up(store, workspace.job(CHECK_GENERAL, {"rows": rows})).ref if rows else None
    return [] if general is None else list(_lines(workspace, store.read(general, GENERAL_FILE)))


def _lines(workspace: Workspace, rows: bytes) -> Iterator[str]:
    from loraflow.data.checks.general import group_sizes as general_sizes

    gate = workspace.recipe.gate
    for score, margin in gate.forgetting.items():
        sizes, metric, reach = general_sizes(rows, score), "accuracy", 1.0
        if score == "loss":
            metric, reach = "token_loss", math.log(vocabulary_of(workspace))
        kind = metric if max(sizes, default=1) == 1 else ""
        needed = max(rows_for_margin(margin, gate.confidence, kind, reach) or 0, MINIMUM_ROWS)
        unchanged = margin_of_unchanged(len(sizes), gate.confidence, metric, reach, sizes) if sizes else None
        if len(sizes) < needed or is_too_strict(margin, unchanged):
            yield not_passed(f"general_{score}", "", margin, needed, unchanged, sizes)
        else:
            needs = f"a margin of {margin:g} needs {needed} rows, you have {len(sizes)}"
            yield f"  general_{score}: unchanged outputs pass: {needs}"


def warn_of_other_tokens(workspace: Workspace) -> None:
    """Log before the training what `token_lines` finds."""
    try:
        lines = token_lines(workspace)
    except DamagedLog:  # the run stops at it after the training, when it asks for the champion
        return
    for line in lines:
        log.warning("%s", line)


def token_lines(workspace: Workspace) -> list[str]:
    """Return a warning if the champion splits references into other tokens than the recipe's base, or may do so.

    It is certain where base and champion were scored on the recipe's rows. Otherwise only the files of tokenizer and chat
    template are compared. Empty if these are equal, if the gate compares no loss, or if base or champion are not in the
    store.
    """
    store, rules = workspace.store, workspace.recipe.gate
    named = {
        rules.primary,
        *rules.guards,
        *rules.worst,
        *(name for margins in rules.slices.values() for name in margins),
    }
    losses = [name for name, used in (("token_loss", named), ("loss", rules.forgetting)) if name in used]
    head = workspace.log.head() if losses else None
    base = look_up(store, workspace.job(RESOLVE_BASE, {})).ref if head else None
    if head is None or base is None:
        return []
    try:
        of_champion = store.manifest(head.merged).input_refs(store.uri).get("base")
        if of_champion is None or of_champion.facets.get("tokenizer") == base.facets.get("tokenizer"):
            return []
        differs = _rows_with_other_tokens(workspace, base, head.merged)
    except CorruptArtifact:  # the plan of the champion's scores says so
        return []
    if differs == 0:
        return []
    where = "gate.forgetting" if losses == ["loss"] else "gate"
    found = "has another tokenizer or chat template than the base"
    if differs is None:
        found += f": if it splits the references into other tokens, {where} refuses to compare {' and '.join(losses)}"
    else:
        found += f", and other tokens in {differs} references: {where} will refuse to compare {' and '.join(losses)}"
    return [f"champion: it {found}, after the training. Compare scores of answers, or set another register.model"]


def _rows_with_other_tokens(workspace: Workspace, base: Ref, champion: Ref) -> int | None:
    """Return in how many rows the references have other numbers of tokens; None if the models were not scored."""
    rows = checked_rows(workspace)
    models = () if rows is None else (base, champion)
    jobs = [workspace.job(EVALUATE, {"model": model, "rows": rows}) for model in models if rows is not None]
    scores = [look_up(workspace.store, job).ref for job in jobs]
    if not scores or None in scores:
        return None
    from loraflow.evaluation.pairing import rows_with_other_tokens

    first, second = (read_table(workspace.store, ref).set_index("id").sort_index() for ref in scores if ref is not None)
    return rows_with_other_tokens(first, second, "champion")


@dataclass(frozen=True)
class PlannedMemory:
    """The memory of training and evaluation, in bytes."""

    device: Literal["cpu", "cuda"]
    least: float  # memory of a training that recomputes all activations
    training: MemoryParts  # at full speed
    evaluation: MemoryParts


def planned_memory(workspace: Workspace) -> PlannedMemory | None:
    """Return the memory of a recipe's stages on this machine's device; None if the base's config is not on this machine.

    Before the rows are tokenized, they are assumed to have training_config.max_length tokens.
    """
    recipe, config = workspace.recipe, base_config(workspace)
    shape = memory.shape_of(json.loads(config.read_text(encoding="utf-8"))) if config else None
    if shape is None:
        return None
    training, rank = recipe.training_config, adapter_rank(shape, [recipe.peft_config])
    width = 2 if training.bf16 or training.fp16 else {"float32": 4}.get(recipe.base.dtype, 2)
    weights = recipe.base.quantization or recipe.base.dtype
    device, (longest, learned) = _device(recipe), _rows(workspace)
    batch = StepMemory(_tokens(recipe, device, longest), learned, _recompute(recipe, device))
    least = memory.least_bytes(shape, weights, rank, longest, width)
    scored = recipe.evaluation
    return PlannedMemory(
        device,
        least,
        training_parts(shape, device, weights, rank, batch, width=width),
        generation_parts(
            shape,
            device,
            scored.dtype,
            recipe.runtime.eval_batch_size,
            longest,
            scored.max_new_tokens,
            width=4 if scored.dtype == "float32" else 2,
        ),
    )


def _tokens(recipe: Recipe, device: str, longest: int) -> int:
    """Return the tokens that are computed at a time: of padded rows on a CPU, of concatenated rows on a GPU."""
    runtime, training = recipe.runtime, recipe.training_config
    if device == "cpu":
        return (runtime.micro_batch or training.per_device_train_batch_size) * longest
    return runtime.micro_tokens or max(longest, memory.ENOUGH_TOKENS)


def _recompute(recipe: Recipe, device: str) -> Recompute:
    """Return what the recipe or the runtime asks to be recomputed; what `auto` chooses is not known before the training."""
    asked = recipe.runtime.checkpointing
    if asked == "elementwise" and (device == "cpu" or recipe.runtime.compile == "off"):
        return "none"  # only compiled layers do so
    if asked != "auto":
        return asked
    return "full" if recipe.training_config.gradient_checkpointing else "none"


def _device(recipe: Recipe) -> Literal["cpu", "cuda"]:
    if recipe.runtime.device != "auto":
        return recipe.runtime.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(workspace: Workspace) -> tuple[int, float]:
    """Return the tokens of the longest row, and the share of the tokens that is learned."""
    store = workspace.store
    rows = checked_rows(workspace)
    base = look_up(store, workspace.job(RESOLVE_BASE, {})).ref
    tokens = look_up(store, workspace.job(TOKENIZE, {"rows": rows, "base": base})).ref if rows and base else None
    figures = store.manifest(tokens).figures if tokens else {}
    longest, learned = figures.get("longest"), figures.get("supervised_share")
    if workspace.recipe.training_config.packing or not isinstance(longest, int):
        longest = workspace.recipe.training_config.max_length
    return longest, learned if isinstance(learned, float) else 1.0
