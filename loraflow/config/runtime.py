"""The runtime: where and how a run computes. Nothing here may change what comes out, but for last bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """The base of everything that a person writes: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Runtime(Frozen):
    """Where and how: out of identity, recorded in the manifest."""

    store: str = Field(
        ".loraflow/store", description="Folder, or s3://bucket/prefix, that holds artifacts, records and the registry."
    )
    placement: dict[Literal["tokenize", "train", "evaluate", "merge", "verify"], str] = Field(
        {}, description="Deployments of other work pools for heavy stages, such as train: gpu for stage/gpu."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where heavy stages compute.")
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto takes flash_attention_2 where installed, else sdpa."
    )
    engine: Literal["fast", "stock"] = Field("fast", description="stock: plain trl and peft, without our speed-ups.")
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rows per forward pass; default is per_device_train_batch_size. The global batch stays."
    )
    eval_batch_size: Annotated[int, Field(ge=1)] = Field(16, description="Rows per batch of generation.")
    threads: Annotated[int, Field(ge=1)] | None = Field(None, description="CPU threads of a worker; default all cores.")
    processes: Annotated[int, Field(ge=1)] | None = Field(None, description="Tokenizer processes; default all cores.")
    deadline_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="A heavy stage that runs longer is ended; none by default."
    )
    grace_seconds: Annotated[float, Field(ge=0)] = Field(
        20.0, description="Time between asking a worker to end and killing it; it saves a checkpoint meanwhile."
    )
    keep: Annotated[int, Field(ge=1)] = Field(
        3, description="`gc` keeps this many merged models beside the champion and its rollback target."
    )
