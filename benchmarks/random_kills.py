"""Runs that are killed at random moments until they complete: `python benchmarks/chaos.py --minutes N`.

A round is a pipeline of nine steps with a tiny model in an empty store, without Prefect. One of its processes, chosen at
random, is killed with SIGKILL; the time between kills has a mean of a third of a quiet round. Then the run is started
again, until it completes. After each kill, no process is left, each artifact in the store is intact and has the digest of
the quiet round, and none of those that were there before is missing. At the end all digests are equal.

Runs and workers are forks of this process, which has imported torch and transformers and computed nothing: to import them
in each worker takes much longer than what the worker computes.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from measure import print_row

sys.path.insert(0, str(Path(__file__).parent.parent))
from loraflow.config import load_recipe
from loraflow.execution import worker, worker_process
from loraflow.execution.device_group import PARENT
from loraflow.execution.job_file import JobFile
from loraflow.execution.launcher import run_job
from loraflow.execution.outcome import PIPE
from loraflow.execution.plan import STEPS, inputs_of
from loraflow.execution.workspace import Workspace
from loraflow.registry.log import actor
from loraflow.stages import STAGES
from loraflow.store import LocalStore, Ref, require_intact, require_intact_in_store
from tests.conftest import RECIPE, build_phi3, chat

STEPS_IN_TRAINING, SAVE_STEPS = 100, 5
EXIT_SECONDS = 30.0  # in which the other processes of a run must end after a kill
PR_SET_CHILD_SUBREAPER = 36
Name = tuple[str, str]  # stage and fingerprint


def run_pipeline(recipe: str) -> None:
    """Run the pipeline's steps one after another, as a flow does, and promote the model."""
    workspace = Workspace(load_recipe(recipe))
    store, found = workspace.store, dict[str, Ref]()
    with store.reader_lock():
        for step in STEPS:
            sources = inputs_of(step, compares_merges=workspace.recipe.compares_merges)
            if not set(sources.values()) <= found.keys():
                continue  # there is no champion to evaluate
            job = workspace.job(step.stage, {name: found[source] for name, source in sources.items()})
            ref = store.find(job.stage, job.fingerprint)
            if ref is None:
                for source in job.inputs.values():
                    require_intact(store, source)
                ref = run_job(job, store)
            found[step.label] = ref
        head = workspace.log.head()
        if head is None:
            require_intact_in_store(store, found["merge"])
            workspace.log.append(
                head,
                action="promote",
                merged=found["merge"],
                adapter=found["train"],
                inputs={},
                reasons=[],
                actor=actor(),
            )


class Fork:
    """A child process that calls a function in a session of its own, with the parts of Popen's interface that are used."""

    def __init__(self, main: Callable[[], int], output: IO[bytes], environment: Mapping[str, str] | None = None):
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._call(main, output, environment)

    def _call(self, main: Callable[[], int], output: IO[bytes], environment: Mapping[str, str] | None) -> NoReturn:
        code = 1
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            code = main()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        until = time.monotonic() + (timeout if timeout is not None else 3600)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout or 3600)
            time.sleep(0.005)
        return code


def fork_worker(_: list[str], file: JobFile, environment: dict[str, str], log_file: int, outcome: int) -> Fork:
    """Start a worker, as `start_worker` does for the launcher."""
    job_file = str(file.write())
    with os.fdopen(log_file, "wb", closefd=False) as output:
        return Fork(
            lambda: worker.main([job_file]), output, environment | {PIPE: str(outcome), PARENT: str(os.getpid())}
        )


def run_in_fork(recipe: Path, output: IO[bytes]) -> Fork:
    """Start a run."""

    def main() -> int:
        vars(worker_process)["start_worker"] = fork_worker
        run_pipeline(str(recipe))
        return 0

    return Fork(main, output)


