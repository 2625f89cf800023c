"""Write a project's first `prefect.yaml`, for its own recipes. `loraflow init` calls it; no import of prefect here."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from loraflow.config.project import FILE
from loraflow.config.recipe_text import find_recipe
from loraflow.config.yaml import load_plain

TEXT = Template("""\
# The deployments of this project: what people start from Prefect's UI, and what runs on a schedule.
#
#   loraflow up        starts a server, a worker and these deployments on this machine
#   loraflow deploy    creates or updates them on the server at PREFECT_API_URL
#
# The file is yours. A deploy applies every change of it, and leaves alone what people paused or added in the UI.
# Several projects can share a server: deployments and work pool have this project's name.
name: $project

# Before each run, the worker enters its project's folder (LORAFLOW_HOME). A worker of another project refuses the run.
pull:
  - loraflow.flows.server.project.enter: {project: $project}

definitions:
  environment: &environment
    env:
      PREFECT_LOGGING_EXTRA_LOGGERS: loraflow  # the log of the stages is shown with the run
      PREFECT_FLOWS_HEARTBEAT_FREQUENCY: "180"  # seconds; three missing heartbeats end a run; see the tag heartbeat
      PREFECT_SERVER_ANALYTICS_ENABLED: "false"
      DO_NOT_TRACK: "1"

deployments:
  - name: $project
    entrypoint: loraflow.flows.finetune.finetune
    description: >-
      Fine-tunes a model as the recipe says, and compares it with the base model and the champion. If it is better,
      it becomes the champion.
    tags: [loraflow, heartbeat]
    work_pool: {name: $project, job_variables: *environment}
    parameters: {recipe: $recipe}

  - name: $project-nightly
    entrypoint: loraflow.flows.retrain.retrain
    description: >-
      Runs the recipe on the newest committed dataset of the branch. If a new model is better than the champion, it
      becomes the champion. If nothing is new, the run ends after a few seconds in the state UpToDate.
    tags: [loraflow, heartbeat]
    work_pool: {name: $project, job_variables: *environment}
    parameters: {recipe: $recipe}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}  # a second run waits, then finds every stage cached
    schedules:
      - slug: nightly
        cron: "0 2 * * *"
        timezone: UTC
        active: false      # only until somebody switches it on, in the UI or here before the first deploy

  - name: $project-on-dataset-update
    entrypoint: loraflow.flows.retrain.retrain
    description: >-
      Runs the recipe when `loraflow data add --commit` has announced a new dataset of this project.
    tags: [loraflow, heartbeat]
    work_pool: {name: $project, job_variables: *environment}
    parameters: {recipe: $recipe}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
    triggers:
      - type: event
        name: "$project: retrain on a new dataset"
        enabled: true
        expect: [loraflow.dataset.updated]
        match: {prefect.resource.id: loraflow.dataset.$project.*}

  - name: $project
    entrypoint: loraflow.flows.evaluate_model.evaluate
    description: >-
      Scores a model on the recipe's held-out rows: the champion, the model of a run, or a model's folder. Promotes
      nothing. The scores are in the run's artifact.
    tags: [loraflow, heartbeat]
    work_pool: {name: $project, job_variables: *environment}
    parameters: {model: champion, recipe: $recipe}
""")


def write_prefect_yaml(folder: Path, recipe: str | None = None) -> Path | None:
    """Write `prefect.yaml` into a project's folder and return its path; None if there is one already.

    Args:
        folder: the project's folder. The project is named after it.
        recipe: the name of the recipe that the deployments run by default; None takes the first one of `configs/`.

    Raises:
        BadConfig: there is no recipe.
    """
    file = folder / FILE
    if file.exists():
        return None
    if recipe is None:
        names = sorted(path.stem for path in (folder / "configs").glob("*.yaml"))
        recipe = names[0] if names else find_recipe("NAME").stem  # refuses, and says how to make one
    file.write_text(TEXT.substitute(project=slug(folder.absolute().name), recipe=_quoted(recipe)), encoding="utf-8")
    return file


def slug(text: str) -> str:
    """Return a text as a name of deployments and work pools that YAML reads as text: a to z, digits and hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return name if name[:1].isalpha() and isinstance(load_plain(name), str) else f"project-{name}".strip("-")


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z][\w-]*", name) and isinstance(load_plain(name), str) else f'"{name}"'
