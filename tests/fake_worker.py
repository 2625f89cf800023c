"""A worker with small stages that end in every way there is. Run by tests in place of `python -m loraflow.execution.worker`."""

import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from loraflow.config.stage_configs import StageConfig
from loraflow.execution import worker
from loraflow.failures import BadConfig, NonFiniteLoss, Preempted
from loraflow.stages import STAGES, Stage
from loraflow.store import Summary
from loraflow.store.checkpoints import finalize_checkpoint


class FakeConfig(StageConfig):
    """Which way to end."""

    how: str


def no_space(*_):
    raise OSError(28, "No space left on device")


class FullStream:
    """A stream to a file on a full disk."""

    def write(self, text):
        no_space()

    def flush(self):
        no_space()


def run(job, inputs, out, report):
    """Do what the job's config says."""
    how, work = job.config.how, report.work
    attempts = work / "attempts"
    attempts.write_text(str(int(attempts.read_text() or 0) + 1 if attempts.exists() else 1))
    (out / "result.txt").write_text("done")
    report(step=1, total=2)
    if how == "kill-once" and attempts.read_text() == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "term-once" and attempts.read_text() == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "stop-once" and attempts.read_text() == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "spin":
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            pass
    elif how == "large-log":
        os.truncate(work / "log.txt", 3 * 2**30)  # without taking the space
        print("the last line", flush=True)
        os._exit(7)
    elif how == "leak":
        url = f"https://someone:{os.environ['CANARY']}@host/data.git"
        print("python:", url)
        warnings.warn(url, stacklevel=1)
        os.write(1, f"a C library: {url}\n".encode())
        subprocess.run(["echo", "a program:", url], check=True)
        print("the last line", end="", flush=True)
        os._exit(7)
    elif how == "exit":
        os._exit(7)
    elif how == "nan":
        raise NonFiniteLoss("loss became nan.", where="step 3")
    elif how == "oom":
        if job.runtime.eval_batch_size > 2:
            raise MemoryError
        (out / "result.txt").write_text(str(job.runtime.eval_batch_size))
    elif how == "full":
        raise OSError(28, "No space left on device", "/somewhere")
    elif how == "fill":
        with (work / "large").open("wb") as file:
            while True:
                file.write(b"0" * 2**16)
    elif how == "fsize":  # a real limit of the system
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        (out / "large").write_bytes(b"0" * 10_000)
    elif how == "checkpoint":
        folder = work / "checkpoints"
        if not folder.exists():
            (folder / "checkpoint-2").mkdir(parents=True)
            (folder / "checkpoint-2" / "weights").write_bytes(b"0" * 2**20)
            finalize_checkpoint(folder / "checkpoint-2")
            (folder / "checkpoint-4").mkdir()
            (folder / "checkpoint-4" / "weights").write_bytes(b"0" * 100)
            raise OSError(28, "No space left on device", str(folder / "checkpoint-4" / "weights"))
    elif how == "no-outcome":
        worker.report_outcome.__globals__["write_atomic"] = no_space
        sys.stderr = FullStream()
        raise RuntimeError("something odd on a full disk")
    elif how == "import":
        import no_such_package  # noqa: F401
    elif how == "raise":
        raise RuntimeError("something odd")
    elif how == "sleep":
        subprocess.Popen(["sleep", "120"])  # a grandchild
        (work / "pid").write_text(str(os.getpid()))
        time.sleep(120)
    elif how in ("swallow", "rename"):  # a metric that catches every exception
        (work / "pid").write_text(str(os.getpid()))
        try:
            time.sleep(120)
        except Exception as error:
            (out / "result.txt").write_text("0.0")
            if how == "rename":
                raise BadConfig("The metric failed.") from error
    elif how == "late":  # is asked to stop when only its result is left to write
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (work / "pid").write_text(str(os.getpid()))
        time.sleep(1.0)
    elif how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (work / "pid").write_text(str(os.getpid()))
        while True:
            try:
                time.sleep(120)
            except Preempted:
                pass
    report(step=2, total=2)
    assert "prefect" not in sys.modules
    return Summary()


FAKE_STAGE = Stage(
    name="evaluate",
    version=1,
    module="tests.fake_worker",
    config=FakeConfig,
    code=("loraflow.identity",),
    oom_field="eval_batch_size",
)

if __name__ == "__main__":
    STAGES[FAKE_STAGE.name] = FAKE_STAGE
    sys.exit(worker.main(sys.argv[1:]))
