"""Errors of the system at the command line: one sentence and an exit status, never a traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraflow.cli import from_system
from loraflow.failures import DiskFull, Network
from tests.unit.flows.test_recipe_file import recipe  # noqa: F401

MAIN = "from loraflow.cli import main; main()"
# A plan that does not build the base without weights: that imports transformers, for six of seven seconds.
NO_PREVIEW = "import loraflow.execution.plan as plan; plan.base_report = lambda *_: []; " + MAIN


def shell(command: str, cwd: Path, python: str = MAIN, **env: str) -> subprocess.CompletedProcess:
    """Run a shell command in which `loraflow` is the command of this checkout: not of the current folder, hence -P."""
    function = f"loraflow() {{ {sys.executable} -P -c '{python}' \"$@\"; }}\n"
    return subprocess.run(
        ["bash", "-c", function + command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )


# A full disk or quota, a limit, and a file system without locks: the advice names what frees space, or the store.
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOLCK}


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_a_failure_with_its_file(number):
    failure = from_system(OSError(number, os.strerror(number), "/some/file"))
    assert failure is not None and failure.exit_code == 1
    if not isinstance(failure, DiskFull):
        assert failure.got == os.strerror(number)
    assert number in STORAGE or not any(word in failure.next_step for word in ("remove", "runtime."))
    assert failure.where == "/some/file" and len(str(failure).splitlines()) <= 4


def test_an_exception_that_only_derives_from_oserror_keeps_its_traceback():
    assert from_system(OSError("a message without a number")) is None
    assert isinstance(from_system(ConnectionRefusedError(errno.ECONNREFUSED, "refused")), Network)


# command → (exit status, words on stderr)
COMMANDS = {
    "loraflow plan tiny.yaml --set runtime.store=tiny.yaml/store": (1, "is a file and not a folder"),
    "loraflow plan tiny.yaml --set runtime.store=$(printf 'x%.0s' {1..300})": (1, "too long"),
    "loraflow plan tiny.yaml --json > /dev/full": (1, "The disk is full."),
    "loraflow plan tiny.yaml --set \"a=$(printf '[%.0s' {1..40000})\"": (2, "not a plain value"),
    "loraflow plan /proc/self/mem": (2, "cannot be read"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_failing_command_prints_one_sentence(recipe, command):  # noqa: F811
    code, words = COMMANDS[command]
    done = shell(command, recipe.parent, NO_PREVIEW)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5 and len(done.stderr) < 1_500


@pytest.mark.parametrize(
    ("command", "python"),
    [("unset HOME; TMPDIR=/nowhere loraflow plan tiny.yaml >&-", MAIN),
     ("loraflow plan tiny.yaml 2>&- >/dev/null", NO_PREVIEW), ("loraflow plan tiny.yaml <&- >&- 2>&-", MAIN)],
)  # fmt: skip
def test_closed_streams_and_missing_folders_do_not_stop_a_plan(recipe, command, python):  # noqa: F811
    done = shell(command, recipe.parent, python)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_closed_pipe_ends_the_command_quietly_with_its_documented_status(recipe):  # noqa: F811
    done = shell("loraflow plan tiny.yaml | true; echo ${PIPESTATUS[0]}", recipe.parent, NO_PREVIEW)
    assert done.stdout == "141\n" and done.stderr == ""


@pytest.mark.parametrize(("argument", "printed"), [("--json", "né→".encode()), ("--quiet", b"n??")])
def test_json_is_utf_8_in_any_locale_and_other_output_replaces_characters(argument, printed):
    script = "from loraflow.cli import prepare_streams; prepare_streams(); print('né→')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, env=env, check=True)
    assert done.stdout.strip() == printed


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    done = shell("mkdir gone && cd gone && rmdir ../gone && loraflow plan nowhere.yaml", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "The current folder no longer exists." in done.stderr


def test_a_failure_on_the_terminal_has_at_most_ten_lines_with_its_next_step():
    from loraflow.cli import short_message
    from loraflow.failures import BadData

    long = BadData(
        "dvc add failed.", where="data", got="\n".join(f"line {n}" for n in range(90)), next_step="look at it"
    )
    lines = short_message(long).splitlines()
    assert len(lines) == 10 and lines[0] == "dvc add failed." and lines[-1] == "  next:     look at it"
    assert short_message(BadData("a", got="b")) == "a\n  got:      b"
