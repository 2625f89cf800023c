"""What processes do at the same moment in `races.py`, and the stores in which they do it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from loraflow.cli.models import _written_whole
from loraflow.cli.registry import promote, registry, rollback
from loraflow.cli.store import backup, gc, repair
from loraflow.cli.upgrade import upgrade
from loraflow.registry import PromotionLog
from loraflow.registry.deals import DealRecord, DealRequest
from loraflow.registry.looks import LookRecord
from loraflow.registry.reserve import ReserveRow
from loraflow.registry.signature import KEY
from loraflow.store import Store, open_store
from tests.promoted_models import add_model, commit, record_run
from tests.promoted_models import promote as promote_model

MODEL = "tickets"


@dataclass(frozen=True)
class Place:
    """Where a round happens."""

    folder: Path
    bucket: str = ""  # uri of the store, if it is in a bucket

    @property
    def store(self) -> Store:
        """The store that the commands share."""
        return open_store(self.bucket or str(self.folder / "store"))

    @property
    def log(self) -> PromotionLog:
        """The promotion log of the model."""
        return PromotionLog(self.store, MODEL)

    @property
    def copy(self) -> Path:
        """Where backups go."""
        return self.folder / "copy"

    @property
    def output(self) -> Path:
        """Where commands write that take the name of a new folder."""
        return self.folder / "output"

    def run_command(self, command: object, *arguments: object) -> None:
        """Run a command of `loraflow` on the store, without its output."""
        call = command.main
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call([*map(str, arguments), "--store", self.store.uri], standalone_mode=False)


Actor = Callable[[Place, random.Random], None]


def run_id(number: int) -> str:
    """Return the id of the run that made a model."""
    return f"20260101-000000-{number:06x}"


def fill(place: Place, *, promoted: int = 2, models: int = 5) -> None:
    """Make models with the records of their runs, and promote the first of them."""
    for number in range(models):
        merged = add_model(place.store, str(number))
        record_run(place.store, run_id(number), merged)
        if number < promoted:
            promote_model(place.log, merged)


def promote_run(number: int) -> Actor:
    """Return a process that promotes the model of a run."""
    return lambda place, _: place.run_command(promote, run_id(number), "--reason", "better")


def roll_back(place: Place, _: random.Random) -> None:
    """Roll back once."""
    place.run_command(rollback, "--reason", "bad")


def clean_up(place: Place, _: random.Random) -> None:
    """Remove all that no champion needs."""
    place.run_command(gc, "--keep", 0, "--keep-champions", 2)


def repair_store(place: Place, _: random.Random) -> None:
    """Look for what is damaged or missing, of which there is nothing."""
    place.run_command(repair, "--yes")


def back_up(place: Place, _: random.Random) -> None:
    """Copy the store."""
    place.run_command(backup, place.copy)


def lose_an_entry(place: Place) -> None:
    """Make models, and lose the last entry of their promotion log."""
    fill(place, promoted=3)
    place.store.remove_document(f"registry/{MODEL}/log/000003.json")


def accept_loss(place: Place, chance: random.Random) -> None:
    """Accept that the entry is lost, at some time while the store is backed up."""
    time.sleep(chance.random() / 50)
    place.run_command(registry, "accept", "--model", MODEL, "--reason", "disk")


def sign(place: Place, _: random.Random) -> None:
    """Sign the promotion log."""
    place.run_command(registry, "sign", "--key", key_file(place), "--store", place.store.uri)


def signed(actor: Actor) -> Actor:
    """Let the promotions of a process be signed."""

    def act(place: Place, chance: random.Random) -> None:
        os.environ[KEY] = str(key_file(place))
        actor(place, chance)

    return act


def take_look(number: int, rows: range) -> Actor:
    """Return a process that takes a look with a model at some rows, as the gate does."""

    def act(place: Place, _: random.Random) -> None:
        keys = [f"row {row}" for row in rows]
        log = place.log
        LookRecord(place.store, MODEL).take(
            f"comparison {number}", challenger=f"{number:064x}", rows=keys, error=0.05, horizon=20,
            promotions=log.entries(), actor="me",
        )  # fmt: skip

    return act


def take_deal(number: int) -> Actor:
    """Return a process in which a model is dealt rows of the reserve, and scored on them in a look."""

    def act(place: Place, _: random.Random) -> None:
        looks, deals = LookRecord(place.store, MODEL), DealRecord(place.store, MODEL)
        rows = [ReserveRow(f"row {row}") for row in range(40)]
        request = DealRequest(reserve=30, max_rows=None, seed=0)
        dealt = deals.take(f"{number:064x}", rows, looks.scored_keys, request, actor="me")
        (place.folder / f"dealt-{number}.json").write_text(json.dumps(sorted(dealt.keys)))
        looks.take(
            f"comparison {number}", challenger=f"{number:064x}", rows=dealt.keys, error=0.05, horizon=20,
            promotions=place.log.entries(), actor="me",
        )  # fmt: skip

    return act


def put(content: str, *, replace: bool = False) -> Actor:
    """Return a process that commits an artifact under the job's lock, as a run does, and reads it."""

    def act(place: Place, _: random.Random) -> None:
        store = place.store
        with store.reader_lock(), store.lock("train", "shared"):
            ref = commit(store, "train", "shared", content, replace=replace)
            if problems := store.verify(ref):
                raise AssertionError(f"an artifact that was just committed: {problems}")

    return act


