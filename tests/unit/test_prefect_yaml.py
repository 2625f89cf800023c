"""What `loraflow deploy` reads from prefect.yaml: Prefect's own keys work, and everything else is refused by its field."""

import asyncio
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from loraflow.failures import BadConfig
from loraflow.flows.server import project
from loraflow.flows.server.new_prefect_yaml import write_prefect_yaml
from loraflow.flows.server.prefect_yaml import read_all
from tests.unit.test_git_branch import git

ENTRY = {
    "name": "mine",
    "entrypoint": "loraflow.flows.retrain.retrain",
    "work_pool": {"name": "local"},
    "parameters": {"recipe": "tiny"},
}

ROOT = Path(__file__).parents[2]


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
        ({"work_pool": "local"}, "work_pool"),
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
    assert f"prefect.yaml: deployments[0] ({fields.get('name', 'mine')})" in error.value.where
    assert field in f"{error.value.where} {error.value.got}"


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


@pytest.mark.parametrize("first", ["master", "main"])
def test_a_new_project_is_retrained_from_the_branch_that_its_repository_has(tmp_path, monkeypatch, caplog, first):
    """git calls the first branch master, where nothing else is configured: the nightly run failed each night."""

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("name: tiny\nbase: {model: x}\ndata: {train: [a.jsonl]}\n")
    git(tmp_path, "init", "-q", "-b", first)  # `loraflow init` comes before the first commit, or after it
    write_prefect_yaml(tmp_path)
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    retrains = [spec for spec in read_all(tmp_path / "prefect.yaml")[0] if spec.flow_name == "retrain"]
    assert [spec.parameters.get("branch", "main") for spec in retrains] == [first] * 2
    assert not caplog.records
    git(tmp_path, "branch", "-q", "-m", "trunk")
    read_all(tmp_path / "prefect.yaml")
    assert caplog.records[0].message.endswith(
        f"parameters: the repository has no branch {first}, so this retraining will fail; it has: trunk "
        "(next: `branch: trunk` there)"
    )


def test_triggers_of_two_deployments_may_have_one_name(specs):
    trigger = {"name": "n", "expect": ["a"]}
    found = specs({"deployments": [{**ENTRY, "name": name, "triggers": [trigger]} for name in "ab"]})
    assert [spec.triggers[0].name for spec in found] == ["n", "n"]


def test_a_worker_refuses_the_run_of_another_project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: ours\n")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert project.enter(project="ours") == project.enter() == {"directory": str(tmp_path)}
    with pytest.raises(BadConfig, match="serves another project") as error:
        project.enter(project="theirs")
    assert (error.value.expected, error.value.got.split(",")[0]) == ("the project theirs", "the project ours")


def test_a_worker_refuses_the_run_of_another_project_of_the_same_name(tmp_path, monkeypatch):
    """Two folders named alike: the run would be computed with the recipes and the store of the other one."""
    from loraflow.config.project import PROJECT_ID, project_id

    for folder in ("a/tickets", "b/tickets"):
        (tmp_path / folder / "configs").mkdir(parents=True)
        write_prefect_yaml(tmp_path / folder, "r")
    own, other = project_id(tmp_path / "a/tickets"), project_id(tmp_path / "b/tickets")
    assert own and other and own != other
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path / "a/tickets"))
    monkeypatch.setenv(PROJECT_ID, own)
    assert project.enter(project="tickets") == {"directory": str(tmp_path / "a/tickets")}
    monkeypatch.setenv(PROJECT_ID, other)
    with pytest.raises(BadConfig, match="another project of the same name") as error:
        project.enter(project="tickets")
    assert other in error.value.expected and own in error.value.got
    (tmp_path / "a/tickets/prefect.yaml").write_text("name: tickets\n")
    project.enter(project="tickets")  # of an earlier version, without an id


def test_a_worker_names_the_other_project_if_both_name_and_id_differ(tmp_path, monkeypatch):
    """One pool of two projects: the advice to replace the name of one of them was false."""
    from loraflow.config.project import PROJECT_ID

    (tmp_path / "ours" / "configs").mkdir(parents=True)
    write_prefect_yaml(tmp_path / "ours", "r")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv(PROJECT_ID, "0a")
    with pytest.raises(BadConfig, match="serves another project than the run's") as error:
        project.enter(project="theirs")
    assert "a work pool of its own" in error.value.next_step


