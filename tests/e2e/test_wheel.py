"""The built wheel in an environment of its own, beside a project that has its own `flows/` and `tasks.py`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

from loraflow.flows.server.prefect_process import GRACE_SECONDS
from tests.conftest import chat
from tests.local_deployment import ROOT, Api, free_port

pytestmark = pytest.mark.slow

FAST = ("base.dtype=float32", "training_config.bf16=false", "training_config.max_steps=2", "evaluation.max_rows=4",
        "evaluation.max_new_tokens=8", "evaluation.metrics=[token_loss]", "gate.primary=token_loss", "gate.guards={}",
        "runtime.device=cpu")  # fmt: skip
OWN = "raise RuntimeError('the project\\'s own module was imported')\n"


class Installed(Api):
    """A virtual environment with the wheel, and a project's folder. The libraries come from the tests' environment."""

    def __init__(self, folder: Path):
        self.project, self.bin = folder / "my project ü", folder / "venv" / "bin"
        self.home = folder / "home"
        wheels = folder / "wheels"
        if released := os.environ.get("LORAFLOW_WHEEL"):  # `make release`: the wheel that it has built
            wheels = ROOT / released
        else:
            shutil.rmtree(
                ROOT / "build" / "lib", ignore_errors=True
            )  # setuptools would add modules that were removed since
            # The wheel is built from the sdist, so that a file which that lacks is noticed.
            sdist = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
            subprocess.run([sys.executable, "-c", sdist, str(wheels)], cwd=ROOT, check=True, capture_output=True)
            [source] = wheels.glob("loraflow-*.tar.gz")
            build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
            subprocess.run([sys.executable, "-m", "pip", *build], check=True)
        [self.wheel] = wheels.glob("loraflow-*.whl")
        venv.create(folder / "venv", with_pip=False)
        python = str(self.bin / "python")
        install = ["--python", python, "install", "--quiet", "--no-deps", str(self.wheel)]
        # a checkout in PYTHONPATH would count as an installed loraflow
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([sys.executable, "-m", "pip", *install], env=env, check=True)
        [site] = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.home.mkdir()
        (self.project / "flows").mkdir(parents=True)
        (self.project / "flows" / "__init__.py").write_text(OWN)
        (self.project / "tasks.py").write_text(OWN)
        (self.project / "chats.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(60)))
        kept = {"PATH", "LANG", "TMPDIR"}
        self.env = {key: value for key, value in os.environ.items() if key in kept}
        self.env |= {"HOME": str(self.home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env["PATH"] = f"{self.bin}{os.pathsep}{self.env['PATH']}{os.pathsep}{Path(sys.executable).parent}"

    def call(self, *arguments: str, **env: str) -> str:
        """Run a command in the project's folder; return its output."""
        done = subprocess.run(
            arguments, cwd=self.project, env={**self.env, **env}, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def ignore_interrupts() -> None:
    """Ignore SIGINT, as a shell without job control does for a command in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_one_package_and_is_small(installed):
    assert installed.wheel.stat().st_size <= 2**20
    listing = installed.call(str(installed.bin / "python"), "-m", "zipfile", "-l", str(installed.wheel))
    names = {line.split()[0].split("/")[0] for line in listing.splitlines()[1:]}
    assert {name for name in names if not name.endswith(".dist-info")} == {"loraflow"}
    where = installed.call(str(installed.bin / "python"), "-c", "import loraflow; print(loraflow.__file__)")
    assert str(installed.bin.parent) in where


def test_init_run_up_deploy_and_retrain_work_in_a_new_folder(installed, phi3):
    assert "prefect.yaml" in installed.call("loraflow", "init", "--data", "chats.jsonl", "--base", str(phi3))
    settings = [part for setting in FAST for part in ("--set", setting)]
    assert "train" in installed.call("loraflow", "run", "configs/chats.yaml", *settings)
    installed.call("git", "init", "-q", "-b", "main")
    installed.call("git", "add", "data.dvc", "configs", "prefect.yaml")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    installed.call("git", *author, "commit", "-qm", "first")
    port = free_port()
    installed.url = f"http://127.0.0.1:{port}"
    log = installed.project / "up.log"
    with log.open("wb") as file:
        up = subprocess.Popen(
            ["loraflow", "up", "--port", str(port)], cwd=installed.project, env=installed.env, stdout=file,
            stderr=file, start_new_session=True, preexec_fn=ignore_interrupts,
        )  # fmt: skip
    try:
        until = time.monotonic() + 240
        while "Ctrl-C stops" not in log.read_text():
            assert up.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        again = installed.call("loraflow", "deploy", PREFECT_API_URL=f"{installed.url}/api")
        assert "nothing changed" in again
        # a recipe's values as JSON, as the form sends them
        pairs = (setting.split("=", 1) for setting in FAST)
        values = {
            key: {"[token_loss]": ["token_loss"], "{}": {}, "false": False}.get(value, value) for key, value in pairs
        }
        values = {key: int(value) if str(value).isdigit() else value for key, value in values.items()}
        for name in ("finetune/my-project-u", "retrain/my-project-u-nightly"):
            run = installed.start(name, settings=values)
            found = installed.wait(run, seconds=240)
            assert found["state"]["type"] == "COMPLETED", (name, found["state"], log.read_text())
        assert found["state"]["name"] == "UpToDate", "the command's artifacts were reused"
    finally:
        up.terminate()
        up.wait(GRACE_SECONDS)  # nothing runs, so no process is left that has to be killed after this time
