"""Render a chat template in a process of its own, which has limits of time and memory (`template_child`)."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, NamedTuple

from loraflow.data.chats import Chat
from loraflow.data.templates.template_child import (
    HEADER,
    MEMORY,
    SECONDS,
    Reply,
    Request,
    Source,
    read_frame,
    write_frame,
)
from loraflow.failures import BadModel, Killed

Span = tuple[int, int]
CHATS = 500  # in one request
CACHED = 4  # templates whose processes are kept


class _Process(NamedTuple):
    child: subprocess.Popen[bytes]
    requests: IO[bytes]
    replies: IO[bytes]
    current: IO[bytes]  # the child writes the number of the chat into it


class TemplateProcess:
    """A compiled template in a child process. It is started when it is first used, and ends with this process.

    A failure's details have the number of the chat, `chat`.
    """

    def __init__(self, source: str, variables: Mapping[str, str], seconds: int = SECONDS):
        self.source: Source = {"template": source, "variables": dict(variables)}
        self.seconds = seconds
        self._process: _Process | None = None
        self._reads: list[str] = []
        self._owner = 0  # process id: a forked process needs a child of its own
        self._lock = threading.Lock()

    def compile(self) -> None:
        """Compile the template, if that has not been done.

        Raises:
            BadModel: it is not valid, or exceeds a limit.
        """
        with self._lock:
            self._start()

    def variables(self) -> list[str]:
        """Return the names that the template reads and does not define.

        Raises:
            BadModel: it is not valid, or exceeds a limit.
        """
        self.compile()
        return self._reads

    def render(self, chats: Sequence[Chat], *, prompt: bool) -> list[str]:
        """Return the chats as the model reads them. `prompt` adds the start of an answer (add_generation_prompt).

        Raises:
            BadModel: the template raises an error, or exceeds a limit.
        """
        return [text for reply in self._replies(chats, prompt=prompt, spans=False) for text in reply["texts"]]

    def marked(self, chats: Sequence[Chat]) -> list[list[Span]]:
        """Return each chat's spans of characters that are inside `{% generation %}` blocks.

        Raises:
            BadModel: the template raises an error, or exceeds a limit.
        """
        return [
            [(start, end) for start, end in spans]
            for reply in self._replies(chats, prompt=False, spans=True)
            for spans in reply["spans"]
        ]

    def _replies(self, chats: Sequence[Chat], *, prompt: bool, spans: bool) -> list[Reply]:
        replies: list[Reply] = []
        with self._lock:
            for first in range(0, len(chats), CHATS):
                part = chats[first : first + CHATS]
                request: Request = {"chats": [list(chat) for chat in part], "prompt": prompt, "spans": spans}
                replies.append(self._exchange(self._start(), json.dumps(request).encode(), part, first))
        return replies

    def _start(self) -> _Process:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        current = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        current.truncate(HEADER)
        child = subprocess.Popen(
            # -P: a module of the current folder, such as token.py, must not replace one of Python
            [
                sys.executable,
                "-P",
                "-m",
                "loraflow.data.templates.template_child",
                str(current.fileno()),
                str(self.seconds),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a MemoryError's traceback at the end of the process
            pass_fds=[current.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
        )
        assert child.stdin is not None and child.stdout is not None
        process = _Process(child, child.stdin, child.stdout, current)
        weakref.finalize(self, _close, process, os.getpid())
        self._reads = self._exchange(process, json.dumps(self.source).encode(), [], 0)["reads"]
        self._process, self._owner = process, os.getpid()
        return process

    def _exchange(self, process: _Process, request: bytes, chats: Sequence[Chat], first: int) -> Reply:
        with contextlib.suppress(BrokenPipeError):
            write_frame(process.requests, request)
        content = read_frame(process.replies)
        if content is None:
            self._process = None
            number = int.from_bytes(os.pread(process.current.fileno(), HEADER, 0), "big")
            code = process.child.wait()
            _close(process, os.getpid())
            raise _ended(code, chats, number, first)
        reply: Reply = json.loads(content)
        if "kind" in reply:
            number = int.from_bytes(os.pread(process.current.fileno(), HEADER, 0), "big")
            if reply["kind"] not in (
                "template",
                "other",
            ):  # memory that was not given back would fail the next chat too
                self._process = None
                _close(process, os.getpid())
            raise _refused(reply, chats, number, first)
        return reply


@lru_cache(CACHED)
def _cached(source: str, variables: frozenset[tuple[str, str]]) -> TemplateProcess:
    return TemplateProcess(source, dict(variables))


def template_process(source: str, variables: Mapping[str, str]) -> TemplateProcess:
    """Return the process of a template, which all users of the same template share."""
    return _cached(source, frozenset(variables.items()))


def _close(process: _Process, owner: int) -> None:
    """Close the pipes, on which the child ends. A forked process closes only its own copies."""
    for stream in (process.requests, process.replies, process.current):
        with contextlib.suppress(OSError):
            stream.close()
    if os.getpid() == owner and process.child.poll() is None:
        process.child.kill()
        process.child.wait()


LIMITS = {
    "time": (f"more than {SECONDS} s of processor time", f"at most {SECONDS} s, and 1 s for each MB of chats"),
    "memory": (f"more than {MEMORY >> 20} MiB of memory", f"at most {MEMORY >> 20} MiB, and 40 times the chats' size"),
    "output": ("far more text than the chat has", "at most 16 Mi characters, and 16 times the chats' size"),
    "recursion": ("too many macros or blocks in each other", "at most Python's recursion limit"),
}


def _ended(code: int, chats: Sequence[Chat], number: int, first: int) -> BadModel | Killed:
    if code == -signal.SIGXCPU:
        return _limit("time", chats, number, first)
    if code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):  # C code that ran out of stack or memory
        return _limit("memory", chats, number, first)
    return Killed(
        "The process that renders the chat template was killed.",
        where="chat_template",
        got=f"exit status {code}",
        next_step="run again; if it repeats, the machine is short of memory (dmesg shows it)",
    )


def _refused(reply: Reply, chats: Sequence[Chat], number: int, first: int) -> BadModel:
    if reply["kind"] in LIMITS:
        return _limit(reply["kind"], chats, number, first)
    if not chats:
        return BadModel(
            "The chat template is not valid.",
            where="chat_template",
            got=reply["error"][:300],
            next_step="correct the template, or name another one (base.chat_template)",
        )
    return BadModel(
        "The chat template raises an error for a chat.",
        where="chat_template",
        got=reply["error"][:300],
        next_step="correct the rows (some templates do not allow system messages), or choose another base model",
        chat=first + number,
    )


def _limit(name: str, chats: Sequence[Chat], number: int, first: int) -> BadModel:
    needs, expected = LIMITS[name]
    next_step = "correct chat_template.jinja of the base model, or choose another base model"
    if number >= len(chats):
        what = f"The chat template needs {needs} before it renders a chat."
        return BadModel(what, where="chat_template", expected=expected, next_step=next_step)
    start = next((message["content"] for message in chats[number]), "")
    return BadModel(
        f"The chat template needs {needs} for one chat.",
        where="chat_template",
        expected=expected,
        got=f"a chat of {len(chats[number])} messages: {start[:80]!r}",
        next_step=next_step,
        chat=first + number,
    )