def test_a_module_of_the_project_that_runs_would_import_in_place_of_a_library_is_refused(tmp_path, monkeypatch):
    """Prefect starts runs with the project's folder in PYTHONPATH: they crashed, and only the worker's log said why."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "r.yaml").write_text("name: r\n")
    for own in ("os", "sys", "evaluate_faq", "__main__"):  # never imported from there, or no library's
        (tmp_path / f"{own}.py").write_text("raise RuntimeError\n")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    write_prefect_yaml(tmp_path, "r")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    assert project.enter() == {"directory": str(tmp_path)}
    (tmp_path / "pydantic").mkdir()
    for shadow in ("random.py", "pydantic/__init__.py"):
        file = tmp_path / shadow
        file.touch()
        for check in (lambda: read_all(Path("prefect.yaml")), lambda: project.enter()):
            with pytest.raises(BadConfig, match=r"in place of the module (random|pydantic)\.") as error:
                check()
            assert Path(error.value.where).resolve() == file
        file.unlink()


def test_the_projects_folder_is_not_searched_while_loraflows_flows_are_imported(tmp_path):
    """Prefect puts the working directory in front: `loraflow deploy` ended with the traceback of a foreign statistics.py."""
    (tmp_path / "statistics.py").write_text("raise RuntimeError('own')\n")
    code = (
        "from loraflow.flows.server.project import import_own_flow\n"
        "from prefect.utilities.importtools import import_object\n"
        "name = 'loraflow.flows.finetune.finetune'\n"
        "import_own_flow(name)\n"
        "print(import_object(name).name)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "finetune\n", done.stderr


@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "in no commit"])
def test_a_prefect_yaml_that_is_written_again_has_the_id_before(tmp_path, is_committed):
    """`loraflow deploy` refused the project as a foreign one of the same name."""
    from loraflow.config.project import project_id

    def written(folder):
        (folder / "prefect.yaml").unlink(missing_ok=True)
        write_prefect_yaml(folder, "r")
        return project_id(folder)

    repository = tmp_path / "a"
    for name in ("chat", "mail"):
        (repository / name / "configs").mkdir(parents=True)
        (repository / name / "configs" / "r.yaml").touch()
    git(repository, "init", "-q")
    without_commits = written(repository / "chat")
    assert without_commits and written(repository / "chat") == without_commits
    git(repository, "add", "chat" if is_committed else "chat/configs")
    git(repository, "commit", "-qm", "one")
    assert written(repository / "chat") == without_commits
    git(tmp_path, "clone", "-q", "a", "b")
    git(tmp_path, "clone", "-q", "a", "c")
    cloned = written(tmp_path / "b" / "chat")
    assert written(tmp_path / "c" / "chat") == cloned == written(tmp_path / "b" / "chat"), (
        "every clone has the same one"
    )
    assert (cloned == without_commits) is is_committed
    assert written(repository / "mail") not in (without_commits, cloned, None)


@pytest.mark.parametrize(("value", "found"), [(12345678, "12345678"), ("0a", "0a"), (None, None), (True, BadConfig)])
def test_an_id_of_digits_without_quotes_is_compared_as_text(value, found):
    from loraflow.config.project import PROJECT_ID, id_of

    variables = {"env": {PROJECT_ID: value}}
    if found is BadConfig:
        with pytest.raises(BadConfig, match="is not a text"):
            id_of(variables)
    else:
        assert id_of(variables) == found


@pytest.mark.parametrize("text", [None, "deployments: []\n", "name:\n", ""])
def test_a_worker_that_does_not_know_its_project_refuses_the_run_of_a_named_one(tmp_path, monkeypatch, text):
    """Its folder would be used for any project's run, with other recipes and another store."""
    (tmp_path / "configs").mkdir()
    if text is not None:
        (tmp_path / "prefect.yaml").write_text(text)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.delenv("LORAFLOW_PROJECT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert project.enter() == {"directory": str(tmp_path)}, "deployments of older files name no project"
    with pytest.raises(BadConfig, match="does not say which project") as error:
        project.enter(project="team")
    assert "LORAFLOW_PROJECT=team" in error.value.next_step
    monkeypatch.setenv("LORAFLOW_PROJECT", "team")
    assert project.enter(project="team") == {"directory": str(tmp_path)}
    with pytest.raises(BadConfig, match="serves another project"):
        project.enter(project="theirs")


def test_a_worker_is_not_talked_out_of_its_folders_project(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: ours\n")
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("LORAFLOW_PROJECT", "theirs")
    monkeypatch.chdir(tmp_path)
    for asked in ("ours", "theirs"):
        with pytest.raises(BadConfig, match="serves another project"):
            project.enter(project=asked)


def test_a_flow_that_is_loaded_from_its_file_validates_its_parameters(monkeypatch):
    """`finetune.serve()` makes Prefect load the flow from its file, under another module name."""
    from prefect.flows import load_flow_from_entrypoint

    import loraflow.flows

    for name in ("finetune", "retrain", "evaluate_model", "predict", "stage", "sweep"):
        file = Path(loraflow.flows.__path__[0]) / f"{name}.py"
        flow = load_flow_from_entrypoint(f"{file}:{'evaluate' if name == 'evaluate_model' else name}")
        arguments = {"predict": {"source": "a", "target": "b"}, "stage": {"job": {}, "store": "s", "label": "l"}}
        flow.validate_parameters(arguments.get(name, {}))


def test_the_gpu_team_template_is_deployable_and_its_commented_settings_are_a_valid_recipe(tmp_path, monkeypatch):
    """The names in the recipe are those of the file, and no flow waits for a stage in its own pool."""
    from loraflow.config.load import load_recipe
    from loraflow.flows.server.new_prefect_yaml import team_recipe_lines

    project_folder = tmp_path / "my team ü"
    (project_folder / "configs").mkdir(parents=True)
    monkeypatch.chdir(project_folder)
    text = re.sub(r"^runtime:.*?(?=^\S|\Z)", "", (ROOT / "configs/quickstart.yaml").read_text(), flags=re.M | re.S)
    lines = team_recipe_lines("my-team-u")
    Path("configs/chats.yaml").write_text(text + lines)
    unchanged = load_recipe(Path("configs/chats.yaml")).runtime
    assert unchanged.placement == {}, "commented out"
    settings = re.sub(r"^# (?=runtime:|  )", "", lines, flags=re.M)
    Path("configs/chats.yaml").write_text(text + settings)
    runtime = load_recipe(Path("configs/chats.yaml")).runtime
    file = write_prefect_yaml(Path(), "chats", "gpu-team")
    specs = {spec.full_name: spec for spec in read_all(file)[0]}
    assert str(runtime.store).startswith("s3://") and set(runtime.placement) == {"train", "evaluate"}
    pools = {specs[f"stage/{name}"].work_pool.name for name in runtime.placement.values()}
    assert not pools & {spec.work_pool.name for spec in specs.values() if spec.flow_name != "stage"}
    assert {spec.project for spec in specs.values()} == {"my-team-u"}