def promote_new(numbers: range) -> Actor:
    """Return a process that makes models and promotes them, one after another."""

    def act(place: Place, chance: random.Random) -> None:
        for number in numbers:
            with place.store.reader_lock():
                merged = add_model(place.store, f"new {number}")
                with contextlib.suppress(Exception):
                    promote_model(place.log, merged)
            time.sleep(chance.random() / 100)

    return act


def look_often(numbers: range) -> Actor:
    """Return a process that takes looks, one after another, each at other rows."""

    def act(place: Place, chance: random.Random) -> None:
        for number in numbers:
            take_look(number, range(number, number + 3))(place, chance)
            time.sleep(chance.random() / 100)

    return act


def upgrade_project(place: Place, _: random.Random) -> None:
    """Upgrade the project's files."""
    os.chdir(place.folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        upgrade.main(["--write"], standalone_mode=False)


def read_project(place: Place, _: random.Random) -> None:
    """Read the recipe again and again, as runs do."""
    for _ in range(20):
        text = (place.folder / "configs" / "old.yaml").read_text()
        if not text.endswith("# the end\n"):
            raise AssertionError("a reader saw a part of the recipe")
        time.sleep(0.002)


def write_output(content: str) -> Actor:
    """Return a process that writes the same output folder, as `merge` and `adapters convert` do."""

    def act(place: Place, _: random.Random) -> None:
        with _written_whole(place.output) as unfinished:
            unfinished.mkdir(parents=True)
            for name in "abc":
                (unfinished / name).write_text(content)

    return act


def key_file(place: Place) -> Path:
    """Return the key that signs."""
    return place.folder / "key"


def make_key(place: Place) -> None:
    """Make a store with models, and a key."""
    fill(place)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key_file(place))], check=True)
    kind, key, *_ = key_file(place).with_suffix(".pub").read_text().split()
    (place.folder / "signers").write_text(f"me {kind} {key}\n")
    os.environ[KEY] = str(key_file(place))
    try:
        promote_model(place.log, add_model(place.store, "signed"))
    finally:
        del os.environ[KEY]


def make_old_project(place: Place) -> None:
    """Write a recipe of an earlier version."""
    (place.folder / "configs").mkdir()
    (place.folder / "configs" / "old.yaml").write_text(OLD + "# x\n" * 20_000 + "# the end\n")


OLD = """
name: old
base: {model: bundled:smollm2}
data: {source: data.dvc}
training_config: {max_seq_length: 256, max_steps: 1}
"""
