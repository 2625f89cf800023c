"""Kill each process of a run at a random moment. Check that the run reaches a final state, no process or damaged artifact
is left, and a rerun completes.

python benchmarks/chaos.py [TIMES] [TARGET ...] [--seed N]      starts `loraflow up` in a temporary folder
python benchmarks/chaos.py --minutes N [--seed N]               many kills without Prefect: `random_kills.py`

The run is one of `retrain/nightly`, which has a concurrency limit of one: a run that never ends would block the next.
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

from measure import print_row

sys.path.insert(0, str(Path(__file__).parent.parent))
from loraflow.flows.server.automations import HEARTBEAT_TIMEOUT
from loraflow.store import LocalStore
from loraflow.store.checkpoints import is_intact
from tests.conftest import build_phi3
from tests.local_deployment import ENDED, LocalDeployment, build_project

TARGETS = {
    "train": "the process that computes a stage",
    "flow": "the flow run's process",
    "worker": "Prefect's worker",
    "server": "Prefect's server",
}
BOUND = HEARTBEAT_TIMEOUT.total_seconds()
EXIT_TIMEOUT = (
    30.0  # seconds that a process may need to end after its run: a terminated training saves a checkpoint in 20
)
ATTEMPTS = 5  # runs in which the target process is looked for


@dataclass
class KillResult:
    """The consequences of one kill."""

    target: str
    moment: float  # seconds after the run was created
    state_at_kill: str = ""  # of the run, with its current stages
    final_state: str = ""
    seconds: float = 0.0  # from the kill to the final state
    orphans: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    rerun: str = ""  # its final state
    resumed: str = ""
    problems: list[str] = field(default_factory=list)


def main() -> int:
    """Print a line for each kill and a table. Return 1 if there were problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", nargs="?", type=int, default=20)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, help="kill at random for so long, without Prefect")
    arguments = parser.parse_args()
    if arguments.minutes is not None:
        import random_kills

        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"seed {arguments.seed}", flush=True)
        return random_kills.main(arguments.minutes, arguments.seed)
    targets = arguments.targets or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    # A shell starts background jobs with SIGINT ignored, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"seed {arguments.seed}", flush=True)
    results: list[KillResult] = []
    with tempfile.TemporaryDirectory() as folder:
        base = build_phi3(Path(folder, "base"), dtype="float32")
        injector = FaultInjector(build_project(Path(folder, "project"), base))
        try:
            injector.warm_up()
            for number in range(arguments.times):
                for target in targets:
                    generator = random.Random(f"{arguments.seed} {target} {number}")
                    results.append(injector.kill_once(target, number, generator))
        except KeyboardInterrupt:
            print(f"\ninterrupted: {len(results)} of {arguments.times * len(targets)} kills", flush=True)
        finally:
            if injector.deployment.process.poll() is None:
                injector.deployment.stop()
    if results:
        print_table(results)
    return int(len(results) < arguments.times * len(targets) or any(result.problems for result in results))


