"""Which model is meant, and where it comes from: one answer for chat, predict, serve, publish and evaluate.

- `champion`, `champion:NAME`: the registered model in use
- a run's id: the merged model that the run made
- a path: a model's folder, or an adapter's folder (peft's) together with its base
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraflow import identity
from loraflow.config import Runtime
from loraflow.failures import BadConfig, BadModel, CorruptArtifact
from loraflow.registry.log import PromotionLog, models
from loraflow.store import LocalStore, Manifest, Ref, Store
from loraflow.store.base import MANIFEST
from loraflow.store.files import HashMemo

_CONTENT = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # weights, configuration, tokenizer, template
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


@dataclass(frozen=True)
class Model:
    """A model's folder, the adapter that belongs on top of it (if it is not merged yet), and its origin."""

    name: str
    folder: Path
    adapter: Path | None = None  # an adapter that is not merged; `folder` is its base then
    ref: Ref | None = None  # of the merged model, where it is an artifact of this store
    tuned: Ref | None = None  # of the adapter that was trained
    base: Path | None = None  # what it was tuned from, where that is known
    run: dict[str, Any] | None = None  # the record of the run that made it

    @property
    def system(self) -> str | None:
        """The system message that the run put before chats that had none: the model was trained and scored with it."""
        return self.run["resolved"]["data"]["system"] if self.run else None

    def digest(self, memo: HashMemo) -> str:
        """Return the digest of the model's content: the artifact's, or that of its files."""
        if self.ref is not None:
            return self.ref.digest
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in _CONTENT and path.name != MANIFEST]
        hashes = {path.name: memo.hash(path) for path in files}
        if self.adapter is not None:
            names = ("adapter_config.json", "adapter_model.safetensors")
            hashes |= {f"adapter/{name}": memo.hash(self.adapter / name) for name in names}
        return identity.digest(hashes)

    def refuse_unmerged(self, what: str) -> None:
        """Say that an adapter has to be merged first.

        Raises:
            BadConfig: it is one.
        """
        if self.adapter is not None:
            raise BadConfig(
                f"{what} needs a merged model, and this is an adapter.",
                where=str(self.adapter),
                next_step=f"loraflow merge {self.adapter} {self.folder} OUT, and then OUT in its place",
            )


def find_model(store: Store, model: str, base: str | None = None) -> Model:
    """Return the model that somebody means by `champion`, `champion:NAME`, a run's id or a path.

    Args:
        store: where champions and runs are looked up.
        model: what was asked for.
        base: a folder, for an adapter whose own does not say which base it belongs to.

    Raises:
        BadConfig: there is no such model.
        CorruptArtifact: there was one, and its artifact is gone or incomplete.
    """
    given = Path(base).expanduser() if base else None
    if given is not None and not (given / "config.json").exists():
        raise BadConfig("The base is no model's folder.", where=f"--base {base}", expected="a folder with config.json")
    if model.split(":")[0] == "champion":
        name = model.partition(":")[2] or only_model(store)
        head = PromotionLog(store, name).head()
        if head is None:
            raise BadConfig(f"No champion of {name} yet.", next_step="loraflow registry --model NAME")
        return _of_artifact(store, head.merged, name, given, tuned=head.adapter)
    if RUN_ID.fullmatch(model):
        record = json.loads(store.read_document(f"runs/{model}.json") or b'{"stages": []}')
        for stage in record["stages"]:
            if stage["stage"] == "merge":
                ref = Ref(stage="merge", fingerprint=stage["fingerprint"], digest=stage["digest"], uri=store.uri)
                # Other runs may have made the same model, by another recipe: this one is meant.
                return replace(_of_artifact(store, ref, model, given), run=record)
        raise BadConfig("This run made no merged model.", where=model, next_step="loraflow runs")
    folder = Path(model).expanduser()
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            return _of_adapter(adapter.absolute(), folder.absolute(), given)
    if (folder / "config.json").exists():
        return _of_folder(store, folder.absolute(), given)
    raise BadConfig(
        "There is no such model.",
        where=model,
        expected="champion, champion:NAME, a run's id, a model's folder or an adapter's folder",
        next_step="loraflow runs, loraflow registry",
    )


def only_model(store: Store) -> str:
    """Return the one name in the registry.

    Raises:
        BadConfig: there is none, or more than one.
    """
    names = models(store)
    if len(names) == 1:
        return names[0]
    raise BadConfig(
        "Which champion?" if names else "The registry is empty.",
        expected=" or ".join(f"champion:{name}" for name in names) or "a promoted model",
        next_step="loraflow run configs/quickstart.yaml" if not names else f"loraflow chat champion:{names[0]}",
    )


