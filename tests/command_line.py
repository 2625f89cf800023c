"""Run a command of loraflow in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from loraflow.cli import cli
from loraflow.store import Store


def loraflow(store: Store, *arguments: str, fails: type[BaseException] | None = None) -> Result:
    """Run a command with `--store`; check that it ends with an exception of this class, or with none."""
    done = CliRunner().invoke(cli, [*arguments, "--store", store.uri])
    assert type(done.exception) is (fails or type(None)), done.exception
    return done
