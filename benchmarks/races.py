"""Commands at the same moment, in processes of their own: `python benchmarks/races.py --rounds 200 [--bucket]`.

Each round makes a small store, and lets two to four processes run commands of `loraflow` in it at once, with a random delay
before each step that changes the disk. Then the store must be what some order of the commands leaves: the promotion log and
the record of looks are whole, their anchors name the last entry, champions and rollback targets are intact, and each
command ended with a result or with a failure in one sentence.

With --bucket, the store is in a bucket of the tests' S3 server, the delays are before each request, and each process has a
cache of its own, as another machine has.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from race_checks import (
    copy_is_whole,
    copy_is_whole_or_refused,
    deals_are_apart,
    everything_is_signed,
    files_are_upgraded,
    looks_are_apart,
    nothing_is_lost,
    one_is_current,
    output_is_of_one,
    promotions_took_place,
    store_is_whole,
)
from race_commands import (
    Actor,
    Place,
    accept_loss,
    back_up,
    clean_up,
    fill,
    look_often,
    lose_an_entry,
    make_key,
    make_old_project,
    promote_new,
    promote_run,
    put,
    read_project,
    repair_store,
    roll_back,
    sign,
    signed,
    take_deal,
    take_look,
    upgrade_project,
    write_output,
)

from loraflow.failures import Failure
from tests.object_server import running

STEPS = ("rename", "replace", "link", "unlink", "mkdir", "open", "scandir")
LONGEST = 0.2  # seconds of a delay
SECONDS = 120  # after which a process is taken to hang


Check = Callable[[Place, list[str]], Iterator[str]]  # yields what is wrong, given what each process ended with


@dataclass(frozen=True)
class Race:
    """What happens at once, and what must hold afterwards."""

    name: str
    actors: tuple[Actor, ...]
    check: Check
    prepare: Callable[[Place], None] = lambda place: None


RACES = (
    Race("promote, promote", (promote_run(2), promote_run(3)), promotions_took_place, fill),
    Race("promote, promote, promote, roll back", (promote_run(2), promote_run(3), promote_run(4), roll_back),
         promotions_took_place, fill),
    Race("promote, roll back", (promote_run(2), roll_back), promotions_took_place, fill),
    Race("promote, clean up", (promote_run(2), clean_up), lambda place, _: store_is_whole(place), fill),
    Race("roll back, clean up, promote", (roll_back, clean_up, promote_run(3)),
         lambda place, _: store_is_whole(place), fill),
    Race("back up, promote", (back_up, promote_new(range(4)), promote_new(range(10, 14))), copy_is_whole, fill),
    Race("back up, clean up, promote", (back_up, clean_up, promote_run(3)), copy_is_whole, fill),
    Race("back up, look", (back_up, look_often(range(6)), look_often(range(10, 16))), copy_is_whole, fill),
    Race("back up, accept a loss", (back_up, accept_loss), copy_is_whole_or_refused, lose_an_entry),
    Race("accept a loss, promote", (accept_loss, promote_run(3)), lambda place, _: store_is_whole(place), lose_an_entry),
    Race("accept a loss, accept a loss, roll back", (accept_loss, accept_loss, roll_back),
         lambda place, _: store_is_whole(place), lose_an_entry),
    Race("accept a loss, clean up", (accept_loss, clean_up), lambda place, _: store_is_whole(place), lose_an_entry),
    Race("repair, promote, roll back", (repair_store, promote_run(2), roll_back), nothing_is_lost, fill),
    Race("repair, clean up", (repair_store, clean_up), nothing_is_lost, fill),
    Race("repair, put, put again", (repair_store, put("a"), put("b", replace=True)), nothing_is_lost, fill),
    Race("repair, look, promote", (repair_store, look_often(range(3)), promote_new(range(3))), nothing_is_lost, fill),
    Race("repair, back up", (back_up, repair_store), copy_is_whole, fill),
    Race("look, look", (take_look(1, range(9)), take_look(2, range(9))), looks_are_apart, fill),
    Race("look, look, look, look", tuple(take_look(n, range(n, n + 3)) for n in range(4)), looks_are_apart, fill),
    Race("deal, deal, deal", tuple(map(take_deal, range(3))), deals_are_apart, fill),
    Race("put, clean up", (put("a"), put("a"), clean_up), one_is_current, fill),
    Race("put, put again, clean up", (put("a"), put("b", replace=True), clean_up), one_is_current, fill),
    Race("promote and sign, promote and sign", (signed(promote_new(range(2))), signed(promote_new(range(5, 7)))),
         everything_is_signed, make_key),
    Race("sign, promote and sign", (sign, signed(promote_new(range(2)))), everything_is_signed, make_key),
    Race("write, write, write, write", tuple(write_output(f"process {n}") for n in range(4)), output_is_of_one),
    Race("upgrade, upgrade, read", (upgrade_project, upgrade_project, read_project), files_are_upgraded, make_old_project),
)  # fmt: skip
IN_FOLDER = ("upgrade", "write")  # starts of the names of races that need a folder


def delay_steps(chance: random.Random, mean: float, *, in_bucket: bool) -> None:
    """Wait before each request, or each step that changes or lists the disk, where nothing is flushed: no power is lost."""

    def delayed(call: Callable[..., object]) -> Callable[..., object]:
        def wait(*arguments: object, **options: object) -> object:
            if chance.random() < 0.3:
                time.sleep(min(chance.paretovariate(0.8) * mean / 4, LONGEST))  # mostly short, sometimes long
            return call(*arguments, **options)

        return wait

    if in_bucket:
        from botocore.client import BaseClient

        BaseClient._make_api_call = delayed(BaseClient._make_api_call)
        return
    for name in STEPS:
        setattr(os, name, delayed(getattr(os, name)))
    os.fsync = lambda _: None


def outcome(actor: Actor, place: Place, chance: random.Random) -> str:
    """Return how a command ended: "done", a failure's class and sentence, or the traceback of anything else."""
    try:
        actor(place, chance)
    except Failure as failure:
        return f"{type(failure).__name__}: {failure.what}"
    except BaseException:
        return f"crashed: {traceback.format_exc()}"
    return "done"


