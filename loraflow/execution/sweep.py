"""The trials of a sweep: variants of a recipe that share every stage before training. Imports no prefect and no torch.

A trial is exactly the training of `loraflow run` with its settings: it has the same fingerprints. What a sweep adds is the
measurement of the validation loss, which no fingerprint contains. `read_curves` reads it from a trained adapter.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

from loraflow.config.grid import SEED, Grid, short_names, show_value
from loraflow.config.load import RecipeFile
from loraflow.config.recipe_text import shorten
from loraflow.config.stage_configs import TrainConfig
from loraflow.execution.plan import steps_to
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.stages import TRAIN
from loraflow.store import Ref, Store
from loraflow.training.validation_loss import CURVES, Curves

log = logging.getLogger("loraflow")

STEPS = steps_to(TRAIN.name)  # the steps of a trial
SHARED = tuple(step.label for step in STEPS if step.stage is not TRAIN)
# Keys that decide which tokens the validation loss is a mean over: trials that differ in them cannot be compared.
MEASURE = (
    "data.source", "data.sources", "data.repo", "data.rev", "data.train", "data.heldout", "data.heldout_fraction",
    "data.validation_fraction", "data.seed", "data.group", "data.system", "data.loss_on", "data.thinking",
    "base.chat_template",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One training of a sweep: a combination of the grid's values, with one seed."""

    label: str  # also the name of its task run
    settings: Mapping[str, JsonValue]  # values of the grid
    seed: int
    recipe_file: RecipeFile
    workspace: Workspace

    @cached_property
    def config(self) -> TrainConfig:
        """The config of its training."""
        return TrainConfig.from_recipe(self.workspace.recipe, self.workspace)

    @cached_property
    def identities(self) -> dict[str, str]:
        """What each step takes from the recipe, its inputs included: trials with an equal value share the artifact."""
        found: dict[str, str] = {}
        for step in STEPS:
            inputs = {name: found[source] for name, source in step.inputs.items()}
            found[step.label] = json.dumps([self.settings_of_steps[step.label], inputs], sort_keys=True)
        return found

    @cached_property
    def settings_of_steps(self) -> dict[str, str]:
        """What each step takes from the recipe, without its inputs."""
        recipe, context = self.workspace.recipe, self.workspace
        configs = {step.label: step.stage.config.from_recipe(recipe, context).identity() for step in STEPS}
        return {label: json.dumps(config, sort_keys=True) for label, config in configs.items()}


def make_trials(recipe_file: RecipeFile, grid: Grid, workspace: Workspace) -> list[Trial]:
    """Return the trials of a sweep, in the order in which they run.

    Args:
        grid: what differs between trials.

    Raises:
        BadConfig: a trial is no valid recipe, a key of the grid does not change the training, the recipe has no validation
            rows, or the trials' validation losses could not be compared.
    """
    _refuse_incomparable(grid)
    names = short_names([*grid.values])
    trials: list[Trial] = []
    with _warnings_once():
        for settings in grid.combinations():
            found = _variant(recipe_file, settings)
            first = found.recipe.training_config.seed
            for seed in range(first, first + grid.seeds):
                variant = found if seed == first else _variant(recipe_file, {**settings, SEED: seed})
                measured = _measured(variant)
                workspace = workspace.with_recipe(measured.recipe)
                _ = workspace.dataset, workspace.base  # the workspaces of later trials have them too
                label = _label(settings, names, seed if grid.seeds > 1 else None)
                if any(trial.label == label for trial in trials):  # long values are cut
                    label += f" ({len(trials) + 1})"
                trials.append(Trial(label, settings, seed, measured, workspace))
    _refuse_without_effect(trials, grid)
    return trials


def stage_counts(trials: Sequence[Trial]) -> dict[str, int]:
    """Return how many times each stage before training runs, at most: {label: number of different jobs}."""
    return {label: len({trial.identities[label] for trial in trials}) for label in SHARED}


def differing_keys(trials: Sequence[Trial], keys: Iterable[str]) -> dict[str, list[str]]:
    """Return {label of a shared stage: the keys of the grid that change it}, for the stages that some key changes."""
    changed = {label: [key for key in keys if _changes(trials, key, (label,))] for label in SHARED}
    return {label: found for label, found in changed.items() if found}


def sharing_lines(trials: Sequence[Trial], keys: Iterable[str]) -> list[str]:
    """Return which stages all trials share, and how often each of the others runs and why, as lines for people."""
    counts, changed = stage_counts(trials), differing_keys(trials, keys)
    shared = [label for label, count in counts.items() if count == 1]
    lines = [f"run once for all {len(trials)} trials: {', '.join(shared)}"] if shared else []
    for label, count in counts.items():
        if count > 1:
            because = f"{', '.join(changed[label])} differ" if label in changed else "its inputs differ"
            if label in changed and len(changed[label]) == 1:
                because = f"{changed[label][0]} differs"
            lines.append(f"{label} runs {count} times, because {because} between trials")
    trainings = len({trial.identities[TRAIN.name] for trial in trials})
    if trainings < len(trials):
        lines.append(f"the {len(trials)} trials are {trainings} different trainings; equal ones are trained once")
    return lines


