"""What a model was made from: dataset, rows, base, libraries. Artifacts that are no longer in the store are skipped."""

from dataclasses import dataclass, field

from pydantic import AliasPath, Field, ValidationError

from loraflow.failures import CorruptArtifact
from loraflow.frozen import StoredModel
from loraflow.store import Manifest, Ref, Store, open_store

_LIBRARIES = ("loraflow", "torch", "transformers", "peft", "trl")
_ENGINE = "telemetry/engine.json"


class BaseSource(StoredModel):
    """What identifies a base model's files: a commit of the hub, the hash of a GGUF file, or of a folder's content."""

    hub: str | None = None
    commit: str | None = None
    gguf: str | None = None
    content: str | None = None


class _BaseConfig(StoredModel):
    source: BaseSource = BaseSource()
    repack: str | None = None


class _DatasetConfig(StoredModel):
    md5: str


class _Provenance(StoredModel):
    versions: dict[str, str] = {}
    # of the dataset, where the recipe names a revision
    commit: str | None = Field(None, validation_alias=AliasPath("runtime", "origin", "commit"))
    python: str | None = None
    machine: str | None = None


class _Engine(StoredModel):
    device: str | None = None
    devices: int = 1


@dataclass(frozen=True)
class Lineage:
    """What an adapter was made from. None or empty: the artifact with this fact is no longer in the store."""

    dataset: str | None = None  # the md5 that DVC pins
    dataset_commit: str | None = None  # git commit of the revision that the recipe names
    rows: dict[str, int] = field(default_factory=dict)  # train and heldout → rows
    base: BaseSource = field(default_factory=BaseSource)
    base_digest: str | None = None  # digest of the base's artifact
    repacked: bool = False  # the base's projections were fused: its adapter does not fit the model on the hub
    versions: dict[str, str] = field(default_factory=dict)  # loraflow, python or library → version that trained
    device: str | None = None  # where it was trained: the GPU's product name, or cpu
    machine: str | None = None  # the machine's architecture, such as x86_64
    artifacts: dict[str, str] = field(default_factory=dict)  # stage → fingerprint/digest


def read_lineage(adapter: Ref | None) -> Lineage:
    """Collect what an adapter was made from, by following the inputs in the manifests."""
    manifests = _manifests(adapter)
    version, check, base, train = (
        manifests.get(name) for name in ("version_dataset", "check_dataset", "resolve_base", "train")
    )
    config = _BaseConfig.model_validate(base.payload["config"]) if base else _BaseConfig()
    provenance = _Provenance.model_validate(train.provenance) if train else _Provenance()
    versions = provenance.versions | ({"python": provenance.python} if provenance.python else {})
    store = open_store(adapter.uri) if adapter else None
    return Lineage(
        dataset=_DatasetConfig.model_validate(version.payload["config"]).md5 if version else None,
        dataset_commit=_Provenance.model_validate(version.provenance).commit if version else None,
        rows=_rows(check) if check else {},
        base=config.source,
        base_digest=base.digest if base else None,
        repacked=config.repack is not None,
        versions={name: versions[name] for name in (*_LIBRARIES, "python") if name in versions},
        device=device_of(store, train, adapter) if store and train and adapter else None,
        machine=provenance.machine,
        artifacts={
            stage: f"{manifest.fingerprint}/{manifest.digest}" for stage, manifest in reversed(manifests.items())
        },
    )


def device_of(store: Store, manifest: Manifest, ref: Ref) -> str | None:
    """Return the device that computed an artifact, such as `2 x NVIDIA H100`; None if it was not recorded."""
    if _ENGINE not in manifest.files:
        return None
    try:
        engine = _Engine.model_validate_json(store.read(ref, _ENGINE))
    except (CorruptArtifact, ValidationError):  # `loraflow verify` reports it
        return None
    return f"{engine.devices} x {engine.device}" if engine.device and engine.devices > 1 else engine.device


def _rows(check: Manifest) -> dict[str, int]:
    counts = {name: check.figures.get(name) for name in ("train", "heldout")}
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def _manifests(adapter: Ref | None) -> dict[str, Manifest]:
    """Return the manifests of an adapter and of all that it was made from, by stage."""
    found: dict[str, Manifest] = {}
    todo = [adapter] if adapter else []
    while todo:
        ref = todo.pop()
        store = open_store(ref.uri)
        if ref.stage in found or store.check(ref):
            continue
        found[ref.stage] = store.manifest(ref)
        todo += found[ref.stage].input_refs(store.uri).values()
    return found
