"""The runtime: where and how a run computes. Nothing here may change what comes out, but for last bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FrozenModel(BaseModel):
    """The base of everything that a person writes: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Rendezvous(FrozenModel):
    """Where the nodes of one training meet: torchrun's c10d rendezvous. The first node, which runs the flow, is host."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Machines that train together.")
    endpoint: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+:[1-9][0-9]{0,4}$")] | None = Field(
        None, description="host:port of the first node, as the others reach it."
    )
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="What tells this meeting from others at the endpoint; default is the job's fingerprint."
    )
    wait_minutes: Annotated[float, Field(gt=0, le=1440)] = Field(
        10.0, description="How long a node waits for the others."
    )

    @model_validator(mode="after")
    def _has_a_place(self) -> Rendezvous:
        if self.nodes > 1 and self.endpoint is None:
            raise ValueError(
                "several nodes need an endpoint: set runtime.rendezvous.endpoint to host:port of the first"
            )
        if self.endpoint is not None and int(self.endpoint.rpartition(":")[2]) > 65535:
            raise ValueError(f"a port is at most 65535: {self.endpoint}")
        return self


class Runtime(FrozenModel):
    """Where and how: out of identity, recorded in the manifest."""

    store: str = Field(
        ".loraflow/store", description="Folder, or s3://bucket/prefix, that holds artifacts, records and the registry."
    )
    placement: dict[Literal["tokenize", "train", "evaluate", "merge", "verify"], str] = Field(
        {}, description="Deployments of other work pools for heavy stages, such as train: gpu for stage/gpu."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where heavy stages compute.")
    devices: Annotated[int, Field(ge=1)] = Field(
        1, description="GPUs (or CPU processes) that train, and evaluate, together; of each node."
    )
    rendezvous: Rendezvous = Field(Rendezvous(), description="Several machines that train together.")
    shard_base: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether several devices hold the frozen weights together; auto: if one cannot hold them."
    )
    attn_implementation: Literal["auto", "varlen", "fa3", "fa4", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel in training; auto takes the fastest that is there, and says which."
    )
    engine: Literal["fast", "stock"] = Field("fast", description="stock: plain trl and peft, without our speed-ups.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile each layer; auto leaves it out on short runs, where it would take longer than it saves.",
    )
    checkpointing: Literal["auto", "none", "selective", "full", "offload"] = Field(
        "auto",
        description="Which layers' activations are computed twice instead of kept; auto is what gradient_checkpointing "
        "says, else what memory needs.",
    )
    micro_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Tokens per forward pass on a GPU; default is what memory has room for. The global batch stays.",
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The same in rows. Default on a CPU is per_device_train_batch_size."
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

    @model_validator(mode="after")
    def _nodes_share_the_store(self) -> Runtime:
        if self.rendezvous.nodes > 1 and "://" in self.store.removeprefix("file://"):
            raise ValueError(
                "several nodes need runtime.store to be a folder that all of them mount at the same path: "
                f"what is unfinished in {self.store} lies on one machine"
            )
        return self
