"""A canary in URL and environment is in no byte that a run, its crash, `show` and `plan` write."""

import json
import logging
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.exceptions import ParameterTypeError

from loraflow import credentials
from loraflow.cli import cli
from loraflow.data.versions import dvc
from loraflow.failures import Failure
from tests.flows.conftest import states
from tests.password_server import git_server

CANARY = "c4nary-0f-16-token"
SHOWN = {"artifacts", "events", "flow_runs", "logs", "task_runs"}  # kinds of answers that name a flow run
URL = f"https://someone:{CANARY}@127.0.0.1:1/data.git"


@pytest.fixture
def masking(monkeypatch):
    """Undo at the end what a command sets for its process."""
    monkeypatch.setattr(credentials, "_hidden", {})
    monkeypatch.setattr(credentials, "_secrets", set())
    factory, hook = logging.getLogRecordFactory(), sys.excepthook
    credentials.protect_output()
    yield
    logging.setLogRecordFactory(factory)
    sys.excepthook = hook


def database_text() -> str:
    """Return every row of the Prefect server's database, after a look at the bytes of its files, which have old rows too."""
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    file = PREFECT_API_DATABASE_CONNECTION_URL.value().split("///")[1]
    for path in Path(file).parent.glob(f"{Path(file).name}*"):
        assert CANARY.encode() not in path.read_bytes(), path
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
        return "\n".join(database.iterdump())


def api_answers(run: str) -> dict[str, bytes]:
    """Return what Prefect's API, from which both UIs have all that they show, answers to each query about a flow run."""
    from prefect.settings import PREFECT_API_URL

    answers: dict[str, bytes] = {}
    with httpx.Client(base_url=PREFECT_API_URL.value(), timeout=60) as client:
        routes = client.get(PREFECT_API_URL.value().removesuffix("api") + "openapi.json").json()["paths"]

        about = {
            "flow_runs": {"id": {"any_": [run]}},
            "logs": {"flow_run_id": {"any_": [run]}},
            "filter": {"any_resource": {"id": [f"prefect.flow-run.{run}"]}},  # of events
        }

        def ask(method: str, path: str, **body: Any) -> None:
            answer = client.request(method, path, **body)
            if answer.is_success:
                answers[path] = answer.content

        for path, methods in routes.items():
            if "get" in methods and "{" not in path:
                ask("get", path)
            if "post" in methods and "{" not in path and path.endswith("filter"):
                ask("post", path, json=about)
        for path, methods in routes.items():
            kind, is_object = path.split("/")[1], path.count("{") == 1 and "/{id}" in path
            if is_object and "get" in methods and kind in ("flow_runs", "task_runs", "artifacts"):
                for found in json.loads(answers[f"/{kind}/filter"]):
                    ask("get", path.replace("{id}", found["id"]))
    return answers


def test_no_byte_that_a_successful_run_from_the_form_writes_has_the_canary(
    project, tmp_path, monkeypatch, capfd, caplog, masking
):
    """The settings are given to the flow in Python: Prefect's server is sent masked ones."""
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{name.lower()}-{CANARY}")
    pin = f"outs:\n- md5: {dvc.dvc_md5(project.folder / 'data')}\n  hash: md5\n  path: data\n"
    monkeypatch.chdir(project.folder)
    with git_server(tmp_path / "git", {"data.dvc": pin}, CANARY) as address:
        url = f"http://someone:{CANARY}@{address}/data.git"
        summary = project.run(force=["merge"], data__source="data.dvc", data__repo=url, data__rev="main")
    assert states(summary)["merge"] == "computed" and states(summary)["version_dataset"] == "cached"
    record = json.loads((project.store / "runs" / f"{summary['run']}.json").read_text())
    assert record["state"] == "done" and record["resolved"]["data"]["repo"] == f"http://***@{address}/data.git"
    cli.main(["show", summary["run"], "--store", str(project.store)], standalone_mode=False)
    for file in project.folder.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
    database = database_text()
    assert f"http://***@{address}/data.git" in database and CANARY not in database
    [run] = re.findall("runs/flow-run/([0-9a-f-]{36})", caplog.text)
    answers = api_answers(run)
    assert f"http://***@{address}/data.git".encode() in answers["/flow_runs/filter"]
    assert {path.split("/")[1] for path, text in answers.items() if run.encode() in text} >= SHOWN
    assert len(json.loads(answers["/task_runs/filter"])) > 9 and f"/flow_runs/{run}/logs/download" in answers
    assert [path for path, text in answers.items() if CANARY.encode() in text] == []
    assert "a retry of this run does not have them" in caplog.text
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err + caplog.text


