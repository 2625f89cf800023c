"""Write a project's first `prefect.yaml`, for its own recipes. `loraflow init` calls it; no import of prefect here."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import unicodedata
from pathlib import Path
from string import Template

from loraflow.config.project import FILE
from loraflow.config.recipe_text import find_recipe
from loraflow.config.yaml import load_plain
from loraflow.data.git_branch import MAIN, branch_for_retraining

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
      LORAFLOW_PROJECT_ID: "$id"  # tells this project from others of its name, which `loraflow deploy` refuses

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
    parameters: {recipe: $recipe$branch}
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
    parameters: {recipe: $recipe$branch}
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

TEAM = Template("""
  # Template gpu-team. The worker of the pool $project runs whole flows, on a machine without a GPU. The worker of the pool
  # $project-gpu runs the stages that the recipe places there (runtime.placement). Both read the same store: a bucket, or a
  # folder that both mount. Keep two pools: a flow that waits for its stage in its own pool would block it.
  #   LORAFLOW_HOME=/path/of/the/project prefect worker start --pool $project
  #   LORAFLOW_HOME=/path/of/the/project prefect worker start --pool $project-gpu --limit 1      # on the GPU machine
  - name: $project-gpu
    entrypoint: loraflow.flows.stage.stage
    description: Started by other runs, for one stage (runtime.placement in their recipe). Do not start it by hand.
    tags: [loraflow, heartbeat, stage]
    work_pool: {name: $project-gpu, job_variables: *environment}
""")
TEAM_RECIPE = Template("""
# For a team: replace BUCKET, remove the first `# ` of the lines below, and give the dataset a remote that all machines read:
# dvc remote add -d team s3://BUCKET/$project/data
#
# runtime:
#   store: s3://BUCKET/$project/store                        # or a folder that all machines mount at the same path
#   placement: {train: $project-gpu, evaluate: $project-gpu}   # by the deployment stage/$project-gpu of prefect.yaml
""")
TEMPLATES = ("local", "gpu-team")


def team_recipe_lines(project: str) -> str:
    """Return what the template gpu-team adds to a recipe: the store and placement of stages, commented out."""
    return TEAM_RECIPE.substitute(project=project)


def write_prefect_yaml(
    folder: Path, recipe: str | None = None, template: str = "local", project: str | None = None
) -> Path | None:
    """Write `prefect.yaml` into a project's folder and return its path; None if there is one already.

    Args:
        folder: the project's folder.
        project: the project's name, as `slug` returns it; None names it after its folder.
        recipe: the name of the recipe that the deployments run by default; None takes the first one of `configs/`.
        template: one of TEMPLATES; gpu-team adds a work pool for stages on a GPU machine.

    Raises:
        BadConfig: there is no recipe.
    """
    file = folder / FILE
    if file.exists():
        return None
    if recipe is None:
        names = sorted(path.stem for path in (folder / "configs").glob("*.yaml"))
        recipe = names[0] if names else find_recipe("NAME").stem  # refuses, and says how to make one
    branch = branch_for_retraining(folder)
    values = {
        "project": project or slug(folder.absolute().name),
        "id": secrets.token_hex(4),
        "recipe": quoted(recipe),
        "branch": "" if branch == MAIN else f", branch: {quoted(branch)}",
    }
    text = TEXT.substitute(values) + (TEAM.substitute(values) if template == "gpu-team" else "")
    file.write_text(text, encoding="utf-8")
    return file


def slug(text: str) -> str:
    """Return a text as a name of deployments and work pools that YAML reads as text: a to z, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", text.casefold())  # Größe → grosse
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not name:  # no letter that a name may have: two such folders are two projects
        return f"project-{hashlib.md5(text.encode()).hexdigest()[:6]}"
    # Prefect reserves work pools whose names begin with "prefect".
    fits = name[:1].isalpha() and isinstance(load_plain(name), str) and not name.startswith("prefect")
    return name if fits else f"project-{name}"


def quoted(name: str) -> str:
    """Return a name as YAML reads it back: as text, whatever it looks like."""
    is_plain = re.fullmatch(r"[A-Za-z][\w-]*", name) and isinstance(load_plain(name), str)
    return name if is_plain else json.dumps(name, ensure_ascii=False)