def find_run(store: Store, merged: Ref) -> dict[str, Any] | None:
    """Return the record of the run that made a merged model; where that is gone, of the newest that found it made."""
    taken = None
    for name in sorted(store.documents("runs/"), reverse=True):
        if not RUN_ID.fullmatch(name.removeprefix("runs/").removesuffix(".json")):
            continue
        record = json.loads(store.read_document(name) or b"{}")
        if not record or not record["summary"]:
            continue
        states = {stage["digest"]: stage["state"] for stage in record["stages"] if stage["stage"] == "merge"}
        if states.get(merged.digest) == "computed":
            return record
        if merged.digest in states:
            taken = taken or record
    return taken


def _of_folder(store: Store, folder: Path, given: Path | None) -> Model:
    from loraflow.base.weight_files import refuse_pickles

    found = _artifact_at(folder)
    if found is None:
        refuse_pickles(folder)
        return Model(folder.name, folder, base=given)
    home, ref = found
    whole = _of_artifact(home, ref, identity.short(ref.digest), given)
    return whole if home.uri == store.uri else replace(whole, ref=None)  # of another store, to this one a folder


def _of_artifact(store: Store, ref: Ref, name: str, given: Path | None, tuned: Ref | None = None) -> Model:
    problems = store.check(ref)
    if problems:
        raise CorruptArtifact(
            "The model's artifact is gone or incomplete.",
            where=str(store.path(ref)),
            got="; ".join(problems[:3]),
            next_step="run the recipe that made it again (`loraflow registry` and `loraflow runs` name it)",
        )
    inputs = {key: Ref(**{**one, "uri": store.uri}) for key, one in store.manifest(ref).inputs.items()}
    base = given
    if base is None and "base" in inputs and not store.check(inputs["base"]):
        base = store.path(inputs["base"])
    run = find_run(store, ref) if ref.stage == "merge" else None
    return Model(name, store.path(ref), ref=ref, tuned=tuned or inputs.get("adapter"), base=base, run=run)


def _of_adapter(adapter: Path, asked: Path, given: Path | None) -> Model:
    from loraflow.base.weight_files import refuse_pickles

    refuse_pickles(adapter)
    base, tuned = given, None
    found = _artifact_at(adapter.parent)
    if found is not None:
        store, tuned = found
        inputs = store.manifest(tuned).inputs
        lineage = Ref(**{**inputs["base"], "uri": store.uri}) if "base" in inputs else None
        if base is None and lineage is not None and not store.check(lineage):
            base = store.path(lineage)
    if base is None:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not named or not (Path(named) / "config.json").exists():
            raise BadConfig(
                "The adapter does not say which folder holds its base.",
                where=str(adapter),
                got=f"base_model_name_or_path: {named}",
                next_step="name it: --base FOLDER",
            )
        base = Path(named)
    return Model(asked.name[: identity.SHORT], base.absolute(), adapter=adapter, tuned=tuned, base=base.absolute())


def _artifact_at(folder: Path) -> tuple[LocalStore, Ref] | None:
    """Return the store and ref of a folder that is an artifact."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    if folder.parts[-3:] != (manifest.stage, manifest.fingerprint, manifest.digest):
        return None
    store = LocalStore(folder.parents[2])
    ref = Ref(stage=manifest.stage, fingerprint=manifest.fingerprint, digest=manifest.digest, uri=store.uri,
              facets=manifest.facets)  # fmt: skip
    return store, ref


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with what is needed to ask it: the template and stop ids of training and evaluation."""

    model: Any
    tokenizer: Any
    template: Any  # mask.ChatTemplate
    stops: list[int]
    positions: int | None  # tokens that it can read and write in all

    def control_token_in(self, text: str) -> str | None:
        """Return a control token that stands in a text: the model would read it as one."""
        return next((token for token in self.template.special if token in text), None)


def load(model: Model, dtype: str, device: str = "auto") -> Loaded:
    """Load a model, with its adapter on top if it is not merged.

    Raises:
        BadModel: the adapter does not fit the base.
    """
    from loraflow.base.load import load_model, load_tokenizer, stop_ids
    from loraflow.data.loss_mask import ChatTemplate

    net = load_model(model.folder, dtype, Runtime.model_validate({"device": device}))
    positions = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    if model.adapter is not None:
        net = _with_adapter(net, model.adapter)
    return Loaded(net, load_tokenizer(model.folder), ChatTemplate(model.folder), stop_ids(model.folder), positions)


def _with_adapter(net: Any, adapter: Path) -> Any:
    from peft import PeftConfig, PeftModelForCausalLM

    try:
        wrapped = PeftModelForCausalLM(net, PeftConfig.from_pretrained(str(adapter)))
        # Loaded by hand, because from_pretrained only warns of tensors that find no place.
        found = wrapped.load_adapter(str(adapter), "default")
        lost = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
    except (ValueError, RuntimeError) as error:
        lost = [str(error).strip().splitlines()[0]]
    if lost:
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter),
            got=f"{lost[0][:200]}" + (f", and {len(lost) - 1} more" if len(lost) > 1 else ""),
            next_step="name the base that it was trained on: --base FOLDER",
        )
    return wrapped.eval()