def test_parameters_of_a_call_in_python_are_masked_before_the_server_stores_them(
    tmp_path, monkeypatch, capfd, caplog, masking
):
    """Without `mask_parameters`, which replaces them once the run has started. Some do not fit: Prefect logs them all.

    The names of runs and tasks are made of parameters, too.
    """
    from loraflow.flows import evaluate_model, finetune, predict, retrain, sweep

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loraflow.tasks.run.mask_parameters", lambda given: None)
    monkeypatch.setattr(sweep, "mask_parameters", lambda given: None)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("name: tiny\n")
    for number, (flow, given) in enumerate(
        (
            (finetune.finetune, {"overrides": {"repo": "{}"}}),
            (finetune.finetune, {"settings": {"data.repo": "{}"}}),
            (retrain.retrain, {"settings": {"data.repo": "{}"}}),
            (evaluate_model.evaluate, {"settings": {"data.repo": "{}"}}),
            (sweep.sweep, {"grid": {"data.repo": ["{}"]}}),
            (predict.predict, {"source": "{}", "target": "answers.jsonl"}),
            (predict.predict, {"source": "rows.jsonl", "target": "{}"}),
            (predict.predict, {"source": "rows.jsonl", "target": "answers.jsonl", "model": "{}"}),
            (predict.predict.with_options(retries=0), {"source": "{}", "target": "answers.jsonl"}),
            (evaluate_model.evaluate, {"model": "{}"}),
            (finetune.finetune, {"recipe": "{}"}),
            (retrain.retrain, {"recipe": "{}"}),
            (sweep.sweep, {"recipe": "{}"}),
        )
    ):
        url = f"https://someone:{CANARY}@127.0.0.1:{number + 10}"
        logging.setLogRecordFactory(logging.LogRecord)
        with pytest.raises((Failure, ParameterTypeError)):
            flow(**json.loads(json.dumps(given).replace("{}", url)))
        assert url.replace(f"someone:{CANARY}", "***") in database_text()
    shown = capfd.readouterr()
    text = shown.out + shown.err + caplog.text
    assert "Parameter validation failed" in text and CANARY not in text


def test_no_byte_that_a_crash_writes_has_the_canary(recipe, tmp_path, monkeypatch, capfd, masking):
    monkeypatch.setenv("HF_TOKEN", f"hf-{CANARY}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"aws-{CANARY}")
    monkeypatch.chdir(tmp_path)
    text = recipe.read_text()
    recipe.unlink()
    project = tmp_path / "project"
    project.mkdir()
    in_file, overridden = tmp_path / "recipe.yaml", tmp_path / "other.yaml"
    in_file.write_text(text.replace("data:\n", f"data:\n  repo: {URL}\n", 1).replace(f"{tmp_path}/data", "data.dvc"))
    overridden.write_text(text)
    monkeypatch.chdir(project)
    sets = ("--set", "data.source=data.dvc", "--set", f"data.repo={URL}")
    for command in (
        ["run", str(in_file)],
        ["run", str(overridden), *sets],
        ["plan", str(in_file)],
        ["plan", str(overridden), *sets],
    ):
        with pytest.raises(Failure, match=r"Git cannot show") as caught:
            cli.main(command, standalone_mode=False)
        assert CANARY not in str(caught.value) and "https://***@127.0.0.1:1" in str(caught.value)
    store = tmp_path / "store"
    records = [json.loads(file.read_text()) for file in (store / "runs").glob("*.json")]
    assert len(records) == 2 and all(record["state"] == "failed" for record in records)
    assert {record["resolved"]["data"]["repo"] for record in records} == {"https://***@127.0.0.1:1/data.git"}
    cli.main(["runs", "--store", str(store)], standalone_mode=False)
    cli.main(["show", records[0]["run"], "--store", str(store)], standalone_mode=False)
    for file in [*store.rglob("*"), *project.rglob("*")]:
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
    database = database_text()
    assert "https://***@127.0.0.1:1/data.git" in database, "the masked parameter"
    assert CANARY not in database
    shown = capfd.readouterr()
    assert CANARY not in shown.out + shown.err and "***" in shown.out + shown.err
