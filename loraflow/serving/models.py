"""Find and load the model that a command names: the same names for chat, predict, serve, publish and evaluate.

- `champion`, `champion:NAME`: the registered model in use
- a run's id: the merged model of that run
- a path: a model's folder, or a PEFT adapter's folder together with its base
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from loraflow import identity
from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.tokenizer_files import served_folder, tokenizer_files
from loraflow.config import Runtime
from loraflow.config.data import read_tools_file
from loraflow.data.templates.tokenizer_config import further_templates
from loraflow.data.tokens.positions import Positions
from loraflow.failures import BadConfig, BadModel, CorruptArtifact
from loraflow.registry.log import Entry, PromotionLog, models
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.registry.runs import RUN_ID, RunRecord, find_run, read_run, require_consistent
from loraflow.store import LocalStore, Ref, Store, hash_memo, open_store, require_intact
from loraflow.store.base import MANIFEST
from loraflow.store.files import HashMemo

if TYPE_CHECKING:
    from peft import PeftModelForCausalLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraflow.data.tokens.loss_mask import ChatTemplate


# Files that make a model: weights, configuration, tokenizer and template.
MODEL_FILE_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEVELS = 2  # an adapter's file is two folders below its artifact


@dataclass(frozen=True)
class Model:
    """A model's folder, the adapter to apply to it (if it is not merged yet), and its origin."""

    name: str
    folder: Path
    unmerged_adapter: Path | None = None  # a PEFT folder to apply to the model in `folder`, which is then its base
    ref: Ref | None = None  # the merged model, if it is an artifact of this store
    adapter_ref: Ref | None = None  # the adapter that was trained, merged or not
    base: Path | None = None  # the model that was fine-tuned, where that is known
    base_ref: Ref | None = None  # the base, if it is an artifact; it is not hashed yet
    run: RunRecord | None = None  # the run that made it

    @property
    def system(self) -> str | None:
        """The system message that the run put before chats that had none: the model was trained and scored with it."""
        return self.run.system_message if self.run else None

    def digest(self, memo: HashMemo) -> str:
        """Return the digest of the model's content: the artifact's, or that of its files."""
        if self.ref is not None:
            return self.ref.digest
        files = [
            path
            for path in sorted(self.folder.iterdir())
            if path.suffix in MODEL_FILE_SUFFIXES and path.name != MANIFEST
        ]
        hashes = {path.name: memo.hash(path) for path in files}
        hashes |= {name: memo.hash(self.folder / name) for name in further_templates(self.folder)}
        if self.unmerged_adapter is not None:
            adapter = self.unmerged_adapter
            names = ["adapter_config.json", "adapter_model.safetensors", *tokenizer_files(adapter)]
            # Loading it refuses an adapter without weights.
            hashes |= {f"adapter/{name}": memo.hash(adapter / name) for name in names if (adapter / name).exists()}
        return identity.digest(hashes)

    def intact_base(self) -> Path | None:
        """Return the folder of the base, where that is known; an artifact is hashed if it changed.

        Raises:
            CorruptArtifact: it is damaged.
        """
        if self.base_ref is not None:
            intact_folder(open_store(self.base_ref.uri), self.base_ref)
        return self.base

    def refuse_unmerged(self, what: str) -> None:
        """Refuse an adapter that is not merged, for `what` needs a whole model.

        Raises:
            BadConfig: it is an adapter.
        """
        if self.unmerged_adapter is not None:
            raise BadConfig(
                f"{what} needs a merged model, but this is an adapter.",
                where=str(self.unmerged_adapter),
                next_step=f"loraflow merge {self.unmerged_adapter} {self.folder} OUT, then name OUT instead of the adapter",
            )


