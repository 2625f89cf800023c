"""Base classes of frozen values, for what people and code write and for documents; and types of fields that are shared."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class FrozenModel(BaseModel):
    """A frozen, strictly typed value. Unknown keys are refused: in a recipe, they are typing errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredModel(BaseModel):
    """A frozen value that is read from a document. Unknown keys are ignored: another version may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore")


Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
ShareOrCount = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