def _variant(recipe_file: RecipeFile, settings: Mapping[str, JsonValue]) -> RecipeFile:
    try:
        return recipe_file.with_overrides({**recipe_file.overrides, **settings})
    except BadConfig as failure:
        shown = " ".join(f"{shorten(key)}={show_value(value)}" for key, value in settings.items())
        _, _, problems = failure.what.partition("\n")
        what = "A trial of the sweep is not a valid recipe" + (f":\n{problems}" if problems else f". {failure.what}")
        for key in settings:  # the recipe's reader knows overrides only as --set
            what = what.replace(f"--set {shorten(key)}:", f"--grid {shorten(key)}:")
        raise BadConfig(what, where=f"the trial {shown}", next_step="correct --grid, --set or the recipe") from None


def _measured(found: RecipeFile) -> RecipeFile:
    """Return the recipe with a measurement of the validation loss at its end, if it has none. No fingerprint changes."""
    recipe = found.recipe
    if not recipe.data.validation_fraction:
        raise BadConfig(
            "A sweep chooses by the loss on validation rows, and the recipe has none. Held-out rows are for the gate only.",
            where=str(found.path),
            expected="data.validation_fraction above 0",
            next_step="add the line `validation_fraction: 0.1` below `data:`, or --set data.validation_fraction=0.1",
        )
    if recipe.training_config.eval_strategy != "no":
        return found
    return found.with_overrides({**found.overrides, "training_config.eval_strategy": "epoch"})


def _label(settings: Mapping[str, JsonValue], names: Mapping[str, str], seed: int | None) -> str:
    words = [f"{names[key]}={show_value(value)}" for key, value in settings.items()]
    return " ".join([TRAIN.name, *words, *([] if seed is None else [f"seed={seed}"])])


def _refuse_incomparable(grid: Grid) -> None:
    for key, values in grid.values.items():
        measured = [name for name in MEASURE if name == key or name.startswith(f"{key}.")]
        if len(values) > 1 and measured:
            raise BadConfig(
                "This key changes the validation rows or their tokens, so the trials' losses could not be compared.",
                where=f"--grid {shorten(key)}",
                expected="keys that do not change the validation rows, such as peft_config.r or data.limit",
                next_step="run each value by `loraflow run`; the gate compares the models",
            )


def _refuse_without_effect(trials: Sequence[Trial], grid: Grid) -> None:
    for key, values in grid.values.items():
        if len(values) > 1 and not _changes(trials, key, [step.label for step in STEPS]):
            raise BadConfig(
                "This key does not change what is trained, so all its trials would be equal.",
                where=f"--grid {shorten(key)}",
                expected="a key of peft_config, training_config, base or data that the training depends on",
                next_step=f"set it for all trials: --set {shorten(key)}=VALUE",
            )


def _changes(trials: Sequence[Trial], key: str, labels: Sequence[str]) -> bool:
    """Return whether a key of the grid changes what some steps take from the recipe, all other settings being equal."""
    groups: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for trial in trials:
        others = {name: value for name, value in trial.settings.items() if name != key}
        if key != SEED:
            others["seed of the trial"] = trial.seed
        groups[json.dumps(others, sort_keys=True)].add(tuple(trial.settings_of_steps[label] for label in labels))
    return any(len(found) > 1 for found in groups.values())


@contextmanager
def _warnings_once() -> Iterator[None]:
    """Log each warning about the recipe once, although it is read once for each trial."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return text not in seen and not seen.add(text)  # type: ignore[func-returns-value]

    reader = logging.getLogger("loraflow.config.load")
    reader.addFilter(is_new)
    try:
        yield
    finally:
        reader.removeFilter(is_new)


NOT_MEASURED = "its adapter is in the store, without a measured validation loss"


def own_loss(trial: Trial, fingerprint: str) -> float | None:
    """Return the validation loss of a trial's own training, whose fingerprint is given; None if the store has none."""
    store = trial.workspace.store
    ref = store.find(TRAIN.name, fingerprint)
    curves = None if ref is None else read_curves(store, ref)
    return None if curves is None else curves.validation_loss(trial.config.training_config)


def read_curves(store: Store, adapter: Ref, name: str = CURVES) -> Curves | None:
    """Return the losses that a training logged; None if the log is damaged, which the adapter's digest does not cover."""
    try:
        return Curves.parse(store.read(adapter, name))
    except CorruptArtifact as failure:
        log.warning("the losses of an adapter cannot be read. %s", failure)
        return None