def find_model(store: Store, model: str, base: str | None = None, memo: HashMemo | None = None) -> Model:
    """Return the model that `champion`, `champion:NAME`, a run's id or a path names.

    If it is an artifact, its files were hashed when this returns: now, or earlier and they have not changed since.

    Args:
        base: folder of an adapter's base, where the adapter's own configuration does not name it.

    Raises:
        BadConfig: there is no such model.
        CorruptArtifact: the model's artifact is gone, incomplete or damaged.
    """
    memo = memo or hash_memo(store)
    given = Path(base).expanduser() if base else None
    if given is not None and not (given / "config.json").exists():
        raise BadConfig(
            "The base is not a model's folder.",
            where=f"--base {base}",
            expected="a folder with config.json",
            next_step="correct --base",
        )
    if (champion := named_champion(store, model)) is not None:
        return _of_artifact(store, champion.merged, champion.model, given, memo, adapter_ref=champion.adapter)
    if RUN_ID.fullmatch(model):
        record = read_run(store, model)
        stage = record.stage("merge") if record else None
        if record is None or stage is None:
            raise BadConfig("This run made no merged model.", where=model, next_step="`loraflow runs` lists the runs")
        require_consistent(store, record)
        # Other runs may have made the same model with another recipe, so set the run that was named.
        return replace(_of_artifact(store, stage.ref(store), model, given, memo), run=record)
    folder = Path(model).expanduser()
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").exists():
            return _of_adapter(adapter.absolute(), folder.absolute(), given, memo)
    if (folder / "config.json").exists():
        return _of_folder(store, folder.absolute(), given, memo)
    raise BadConfig(
        "There is no such model.",
        where=model,
        expected="champion, champion:NAME, a run's id, a model's folder or an adapter's folder",
        next_step="`loraflow runs` lists the runs, `loraflow registry` the models",
    )


def only_model(store: Store) -> str:
    """Return the name of the model in a registry that holds one.

    Raises:
        BadConfig: the registry is empty, or holds several models.
    """
    names = models(store)
    if len(names) == 1:
        return names[0]
    if names:
        raise BadConfig(
            "The registry holds several models.",
            where=store.uri,
            expected=f"one of {', '.join(names)}",
            next_step=f"name it: champion:{names[0]}, or --model {names[0]} where the command has this option",
        )
    raise BadConfig(
        "The registry is empty.",
        where=store.uri,
        next_step="loraflow run RECIPE promotes a model that passes the gate; loraflow promote RUN does so by hand",
    )


def named_champion(store: Store, name: str, model: str | None = None) -> Entry | None:
    """Return the champion that `champion` or `champion:NAME` names; None for other names.

    `model` is the one that `champion` means; None is the only model of the registry.

    Raises:
        BadConfig: there is no such champion.
        CorruptArtifact: the log is damaged.
    """
    word, _, named = name.partition(":")
    return champion_entry(store, named or model or only_model(store)) if word == "champion" else None


def champion_entry(store: Store, name: str) -> Entry:
    """Return the entry of the promotion log that is in force.

    Raises:
        BadConfig: no model of this name was promoted yet.
        CorruptArtifact: the log is damaged.
    """
    head = PromotionLog(store, name).head()
    if head is None:
        raise BadConfig(
            f"There is no champion of {name} yet.",
            where=store.uri,
            expected=f"one of {', '.join(models(store)) or 'none: the registry is empty'}",
            next_step="loraflow run RECIPE promotes a model that passes the gate; loraflow promote RUN does so by hand",
        )
    return head


def _of_folder(store: Store, folder: Path, given: Path | None, memo: HashMemo) -> Model:
    from loraflow.base.stored_weights import refuse_damaged_settings, refuse_pickles

    found = artifact_at(folder)
    if found is None:
        refuse_pickles(folder)
        refuse_damaged_settings(folder)
        return Model(folder.name, folder, base=given, base_ref=_ref_at(given))
    home, ref = found
    model = _of_artifact(home, ref, identity.short(ref.digest), given, memo)
    return model if home.uri == store.uri else replace(model, ref=None)  # an artifact of another store


def _of_artifact(
    store: Store, ref: Ref, name: str, given: Path | None, memo: HashMemo, adapter_ref: Ref | None = None
) -> Model:
    folder = intact_folder(store, ref, memo)
    inputs = store.manifest(ref).input_refs(store.uri)
    base, base_ref = given, _ref_at(given)
    if base is None and "base" in inputs and not store.check(inputs["base"]):
        base, base_ref = store.path(inputs["base"]), inputs["base"]
    run = find_run(store, ref) if ref.stage == "merge" else None
    adapter_ref = adapter_ref or inputs.get("adapter")
    return Model(name, folder, ref=ref, adapter_ref=adapter_ref, base=base, base_ref=base_ref, run=run)


