"""prefect.yaml fits the flows that it deploys, and `loraflow up` refuses a server open to anybody."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from loraflow.cli import require_free_port
from loraflow.failures import BadConfig
from loraflow.flows.server import project
from loraflow.flows.server.local_server import environment
from loraflow.store import Ref
from tests.job_factory import make_job

FILE = Path(__file__).parents[3] / "prefect.yaml"
ENTRIES = yaml.safe_load(FILE.read_text())["deployments"]
NAMES = [f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}" for entry in ENTRIES]
REF = Ref(stage="s", fingerprint="f", digest="d", uri="", facets=dict.fromkeys(("adapter", "tokenizer", "train"), "d"))


def test_all_deployments_are_defined():
    assert set(NAMES) == {
        "finetune/local",
        "finetune/gpu",
        "retrain/nightly",
        "retrain/on-dataset-update",
        "stage/cpu",
        "stage/gpu",
        "evaluate/local",
        "sweep/local",
    }


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_parameters_of_deployments_schedules_and_triggers_fit_the_flow(entry):
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.importtools import import_object
    from prefect.utilities.schema_tools.validation import validate

    schema = parameter_schema(import_object(entry["entrypoint"])).model_dump()
    defaults = entry.get("parameters", {})
    for more in (*entry.get("schedules", []), *entry.get("triggers", []), {}):
        assert (
            validate({**defaults, **(more.get("parameters") or {})}, schema, raise_on_error=True, ignore_required=True)
            == []
        )


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_recipes_of_deployments_load(entry):
    from loraflow.config import load_recipe

    for more in (*entry.get("schedules", []), {}):
        name = {**entry.get("parameters", {}), **more.get("parameters", {})}.get("recipe")
        assert name is None or load_recipe(name).name


def test_schedules_keep_their_pause_and_entrypoints_are_modules():
    for entry in ENTRIES:
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", entry["entrypoint"]), "a file entrypoint puts flows/ on sys.path"
        for schedule in entry.get("schedules", []):
            assert schedule["slug"] and isinstance(schedule["active"], bool)
        if entry["entrypoint"].endswith(".retrain"):
            assert entry["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_the_file_contains_no_path_of_a_machine():
    assert not re.search(r"/(home|work|root|tmp|Users)/", FILE.read_text())
    assert yaml.safe_load(FILE.read_text())["pull"] == [
        {"loraflow.flows.server.project.enter": {"project": "loraflow"}}
    ]


def test_a_run_uses_the_project_that_its_worker_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "configs").mkdir(parents=True)
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path / "mine"))
    assert project.enter() == {"directory": str(tmp_path / "mine")} and Path.cwd() == tmp_path / "mine"
    monkeypatch.setenv("LORAFLOW_HOME", str(tmp_path))
    with pytest.raises(BadConfig, match="does not know the project's folder") as error:
        project.enter()
    assert "LORAFLOW_HOME=" in error.value.next_step


def test_automations_do_not_depend_on_the_order_of_their_sets():
    """`expect` is a set: two equal sets may be dumped in two orders, and each deploy then updated the automation."""
    from loraflow.flows.server.deployments import same_automation_fields

    def automation(*names, id_=1, force=("train", "merge")):
        trigger = {"id": id_, "triggers": [{"id": id_, "expect": list(names), "within": 3}]}
        return {"trigger": trigger, "actions": [{"parameters": {"force": list(force)}}]}

    assert same_automation_fields(automation("failed", "crashed"), automation("crashed", "failed", id_=2))
    assert not same_automation_fields(automation("failed"), automation("crashed"))
    assert not same_automation_fields(automation("a"), automation("a", force=("merge", "train"))), "a list of a person"


def test_a_server_without_a_password_listens_on_localhost_only(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(BadConfig) as error:
        environment(tmp_path, "0.0.0.0", 4242)
    assert "PREFECT_SERVER_API_AUTH_STRING" in error.value.next_step
    settings = environment(tmp_path, "127.0.0.1", 4242)
    assert settings["PREFECT_SERVER_UI_API_URL"] == settings["PREFECT_API_URL"] == "http://127.0.0.1:4242/api"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and settings["PREFECT_HOME"] == str(tmp_path)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "a:b")
    assert environment(tmp_path, "0.0.0.0", 4242)["PREFECT_API_AUTH_STRING"] == "a:b"


def test_up_on_a_port_in_use_names_another_port(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from loraflow.cli import deploy

    monkeypatch.setattr(deploy, "quiet_logging", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with patch.dict(os.environ):
            result = CliRunner().invoke(deploy.up, ["--port", str(port), "--home", str(tmp_path)])
        assert isinstance(result.exception, BadConfig) and f"cannot listen on port {port}" in str(result.exception)
        assert f"loraflow up --port {port + 1}" in result.exception.next_step
    require_free_port("127.0.0.1", port, "")


def test_a_stage_leases_the_gpu_only_if_there_is_one(monkeypatch, tmp_path):
    from loraflow.config import parse_recipe
    from loraflow.stages import STAGES
    from loraflow.store.lock import LockHeld, flock
    from loraflow.tasks import gpu_lease as lease

    monkeypatch.setattr(lease.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(lease, "has_gpu", lambda: True)
    monkeypatch.setattr(lease, "get_current_settings", lambda: type("S", (), {"api": type("A", (), {"url": None})}))
    lock = tmp_path / f"loraflow-{lease.limit_name()}-{os.getuid()}.lock"
    for stage, device, leased in (("train", "auto", True), ("merge", "auto", False), ("train", "cpu", False)):
        lock.unlink(missing_ok=True)
        recipe = parse_recipe("name: x\nbase: {model: a}", overrides={"runtime.device": device})
        inputs = {name: REF for name, input_ in STAGES[stage].inputs.items() if not input_.optional}
        with lease.gpu_lease(make_job(stage, recipe, inputs)):
            if leased:
                with pytest.raises(LockHeld), flock(lock, wait=False):
                    pass
            assert lock.exists() is leased


RACE = """
import asyncio, sys
import sqlalchemy as sa
from loraflow.flows.server.prefect_process import write_in_turn
from prefect.server.database.configurations import AioSqliteConfiguration

