"""A Prefect server for the session, and projects in which a real run has completed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import RECIPE, chat


@pytest.fixture(scope="session", autouse=True)
def prefect_server(tmp_path_factory):
    home = tmp_path_factory.mktemp("prefect")
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    os.environ["PREFECT_LOCAL_STORAGE_PATH"] = str(home / "storage")
    from prefect.server.api import server as module
    from prefect.testing.utilities import prefect_test_harness

    from loraflow.flows.server.temporary_server import wrapped

    def start(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(wrapped(args), start_new_session=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(Popen=start))
        with prefect_test_harness(server_startup_timeout=120):
            patch.undo()
            yield


class Project:
    """A dataset, a recipe and a store in one folder."""

    def __init__(self, folder: Path, phi3: Path):
        self.folder, self.recipe, self.store = folder, folder / "tiny.yaml", folder / "store"
        self.phi3 = phi3
        self.recipe.write_text(RECIPE.format(data=folder / "data", base=phi3, store=self.store))

    def run(self, force: list[str] | None = None, **overrides: Any) -> dict[str, Any]:
        from loraflow.flows.finetune import finetune

        return finetune(recipe=str(self.recipe), settings=_dotted(overrides), force=force or [])

    def plan(self, force: list[str] | None = None, **overrides: Any) -> dict[str, str]:
        """Return {stage: verdict}."""
        from loraflow.config import load_recipe
        from loraflow.execution.plan import plan
        from loraflow.execution.workspace import Workspace

        self.verdicts = plan(Workspace(load_recipe(self.recipe, _dotted(overrides))), force or [])
        return {verdict.label: verdict.status for verdict in self.verdicts}


def _dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["state"] for stage in summary["stages"]}


@pytest.fixture(scope="session")
def completed_project(tmp_path_factory, phi3) -> tuple[Project, dict[str, Any]]:
    """A project in which the flow ran once."""
    import json

    folder = tmp_path_factory.mktemp("first run")
    (folder / "data").mkdir()
    for name, numbers in (("train.jsonl", range(80)), ("heldout.jsonl", range(1000, 1020))):
        (folder / "data" / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    project = Project(folder, phi3)
    return project, project.run()


@pytest.fixture
def project(completed_project, tmp_path) -> Project:
    """A copy of the completed project in another folder: nothing in it may depend on its path."""
    shutil.copytree(completed_project[0].folder, tmp_path / "copy")
    return Project(tmp_path / "copy", completed_project[0].phi3)


@pytest.fixture
def client():
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client
