"""How a worker process tells the launcher its outcome: by a file in the work folder, and a failure by a pipe as well.

A worker whose disk is full cannot write the file. The pipe needs no disk.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from pydantic import JsonValue

from loraflow import failures
from loraflow.execution.classify import classify, full_folder
from loraflow.execution.job_file import JobFile
from loraflow.execution.log_file import read_tail
from loraflow.store import Summary
from loraflow.store.checksum import ChangedDocument, check_document, with_checksum
from loraflow.store.files import write_atomic

PIPE = "LORAFLOW_OUTCOME"  # environment: the number of the pipe's end that the worker writes to
FILE = "outcome.json"
_MAX_PIPE = 60_000  # bytes: less than a pipe holds, so that writing never waits for the launcher
_MAX_FILE = 256 * 2**20  # bytes


def take_pipe() -> int | None:
    """Return the pipe to the launcher and hide it from this process's children; None if there is no launcher."""
    number = os.environ.pop(PIPE, None)
    if number is None:
        return None
    os.set_inheritable(int(number), False)
    return int(number)


def report_outcome(
    file: JobFile, name: str, pipe: int | None, failure: failures.Failure | None, summary: Summary
) -> failures.Failure | None:
    """Write a job's outcome, and return its failure: that of the job, or that the outcome cannot be written."""
    outcome: dict[str, JsonValue] = (
        {"status": "done", "summary": summary.model_dump(mode="json")}
        if failure is None
        else {"status": "failed", "failure": failure.to_dict()}
    )
    try:
        write_atomic(file.work / name, with_checksum(f"{file.work.name}/{name}", outcome))
    except OSError as error:
        if failure is None or isinstance(failure, failures.Crashed):  # the full disk may be what it crashed of
            failure = classify(error, file.job.stage, [file.work])
    if failure is not None and pipe is not None:
        line = json.dumps({"status": "failed", "failure": failure.to_dict()}).encode()
        if len(line) > _MAX_PIPE:
            line = json.dumps({"status": "failed", "failure": _shortened(failure).to_dict()}).encode()
        with contextlib.suppress(OSError):  # the launcher is gone
            os.write(pipe, line)
    return failure


def _shortened(failure: failures.Failure) -> failures.Failure:
    texts = {key: str(value)[:5000] for key, value in failure.to_dict().items() if key != "details"}
    return failures.from_dict(texts)


def read_outcome(file: JobFile, pipe: int, code: int, *, oom_killed: bool) -> Summary:
    """Return the summary of a worker that has ended, or raise its failure.

    Args:
        code: the worker's exit status; negative is the number of the signal that ended it.
        oom_killed: whether the kernel killed a process for lack of memory meanwhile.

    Raises:
        Failure: the worker's own; or Killed, Preempted, DiskFull or Crashed, if it left none.
    """
    log = file.work / "log.txt"
    command = f"{Path(sys.executable).name} -P -m loraflow.execution.worker {file.work / 'job.json'}"
    next_step = f"read the log {log}; run it by hand: {command}"
    outcome = _from_file(file.work / FILE)
    if not outcome or (code and outcome.get("status") == "done"):  # it was written, but could not be flushed
        outcome = _from_pipe(pipe)
    if outcome and outcome.get("status") == "done" and code == 0:
        return Summary.model_validate(outcome["summary"])
    found = outcome.get("failure") if outcome and outcome.get("status") == "failed" else None
    if isinstance(found, dict):
        failure = failures.from_dict(found)
        failure.next_step = failure.next_step or next_step
        raise failure
    where = f"{file.job.stage} {file.job.short}"
    if code == -signal.SIGKILL and oom_killed:
        raise failures.OutOfMemory(
            "The host ran out of memory and killed the worker.", where=where, next_step=next_step
        )
    if code == -signal.SIGKILL:
        raise failures.Killed("The worker was killed.", where=where, got="SIGKILL", next_step=next_step)
    if code == -signal.SIGTERM:
        raise failures.Preempted("The worker was asked to stop.", where=where, got="SIGTERM", next_step=next_step)
    if folder := full_folder([file.out, file.work]):  # a mapped file ends a process by SIGBUS then
        raise failures.disk_full(str(folder))
    got = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    raise failures.Crashed(
        "The worker ended without an outcome.", where=where, got=f"{got}\n{read_tail(log, 1500)}", next_step=next_step
    )


def _from_file(path: Path) -> dict[str, JsonValue] | None:
    try:
        if path.stat().st_size > _MAX_FILE:
            return None
        return parse_outcome(path)
    except FileNotFoundError:
        return None


def parse_outcome(path: Path) -> dict[str, JsonValue] | None:
    """Return an outcome's values; None if the file is damaged, or that of another job.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return _parsed(check_document(f"{path.parent.name}/{path.name}", path.read_bytes()))
    except ChangedDocument:
        return None


def _from_pipe(pipe: int) -> dict[str, JsonValue] | None:
    os.set_blocking(pipe, False)  # a grandchild may still hold the other end
    try:
        return _parsed(os.read(pipe, _MAX_PIPE + 1))
    except BlockingIOError:
        return None


def _parsed(data: bytes) -> dict[str, JsonValue] | None:
    try:
        value: JsonValue = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
