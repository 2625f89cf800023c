"""`loraflow upgrade`: old files come forward, a person's own lines stay, and nothing is written unasked."""

import pytest
import yaml
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.cli.upgrade import upgrade_recipe
from loraflow.config import load_recipe
from loraflow.config.project import PROJECT_ID, id_in
from loraflow.flows.server.new_prefect_yaml import upgrade_prefect_yaml, write_prefect_yaml

RECIPE = """\
name: old   # ours since March
base: {model_name_or_path: bundled:smollm2, "torch_dtype": float32}
data:
  source: data.dvc
training_config:
    max_seq_length: 128      # max_seq_length, as in the card
    warmup_ratio: 0.1
    output_dir: out
    bf16: false
peft_config:
    rank: 8
"""
NEW = (
    RECIPE.replace("model_name_or_path", "model")
    .replace('"torch_dtype"', "dtype")
    .replace("    max_seq_length:", "    max_length:")
    .replace("warmup_ratio", "warmup_steps")
    .replace("rank", "r")
)
PREFECT = """\
# written by hand
prefect-version: 3.8.8
pull:
  - flows.project.enter: {}   # keep
deployments:
  - name: local
    entrypoint: flows.finetune.finetune
    parameters: {recipe: old}   # flows.finetune.finetune
    schedules: [{slug: x, cron: "0 3 * * 1"}]
  - &second
    name: again
    entrypoint: "flows/retrain.py:retrain"
  - name: third
    entrypoint: flows/mine.py:train
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "Old Project ü"
    (folder / "configs").mkdir(parents=True)
    (folder / ".dvc").mkdir()
    (folder / "configs" / "old.yaml").write_text(RECIPE)
    (folder / "prefect.yaml").write_text(PREFECT)
    (folder / ".gitignore").write_text("mine\n/.loraflow")
    monkeypatch.chdir(folder)
    return folder


def upgrade(*options: str, **given):
    return CliRunner().invoke(cli, ["upgrade", *options], **given)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_renamed_keys_of_a_recipe_get_their_names_and_nothing_else_changes():
    upgraded = upgrade_recipe(RECIPE, "old")
    assert upgraded.text == NEW
    assert ["output_dir has no effect" in note for note in upgraded.notes] == [True]
    assert upgrade_recipe(NEW, "old").text == NEW


def test_line_ends_and_a_byte_order_mark_stay():
    text = "\ufeff" + RECIPE.replace("\n", "\r\n")
    assert upgrade_recipe(text, "old").text == "\ufeff" + NEW.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (RECIPE.replace("    bf16", "    max_length: 64\n    bf16"), "max_seq_length and training_config.max_length are both"),
        (RECIPE.replace("    bf16", "    tokenizer: x\n    bf16"), "is not supported"),
        (RECIPE.replace("bf16: false", "bf16: [1"), "line "),
        (RECIPE.replace("bf16: false", "bf17: false"), "other problems"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_changed_for_certain_is_left_with_a_note(text, note):
    upgraded = upgrade_recipe(text, "old")
    assert upgraded.text == text
    assert any(note in found for found in upgraded.notes), upgraded.notes


def test_prefect_yaml_gets_import_names_and_its_project(tmp_path):
    folder = tmp_path / "Old Project ü"
    new, notes = upgrade_prefect_yaml(PREFECT, folder)
    before, after = yaml.safe_load(PREFECT), yaml.safe_load(new)
    assert after.pop("name") == "old-project-u"
    assert after["pull"] == [{"loraflow.flows.server.project.enter": {"project": "old-project-u"}}]
    entrypoints = [deployment.pop("entrypoint") for deployment in after["deployments"]]
    assert entrypoints == ["loraflow.flows.finetune.finetune", "loraflow.flows.retrain.retrain", "flows/mine.py:train"]
    for document in (before, after):
        document.pop("pull")
        for deployment in document["deployments"]:
            deployment.pop("entrypoint", None)
    assert before == after and notes == []
    assert "# written by hand" in new and "# keep" in new and "parameters: {recipe: old}   # flows.finetune" in new
    assert upgrade_prefect_yaml(new, folder) == (new, [])


@pytest.mark.parametrize("step", ["{}", "null", "", " {  }  # a"])
def test_an_empty_pull_step_gets_the_project_of_the_file(tmp_path, step):
    text = f"name: mine\npull:\n  - loraflow.flows.server.project.enter: {step}\ndeployments: []\n"
    new, _ = upgrade_prefect_yaml(text, tmp_path)
    assert yaml.safe_load(new)["pull"] == [{"loraflow.flows.server.project.enter": {"project": "mine"}}]


@pytest.mark.parametrize("name", ["a: b", "x, y", "1", "yes", 'quote"d', "ü"])
def test_a_projects_name_stays_text_in_the_pull_step(tmp_path, name):
    text = yaml.safe_dump({"name": name}) + "pull:\n  - loraflow.flows.server.project.enter: {}\n"
    new, _ = upgrade_prefect_yaml(text, tmp_path)
    assert yaml.safe_load(new)["pull"] == [{"loraflow.flows.server.project.enter": {"project": name}}]


def test_a_pull_step_with_other_values_is_named_and_left(tmp_path):
    text = "name: mine\npull:\n  - loraflow.flows.server.project.enter: {other: 1}\n"
    new, [note] = upgrade_prefect_yaml(text, tmp_path)
    assert new == text and "line 3: add the project" in note


def test_a_file_in_another_style_is_left_with_a_note(tmp_path):
    text = "{pull: [{flows.project.enter: {}}], deployments: []}\n"
    new, notes = upgrade_prefect_yaml(text, tmp_path)
    assert new == text and "one key per line" in notes[-1]


def test_a_flow_of_the_projects_own_keeps_its_entrypoint(tmp_path):
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "finetune.py").touch()
    text = "deployments:\n  - entrypoint: flows/finetune.py:finetune\n"
    assert upgrade_prefect_yaml(text, tmp_path) == (text, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("env:\n        A: b  # x\n", "env:\n        ID\n        A: b  # x\n"),
        ("env: {A: b, C: d}\n", "env: {ID, A: b, C: d}\n"),
        ("env: {}\n", None),
        ("env: {\n        A: b}\n", None),
        ("env: {LORAFLOW_PROJECT_ID: mine}\n", None),
        ("working_dir: /x\n", None),
    ],
)
def test_the_variables_of_runs_get_the_projects_id(tmp_path, old, new):
    """Two projects of one name, of an earlier version, were taken for the same."""
    head = "name: x\npull: [{own.step: {env: {B: c}}}]\ndeployments:\n- entrypoint: own.py:flow\n  work_pool:\n    name: p\n"
    head += "    job_variables:\n      "
    upgraded, notes = upgrade_prefect_yaml(head + old, tmp_path)
    made = id_in(yaml.safe_load(upgraded))
    expected = (new or old).replace("ID", f'LORAFLOW_PROJECT_ID: "{made}"') if new else old
    assert (upgraded, notes) == (head + expected, [])
    assert upgrade_prefect_yaml(upgraded, tmp_path) == (upgraded, [])


def test_a_deployment_without_the_id_gets_that_of_the_others(tmp_path):
    deployment = "- {entrypoint: own.py:flow, work_pool: {name: p, job_variables: {env: {%s}}}}\n"
    head, one = "name: x\ndeployments:\n", deployment % "LORAFLOW_PROJECT_ID: mine"
    upgraded, _ = upgrade_prefect_yaml(head + one + deployment % "A: b", tmp_path)
    assert upgraded == head + one + deployment % 'LORAFLOW_PROJECT_ID: "mine", A: b'


@pytest.mark.parametrize(
    ("pool", "new"),
    [
        ("{name: p}", "{job_variables: {env: {ID}}, name: p}"),
        ("\n      name: p  # x", "\n      job_variables: {env: {ID}}\n      name: p  # x"),
        ("{name: p, job_variables: {image: i}}", "{name: p, job_variables: {env: {ID}, image: i}}"),
        ("p", None),
        ("&p {<<: *pool}", None),
        ("*pool", None),
        ("{name: p, job_variables: *v}", None),
        ("{name: p, job_variables: {<<: *v}}", None),
    ],
)
def test_a_deployment_of_loraflow_without_variables_gets_the_projects_id(tmp_path, pool, new):
    head = "name: x\ndefinitions: {a: &pool {name: p}, b: &v {image: i}}\ndeployments:\n  - entrypoint: own.py:flow\n"
    head += "    work_pool: {name: own}\n  - entrypoint: loraflow.flows.finetune.finetune\n    work_pool: "
    upgraded, notes = upgrade_prefect_yaml(head + pool + "\n", tmp_path)
    made = f'LORAFLOW_PROJECT_ID: "{id_in(yaml.safe_load(upgraded))}"'
    assert upgraded == head + (new or pool).replace("ID", made) + "\n"
    assert upgrade_prefect_yaml(upgraded, tmp_path) == (upgraded, notes)
    if new:
        assert notes == []
    else:
        [note] = notes
        assert note.startswith(f'deployments[1]: add {PROJECT_ID}: "') and "work_pool.job_variables.env" in note


def test_a_deployment_with_the_id_in_an_alias_or_a_merge_is_not_named(tmp_path):
    head = "name: x\ndefinitions: {v: &v {env: &e {LORAFLOW_PROJECT_ID: mine}}}\ndeployments:\n"
    for variables in ("*v", "{<<: *v}", "{env: *e}", "{env: {<<: *e, A: b}}"):
        entry = f"  - entrypoint: loraflow.flows.finetune.finetune\n    work_pool: {{name: p, job_variables: {variables}}}\n"
        assert upgrade_prefect_yaml(head + entry, tmp_path).notes == []


def test_a_prefect_yaml_of_init_without_an_id_gets_the_one_that_init_would_write(tmp_path):
    (tmp_path / "configs").mkdir()
    file = write_prefect_yaml(tmp_path, "r")
    text = file.read_text()
    line = next(line for line in text.splitlines(keepends=True) if "LORAFLOW_PROJECT_ID" in line)
    upgraded, _ = upgrade_prefect_yaml(text.replace(line, ""), tmp_path)
    assert yaml.safe_load(upgraded) == yaml.safe_load(text)


def test_nothing_is_written_without_a_yes(project):
    before = contents(project)
    done = upgrade()
    assert done.exit_code == 0, done.output
    assert contents(project) == before
    for line in (
        "-    max_seq_length: 128",
        "+    max_length: 128",
        "+name: old-project-u",
        "loraflow upgrade --write",
    ):
        assert line in done.output


def test_what_is_shown_is_written_and_a_second_time_nothing(project):
    before = load_recipe("configs/old.yaml")
    done = upgrade("--write")
    assert done.exit_code == 0 and "next  loraflow deploy" in done.output, done.output
    assert (project / "configs" / "old.yaml").read_text() == NEW
    assert (project / ".gitignore").read_text() == "mine\n/.loraflow\n/.dvc/cache\n/.dvc/tmp\n/.dvc/config.local\n"
    assert (project / ".dvcignore").read_text() == "/.loraflow/\n"
    assert load_recipe("configs/old.yaml") == before
    after = contents(project)
    assert "up to date" in upgrade("--write").output
    assert contents(project) == after


def test_a_project_of_init_is_up_to_date(project):
    (project / "prefect.yaml").unlink()
    write_prefect_yaml(project, "old", "gpu-team")
    text = (project / "prefect.yaml").read_text()
    assert upgrade_prefect_yaml(text, project) == (text, [])


def test_a_folder_that_is_no_project_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from loraflow.failures import BadConfig

    assert isinstance(upgrade("--write").exception, BadConfig)
    assert list(tmp_path.iterdir()) == []
