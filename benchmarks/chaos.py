"""SIGKILL at random moments to each process that a run needs. Does it end truly, is nothing left, does the next go on?

python benchmarks/chaos.py [TIMES] [VICTIM ...] [--seed N]      starts `loraflow up` in a folder of its own

The run is one of `retrain/nightly`, whose queue has a single place: a run that never ends would hold up the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from measure import row

sys.path.insert(0, str(Path(__file__).parent.parent))
from loraflow.flows.server.automations import HEARTBEAT_TIMEOUT
from loraflow.store import LocalStore
from loraflow.store.checkpoints import is_intact
from tests.conftest import build_phi3
from tests.site import ENDED, Site, build_project

WHO = {
    "train": "the process that computes a stage",
    "flow": "the flow run's process",
    "worker": "Prefect's worker",
    "server": "Prefect's server",
}
BOUND = HEARTBEAT_TIMEOUT.total_seconds()
GONE = 30.0  # seconds in which a process may end after its run: a training that is asked to saves a checkpoint in 20
ATTEMPTS = 5  # at a moment at which the victim is there


@dataclass
class Round:
    """What became of one kill."""

    victim: str
    moment: float  # seconds after the click
    doing: str = ""
    ended: str = ""
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    again: str = ""
    went_on: str = ""
    lost: list[str] = field(default_factory=list)


def main() -> int:
    """Print a line for each round and a table. Return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", nargs="?", type=int, default=20)
    parser.add_argument("victims", nargs="*", metavar="VICTIM", help=f"of {', '.join(WHO)}; all by default")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    victims = arguments.victims or list(WHO)
    if unknown := set(victims) - set(WHO):
        parser.error(f"no such victim: {', '.join(sorted(unknown))}")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job would hand on that it is ignored
    print(f"seed {arguments.seed}", flush=True)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        base = build_phi3(Path(folder, "base"), dtype="float32")
        chaos = Chaos(build_project(Path(folder, "project"), base))
        try:
            chaos.warm_up()
            for number in range(arguments.times):
                for victim in victims:
                    chance = random.Random(f"{arguments.seed} {victim} {number}")
                    rounds.append(chaos.round(victim, number, chance))
        except KeyboardInterrupt:
            print(f"\ninterrupted: {len(rounds)} of {arguments.times * len(victims)} rounds", flush=True)
        finally:
            if chaos.site.process.poll() is None:
                chaos.site.stop()
    if rounds:
        show(rounds)
    return int(len(rounds) < arguments.times * len(victims) or any(one.lost for one in rounds))


