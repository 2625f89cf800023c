"""A project's `prefect.yaml`: write the first one, show what to add to somebody's own, upgrade an earlier version's.

`loraflow init` and `loraflow upgrade` call it; no import of prefect here.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from string import Template

import yaml
from pydantic import JsonValue

from loraflow.config.project import FILE, PROJECT_ID, id_in
from loraflow.config.recipe_text import find_recipe, recipe_names
from loraflow.config.renamed_keys import Upgraded
from loraflow.config.yaml import Edit, Scalar, Syntax, apply, load_plain, scalars
from loraflow.data.versions.git import folder_in_repository, git_or_none
from loraflow.data.versions.git_branch import MAIN, branch_for_retraining
from loraflow.failures import BadConfig
from loraflow.store.files import write_atomic

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

# Who is notified of failed retrainings and rejected models: blocks of the UI, such as slack-webhook/NAME or webhook/NAME.
notifications: {blocks: [], champion_older_than_days: 30}
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
LAST_ID = Path(".loraflow", "project-id")


def team_recipe_lines(project: str) -> str:
    """Return what the template gpu-team adds to a recipe: the store and placement of stages, commented out."""
    return TEAM_RECIPE.substitute(project=project)


def write_prefect_yaml(
    folder: Path, recipe: str | None = None, template: str = "local", project: str | None = None
) -> Path | None:
    """Write `prefect.yaml` into a project's folder and return its path; None if there is one already.

    Args:
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
        names = recipe_names(folder)
        recipe = names[0] if names else find_recipe("NAME").stem  # refuses, and says how to make one
    values = {
        "project": project or slug(folder.absolute().name),
        "id": _new_id(folder),
        "recipe": quoted(recipe),
        "branch": _branch(folder),
    }
    text = TEXT.substitute(values) + (TEAM.substitute(values) if template == "gpu-team" else "")
    with suppress(OSError):  # without it, another id may be written after a clone
        (folder / LAST_ID).parent.mkdir(exist_ok=True)
        write_atomic(folder / LAST_ID, f"{values['id']} {folder.absolute()}".encode())
    file.write_text(text, encoding="utf-8")
    return file


def _branch(folder: Path) -> str:
    branch = branch_for_retraining(folder)
    return "" if branch == MAIN else f", branch: {quoted(branch)}"


def _new_id(folder: Path) -> str:
    """Return the id of the project in a folder: a `prefect.yaml` that is written again has the one before.

    That is the id of the committed file, or the one that was last written here. A new one is a hash of git's first commit
    and the folder's path in the repository, as in every clone; without commits, of this host and the folder's path.
    """
    if committed := git_or_none(["show", f"HEAD:./{FILE}"], folder):
        with suppress(Syntax, BadConfig):
            if known := id_in(load_plain(committed)):
                return known
    with suppress(OSError, ValueError):
        known, path = (folder / LAST_ID).read_text(encoding="utf-8").split(" ", 1)
        if re.fullmatch(r"[0-9a-f]{8}", known) and path == str(folder.absolute()):  # a copy is another project
            return known
    first = None
    if git_or_none(["rev-parse", "--is-shallow-repository"], folder) == "false":
        first = git_or_none(["rev-list", "--max-parents=0", "--first-parent", "HEAD"], folder)
    place = [first, folder_in_repository(folder)] if first else [socket.gethostname(), str(folder.absolute())]
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()[:8]


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


RUNS = re.compile(r"'loraflow\.flows\.(finetune|retrain)\.")
FIRST = "it has no deployment of loraflow.flows.finetune. To start runs from Prefect's UI"
FURTHER = "the form of its deployments starts this recipe too. To retrain it on a schedule"