def _ref_at(folder: Path | None) -> Ref | None:
    found = artifact_at(folder) if folder else None
    return found[1] if found else None


def _of_adapter(adapter: Path, named_folder: Path, given: Path | None, memo: HashMemo) -> Model:
    from loraflow.base.stored_weights import refuse_damaged_settings, refuse_pickles

    refuse_pickles(adapter)
    refuse_damaged_settings(adapter)
    base, adapter_ref = given, None
    found = artifact_at(adapter.parent)
    if found is not None:
        store, adapter_ref = found
        intact_folder(store, adapter_ref, memo)
        trained_on = store.manifest(adapter_ref).input_refs(store.uri).get("base")
        if base is None and trained_on is not None and not store.check(trained_on):
            base = store.path(trained_on)
    if base is None:
        named = (AdapterConfig.read(adapter).model_extra or {}).get("base_model_name_or_path")
        if not isinstance(named, str) or not named or not (Path(named) / "config.json").exists():
            raise BadConfig(
                "The adapter does not say which folder holds its base.",
                where=str(adapter),
                got=f"base_model_name_or_path: {named}",
                next_step="name the base: --base FOLDER",
            )
        base = Path(named)
    loaded_base = artifact_at(base)  # the adapter is applied to it
    if loaded_base is None:
        refuse_damaged_settings(base)
    else:
        intact_folder(*loaded_base, memo)
    return Model(
        named_folder.name[: identity.SHORT],
        base.absolute(),
        unmerged_adapter=adapter,
        adapter_ref=adapter_ref,
        base=base.absolute(),
        base_ref=loaded_base[1] if loaded_base else None,
    )


@dataclass(frozen=True)
class Loaded:
    """A model in memory, with its tokenizer, and the template and stop ids of training and evaluation."""

    model: PreTrainedModel | PeftModelForCausalLM
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    stops: list[int]
    positions: int | None  # most tokens of prompt and answer together

    def control_token_in(self, text: str) -> str | None:
        """Return a control token that a text contains: the model would read it as one."""
        return next((token for token in self.template.special if token in text), None)


def load(model: Model, dtype: str, device: str = "auto") -> Loaded:
    """Load a model, and apply its adapter if it is not merged.

    Raises:
        BadModel: the adapter does not fit the base, or a folder that is not an artifact cannot be opened.
    """
    from safetensors import SafetensorError

    from loraflow.base.architecture import config_errors, reason_of
    from loraflow.base.load import load_model, load_tokenizer, stop_ids
    from loraflow.base.usable import refuse_unusable_folder
    from loraflow.data.tokens.loss_mask import ChatTemplate

    adapter = model.unmerged_adapter
    if adapter is not None:
        check_unmerged(model)
    errors: tuple[type[Exception], ...] = (*config_errors(), SafetensorError)
    with served_folder(model.folder, adapter) as folder:
        try:
            network = load_model(model.folder, dtype, Runtime.model_validate({"device": device}))
            tokenizer = load_tokenizer(folder)
        except errors as error:
            is_of_machine = isinstance(error, (OSError, RuntimeError)) and "mismatched_sizes" not in str(error)
            if model.ref is not None or is_of_machine:  # an artifact is intact
                raise
            refuse_unusable_folder(model.folder, trust=False)
            if isinstance(error, ImportError):
                raise
            raise BadModel(
                "transformers cannot open the model.",
                where=str(model.folder),
                got=reason_of(error),
                next_step="download or save it again: its files are damaged, mixed up, or no text generator",
            ) from error
        positions = positions_of(network)
        if adapter is not None:
            network = _with_adapter(network, adapter)
        return Loaded(network, tokenizer, ChatTemplate(folder), stop_ids(folder), positions)


def positions_of(network: Any) -> int | None:
    """Return the most tokens of prompt and answer together, as in training; None if there is no limit."""
    return Positions.of(network.config.get_text_config().to_dict()).limit


def check_unmerged(model: Model) -> None:
    """Refuse an adapter that is not complete, or does not fit the base that it is applied to.

    Raises:
        BadModel: see `check_adapter`.
    """
    from loraflow.adapters.validation import check_adapter

    if model.unmerged_adapter is not None:
        check_adapter(
            model.unmerged_adapter, model.folder, base_digest=model.base_ref.digest if model.base_ref else None
        )


