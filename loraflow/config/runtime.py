"""The runtime: where and how a run computes. It changes a result only by rounding, in its last bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loraflow.frozen import FrozenModel, Positive


class Rendezvous(FrozenModel):
    """torchrun's c10d rendezvous of several nodes. The first node, which runs the flow, is the host."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Number of machines that train together.")
    endpoint: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+:[1-9][0-9]{0,4}$")] | None = Field(
        None, description="host:port of the first node, as the other nodes reach it."
    )
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="Id of the rendezvous at the endpoint; the default is the job's fingerprint."
    )
    wait_minutes: Annotated[float, Field(gt=0, le=1440)] = Field(
        10.0, description="How long a node waits for the other nodes."
    )

    @model_validator(mode="after")
    def _has_an_endpoint(self) -> Rendezvous:
        if self.nodes > 1 and self.endpoint is None:
            raise ValueError(
                "several nodes need an endpoint: set runtime.rendezvous.endpoint to host:port of the first node"
            )
        if self.endpoint is not None and int(self.endpoint.rpartition(":")[2]) > 65535:
            raise ValueError(f"a port is at most 65535: {self.endpoint}")
        return self


class Mlflow(FrozenModel):
    """The MLflow server or database that shows runs and the champion. It is a view: the store stays the truth."""

    uri: str | None = Field(
        None,
        description="Address such as http://host:5000 or sqlite:///mlflow.db; the default is MLFLOW_TRACKING_URI. "
        "Give a password by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, not here.",
    )
    experiment: str | None = Field(
        None, description="Name of the experiment; the default is MLFLOW_EXPERIMENT_NAME, else loraflow."
    )
    model: Annotated[str, Field(pattern=r"^[^/:'\"]+$")] | None = Field(
        None, description="Name in MLflow's registry; the default is register.model."
    )


class Runtime(FrozenModel):
    """Where and how a run computes: not part of any fingerprint, but recorded in the manifest."""

    store: str = Field(
        ".loraflow/store", description="Folder or s3://bucket/prefix of the artifacts, run records and registry."
    )
    # The stages that are `placeable` in the stage table, which this layer cannot import. A test compares the two.
    placement: dict[Literal["tokenize", "train", "evaluate", "merge", "verify", "score_general"], str] = Field(
        {}, description="{stage: deployment} to run a stage on another work pool, such as {train: gpu} for stage/gpu."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device of the heavy stages.")
    devices: Positive = Field(
        1, description="Number of GPUs (or CPU processes) per node that train and evaluate together."
    )
    rendezvous: Rendezvous = Field(Rendezvous(), description="Training on several machines.")
    shard_base: Literal["auto", "on", "off"] = Field(
        "auto", description="Shard the frozen weights over the devices; auto does so if they do not fit on one device."
    )
    attn_implementation: Literal["auto", "varlen", "fa3", "fa4", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel in training; auto takes the fastest that is available, and logs it."
    )
    engine: Literal["fast", "stock"] = Field(
        "fast", description="stock: plain trl and peft, without loraflow's speed-ups."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile each layer; auto does so if it is expected to save more time than it takes, and logs why.",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Record forward and backward passes on a GPU as CUDA graphs. auto does so if starting the "
        "kernels takes longer than computing them, as with small models, and logs why.",
    )
    trials_together: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Number of a sweep's trials that one process trains at once, over one base. Faster on a GPU with a "
        "small model; the chosen trial is then trained again by itself.",
    )
    checkpointing: Literal["auto", "none", "elementwise", "selective", "full", "offload"] = Field(
        "auto",
        description="Activations that are recomputed in the backward pass instead of stored. elementwise: those of norms, "
        "rotations and activation functions, if layers are compiled (2 % slower, a quarter less memory). selective: those "
        "of half of the layers. full: of all layers. offload: nothing is recomputed; main memory stores them. auto uses "
        "gradient_checkpointing if that is set, else the free memory.",
    )
    micro_tokens: Positive | None = Field(
        None,
        description="Tokens per forward pass on a GPU; the default fits the memory. The global batch stays the same.",
    )
    micro_batch: Positive | None = Field(
        None, description="Rows per forward pass; the default on a CPU is per_device_train_batch_size."
    )
    eval_batch_size: Positive = Field(16, description="Rows per batch of generation.")
    threads: Positive | None = Field(None, description="CPU threads of a worker; the default is all cores.")
    processes: Positive | None = Field(None, description="Tokenizer processes; the default is all cores.")
    worker_start: Literal["fork", "spawn"] = Field(
        "fork",
        description="How a heavy stage's process starts. fork: from a process that has imported the libraries once (on "
        "Linux, unless the stage needs bitsandbytes). spawn: a new Python, which imports them again.",
    )
    deadline_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="A heavy stage that runs longer is stopped; by default there is no limit."
    )
    stall_minutes: Annotated[float, Field(gt=0)] | None = Field(
        30.0,
        description="A heavy stage without any sign of progress for this long is ended and retried, after a warning at a "
        "third of it; null never ends it.",
    )
    silent_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="A heavy stage that only uses the processor for this long, without progress, log, reads or writes, is "
        "ended and retried. Choose more than one batch of generation, or a metric of your own, takes. By default it is only "
        "warned about, after stall_minutes.",
    )
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Time that a run may take on its machine. Shortly before its end, training saves a checkpoint and the "
        "run ends as preempted; the next run resumes. A run of a deployment schedules it by itself, if it made progress.",
    )
    preemptible: bool = Field(
        False,
        description="For machines that can be taken away: if SIGTERM ends a run of a deployment and it was not "
        "cancelled, it schedules another run, which resumes. Stopping a worker sends SIGTERM, too.",
    )
    grace_seconds: Annotated[float, Field(ge=0)] = Field(
        20.0,
        description="Time between SIGTERM and SIGKILL for a worker, in which it saves a checkpoint: after the step that is "
        "computed; with several devices, up to two steps later.",
    )
    keep: Positive = Field(
        3,
        description="Number of merged models to keep besides the champions. Every run that computed a stage removes "
        "older ones, as `loraflow gc` does.",
    )
    keep_champions: Annotated[int, Field(ge=2)] = Field(
        10,
        description="Number of champions to keep for each registered model: the one in use, and those before it to which "
        "`loraflow rollback` can return.",
    )

    mlflow: Mlflow | None = Field(
        None,
        description="Send each run to MLflow, and move its alias champion with promotions and rollbacks (extra mlflow).",
    )

    @model_validator(mode="after")
    def _nodes_share_the_store(self) -> Runtime:
        if self.rendezvous.nodes > 1 and "://" in self.store.removeprefix("file://"):
            raise ValueError(
                "several nodes need runtime.store to be a folder that all of them mount at the same path: "
                f"unfinished work of {self.store} is on one machine only"
            )
        return self
