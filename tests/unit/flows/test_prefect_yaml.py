"""What `loraflow deploy` reads from prefect.yaml: Prefect's own keys work, and everything else is refused by its field."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from loraflow.failures import BadConfig
from loraflow.flows.server.prefect_yaml import read_all

ENTRY = {
    "name": "mine",
    "entrypoint": "loraflow.flows.retrain.retrain",
    "work_pool": {"name": "local"},
    "parameters": {"recipe": "tiny"},
}

ROOT = Path(__file__).parents[3]


@pytest.fixture
def specs(tmp_path):
    def specs(document=None, **fields):
        """Read a prefect.yaml with one deployment that has these fields; None removes a field."""
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / "tiny.yaml").write_text("name: tiny\n")
        entry = {key: value for key, value in {**ENTRY, **fields}.items() if value is not None}
        file = tmp_path / "prefect.yaml"
        file.write_text(yaml.safe_dump({"name": "p", "pull": [], "deployments": [entry], **(document or {})}))
        return read_all(file)[0]

    return specs


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"cron": "0 2 * * *", "timezone": "Europe/Berlin", "day_or": False}, ("cron", "0 2 * * *")),
        ({"interval": 3600}, ("interval", timedelta(hours=1))),
        ({"interval": "PT2H", "anchor_date": "2026-01-01T00:00:00Z"}, ("interval", timedelta(hours=2))),
        ({"rrule": "FREQ=DAILY;BYHOUR=2"}, ("rrule", "FREQ=DAILY;BYHOUR=2")),
    ],
)
def test_every_kind_of_schedule_is_read_and_slug_and_active_are_optional(specs, schedule, expected):
    [spec] = specs(schedules=[schedule])
    [created] = spec.new_schedules()
    kind, value = expected
    found = getattr(created.schedule, kind)
    assert found == value or (kind == "rrule" and found.endswith(value))
    assert (created.slug, created.active) == ("schedule-1", True)
    [single] = specs(schedule=schedule)
    assert single.schedules == spec.schedules


@pytest.mark.parametrize(
    "schedule",
    [
        {"rrule": "DTSTART:20240101T090000\nRRULE:FREQ=DAILY", "timezone": "America/New_York"},
        {"rrule": "DTSTART;TZID=America/New_York:20240101T090000\nRRULE:FREQ=DAILY", "timezone": "America/New_York"},
        {"rrule": "DTSTART:20240101T000000\nRRULE:FREQ=WEEKLY;BYDAY=MO\nEXDATE:20270104T000000"},
        {"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=29;COUNT=100"},
        {"rrule": "FREQ=DAILY;UNTIL=20990101T000000", "timezone": "Asia/Tokyo"},
        {"rrule": "DTSTART:20240101T090000Z\nRRULE:FREQ=DAILY;UNTIL=20990101T000000Z"},
        {"cron": "0 9 29 2 *", "timezone": "Asia/Tokyo"},
        {"interval": 86400, "anchor_date": "2026-01-01T09:00:00+01:00", "timezone": "Europe/Berlin"},
    ],
)
def test_a_schedule_that_is_accepted_runs_when_the_server_says_so(specs, caplog, schedule):
    from prefect.server.schemas import schedules as of_server

    [spec] = specs(schedules=[schedule])
    assert not caplog.records
    created = spec.new_schedules()[0].schedule
    now = datetime(2026, 11, 27, 12, tzinfo=UTC)
    [date] = asyncio.run(getattr(of_server, type(created).__name__)(**created.model_dump()).get_dates(n=1, start=now))
    assert date >= now
    if "America/New_York" in str(schedule):
        assert date == datetime(2026, 11, 27, 14, tzinfo=UTC), "at nine o'clock in New York"


@pytest.mark.parametrize("rule", ["FREQ=DAILY;UNTIL=20240101T000000", "FREQ=HOURLY;COUNT=3"])
def test_a_schedule_that_has_ended_is_deployed_with_a_warning(specs, caplog, rule):
    assert specs(schedules=[{"cron": "@daily"}, {"rrule": rule}])
    assert "deployments[0] (mine).schedules[1]: all dates of this schedule are in the past" in caplog.text


def test_an_interval_starts_at_the_same_time_at_each_deploy(specs):
    first, second = (specs(schedules=[{"interval": 3600}])[0].new_schedules() for _ in range(2))
    assert first == second


def test_queue_version_limit_tags_and_pause_are_applied(specs):
    [spec] = specs(
        work_pool={"name": "local", "work_queue_name": "high"},
        version="7",
        concurrency_limit=1,
        enforce_parameter_schema=False,
        tags="a, b",
        paused=True,
    )
    update = spec.to_update()
    assert (update.work_queue_name, update.version, update.concurrency_limit) == ("high", "7", 1)
    assert (update.enforce_parameter_schema, update.tags, spec.paused) == (False, ["a", "b"], True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"schedules": [{"cron": "0 25 * * *"}]}, "schedules.0"),
        ({"schedules": [{"cron": "0 2 * * *", "timezone": "Europe/Berln"}]}, "schedules.0"),
        ({"schedules": [{"rrule": "FREQ=SOMETIMES"}]}, "schedules.0"),
        (
            {"schedules": [{"rrule": "DTSTART;TZID=America/New_York:20240101T090000\nRRULE:FREQ=DAILY"}]},
            "timezone: America/New_York",
        ),
        (
            {"schedules": [{"rrule": "DTSTART;TZID=No/Where:20240101T090000\nRRULE:FREQ=DAILY"}]},
            "ignores TZID=No/Where",
        ),
        (
            {"schedules": [{"rrule": "DTSTART:20240101T090000Z\nRRULE:FREQ=DAILY", "timezone": "Asia/Tokyo"}]},
            "without Z",
        ),
        ({"schedules": [{"rrule": "FREQ=DAILY;UNTIL=20990101T000000Z"}]}, "schedules.0: RRULE UNTIL values"),
        ({"schedules": [{"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}]}, "never runs"),
        ({"schedules": [{"rrule": "FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30"}]}, "never runs"),
        ({"schedules": [{"rrule": "FREQ=MINUTELY;BYHOUR=25"}]}, "schedules.0"),
        ({"schedules": [{"cron": "0 0 30 2 *"}]}, "never runs"),
        ({"schedules": [{"cron": "0 0 31 4,6 *", "active": False}]}, "never runs"),
        (
            {"schedules": [{"interval": 86400, "anchor_date": "2026-01-01T09:00:00", "timezone": "Europe/Berlin"}]},
            "anchor_date has no offset",
        ),
        ({"schedules": [{"interval": 0}]}, "schedules.0"),
        ({"schedules": [{"interval": 60, "cron": "0 2 * * *"}]}, "exactly one of cron, interval and rrule"),
        ({"schedules": [{"active": True}]}, "got none"),
        ({"schedules": [{"cron": "0 2 * * *", "anchor_date": "2026-01-01T00:00:00Z"}]}, "anchor_date"),
        ({"schedules": [{"cron": "0 2 * * *", "slug": "a"}, {"cron": "0 3 * * *", "slug": "a"}]}, "slug a"),
        ({"schedules": [{"cron": "0 2 * * *", "timzone": "UTC"}]}, "schedules.0.timzone"),
        ({"work_pool": "local"}, "work_pool: expected {name: local}"),
        ({"work_pool": None}, "work_pool"),
        ({"work_pool": {"name": "local", "queue": "high"}}, "work_pool.queue"),
        ({"concurrency_limit": {"limit": 1, "collision_strategy": "WAIT"}}, "concurrency_limit.collision_strategy"),
        ({"tag": ["a"]}, "tag"),
        ({"sla": []}, "sla"),
        ({"triggers": [{"type": "event", "expect": ["a"], "within": "soon"}]}, "triggers.0"),
        ({"entrypoint": "loraflow.flows.nowhere.flow"}, "entrypoint"),
        ({"entrypoint": "loraflow.flows.retrain.is_news"}, "not a flow"),
        ({"entrypoint": "nowhere.py:flow"}, "entrypoint"),
        ({"entrypoint": None}, "entrypoint"),
        ({"parameters": {"recipe": "{{ $RECIPE }}"}}, ".parameters.recipe"),
        ({"name": "a/b"}, "name: Prefect's names must not contain /"),
        ({"name": " "}, "name: the name is empty"),
        ({"work_pool": {"name": "Prefect-gpu"}}, "work_pool.name"),
        ({"work_pool": {"name": "local", "work_queue_name": "a%b"}}, "work_pool.work_queue_name"),
        ({"concurrency_limit": 0}, "concurrency_limit.limit"),
        ({"concurrency_limit": True}, "concurrency_limit.limit"),
        ({"concurrency_limit": {"limit": "0"}}, "concurrency_limit.limit"),
        ({"concurrency_limit": {"limit": "one"}}, "concurrency_limit.limit"),
        ({"concurrency_limit": {"limit": 1, "grace_period_seconds": 90}}, "grace_period_seconds needs"),
        (
            {"concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE", "grace_period_seconds": 1}},
            "grace_period",
        ),
        ({"schedule": {"cron": "@daily"}, "schedules": [{"cron": "@daily"}]}, "both schedule and schedules"),
        ({"pull": [{"a.b": {}, "c.d": {}}]}, "step 0 has 2 keys"),
        ({"triggers": [{"expct": ["a"], "match": {"b": "c"}}]}, "0.expct: unknown key"),
        ({"triggers": [{"name": "n", "expect": ["a"]}, {"name": "n", "expect": ["b"]}]}, ".triggers"),
        ({"triggers": [{"name": "n"}]}, "0: without expect or match"),
        ({"triggers": [{"type": "sequence", "triggers": [{"expect": ["a"]}, {"expct": ["b"]}]}]}, "0.triggers.1.expct"),
        ({"triggers": [{"expect": ["a"], "parameters": {"nope": 1}}]}, ".triggers[0].parameters"),
        (
            {"triggers": [{"expect": ["a"], "parameters": {"recipe": "{{ $RECIPE }}"}}]},
            ".triggers[0].parameters.recipe",
        ),
        ({"parameters": {"recipe": "tiny", "nope": 1}}, "(mine).parameters nope"),
        ({"parameters": {"recipe": "tiny", "min_shift": 7}}, ".parameters.min_shift"),
        ({"schedules": [{"cron": "@daily", "parameters": {"min_shift": 7}}]}, "schedules[0].parameters.min_shift"),
        ({"work_pool": {"name": "local", "job_variables": {"env": {"A": "{{ $SECRET }}"}}}}, ".job_variables.env.A"),
        ({"build": [{"prefect.deployments.steps.run_shell_script": {"script": "true"}}]}, ".build"),
    ],
)
def test_a_refusal_names_file_deployment_and_field(specs, fields, field):
    with pytest.raises(BadConfig) as error:
        specs(**fields)
    assert f"prefect.yaml:2: deployments[0] ({fields.get('name', 'mine')})" in error.value.where
    assert field in f"{error.value.where} {error.value.got}"


TEXT = """\
name: p
pull:
  - loraflow.flows.server.project.enter: {project: p}