async def race():
    config = AioSqliteConfiguration(f"sqlite+aiosqlite:///{sys.argv[1]}")
    engine = await config.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("create table counts (n integer)"))
    begun = []
    async def write():
        async with await config.session(engine) as session, config.begin_transaction(session):
            begun.append(sys.argv[2])
            assert sys.argv[2] != "ours" or len(begun) == 1, "another one waits in SQLite, with a connection's mutex"
            count = (await session.execute(sa.text("select count(*) from counts"))).scalar()
            await asyncio.sleep(0.2)
            await session.execute(sa.text(f"insert into counts values ({count})"))
            begun.pop()
    await asyncio.gather(*[write() for _ in range(3)])
    async with engine.connect() as connection:
        print([row[0] for row in await connection.execute(sa.text("select n from counts order by n"))])

if sys.argv[2] == "ours":
    write_in_turn()
asyncio.run(race())
"""


@pytest.mark.parametrize("whose", [pytest.param("prefect's", marks=pytest.mark.slow), "ours"])
def test_concurrent_transactions_that_read_first_wait_only_in_our_server(tmp_path, whose):
    """If Prefect's own way passes one day, `write_in_turn` can go."""
    command = [sys.executable, "-c", RACE, str(tmp_path / "race.db"), whose]
    env = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=FILE.parent, env=env, capture_output=True, text=True, timeout=90)
    if whose == "ours":
        assert done.stdout == "[0, 1, 2]\n", done.stderr
    else:
        assert "database is locked" in done.stderr


def test_a_worker_can_interrupt_itself_although_a_background_job_ignores_interrupts():
    """Prefect's worker stops by SIGINT to itself: in the background of a script, `loraflow up` waited 25 s and killed it."""
    script = f"""
import os, runpy, signal, sys
from loraflow.flows.server import prefect_process
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
runpy.run_module = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
sys.argv[1:] = ["{os.getpid()}", "worker", "start"]
prefect_process.main()
"""
    done = subprocess.run(
        ["bash", "-c", 'trap "" INT; exec "$@"', "", sys.executable, "-c", script],
        cwd=FILE.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.endswith("KeyboardInterrupt\n"), done.stderr


def test_up_names_what_is_wrong_in_prefect_yaml_before_it_starts_a_server(tmp_path, monkeypatch):
    from loraflow.cli.deploy import up

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loraflow.flows.server.local_server.Processes", None)  # nothing may be started
    monkeypatch.setattr("loraflow.flows.server.local_server.environment", lambda *server: {})
    (tmp_path / "configs").mkdir()
    (tmp_path / "prefect.yaml").write_text("name: p\ndeployments:\n  - name: one\n    entrypoint: nothing.at.all\n")
    with pytest.raises(BadConfig, match="one|entrypoint|nothing"):
        up.callback(port=4799, host="127.0.0.1", pools=(), limit=1, home=tmp_path / "home", only=())
    assert not (tmp_path / "home").exists()