class Chaos:
    """A project under `loraflow up`, and what one kill does to it."""

    def __init__(self, project: Path):
        self.site = Site(project)
        self.store = LocalStore(project / ".loraflow" / "store")
        self.usual = 0.0  # seconds from the click to the end of a run that nobody kills
        self.variation = 0

    def warm_up(self) -> None:
        """Fill the cache with what all rounds share, and see how long a round takes by itself."""
        for _ in range(2):
            started = time.monotonic()
            run = self.site.wait(self.start(fresh=True))
            assert run["state"]["type"] == "COMPLETED", run["state"]
            self.usual = time.monotonic() - started
        print(f"a run that nobody kills takes {self.usual:.0f} s", flush=True)

    def start(self, *, fresh: bool) -> str:
        """Start a run: of a seed that nobody had yet, or with the parameters of the last one again."""
        self.variation += fresh
        settings = {
            "training_config.seed": 1000 + self.variation,
            "training_config.max_steps": 80,
            "training_config.save_steps": 5,
            "evaluation.metrics": ["token_loss"],
            "evaluation.max_rows": 4,
            "merge.verify_prompts": 1,
        }
        return self.site.start("retrain/nightly", settings=settings)

    def round(self, victim: str, number: int, chance: random.Random) -> Round:
        """Start a run, kill, and look at what became of it and of the next one."""
        for _ in range(ATTEMPTS):
            run, one = self.start(fresh=True), Round(victim, chance.uniform(0.0, 0.95 * self.usual))
            if (pid := self.find(victim, run, one.moment)) is not None:
                break
        else:
            raise SystemExit(f"{victim} was never there at its moment, in {ATTEMPTS} runs of {self.usual:.0f} s")
        one.doing = self.doing(run)
        os.kill(pid, signal.SIGKILL)
        killed, before, step = time.time(), self.made(), self.checkpoint()
        self.look(one, run, killed)
        self.again(one, before, step)
        said = "; ".join(one.lost) or "nothing lost"
        row(
            victim, number + 1, f"{one.moment:.1f} s: {one.doing}", one.ended, f"{one.seconds:.1f} s", one.went_on, said
        )
        return one

    def find(self, victim: str, run: str, moment: float) -> int | None:
        """Wait until the moment, and for the victim if it is not there then. None: the run ended before that."""
        until, last_look = time.monotonic() + moment, 0.0
        while True:
            now = time.monotonic()
            if now >= until and (pids := self.processes().get(victim)):
                return max(pids)
            if now - last_look > 0.5:
                last_look = now
                if self.site.api("GET", f"/flow_runs/{run}")["state"]["type"] in ENDED:
                    return None
            time.sleep(0.02)

    def doing(self, run: str) -> str:
        """Tell what the run is at: its state, and the stage that a process computes."""
        state = self.site.api("GET", f"/flow_runs/{run}")["state"]["name"]
        stages = [
            folder.parent.name for folder in (self.store.root / "work").glob("*/*") if (folder / "job.json").exists()
        ]
        return " ".join([state, *sorted(stages)])

    def look(self, one: Round, run: str, killed: float) -> None:
        """Wait for the run's end, and look for what the kill left."""
        if one.victim in ("worker", "server"):
            code = self.site.process.wait(BOUND)
            if code != 1 or f"Prefect's {one.victim}" not in self.site.log.read_text():
                one.lost.append(f"`loraflow up` ended with {code}: {self.site.log.read_text()[-300:]}")
            self.site = Site(self.site.folder, self.site.port)
        state = self.wait(run, one)
        if state is None:
            return
        one.ended = state["state"]["name"]
        one.seconds = datetime.fromisoformat(state["end_time"]).timestamp() - killed
        if state["state"]["type"] == "COMPLETED" and self.record(run).get("state") != "done":
            one.lost.append("Prefect shows it as completed, and the store has no such run")
        one.left = self.left()
        if one.left:
            one.lost.append(f"still there: {one.left}")
        one.damaged = [f"{ref}: {why[0]}" for ref in self.store.artifacts() if (why := self.store.verify(ref))]
        if one.damaged:
            one.lost.append(f"damaged: {one.damaged}")

    def wait(self, run: str, one: Round) -> dict[str, Any] | None:
        try:
            return self.site.wait(run, seconds=BOUND)
        except AssertionError as error:
            one.ended, one.seconds = "none", BOUND
            one.lost.append(f"no final state within {BOUND:.0f} s: {error}")
            return None

    def again(self, one: Round, before: set[tuple[str, str]], step: int) -> None:
        """Start the same parameters: it has to come to its end, with all that was made before the kill."""
        run = self.start(fresh=False)
        found = self.wait(run, one)
        one.again = found["state"]["name"] if found else "none"
        if found is None or found["state"]["type"] != "COMPLETED":
            one.lost.append(f"the next run: {found and found['state']}")
            return
        stages = self.record(run)["stages"]
        cached = [stage["stage"] for stage in stages if stage["state"] == "cached"]
        for stage in stages:
            name = stage["stage"].split()[0]  # "evaluate tuned" is a stage evaluate
            if stage["state"] == "computed" and (name, stage["fingerprint"]) in before:
                one.lost.append(f"{stage['stage']} was there before the kill, and was computed again")
        train = next(stage for stage in stages if stage["stage"] == "train")
        ref = self.store.find("train", train["fingerprint"])
        assert ref is not None
        resumed = self.store.manifest(ref).figures["resumed_at"]
        # A training that the kill did not reach comes to its end, and its own checkpoints are no one's to go on from.
        if resumed < step and (one.victim == "train" or train["state"] == "computed"):
            one.lost.append(f"a checkpoint of step {step} was there, and training went on from step {resumed}")
        one.went_on = f"next: {len(cached)} of {len(stages)} stages cached; training resumed at step {resumed}"

    def made(self) -> set[tuple[str, str]]:
        return {(ref.stage, ref.fingerprint) for ref in self.store.artifacts()}

    def checkpoint(self) -> int:
        """Return the newest whole checkpoint of a training that is not done, as its step."""
        found = (self.store.root / "work" / "train").glob("*/checkpoints/checkpoint-*")
        return max((int(path.name.split("-")[1]) for path in found if is_intact(path)), default=0)

    def record(self, run: str) -> dict[str, Any]:
        """Return what the store knows of a run of Prefect's."""
        records = (json.loads(path.read_bytes()) for path in (self.store.root / "runs").glob("*.json"))
        return next((one for one in records if one["prefect_run"] == run), {})

    def processes(self) -> dict[str, list[int]]:
        """Return the processes of this project by what they are. All but `up` itself have its folder in the environment."""
        mark = f"LORAFLOW_HOME={self.site.folder}".encode()
        found: dict[str, list[int]] = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (place / "environ").read_bytes().split(b"\0"):
                    continue
                words = (place / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it ended meanwhile, or is another user's
                continue
            found.setdefault(_kind(words), []).append(int(place.name))
        return found

    def left(self) -> list[str]:
        """Return what is there beside `up`, its server and its worker, once everything had time to end."""
        until = time.monotonic() + GONE
        while True:
            rows = [
                f"{pid} {kind}"
                for kind, pids in self.processes().items()
                for pid in (pids[1:] if kind in ("server", "worker") else pids)
            ]
            if not rows or time.monotonic() > until:
                return rows
            time.sleep(0.1)


def _kind(words: list[str]) -> str:
    child = "loraflow.flows.server.prefect_process"
    kinds = {"train": ["loraflow.execution.worker"], "flow": ["prefect.engine"],
             "worker": [child, "worker"], "server": [child, "server"]}  # fmt: skip
    for kind, marks in kinds.items():
        if all(mark in words for mark in marks):
            return kind
    return " ".join(words)[:200]


def show(rounds: list[Round]) -> None:
    """Print the table."""
    print(
        f"\na run has to be in a final state within {BOUND:.0f} s, the product's own bound for a silent run", flush=True
    )
    row("killed", "rounds", "the run ended", "median s", "max s", "orphans", "damaged", "next run completed", "lost")
    for victim in dict.fromkeys(one.victim for one in rounds):
        mine = [one for one in rounds if one.victim == victim]
        ended = ", ".join(f"{name} {count}" for name, count in Counter(one.ended for one in mine).most_common())
        seconds = [one.seconds for one in mine]
        row(f"{victim}: {WHO[victim]}", len(mine), ended, statistics.median(seconds), max(seconds),
            sum(len(one.left) for one in mine), sum(len(one.damaged) for one in mine),
            sum(one.again in ("Completed", "UpToDate") for one in mine), sum(bool(one.lost) for one in mine))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