definitions:
  pool: &pool {name: local}
deployments:
  - name: one
    entrypoint: loraflow.flows.finetune.finetune
    work_pool: *pool
    parameters: {recipe: tiny, overrides: {rank: 8}}
  - name: two
    entrypoint: loraflow.flows.retrain.retrain
    parameters:
      recipe: tiny
    work_pool:
      <<: *pool
      work_queue_name: default
    concurrency_limit:
      limit: 1
    schedules:
      - cron: "@daily"
        slug: daily
    triggers:
      - enabled: true
        expect: [a]
notifications:
  blocks: []
"""


@pytest.mark.parametrize(
    ("good", "bad", "line", "words"),
    [
        ("    entrypoint: loraflow.flows.retrain", "    entry: loraflow.flows.retrain", 12, "did you mean entrypoint?"),
        ("work_queue_name", "queue", 17, "(known: job_variables, name, work_queue_name)"),
        ("      limit: 1", "      limit: 1\n      colision_strategy: ENQUEUE", 20, "did you mean collision_strategy?"),
        ("        slug:", "        slugg:", 22, "did you mean slug?"),
        ("expect:", "expct:", 23, "did you mean expect?"),
        ("  blocks:", "  block:", 27, "did you mean blocks?"),
        ("overrides: {rank", "overrides: {rnk", 7, "did you mean rank?"),
        ("enter: {project: p}", "enter: {projct: p}", 3, "projct: unknown input (did you mean project?)"),
        ("enter: {project: p}", "enter: p", 3, "p: unknown input (known: id, project, requires)"),
        ("definitions:", "definition:", 4, "definition (did you mean definitions?)"),
        ("name: p\npull:", "nam: p\npul:", 1, "nam (did you mean name?); line 2: pul (did you mean pull?)"),
        (
            "name: p\npull:\n  - loraflow.flows.server.project.enter: {project",
            "pull:\n  - loraflow.flows.server.project.enter: {projct",
            2,
            "projct: unknown input",
        ),
        ("      recipe: tiny\n", "      recipe: tiny\n      recipe: tiny\n", 15, "has a duplicate key.\n  where:    "),
        ("      limit: 1", "\tlimit: 1", 19, "a tab, where YAML takes spaces"),
    ],
)
@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n")])
def test_an_unknown_key_is_named_with_its_line_and_what_to_write(specs, tmp_path, start, end, good, bad, line, words):
    specs()
    file = tmp_path / "prefect.yaml"
    file.write_bytes((start + TEXT.replace("\n", end)).encode())
    assert len(read_all(file)[0]) == 2
    assert TEXT.count(good) == 1
    file.write_bytes((start + TEXT.replace(good, bad).replace("\n", end)).encode())
    with pytest.raises(BadConfig) as error:
        read_all(file)
    message = str(error.value)
    assert words in message and (f"line {line}: " in message or f"{file}:{line}" in message), message
    assert "None" not in message


@pytest.mark.parametrize("limit", ["3", {"limit": "3"}, {"limit": 3}, 3])
def test_a_limit_is_a_number_in_quotes_or_without_alone_or_with_options(specs, limit):
    assert specs(concurrency_limit=limit)[0].to_update().concurrency_limit == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": 0.0002}, '0.0002 must be a text in quotes: "0.0002"'),
        ({"dataset_rev": 7}, '7 must be a text in quotes: "7"'),
        ({"dataset_rev": True}, 'true must be a text in quotes: "true"'),
        ({"rank": "8"}, "'8' is not of type 'integer'"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused_with_the_right_type(specs, overrides, message):
    entry = {"entrypoint": "loraflow.flows.finetune.finetune", "parameters": {"recipe": "tiny", "overrides": overrides}}
    with pytest.raises(BadConfig) as error:
        specs(**entry)
    assert error.value.got == message and error.value.where.endswith(f".parameters.overrides.{next(iter(overrides))}")


def test_the_text_that_a_refused_number_asks_for_is_accepted(specs):
    entry = {"entrypoint": "loraflow.flows.finetune.finetune"}
    [spec] = specs(**entry, parameters={"recipe": "tiny", "overrides": {"learning_rate": "0.0002"}})
    assert spec.parameters["overrides"] == {"learning_rate": "0.0002"}


@pytest.mark.parametrize("given", [{"pull": None}, {"pull": {}}])
def test_a_run_without_pull_steps_begins_in_the_projects_folder(specs, given):
    for name in ("p", 2026):
        [spec] = specs({"name": name, **given})
        assert spec.pull_steps == [{"loraflow.flows.server.project.enter": {"project": name}}]
        assert spec.project == str(name)
    assert specs(given, pull=[])[0].pull_steps == [], "no steps, as in Prefect"


@pytest.mark.parametrize(
    ("document", "variables"),
    [({"name": None}, {}), ({}, {"working_dir": "/srv"}), ({}, {"image": "me/app:1"}), ({"pull": ""}, {})],
)
def test_a_run_that_has_a_folder_of_its_own_or_no_project_has_no_pull_steps(specs, document, variables):
    pool = {"name": "local", "job_variables": variables}
    assert specs({"pull": None, **document}, work_pool=pool)[0].pull_steps == []


def test_what_prefect_deploy_writes_for_nothing_is_read_as_nothing(specs):
    empty = {"work_queue_name": None, "job_variables": None, "name": "local"}
    none = {"build": [], "push": {}, "version": None, "description": None, "concurrency_limit": None, "tags": "a,, a"}
    [spec] = specs(
        work_pool=empty, schedules=[{"cron": "@daily", "slug": None, "active": None, "day_or": None}], **none
    )
    assert (spec.work_pool.work_queue_name, spec.tags) == ("default", ["a"])
    assert spec.new_schedules()[0].active and specs(concurrency_limit="2")[0].concurrency_limit.limit == 2


def test_templates_that_are_filled_in_for_each_run_are_kept(specs):
    secret = {"env": {"KEY": "{{ prefect.blocks.secret.key }}", "B": "{{ prefect.variables.b }}"}}
    step = {"prefect.deployments.steps.git_clone": {"repository": "{{ prefect.variables.url }}"}}
    trigger = {"expect": ["a"], "parameters": {"branch": "{{ event.resource.name }}"}}
    [spec] = specs(work_pool={"name": "local", "job_variables": secret}, pull=step, triggers=[trigger])
    assert (spec.work_pool.job_variables, spec.pull_steps) == (secret, [step])
    assert spec.triggers[0].parameters == trigger["parameters"]


def test_settings_that_the_recipe_does_not_have_are_not_deployed(specs, tmp_path, monkeypatch):
    from tests.conftest import RECIPE

    specs()
    (tmp_path / "configs" / "real.yaml").write_text(RECIPE.format(data="data.dvc", base="b", store=".s"))
    with pytest.raises(BadConfig, match="do not fit its recipe") as error:
        specs(parameters={"recipe": "real", "settings": {"training_config.max_step": 3}})
    assert error.value.where.endswith("retrain/mine.parameters.settings") and "max_step" in str(error.value)
    assert error.value.got.count("training_config.max_step") == 1, error.value.got
    assert specs(parameters={"recipe": "real", "settings": {"training_config.max_steps": 3}})


def test_parameters_of_a_flow_that_takes_any_are_not_checked_by_name(specs, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("from prefect import flow\n\n\n@flow\ndef anything(**more):\n    return more\n")
    monkeypatch.chdir(tmp_path)
    assert specs(entrypoint="own.py:anything", parameters={"n": 2})


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"parameters": {"recipe": "gone"}}, "retrain/mine.parameters.recipe"),
        ({"schedules": [{"cron": "0 2 * * *", "parameters": {"recipe": "gone"}}]}, "schedules[0].parameters.recipe"),
    ],
)
def test_a_recipe_that_does_not_exist_is_not_deployed(specs, fields, where):
    with pytest.raises(BadConfig, match="recipe that does not exist") as error:
        specs(**fields)
    assert error.value.where.endswith(where) and "tiny" in error.value.expected
    assert specs(parameters={"recipe": "configs/tiny.yaml"})


def test_a_deployment_without_a_recipe_has_the_only_one_or_is_refused(specs, tmp_path):
    [spec] = specs(parameters={"branch": "dev"})
    assert spec.parameters == {"branch": "dev", "recipe": "tiny"}
    (tmp_path / "configs" / "other.yaml").write_text("name: other\n")
    with pytest.raises(BadConfig, match="names no recipe") as error:
        specs(parameters={"branch": "dev"})
    assert error.value.where.endswith("retrain/mine.parameters.recipe") and "other, tiny" in error.value.expected
    assert (error.value.got, error.value.next_step) == ("none", "write parameters: {recipe: other}")


def test_a_deployment_whose_schedules_and_triggers_each_name_a_recipe_needs_none_itself(specs, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "other.yml").write_text("name: other\n")
    runs = {
        "schedules": [{"cron": "0 2 * * *", "parameters": {"recipe": "other"}}],
        "triggers": [{"expect": ["a"], "parameters": {"recipe": "tiny"}}],
    }
    [spec] = specs(parameters=None, **runs)
    assert spec.parameters == {}
    with pytest.raises(BadConfig, match="names no recipe"):
        specs(parameters=None, **{**runs, "triggers": [{"expect": ["a"]}]})
    with pytest.raises(BadConfig, match="recipe that does not exist") as error:
        specs(parameters=None, schedules=[{"cron": "0 2 * * *", "parameters": {"recipe": "gone"}}])
    assert error.value.next_step == "write schedules[0].parameters: {recipe: other}"


def test_a_flow_of_the_users_own_is_read_from_its_file(specs, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("from prefect import flow\n\n\n@flow\ndef nothing(n: int = 1):\n    return n\n")
    monkeypatch.chdir(tmp_path)
    [spec] = specs(entrypoint="own.py:nothing", parameters={"n": 2})
    assert spec.full_name == "nothing/mine" and "n" in spec.parameter_openapi_schema["properties"]


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"deployment": []}, "no effect"),
        ({"build": [{"a": {}}]}, "build steps"),
        ({"deployments": []}, "no deployments"),
        ({"deployments": [ENTRY, ENTRY]}, "same name"),
        ({"deployments": [{"name": "x"}, 3]}, "not valid"),
        ({"pull": [{"loraflow.flows.server.project.enter": {"project": "q"}}]}, "names another project"),
        ({"pull": {"loraflow.flows.server.project.enter": {"project": "q"}}}, "names another project"),
        (
            {"deployments": [{**ENTRY, "pull": [{"loraflow.flows.server.project.enter": {"project": "q"}}]}]},
            "another proj",
        ),
        ({5: 1}, "no effect"),
    ],
)
def test_a_wrong_document_is_refused(specs, document, what):
    with pytest.raises(BadConfig, match=what):
        specs(document)


def test_triggers_of_two_deployments_may_have_one_name(specs):
    trigger = {"name": "n", "expect": ["a"]}
    found = specs({"deployments": [{**ENTRY, "name": name, "triggers": [trigger]} for name in "ab"]})
    assert [spec.triggers[0].name for spec in found] == ["n", "n"]


def test_a_flow_that_is_loaded_from_its_file_validates_its_parameters(monkeypatch):
    """`finetune.serve()` makes Prefect load the flow from its file, under another module name."""
    from prefect.flows import load_flow_from_entrypoint

    import loraflow.flows

    for name in ("finetune", "retrain", "evaluate_model", "predict", "stage", "sweep"):
        file = Path(loraflow.flows.__path__[0]) / f"{name}.py"
        flow = load_flow_from_entrypoint(f"{file}:{'evaluate' if name == 'evaluate_model' else name}")
        arguments = {"predict": {"source": "a", "target": "b"}, "stage": {"job": {}, "store": "s", "label": "l"}}
        flow.validate_parameters(arguments.get(name, {}))
