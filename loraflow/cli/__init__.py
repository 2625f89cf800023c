"""The command `loraflow`. Each command's module is imported when it is called, so that `--help` is fast.

Exit status: 0 success, with any decision of the gate · 1 failure · 2 wrong usage or recipe · 3 nothing was promoted, with
--strict-gate · 130 interrupted · 141 the reader of the output closed it · 143 terminated.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from loraflow import __version__
from loraflow.credentials import protect_output
from loraflow.failures import DISK_FAULTS, BadConfig, Failure, Network, from_os_error, of_machine

if TYPE_CHECKING:
    from types import FrameType

    from pydantic import JsonValue


# RowFormat of loraflow.config, whose import takes longer than `--help`
FORMATS = (
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "gemini", "xlam", "glaive", "tree", "transcript",
)  # fmt: skip
# command → (module, its line in `--help`)
COMMANDS = {
    "init": ("loraflow.cli.init", "Create a recipe and a versioned dataset from your own file."),
    "run": ("loraflow.cli.run", "Run a recipe on this machine, from dataset to registered model."),
    "sweep": ("loraflow.cli.sweep", "Train a recipe with several settings, and take the best to the gate."),
    "plan": ("loraflow.cli.plan", "Show which stages of a recipe will run, and why."),
    "data": ("loraflow.cli.data", "Version, check, pull and compare datasets."),
    "evaluate": ("loraflow.cli.models", "Score a model on a recipe's held-out rows."),
    "merge": ("loraflow.cli.models", "Merge an adapter into a base."),
    "adapters": ("loraflow.cli.models", "Convert adapters from other tools."),
    "chat": ("loraflow.cli.serving", "Talk to a model."),
    "predict": ("loraflow.cli.serving", "Answer a file of chats."),
    "serve": ("loraflow.cli.serving", "Serve a model with an OpenAI-compatible server."),
    "publish": ("loraflow.cli.serving", "Publish a model on the hub, with a card."),
    "runs": ("loraflow.cli.store", "List all runs."),
    "show": ("loraflow.cli.show", "Show a run, an artifact, or the champion and its lineage."),
    "compare": ("loraflow.cli.show", "Compare two or three runs: scores, settings, rows that flipped."),
    "verify": ("loraflow.cli.store", "Check the store; with --rederive, merge a model again and compare it."),
    "reproduce": ("loraflow.cli.store", "Run a recorded run again in a fresh store, and compare its bytes."),
    "repair": ("loraflow.cli.store", "Recompute damaged and missing artifacts, after naming the cost."),
    "gc": ("loraflow.cli.store", "Remove superseded artifacts, older merged models and stale work."),
    "backup": ("loraflow.cli.store", "Copy the store to a folder while runs use it."),
    "registry": ("loraflow.cli.registry", "Show the promotion log."),
    "promote": ("loraflow.cli.registry", "Make a run's model the champion by hand."),
    "rollback": ("loraflow.cli.registry", "Go back to the previous champion."),
    "mlflow": ("loraflow.cli.registry", "Send MLflow the runs and the champion that it does not have."),
    "up": ("loraflow.cli.deploy", "Start a Prefect server, a worker and all deployments on this machine."),
    "deploy": ("loraflow.cli.deploy", "Create or update the deployments on the server at PREFECT_API_URL."),
    "upgrade": ("loraflow.cli.upgrade", "Update an older project's files, after showing the changes."),
    "base": ("loraflow.cli.models", "Install the bundled base model."),
    "doctor": ("loraflow.cli.doctor", "Show what this machine supports and what is missing."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[name][0]), name)
        return command

    def invoke(self, ctx: click.Context) -> int | None:
        """Call the command. If the reader of the output is gone, exit with 141, where click would exit with 1."""
        try:
            code: int | None = super().invoke(ctx)
            return code
        except BrokenPipeError:  # `loraflow runs | head`
            drop_output()
            raise click.exceptions.Exit(141) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Fine-tune small language models with LoRA: a Prefect flow of cached, resumable stages.

    \b
    loraflow init --data FILE --base MODEL     a recipe from your own chats
    loraflow plan RECIPE                       what will run, and why
    loraflow run RECIPE                        data → adapter → scores → merged model → gate → registry
    """


