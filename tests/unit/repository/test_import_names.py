"""loraflow is one name in site-packages: flows and tasks are imported as parts of it, and each file once."""

import os
import subprocess
import sys

EVERYTHING = """
import importlib.util, pkgutil, sys, loraflow
# modules that need a package of an extra, or of torch's build for GPUs
extras = {
    "loraflow.tracking.mlflow_tracker": "mlflow",
    "loraflow.training.triton_kernels": "triton",
}
left_out = {name for name, package in extras.items() if importlib.util.find_spec(package) is None}
for module in pkgutil.walk_packages(loraflow.__path__, "loraflow."):
    if ".metrics." not in module.name and module.name not in {"loraflow.cli.__main__", *left_out}:
        __import__(module.name)
files = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if name.split(".")[0] in ("loraflow", "flows", "tasks") and file:
        files.setdefault(os.path.realpath(file), []).append(name)
twice = {file: names for file, names in files.items() if len(names) > 1}
assert not twice, twice
assert "loraflow.flows.finetune" in sys.modules and "loraflow.tasks.stages" in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] in ("flows", "tasks")]
"""


def test_every_file_is_one_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import os\n" + EVERYTHING], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_projects_own_flows_and_tasks_are_not_imported(tmp_path):
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise RuntimeError('the flows of the user')")
    (tmp_path / "tasks.py").write_text("raise RuntimeError('the tasks of the user')")
    script = "import loraflow.flows.finetune, loraflow.flows.server.prefect_process, loraflow.tasks.stages"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    for command in (
        [sys.executable, "-c", script],
        [sys.executable, "-m", "loraflow.flows.server.prefect_process", "0", "version"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert "of the user" not in done.stderr, done.stderr[-2000:]
        assert done.returncode == 0, done.stderr[-2000:]
