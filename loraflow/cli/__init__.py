"""The command `loraflow`. Each command's code is imported when it is called, so that `--help` is quick.

Exit status: 0 done, whatever the gate decided · 1 a stage failed · 2 wrong usage or recipe · 3 with --strict-gate, when
nothing was promoted · 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from typing import Any

import click

from loraflow import __version__
from loraflow.failures import Failure

# command → (module, what `--help` says)
COMMANDS = {
    "init": ("loraflow.cli.init", "Make a recipe and a versioned dataset from your own file."),
    "run": ("loraflow.cli.run", "Run a recipe here: data to registered model."),
    "plan": ("loraflow.cli.plan", "Say what a run will do, and why."),
    "data": ("loraflow.cli.data", "The dataset alone: add, check, pull, diff."),
    "evaluate": ("loraflow.cli.models", "Score a model on a recipe's held-out rows."),
    "merge": ("loraflow.cli.models", "Merge an adapter into a base."),
    "adapters": ("loraflow.cli.adapters", "Adapters from elsewhere: convert, split, fuse."),
    "chat": ("loraflow.cli.serving", "Talk to a model."),
    "predict": ("loraflow.cli.serving", "Answer a file of chats."),
    "serve": ("loraflow.cli.serving", "Serve a model with an OpenAI-compatible server."),
    "publish": ("loraflow.cli.serving", "Put a model on the hub, with a card."),
    "runs": ("loraflow.cli.store", "List what was run."),
    "show": ("loraflow.cli.store", "Show a run, an artifact or the champion, with its lineage."),
    "verify": ("loraflow.cli.store", "Check the store; --deep reads every byte."),
    "gc": ("loraflow.cli.store", "Remove what no run needs."),
    "registry": ("loraflow.cli.registry", "Show the promotion log."),
    "promote": ("loraflow.cli.registry", "Make a run's model the champion by hand."),
    "rollback": ("loraflow.cli.registry", "Go back to the champion before this one."),
    "up": ("loraflow.cli.deploy", "Start Prefect's server, a worker and all deployments here."),
    "deploy": ("loraflow.cli.deploy", "Put the deployments onto the server at PREFECT_API_URL."),
    "doctor": ("loraflow.cli.doctor", "Say what this machine can do, and what is missing."),
}


class Lazy(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands, in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(COMMANDS[name][0]), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Fine-tune small language models with LoRA: a Prefect flow of cached, resumable stages.

    \b
    loraflow init --data FILE --base MODEL     a recipe from your own chats
    loraflow plan RECIPE                       what will run, and why
    loraflow run RECIPE                        data → adapter → scores → merged model → gate → registry
    """


def main() -> None:
    """Run the command, and turn failures into a message and an exit status."""
    if sys.platform == "win32":
        sys.exit("loraflow runs on Linux and macOS; on Windows use WSL.")
    settle_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what ends at exit ends: prefect's own server
    try:
        code = cli.main(standalone_mode=False)  # a command's own exit status comes back as a value
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted; finished stages are kept, and unfinished training resumes on the next run", err=True)
        sys.exit(130)
    except Failure as failure:
        click.secho(str(failure), fg="red" if sys.stderr.isatty() else None, err=True)
        sys.exit(failure.exit_code)
    except BrokenPipeError:  # `loraflow runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def settle_environment() -> None:
    """Set what libraries read at import: quiet, private, patient with a first start."""
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start migrates a database
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "loraflow",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)


def quiet_logging(level: int = logging.WARNING) -> None:
    """Send our own log to stderr, where prefect does not take care of it."""
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)


def parse_sets(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read `--set key=value` options, values as in a recipe."""
    from loraflow.config import yaml
    from loraflow.failures import BadConfig

    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise BadConfig("--set wants key=value.", where=f"--set {pair}", expected="training_config.seed=1")
        try:
            out[key.strip()] = yaml.scalar(text) if text.strip() else ""
        except yaml.Syntax as error:
            raise BadConfig("--set has no plain value.", where=f"--set {pair}", got=str(error)) from error
    return out


set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, such as training_config.seed=1.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document; logs go to stderr.")