def require_free_port(host: str, port: int, next_step: str) -> None:
    """Check that a server can listen on a port: most report a taken one only after loading everything.

    Raises:
        BadConfig: the port is in use, or the host is not an address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadConfig(
                f"The server cannot listen on port {port}.",
                where=f"{host}:{port}",
                got=error.strerror or str(error),
                next_step=next_step,
            ) from error


def _check_folder() -> None:
    """Refuse a current folder that was removed, before Python 3.13.0's imports fail there with an error of its own."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise BadConfig("The current folder no longer exists.", next_step="go to the project's folder") from None


def main() -> None:
    """Run the command. Turn a failure into a message and an exit status."""
    if sys.platform == "win32":
        sys.exit("loraflow runs on Linux and macOS; on Windows use WSL.")
    prepare_streams()
    set_default_environment()
    protect_output()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _check_folder()
        code = cli.main(standalone_mode=False)  # returns the exit status of click.exceptions.Exit
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        if hint := usage_hint(error):
            click.echo(hint, err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\ninterrupted; {RESUMES}", err=True)
        sys.exit(130)
    except Failure as failure:
        _fail(of_machine(failure))
    except BrokenPipeError:  # at the last flush
        drop_output()
        sys.exit(141)
    except OSError as error:
        known = from_system(error)
        if known is None:
            raise
        if not can_flush():
            drop_output()
        _fail(known)


_FILE = "A file or folder cannot be used."
# errno → (what, next step), where a command says something else than a stage, or a stage has nothing to say
_SENTENCES = {
    errno.EACCES: ("There is no permission for a file or folder.", "correct its permissions, or name another path"),
    errno.EPERM: ("There is no permission for a file or folder.", "correct its permissions, or name another path"),
    errno.EROFS: ("The file system is read-only.", "name a path that can be written to"),
    errno.ENOENT: ("A file or folder does not exist.", "correct the path"),
    errno.EEXIST: ("The target exists already.", "name another path"),
    errno.ENOTEMPTY: ("The target exists already.", "name another path"),
    errno.EIO: ("The disk reported an input/output error.", "check the disk (`dmesg`), then run the command again"),
    errno.EISDIR: ("This is a folder, where a file is needed.", "correct the path"),
    errno.ENOTDIR: ("This is a file, where a folder is needed.", "correct the path"),
    errno.ENAMETOOLONG: ("A path is too long for the file system.", "use shorter names"),
    errno.EMLINK: ("The file system allows no more links to this file.", "name a path on another file system"),
    errno.EMFILE: (
        "This process has too many open files.",
        "raise the limit (`ulimit -n 65536`), then run the command again",
    ),
    errno.ETXTBSY: ("A file is in use by a running program.", "end that program, then run the command again"),
    errno.EAGAIN: ("The system cannot start another process or thread.", "raise the limit: `ulimit -u`"),
}
_NETWORK = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EHOSTDOWN, errno.ENETDOWN,
}  # fmt: skip


def from_system(error: OSError) -> Failure | None:
    """Return the failure for an error of the operating system; None if it is not one.

    Libraries derive their own exceptions from OSError, for example for an answer of a server. Those have no errno.
    """
    if not isinstance(error.errno, int) or error.strerror is None:
        return None
    where = error.filename if isinstance(error.filename, str) else ""
    if where and isinstance(error.filename2, str):  # the target of a rename or link
        where += f" → {error.filename2}"
    if isinstance(error, socket.gaierror) or error.errno in _NETWORK:
        return Network("A remote service did not answer.", where=where, got=error.strerror, next_step="try again")
    if error.errno not in DISK_FAULTS.union(_SENTENCES) and (known := from_os_error(error, where)) is not None:
        return known
    what, step = _SENTENCES.get(error.errno, (_FILE, "check the file and its disk, then run the command again"))
    if error.errno == errno.ENOENT and not where:
        step = "enter a folder that exists, and check TMPDIR"
    return Failure(what, where=where, got=error.strerror, next_step=step)


MAX_LINES = 10  # lines of a failure on the terminal


def short_message(failure: Failure) -> str:
    """Return a failure in at most ten lines: an error of DVC or git that it quotes may have more."""
    lines = str(failure).splitlines()
    if len(lines) <= MAX_LINES:
        return "\n".join(lines)
    end = lines[-1:] if failure.next_step else []
    return "\n".join([*lines[: MAX_LINES - 1 - len(end)], "            …", *end])