@dataclass
class Tally:
    """What was seen in all rounds."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by process and stage
    killed_trainings: int = 0
    repeated_steps: int = 0
    lost: list[str] = field(default_factory=list)
    false_hits: list[str] = field(
        default_factory=list
    )  # artifacts that a lookup finds, and that are not the quiet round's
    problems: list[str] = field(default_factory=list)


class Chaos:
    """A quiet round, and rounds with kills."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder, self.generator, self.tally = folder, generator, Tally()
        self.recipe = folder / "tiny.yaml"
        self.store = LocalStore(folder / "store")
        (folder / "data").mkdir()
        for name, numbers in (("train.jsonl", range(80)), ("heldout.jsonl", range(1000, 1020))):
            (folder / "data" / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
        base = folder / "base"
        with (folder / "log.txt").open("wb") as output:  # in a child: this process must not compute before it forks
            assert Fork(lambda: build_phi3(base, dtype="float32") is None, output).wait() == 0
        for stage in STAGES.values():
            importlib.import_module(stage.module)
        for name in ("peft", "trl", "loraflow.training.trainer", "loraflow.training.fast_engine"):
            importlib.import_module(name)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed run leaves becomes its child
        text = RECIPE.format(data=folder / "data", base=base, store=self.store.root)
        text = text.replace("max_steps: 6", f"max_steps: {STEPS_IN_TRAINING}")
        self.recipe.write_text(text.replace("save_steps: 2", f"save_steps: {SAVE_STEPS}"))
        self.quiet: dict[Name, str] = {}
        self.quiet_seconds = 0.0
        self.next_kill = 0.0

    def run_quietly(self) -> None:
        """Run once to warm up, and once to measure; remember the digests."""
        for _ in range(2):
            shutil.rmtree(self.store.root, ignore_errors=True)
            started = time.monotonic()
            with (self.folder / "log.txt").open("wb") as output:
                code = run_in_fork(self.recipe, output).wait()
            if code != 0:
                raise SystemExit((self.folder / "log.txt").read_text())
            self.quiet_seconds = time.monotonic() - started
            found = self._digests()
            if self.quiet and found != self.quiet:
                raise SystemExit("two quiet rounds have other digests")
            self.quiet = found
        print(f"a quiet round takes {self.quiet_seconds:.1f} s and writes {len(self.quiet)} artifacts", flush=True)

    def run_until(self, deadline: float) -> None:
        """Run rounds with kills until the time is over; the last round is completed without kills."""
        self._draw_next_kill()
        while time.monotonic() < deadline:
            shutil.rmtree(self.store.root)
            kills = sum(self.tally.kills.values())
            self._round(deadline)
            self.tally.rounds += 1
            kills = sum(self.tally.kills.values()) - kills
            print_row(f"round {self.tally.rounds}", f"{kills} kills", f"{len(self.tally.problems)} problems so far")

    def _round(self, deadline: float) -> None:
        known: dict[Name, str] = {}
        furthest = 0
        while True:
            with (self.folder / "log.txt").open("wb") as output:
                process = run_in_fork(self.recipe, output)
            killed = self._kill_at_random(process, deadline)
            if killed:
                self._wait_for_end()
            resumed, reached = self._training_steps()
            if reached is not None:
                self.tally.killed_trainings += 1
                self.tally.repeated_steps += max(0, furthest - resumed)
                furthest = max(furthest, reached)
            known = self._check(known)
            if process.returncode == 0:
                break
            if not killed:
                self.tally.problems.append(
                    f"ended with {process.returncode} without a kill: {(self.folder / 'log.txt').read_text()[-400:]}"
                )
                return
        train = next((ref for ref in self.store.artifacts() if ref.stage == "train"), None)
        if train is not None and furthest:
            resumed_at = self.store.manifest(train).figures["resumed_at"]
            assert isinstance(resumed_at, int)
            self.tally.repeated_steps += max(0, furthest - resumed_at)
        if known != self.quiet:
            self.tally.problems.append(
                f"other digests than in the quiet round: {sorted(set(known.items()) ^ set(self.quiet.items()))}"
            )
        head = Workspace(load_recipe(self.recipe)).log.head()
        if head is None or self.store.verify(head.merged):
            self.tally.problems.append("the champion is missing or damaged")

    def _kill_at_random(self, process: Fork, deadline: float) -> bool:
        """Wait for the run's end, and kill one of its processes when it is time. Return whether one was killed."""
        while process.poll() is None:
            if time.monotonic() >= self.next_kill and time.monotonic() < deadline:
                self._draw_next_kill()
                victims = [process.pid, *_descendants(process.pid)]
                victim = self.generator.choice(victims)
                stage = self._running_stage()
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.tally.kills[f"{'run' if victim == process.pid else 'worker'}, {stage}"] += 1
                process.wait()
                return True
            time.sleep(0.02)
        return False

    def _draw_next_kill(self) -> None:
        self.next_kill = time.monotonic() + self.generator.expovariate(3 / self.quiet_seconds)

    def _running_stage(self) -> str:
        found = sorted((self.store.root / "work").glob("*/*/job.json"))
        return found[-1].parent.parent.name if found else "no worker"

    def _wait_for_end(self) -> None:
        """Wait until no process of the run is left; those that are left are a problem, and are killed."""
        until = time.monotonic() + EXIT_SECONDS
        while left := _descendants(os.getpid()):
            while _reap():
                pass
            if time.monotonic() > until:
                self.tally.problems.append(f"{len(left)} processes are left after {EXIT_SECONDS:.0f} s")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _training_steps(self) -> tuple[int, int | None]:
        """Return the step from which an unfinished training went on, and the last step that it did; None without one."""
        for path in (self.store.root / "work" / "train").glob("*/progress.jsonl"):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.endswith("}")]
            steps = [step for line in lines if isinstance(step := json.loads(line).get("step"), int)]
            path.unlink()
            if steps:
                return steps[0] - 1, steps[-1]
        return 0, None

    def _digests(self) -> dict[Name, str]:
        return {(ref.stage, ref.fingerprint): ref.digest for ref in self.store.artifacts()}

    def _check(self, known: dict[Name, str]) -> dict[Name, str]:
        """Look at the store after an attempt: nothing is lost, damaged, or found that the quiet round did not compute."""
        found = self._digests()
        self.tally.lost += [f"{stage}/{fingerprint[:12]}" for stage, fingerprint in known.keys() - found.keys()]
        for stage, fingerprint in found:
            ref = self.store.find(stage, fingerprint)
            if ref is None:
                continue  # committed, but not current yet: the next attempt finishes it
            problems = self.store.verify(ref)
            if problems or ref.digest != self.quiet.get((stage, fingerprint)):
                self.tally.false_hits.append(f"{ref}: {problems or 'another digest'}")
        return found


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _reap() -> bool:
    """Reap a child that has ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def main(minutes: float, seed: int) -> int:
    """Run rounds with kills, and print a table. Return 1 if something was lost, wrong or repeated too often."""
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), random.Random(seed))
        chaos.run_quietly()
        started = time.monotonic()
        chaos.run_until(started + 60 * minutes)
        seconds = time.monotonic() - started
    tally = chaos.tally
    kills, bound = sum(tally.kills.values()), tally.killed_trainings * SAVE_STEPS
    if tally.repeated_steps > bound:
        tally.problems.append("more optimizer steps were repeated than the checkpoints allow")
    print(f"\n{seconds / 60:.0f} minutes, a mean of {chaos.quiet_seconds / 3:.1f} s between kills", flush=True)
    print_row("rounds", "kills", "artifacts lost", "false hits", "rounds with other digests or a problem",
              "steps repeated", f"at most ({tally.killed_trainings} trainings that ended early x {SAVE_STEPS})")  # fmt: skip
    print_row(
        tally.rounds, kills, len(tally.lost), len(tally.false_hits), len(tally.problems), tally.repeated_steps, bound
    )
    for name, count in tally.kills.most_common():
        print_row(name, count)
    for problem in (*tally.lost, *tally.false_hits, *tally.problems):
        print(problem, flush=True)
    return int(bool(tally.lost or tally.false_hits or tally.problems))