def deployment_to_add(folder: Path, recipe: str) -> str | None:
    """Return what to add to an existing `prefect.yaml`: a form, or the recipe's schedule if it has a form.

    None if a deployment names the recipe, or the file cannot be read.
    """
    try:
        text = (folder / FILE).read_text(encoding="utf-8-sig")
        document = load_plain(text)
    except (OSError, UnicodeDecodeError, Syntax):
        return None
    if not isinstance(document, dict):
        return None
    entries = document.get("deployments")
    if not isinstance(entries, list | None):
        return None
    own = [entry for entry in entries or [] if RUNS.search(str(entry))]
    if any(re.search(rf"'recipe': '([^']*/)?{re.escape(recipe)}(\.ya?ml)?'", str(entry)) for entry in own):
        return None
    is_further = "loraflow.flows.finetune." in str(own)
    project = slug(folder.absolute().name)
    name = str(document["name"]) if document.get("name") not in (None, "") else project
    variables = ", job_variables: *environment" if "&environment\n" in text else ""
    entry = [
        f"name: {f'{slug(name)}-{slug(recipe)}-nightly' if is_further else project}",
        f"entrypoint: loraflow.flows.{'retrain.retrain' if is_further else 'finetune.finetune'}",
        f"work_pool: {{name: {quoted(_first_pool(entries or []) or project)}{variables}}}",
        f"parameters: {{recipe: {quoted(recipe)}{_branch(folder) if is_further else ''}}}",
        f"pull: [{{loraflow.flows.server.project.enter: {{project: {quoted(name)}}}}}]",
    ]
    entry += ["tags: [loraflow, heartbeat]"] if variables else []  # the variables set the frequency of heartbeats
    if is_further:
        entry += ["concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}"]
        entry += ['schedules: [{slug: nightly, cron: "0 2 * * *", timezone: UTC, active: false}]']
    indent = _indent(text)
    if not entries:
        is_there = "deployments" in document
        todo = "replace its empty `deployments` with this" if is_there else "add this to it"
        lines = ["deployments:", *_item(entry, 2)]
    elif indent is None:
        todo, lines = "add this to the list in brackets at `deployments`", [f"{{{', '.join(entry)}}}"]
    else:
        todo, lines = "add this at the end of its `deployments`", _item(entry, indent)
    if document.get("name") in (None, ""):
        lines.append(f"name: {quoted(name)}" + ("  # instead of the empty name" if "name" in document else ""))
        todo += ", with the name of the project"
    return "\n".join([f"prefect.yaml   unchanged: {FURTHER if is_further else FIRST}, {todo}:", *lines])


def _item(entry: list[str], indent: int) -> list[str]:
    return [" " * indent + ("  " if number else "- ") + line for number, line in enumerate(entry)]


def _first_pool(entries: list[JsonValue]) -> str | None:
    pools = [entry.get("work_pool") for entry in entries if isinstance(entry, dict)]
    return next((str(pool["name"]) for pool in pools if isinstance(pool, dict) and pool.get("name")), None)