def _with_adapter(base: PreTrainedModel, adapter: Path) -> PeftModelForCausalLM:
    from peft import PeftConfig, PeftModelForCausalLM

    from loraflow.adapters.vocabulary import fit_vocabulary

    fit_vocabulary(base, adapter, AdapterConfig.read(adapter))
    try:
        model = PeftModelForCausalLM(base, PeftConfig.from_pretrained(str(adapter)))
        # Not PeftModel.from_pretrained, which only warns about missing tensors. Unexpected ones were refused before, except
        # for the copies of embeddings that peft saves and does not read.
        found = model.load_adapter(str(adapter), "default")
        mismatches = [key for key in found.missing_keys if "lora_" in key]
    except (ValueError, RuntimeError) as error:
        mismatches = [str(error).strip().splitlines()[0]]
    if mismatches:
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter),
            got=f"{mismatches[0][:200]}" + (f", and {len(mismatches) - 1} more" if len(mismatches) > 1 else ""),
            next_step="name the base that it was trained on: --base FOLDER",
        )
    return model.eval()


def tools_of(store: Store, model: Model) -> list[JsonValue] | None:
    """Return the content of `data.tools` of the run that made a model; None if it had none.

    The artifact of check_dataset has the tools as they were in that run. If it was removed, the file is read again.

    Raises:
        BadConfig: the artifact was removed, and the file is missing or is not a list of tools.
    """
    name = model.run.section("data").get("tools") if model.run is not None else None
    if model.run is None or not isinstance(name, str):
        return None
    stage = model.run.stage("check_dataset")
    ref = store.find("check_dataset", stage.fingerprint) if stage is not None else None
    if ref is not None:
        config = store.manifest(ref).payload.get("config")
        tools = config.get("tools") if isinstance(config, dict) else None
        if isinstance(tools, list):
            return tools
    try:
        return read_tools_file(name)
    except BadConfig as failure:
        raise BadConfig(
            "The tools that the model was trained with are no longer in the store, and their file cannot be used.",
            where=failure.where,
            expected=failure.expected,
            got=failure.got or failure.what,
            next_step="give them with `loraflow predict … --tools FILE`, or put the file back",
        ) from failure


# Artifacts that are about to be used as models are hashed once per change, and refused if they are damaged.


def intact_folder(store: Store, ref: Ref, memo: HashMemo | None = None) -> Path:
    """Return the folder of an artifact that is used as a model. Files that changed since they were hashed are hashed.

    Raises:
        CorruptArtifact: it is gone, incomplete or damaged; the next step rebuilds it.
    """
    problems = store.check(ref)
    if problems:
        raise CorruptArtifact(
            "The model's artifact is gone or incomplete.",
            where=store.location(ref),
            got="; ".join(problems[:3]),
            next_step=how_to_rebuild(store, ref),
        )
    try:
        require_intact(store, ref, memo or hash_memo(store))
        return store.path(ref)
    except CorruptArtifact as failure:
        raise CorruptArtifact(
            "The model's artifact is damaged, so it is not used.",
            where=failure.where,
            got=failure.got,
            next_step=how_to_rebuild(store, ref),
        ) from failure


def artifact_at(folder: Path) -> tuple[LocalStore, Ref] | None:
    """Return the store and ref of a folder that is an artifact, or a link to one; None if it is not.

    Raises:
        CorruptArtifact: its manifest is missing, unreadable, or was changed.
    """
    folder = folder.resolve()
    if len(folder.parts) < 4 or not all(_SHA256.fullmatch(part) for part in folder.parts[-2:]):
        return None
    stage, fingerprint, digest = folder.parts[-3:]
    store = LocalStore(folder.parents[2])
    manifest = store.manifest(Ref(stage=stage, fingerprint=fingerprint, digest=digest, uri=store.uri))
    return store, manifest.ref(store.uri)


def require_intact_files(*paths: Path) -> None:
    """Refuse files and folders of damaged artifacts. Others are not checked: nothing says what they should be."""
    for path in paths:
        resolved = path.resolve()
        for folder in (resolved, *resolved.parents[:_LEVELS]):
            found = artifact_at(folder)
            if found is not None:
                intact_folder(*found)
                break