class FaultInjector:
    """A project under `loraflow up` whose processes are killed."""

    def __init__(self, project: Path):
        self.deployment = LocalDeployment(project)
        self.store = LocalStore(project / ".loraflow" / "store")
        self.baseline_seconds = 0.0  # from the creation to the end of a run without a kill
        self.variation = 0

    def warm_up(self) -> None:
        """Fill the cache with the stages that all runs share, and measure a run without a kill."""
        for _ in range(2):
            started = time.monotonic()
            run = self.deployment.wait(self.start(fresh=True))
            assert run["state"]["type"] == "COMPLETED", run["state"]
            self.baseline_seconds = time.monotonic() - started
        print(f"a run without a kill takes {self.baseline_seconds:.0f} s", flush=True)

    def start(self, *, fresh: bool) -> str:
        """Start a run: with a new seed, or with the parameters of the last run."""
        self.variation += fresh
        settings = {
            "training_config.seed": 1000 + self.variation,
            "training_config.max_steps": 80,
            "training_config.save_steps": 5,
            "evaluation.metrics": ["token_loss"],
            "evaluation.max_rows": 4,
            "merge.verify_prompts": 1,
        }
        return self.deployment.start("retrain/nightly", settings=settings)

    def kill_once(self, target: str, number: int, generator: random.Random) -> KillResult:
        """Start a run, kill the target process, inspect the run, and rerun it."""
        for _ in range(ATTEMPTS):
            run = self.start(fresh=True)
            result = KillResult(target, generator.uniform(0.0, 0.95 * self.baseline_seconds))
            if (pid := self.find(target, run, result.moment)) is not None:
                break
            self.baseline_seconds = min(
                self.baseline_seconds, self.seconds_of(run)
            )  # other work may have slowed the first run
        else:
            raise SystemExit(
                f"{target} did not run at the chosen moments of {ATTEMPTS} runs of {self.baseline_seconds:.0f} s"
            )
        result.state_at_kill = self.state_and_stages(run)
        os.kill(pid, signal.SIGKILL)
        killed, artifacts, step = time.time(), self.artifacts(), self.newest_checkpoint()
        self.inspect(result, run, killed)
        self.rerun(result, artifacts, step)
        problems = "; ".join(result.problems) or "no problems"
        print_row(
            target, number + 1, f"{result.moment:.1f} s: {result.state_at_kill}", result.final_state,
            f"{result.seconds:.1f} s", result.resumed, problems,
        )  # fmt: skip
        return result

    def seconds_of(self, run: str) -> float:
        """Return how long a run took that has ended, from its creation."""
        found = self.deployment.api("GET", f"/flow_runs/{run}")
        created, ended = (datetime.fromisoformat(found[key]).timestamp() for key in ("created", "end_time"))
        return ended - created

    def find(self, target: str, run: str, moment: float) -> int | None:
        """Wait until the moment, and until the target process exists. Return its pid, or None if the run ended first."""
        until, last_poll = time.monotonic() + moment, 0.0
        while True:
            now = time.monotonic()
            if now >= until and (pids := self.processes().get(target)):
                return max(pids)
            if now - last_poll > 0.5:
                last_poll = now
                if self.deployment.api("GET", f"/flow_runs/{run}")["state"]["type"] in ENDED:
                    return None
            time.sleep(0.02)

    def state_and_stages(self, run: str) -> str:
        """Return the run's state and the stages that are being computed."""
        state = self.deployment.api("GET", f"/flow_runs/{run}")["state"]["name"]
        stages = [
            folder.parent.name for folder in (self.store.root / "work").glob("*/*") if (folder / "job.json").exists()
        ]
        return " ".join([state, *sorted(stages)])

    def inspect(self, result: KillResult, run: str, killed: float) -> None:
        """Wait for the run's final state, and look for orphans and damaged artifacts."""
        if result.target in ("worker", "server"):
            code = self.deployment.process.wait(BOUND)
            if code != 1 or f"Prefect's {result.target}" not in self.deployment.log.read_text():
                result.problems.append(f"`loraflow up` ended with {code}: {self.deployment.log.read_text()[-300:]}")
            self.deployment = LocalDeployment(self.deployment.folder, self.deployment.port)
        state = self.wait(run, result)
        if state is None:
            return
        result.final_state = state["state"]["name"]
        result.seconds = datetime.fromisoformat(state["end_time"]).timestamp() - killed
        if state["state"]["type"] == "COMPLETED" and self.record(run).get("state") != "done":
            result.problems.append("Prefect shows the run as completed, but the store has no record of it")
        result.orphans = self.orphans()
        if result.orphans:
            result.problems.append(f"orphans: {result.orphans}")
        result.damaged = [f"{ref}: {why[0]}" for ref in self.store.artifacts() if (why := self.store.verify(ref))]
        if result.damaged:
            result.problems.append(f"damaged: {result.damaged}")

    def wait(self, run: str, result: KillResult) -> dict[str, Any] | None:
        try:
            return self.deployment.wait(run, seconds=BOUND)
        except AssertionError as error:
            result.final_state, result.seconds = "none", BOUND
            result.problems.append(f"no final state within {BOUND:.0f} s: {error}")
            return None

    def rerun(self, result: KillResult, artifacts: set[tuple[str, str]], step: int) -> None:
        """Rerun with the same parameters. It must complete, and reuse artifacts and checkpoint from before the kill."""
        run = self.start(fresh=False)
        found = self.wait(run, result)
        result.rerun = found["state"]["name"] if found else "none"
        if found is None or found["state"]["type"] != "COMPLETED":
            result.problems.append(f"the rerun: {found and found['state']}")
            return
        stages = self.record(run)["stages"]
        cached = [stage["stage"] for stage in stages if stage["state"] == "cached"]
        for stage in stages:
            name = stage["stage"].split()[0]  # "evaluate tuned" is a stage evaluate
            if stage["state"] == "computed" and (name, stage["fingerprint"]) in artifacts:
                result.problems.append(f"{stage['stage']} existed before the kill and was computed again")
        train = next(stage for stage in stages if stage["stage"] == "train")
        ref = self.store.find("train", train["fingerprint"])
        assert ref is not None
        resumed = self.store.manifest(ref).figures["resumed_at"]
        # If the kill did not end the training, it completes, and its checkpoints are not used.
        if resumed < step and (result.target == "train" or train["state"] == "computed"):
            result.problems.append(f"there was a checkpoint of step {step}, but training resumed at step {resumed}")
        result.resumed = f"rerun: {len(cached)} of {len(stages)} stages cached; training resumed at step {resumed}"

    def artifacts(self) -> set[tuple[str, str]]:
        return {(ref.stage, ref.fingerprint) for ref in self.store.artifacts()}

    def newest_checkpoint(self) -> int:
        """Return the step of the newest intact checkpoint of an unfinished training."""
        found = (self.store.root / "work" / "train").glob("*/checkpoints/checkpoint-*")
        return max((int(path.name.split("-")[1]) for path in found if is_intact(path)), default=0)

    def record(self, run: str) -> dict[str, Any]:
        """Return the store's record of a Prefect run."""
        records = (json.loads(path.read_bytes()) for path in (self.store.root / "runs").glob("*.json"))
        return next((record for record in records if record["prefect_run"] == run), {})

    def processes(self) -> dict[str, list[int]]:
        """Return {kind: pids} of this project's processes. All but `up` itself have its folder in their environment."""
        mark = f"LORAFLOW_HOME={self.deployment.folder}".encode()
        found: dict[str, list[int]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (process / "environ").read_bytes().split(b"\0"):
                    continue
                words = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:  # it ended meanwhile, or is another user's
                continue
            found.setdefault(_kind(words), []).append(int(process.name))
        return found

    def orphans(self) -> list[str]:
        """Return the processes other than `up`, its server and its worker that are left after EXIT_TIMEOUT."""
        until = time.monotonic() + EXIT_TIMEOUT
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


def print_table(results: list[KillResult]) -> None:
    """Print the table."""
    print(f"\na run must reach a final state within {BOUND:.0f} s, the heartbeat timeout", flush=True)
    print_row(
        "killed", "kills", "the run ended", "median s", "max s", "orphans", "damaged", "rerun completed", "problems"
    )
    for target in dict.fromkeys(result.target for result in results):
        own = [result for result in results if result.target == target]
        counts = Counter(result.final_state for result in own).most_common()
        ended = ", ".join(f"{name} {count}" for name, count in counts)
        seconds = [result.seconds for result in own]
        print_row(f"{target}: {TARGETS[target]}", len(own), ended, statistics.median(seconds), max(seconds),
            sum(len(result.orphans) for result in own), sum(len(result.damaged) for result in own),
            sum(result.rerun in ("Completed", "UpToDate") for result in own),
            sum(bool(result.problems) for result in own))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
