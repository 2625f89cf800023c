"""Plan a merge: which tensors of the base the adapter updates or replaces. Only headers and the config are read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.completeness import saved_name
from loraflow.adapters.lora_updates import PREFIX
from loraflow.adapters.nf4 import Nf4
from loraflow.base.stored_weights import TensorEntry, read_entries
from loraflow.failures import BadModel

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of the floating types that a merge touches
# Settings that the merge from disk to disk does not support; adapters with one of them are merged by peft.
_NEEDS_PEFT = ("lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora", "target_parameters", "arrow_config",
               "alora_invocation_tokens", "layer_replication", "use_bdlora", "megatron_config")  # fmt: skip


@dataclass(frozen=True)
class MatrixUpdate:
    """The update of one matrix: where A [r, in] and B [out, r] are stored, and their scale."""

    down: TensorEntry  # A
    up: TensorEntry  # B
    scale: float
    magnitude: TensorEntry | None = None  # DoRA's, [out]
    embedding: bool = False  # then the base's matrix is [in, out]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the base's matrix."""
        out, inner = self.up.shape[0], self.down.shape[1]
        return (inner, out) if self.embedding else (out, inner)

    @property
    def entries(self) -> list[TensorEntry]:
        """The tensors that it consists of."""
        return [entry for entry in (self.down, self.up, self.magnitude) if entry is not None]


@dataclass(frozen=True)
class MergePlan:
    """What an adapter does to a base, by the names of the base's tensors."""

    updates: Mapping[str, MatrixUpdate]
    replaced: Mapping[str, TensorEntry]  # fully trained (modules_to_save): the adapter's tensor replaces the base's
    nf4: Nf4 | None = None  # how training quantized the tensors in `quantized`
    quantized: frozenset[str] = frozenset()  # names of tensors to quantize and dequantize before the merge

    @property
    def adapter_entries(self) -> list[TensorEntry]:
        """All tensors of the adapter."""
        return [*(entry for update in self.updates.values() for entry in update.entries), *self.replaced.values()]


def plan_merge(config: AdapterConfig, adapter: Path) -> MergePlan | None:
    """Plan a merge that uses every tensor of the adapter once, or return None if only peft can merge it.

    Args:
        config: of LoRA, as `validation.check_config` ensures.

    Raises:
        BadModel: the adapter is damaged.
    """
    entries = {saved_name(entry.name): entry for entry in read_entries(adapter / "adapter_model.safetensors")}
    if config.enabled(_NEEDS_PEFT) or config.base_was_modified:
        return None
    updates: dict[str, MatrixUpdate] = {}
    for first, second, embedding in (
        (".lora_A.weight", ".lora_B.weight", False),
        (".lora_embedding_A", ".lora_embedding_B", True),
    ):
        for stem in sorted(name.removesuffix(first) for name in entries if name.endswith(first)):
            down, up = entries[stem + first], entries.get(stem + second)
            magnitude = entries.get(f"{stem}.lora_magnitude_vector")
            if up is None or len(down.shape) != 2 or len(up.shape) != 2 or (embedding and magnitude is not None):
                return None  # half a pair, a convolution, or DoRA's norms over the vocabulary
            if down.shape[0] != up.shape[1]:
                return None
            module = stem.removeprefix(PREFIX)
            scale = config.scale_of(module, down.shape[0])
            updates[f"{module}.weight"] = MatrixUpdate(down, up, scale, magnitude, embedding)
    if bool(config.use_dora) != any(update.magnitude for update in updates.values()):
        return None
    replaced = _fully_trained_tensors(entries, updates)
    return None if replaced is None else MergePlan(updates, replaced)


def _fully_trained_tensors(
    entries: Mapping[str, TensorEntry], updates: Mapping[str, MatrixUpdate]
) -> dict[str, TensorEntry] | None:
    """Return the fully trained tensors by their names in the base; None if only peft can place them."""
    used = {entry for update in updates.values() for entry in update.entries}
    rest = [name for name, entry in entries.items() if entry not in used]
    replaced = {name.removeprefix(PREFIX).replace(".base_layer.", "."): entries[name] for name in rest}
    if any(".lora_" in name for name in rest) or len(replaced) < len(rest):
        return None
    return replaced


def fits(entries: Iterable[TensorEntry], plan: MergePlan) -> bool:
    """Tell whether the base's files have a tensor of the same name and shape for each one that the plan changes."""
    base = {entry.name: entry.shape for entry in entries}
    shapes: dict[str, tuple[int, ...]] = {name: update.shape for name, update in plan.updates.items()}
    shapes |= {name: entry.shape for name, entry in plan.replaced.items()}
    return all(base.get(name) == shape for name, shape in shapes.items())


def check_types(entries: list[TensorEntry], plan: MergePlan) -> None:
    """Check that every tensor of the base that the plan changes has a floating-point type.

    Raises:
        BadModel: a tensor has not.
    """
    changed = plan.updates.keys() | plan.replaced.keys()
    for entry in entries:
        if entry.name in changed and entry.dtype not in SIZES:
            raise BadModel(
                "A weight of the base has a type that cannot be merged.",
                where=f"{entry.file}: {entry.name}",
                expected=", ".join(SIZES),
                got=entry.dtype,
                next_step="name the original model, in one of these types",
            )