def _indent(text: str) -> int | None:
    """Return the column of the hyphens of `deployments`; None without a list, or if it is in brackets."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        if key.value == "deployments" and isinstance(value, yaml.SequenceNode) and not value.flow_style:
            return value.start_mark.column
    return None


ENTER = "loraflow.flows.server.project.enter"
OLD_ENTER = "flows.project.enter"  # while loraflow's flows were a top-level package
# loraflow's own flows, under the names that they had then: as a module, or as a file of a clone
OLD_FLOW = re.compile(r"(?:loraflow/)?flows[./](finetune|retrain|evaluate_model|predict|stage)(?:\.|\.py:)(\w+)")


def upgrade_prefect_yaml(text: str, folder: Path) -> Upgraded:
    """Write current import names, the project's name, the project into loraflow's pull step, and the project's id into the
    variables of runs.

    Deployments, schedules and everything else stay as they are. A flow of the project's own, in its folder
    `flows`, keeps its entrypoint.
    """
    try:
        found = list(scalars(text))
    except Syntax as error:
        return Upgraded(text, [f"line {error.line}: {error}"])
    edits = [edit for scalar in found if (edit := _entrypoint(scalar, folder))]
    steps = [scalar for scalar in found if scalar.is_key and scalar.value in (ENTER, OLD_ENTER)]
    edits += [step.replaced_by(ENTER) for step in steps if step.value == OLD_ENTER]
    name = next((scalar.value for scalar in found if scalar.path == ("name",) and not scalar.is_key), "")
    notes = []
    if steps and not name:
        name = slug(folder.absolute().name)
        start = min(scalar.start for scalar in found)
        edits.append(Edit(start, start, f"name: {name}\n"))
    for step in steps:
        if any(scalar.path == (*step.path, "project") for scalar in found):
            continue
        if (edit := _fill(text, step, f"{{project: {quoted(name)}}}")) is None:
            line = text.count("\n", 0, step.start) + 1
            notes.append(f"line {line}: add the project to this step: {ENTER}: {{project: {name}}}")
        else:
            edits.append(edit)
    new = _with_id(apply(text, edits), folder)
    if new != text and not _has_name(new, name):
        return Upgraded(text, [*notes, "left unchanged: the file does not have one key per line"])
    return Upgraded(new, [*notes, *_without_id(new, folder)])


def _with_id(text: str, folder: Path) -> str:
    """Write the project's id as the first of the variables of runs: where there are variables, and for loraflow's flows.

    A `work_pool` or `job_variables` that is an alias, or merges another mapping, is left as it is: `_without_id` names it.
    """
    with suppress(Syntax, BadConfig):
        entry = f'{PROJECT_ID}: "{id_in(load_plain(text)) or _new_id(folder)}"'
        found = list(scalars(text))
        paths = {key.path for key in found}
        of_loraflow = {
            key.path[:2] for key in found if key.path[2:] == ("entrypoint",) and key.value.startswith("loraflow.flows.")
        }
        first: dict[tuple[str | int, ...], Edit] = {}
        for key in found:
            inner, place = key.path[:-1], key.path[2:-1]
            if inner[-1:] == ("env",) and (inner[0] == "definitions" or "job_variables" in inner):
                name, added = PROJECT_ID, entry
            elif inner[:2] in of_loraflow and place == ("work_pool", "job_variables"):
                name, added = "env", f"env: {{{entry}}}"
            elif inner[:2] in of_loraflow and place == ("work_pool",):
                name, added = "job_variables", f"job_variables: {{env: {{{entry}}}}}"
            else:
                continue
            if (*inner, name) not in paths and (name == PROJECT_ID or (*inner, "<<") not in paths):
                first.setdefault(inner, _inserted_before(text, key, added))
        new = apply(text, first.values())
        return new if id_in(load_plain(new)) else text
    return text


def _without_id(text: str, folder: Path) -> Iterator[str]:
    """Yield a note for each deployment of loraflow's flows to a work pool whose runs do not have the project's id."""
    with suppress(Syntax, BadConfig):
        add = f'add {PROJECT_ID}: "{id_in(load_plain(text)) or _new_id(folder)}" to work_pool.job_variables.env'
        document = load_plain(text)
        entries = document.get("deployments") if isinstance(document, dict) else None
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            if not isinstance(entry, dict) or "work_pool" not in entry:
                continue
            if str(entry.get("entrypoint")).startswith("loraflow.flows.") and not id_in({"deployments": [entry]}):
                yield f"deployments[{number}]: {add}, or another project of this name counts as this one"


def _inserted_before(text: str, key: Scalar, entry: str) -> Edit:
    """Insert an entry before a key."""
    indent = text[text.rfind("\n", 0, key.start) + 1 : key.start]
    return Edit(key.start, key.start, entry + (", " if indent.strip() else f"\n{indent}"))


def _has_name(text: str, name: str) -> bool:
    """Tell whether a text is valid YAML with this project name, if any."""
    try:
        document = load_plain(text)
    except Syntax:
        return False
    return isinstance(document, dict) and (not name or str(document.get("name")) == name)


def _entrypoint(scalar: Scalar, folder: Path) -> Edit | None:
    if scalar.is_key or scalar.path[-1:] != ("entrypoint",):
        return None
    old = OLD_FLOW.fullmatch(scalar.value)
    if old is None or (folder / "flows" / f"{old[1]}.py").exists():  # the project's own flow
        return None
    return scalar.replaced_by(f"loraflow.flows.{old[1]}.{old[2]}")


def _fill(text: str, key: Scalar, value: str) -> Edit | None:
    """Return the edit that gives a key without values this one; None if it has others."""
    rest = re.compile(r"\s*:[ \t]*(\{[ \t]*\}|null|~)?(?=[ \t]*(?:#.*)?(?:\r?\n|$))").match(text, key.end)
    return None if rest is None else Edit(key.end, rest.end(), f": {value}")