def _fail(failure: Failure) -> NoReturn:
    click.secho(short_message(failure), fg="red" if sys.stderr.isatty() else None, err=True)
    sys.exit(failure.exit_code)


RESUMES = "finished stages are kept, and unfinished training resumes on the next run"
SAME_INTERRUPT = 1.0  # seconds; `timeout` and some shells send one signal twice, to the process and to its group


def _terminated(signum: int, frame: FrameType | None) -> None:
    """Exit on SIGTERM. Exit handlers run: they stop a temporary Prefect server."""
    _write_error(f"\nterminated; {RESUMES}\n")
    sys.exit(143)


def _write_error(text: str) -> None:
    """Write to stderr from a signal's handler, which may have interrupted another write."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def stop_at_second_interrupt() -> None:
    """Let the first Ctrl-C end the run in order, and the second one end it at once.

    Worker processes and a temporary server end with this process.
    """
    first: list[float] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not first:
            first.append(now)
            raise KeyboardInterrupt
        if now - first[0] > SAME_INTERRUPT:
            _write_error(f"\nstopped at once; {RESUMES}\n")
            os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background of a shell
        return
    signal.signal(signal.SIGINT, interrupt)


def set_default_environment() -> None:
    """Set defaults of the variables that libraries read at import: less output, no telemetry, a longer startup timeout."""
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start migrates a database
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "loraflow",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def quiet_logging(level: int = logging.WARNING) -> None:
    """Log to stderr, for commands that do not start Prefect, which sets up its own logging."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, JsonValue]:
    """Parse `--set key=value` options. Values are written as in a recipe.

    Raises:
        BadConfig: an option is not key=value, or its value is not a plain YAML value.
    """
    from loraflow.config import yaml
    from loraflow.credentials import hide_in_json

    overrides: dict[str, JsonValue] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise BadConfig(
                "--set needs key=value.",
                where=f"--set {pair[:80]}",
                expected="training_config.seed=1",
                next_step="write --set KEY=VALUE",
            )
        try:
            # Prefect saves a flow's parameters in its database, so they get the masked URL.
            overrides[key.strip()] = hide_in_json(yaml.scalar(text)) if text.strip() else ""
        except yaml.Syntax as error:
            raise BadConfig(
                "The value of --set is not a plain value.",
                where=f"--set {pair[:80]}",
                got=str(error),
                next_step="quote the value, as in --set 'evaluation.metrics=[exact_match]'",
            ) from None
    return overrides


set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as training_config.seed=1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; logs go to stderr.")
store_option = click.option(
    "--store", default=".loraflow/store", show_default=True, help="The store: a folder, or s3://bucket/prefix."
)
model_option = click.option("--model", help="Name in the registry (register.model); needed if there are several.")


def prepare_streams() -> None:
    """Open streams that are closed, and let no character stop the output.

    With a closed descriptor 1, the next file that is opened would get that number, and output would be written into it.
    JSON is UTF-8 whatever the locale is; in other output a character that the locale lacks is replaced.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        if "--json" in sys.argv:
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        else:
            sys.stdout.reconfigure(errors="replace")


def can_flush() -> bool:
    """Return whether what was printed can be written; not if its disk is full, for example."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def drop_output() -> None:
    """Send what was and will be printed nowhere, as its target is gone. Python flushes the stream when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


SHOWN_RECIPES = 8


def usage_hint(error: click.ClickException) -> str:
    """Return the help of a missing option, or the recipes that exist if the recipe is missing; empty for other errors."""
    if not isinstance(error, click.MissingParameter) or error.param is None:
        return ""
    if isinstance(error.param, click.Option):
        return f"  {error.param.opts[0]}  {error.param.help}" if error.param.help else ""
    if error.param.metavar == "OUT":
        return "  OUT is a new file for the answers, such as answers.jsonl"
    if error.param.name != "recipe":
        return ""
    from loraflow.config.recipe_text import recipe_names

    names = recipe_names()
    if not names:
        return "  There are no recipes in configs/ here. To make one: loraflow init --data FILE --base MODEL"
    more = f", and {len(names) - SHOWN_RECIPES} more" if len(names) > SHOWN_RECIPES else ""
    return f"  Recipes here: {', '.join(names[:SHOWN_RECIPES])}{more}"