def run_at_once(race: Race, place: Place, seed: str, mean: float) -> list[str]:
    """Run a race's commands in forks of this process that start together; return how each of them ended."""
    sys.stdout.flush()
    gate, go = os.pipe()
    pids = []
    for number, actor in enumerate(race.actors):
        pid = os.fork()
        if pid == 0:
            try:
                os.close(go)
                os.read(gate, 1)
                chance = random.Random(f"{seed} {number}")
                file = place.folder / f"outcome-{number}"
                delay_steps(chance, mean, in_bucket=bool(place.bucket))
                os.environ["LORAFLOW_CACHE"] = str(place.folder / f"cache-{number}")
                time.sleep(chance.expovariate(1 / (3 * mean)))
                file.write_text(outcome(actor, place, chance))
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(gate)
    os.close(go)  # the end of the pipe lets all of them start
    until = time.monotonic() + SECONDS
    for pid in pids:
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > until:
                os.kill(pid, 9)
            time.sleep(0.001)
    files = [place.folder / f"outcome-{number}" for number in range(len(pids))]
    return [file.read_text() if file.exists() else "crashed: did not end" for file in files]


def problems(race: Race, seed: str, mean: float = 0.002, bucket: str = "") -> tuple[list[str], list[str]]:
    """Run a race once in a new folder, or at a new uri of a bucket. Return what is wrong, and how each command ended."""
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        place = Place(Path(folder), bucket)
        race.prepare(place)
        outcomes = run_at_once(race, place, seed, mean)
        found = [text for text in outcomes if text.startswith("crashed")]
        try:
            found += race.check(place, outcomes)
        except Failure as failure:
            found.append(f"{failure}")
        return found, outcomes


def main() -> int:
    """Run each race many times, and print a line for each. Return 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="of each race")
    parser.add_argument("--race", action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.002, help="mean seconds of a delay")
    parser.add_argument("--bucket", action="store_true", help="in a bucket of the tests' S3 server (`make test-s3`)")
    options = parser.parse_args()
    os.fsync = lambda _: None
    if not options.bucket:
        return run_all(options, lambda: "")
    with tempfile.TemporaryDirectory(prefix="race-server-") as folder, running(Path(folder) / "server") as server:
        return run_all(options, server.new_store_uri)


def run_all(options: argparse.Namespace, new_uri: Callable[[], str]) -> int:
    """Run the races that the options name. `new_uri` returns the uri of an empty store, and nothing for a folder."""
    wrong = 0
    for race in RACES:
        if (options.race and race.name not in options.race) or (options.bucket and race.name.startswith(IN_FOLDER)):
            continue
        started, kinds, ends = time.monotonic(), Counter[str](), Counter[str]()
        for number in range(options.rounds):
            found, outcomes = problems(race, f"{options.seed} {race.name} {number}", options.delay, new_uri())
            kinds.update(found)
            ends.update(text.partition("\n")[0] for text in outcomes)
        wrong += sum(kinds.values())
        print(f"{race.name}: {options.rounds} rounds, {sum(kinds.values())} problems, {time.monotonic() - started:.0f} s",
              flush=True)  # fmt: skip
        for text, count in ends.most_common(8):
            print(f"    {count:5} {text[:150]}")
        for text, count in kinds.most_common(5):
            print(f"  ! {count:5} {text}", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
