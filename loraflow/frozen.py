"""Base classes of frozen values: one for what people and code write, one for what is read back from documents."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    """A frozen, strictly typed value. Unknown keys are refused: in a recipe, they are typing errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredModel(BaseModel):
    """A frozen value that is read from a document. Unknown keys are ignored: another version may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore")
