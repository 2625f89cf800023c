"""How many positions a model has, from its config alone, and rows that are longer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from loraflow.failures import BadData

_LIMITS = ("max_position_embeddings", "n_positions")
_LONGROPE = ("longrope", "su")  # Phi-3's first config calls it su
# Beyond max_position_embeddings, the angles of these follow the longest row of a call, and of the calls before it.
_BY_CALL = ("dynamic",)


@dataclass(frozen=True)
class Positions:
    """The positions of a model. None: there is no such limit, or the config does not say."""

    limit: int | None  # most tokens of a document
    switch: int | None = None  # longrope: longer documents use other angles

    @classmethod
    def of(cls, config: Mapping[str, JsonValue]) -> Positions:
        """Return the positions of a model with this config.json."""
        nested = config.get("text_config")
        text = nested if isinstance(nested, dict) else config
        limit = next((value for key in _LIMITS if isinstance(value := text.get(key), int) and value > 0), None)
        if limit is None:
            return cls(None)
        switch = None
        for rope in _ropes(text):
            kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
            original = rope.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
            known = original if isinstance(original, int) else limit
            if kind in _LONGROPE:
                switch = known
            elif kind not in (None, "default", *_BY_CALL) and isinstance(factor, int | float):
                limit = max(limit, int(known * factor))
        return cls(limit, switch)

    @classmethod
    def of_folder(cls, folder: Path) -> Positions:
        """Return the positions of a model in a folder."""
        file = folder / "config.json"
        return cls.of(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else cls(None)

    def check(self, lengths: Sequence[int], where: str, scored: Sequence[str] = ()) -> None:
        """Check the lengths of documents that are computed together.

        Args:
            scored: the place of each document, if they are scored: max_length does not apply to them then.

        Raises:
            BadData: a document has more tokens than the model has positions.
        """
        longest = max(lengths, default=0)
        if self.limit is not None and longest > self.limit:
            next_step = f"set training_config.max_length to {self.limit}, and data.too_long to drop or truncate"
            if scored:
                beyond = sum(length > self.limit for length in lengths)
                where = f"{where}: {scored[list(lengths).index(longest)]}" + (
                    f", and {beyond - 1} more" if beyond > 1 else ""
                )
                next_step = "shorten or remove these rows: rows are scored whole, whatever max_length is"
            raise BadData(
                "A row has more tokens than the model has positions.",
                where=where,
                expected=f"at most {self.limit} tokens (max_position_embeddings of the base)",
                got=f"{longest} tokens",
                next_step=next_step,
            )

    def switched_angles(self, lengths: Sequence[int], row_length: int | None) -> int | None:
        """Return the switch, if a call with some of the documents, and padding, has positions on both sides of it.

        Args:
            row_length: the length of packed rows, whose padding counts its own positions; None if rows are not packed.
        """
        if self.switch is None or not len(lengths) or min(lengths) > self.switch:
            return None
        return self.switch if max(*lengths, row_length or 0) > self.switch else None


def _ropes(text: Mapping[str, JsonValue]) -> list[Mapping[str, JsonValue]]:
    """Return the settings of the rotary embeddings; newer configs have one for each type of layer."""
    found: list[Mapping[str, JsonValue]] = []
    for key in ("rope_scaling", "rope_parameters"):
        value = text.get(key)
        if isinstance(value, dict):
            found += [value, *(inner for inner in value.values() if isinstance(inner, dict))]
    return found
