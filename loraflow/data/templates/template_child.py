"""The process that compiles and renders a chat template. A template is code from outside, so it gets little time and memory.

    python -m loraflow.data.templates.template_child FD SECONDS

Jinja's sandbox keeps a template from files and Python's internals, but not from `'x' * 4000000000` or nested loops. Here
the kernel ends them. Each frame on stdin and stdout is eight bytes with a length, and JSON of that length. FD is an
open file: the number of the chat that is being rendered is written to it, for the case that this process is killed.
SECONDS is the processor time for one chat.
"""

from __future__ import annotations

import json
import mmap
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import IO, TypedDict

from jinja2.exceptions import TemplateError

from loraflow.data.chats import Message
from loraflow.data.templates.template import CompiledTemplate, variables_of

SECONDS = 10  # of processor time for one chat; ordinary templates need less than a millisecond
SECONDS_PER_MB = 1  # of the request, in addition
MEMORY = 1 << 30  # bytes of address space: Python and Jinja need about 100 MB of it
MEMORY_PER_BYTE = 40  # of the request, in addition: JSON, its objects, the text and its copies
OUTPUT = 1 << 24  # characters of a rendered chat
OUTPUT_PER_BYTE = 16  # of the request, in addition
HEADER = 8  # bytes of a frame's length


class Source(TypedDict):
    """The first request."""

    template: str
    variables: dict[str, str]


class Request(TypedDict):
    """Chats to render. `prompt` is add_generation_prompt; `spans` asks for the {% generation %} blocks, not the text."""

    chats: list[list[Message]]
    prompt: bool
    spans: bool


class Reply(TypedDict, total=False):
    """The names that a template reads; the rendered chats or their spans; or `error` and its kind.

    Kinds are template, memory, recursion, output and other.
    """

    reads: list[str]
    texts: list[str]
    spans: list[list[tuple[int, int]]]
    kind: str
    error: str


class TooLong(Exception):
    """A rendered chat is far longer than its messages."""


def read_frame(stream: IO[bytes], before: Callable[[int], None] | None = None) -> bytes | None:
    """Return the next frame's content; None at the end of the stream, or if the frame is cut off.

    `before` is called with the content's size before the content is read.
    """
    header = stream.read(HEADER)
    if len(header) < HEADER:
        return None
    size = int.from_bytes(header, "big")
    if before is not None:
        before(size)
    content = stream.read(size)
    return content if len(content) == size else None


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Write a frame."""
    stream.write(len(content).to_bytes(HEADER, "big"))
    stream.write(content)
    stream.flush()


def main(argv: list[str]) -> int:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    limit = _Limit(*map(int, argv))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    compiled: CompiledTemplate | None = None
    while (content := read_frame(requests, _limit_memory)) is not None:
        reply: Reply
        limit.next_request(len(content))
        try:
            if compiled is None:
                source: Source = json.loads(content)
                compiled = CompiledTemplate(source["template"], source["variables"])
                reply = {"reads": sorted(variables_of(source["template"]))}
            else:
                reply = _render(compiled, json.loads(content), limit)
            encoded = json.dumps(reply).encode()
        except BaseException as error:  # a template can raise anything
            encoded = json.dumps({"kind": _kind(error), "error": f"{error}"[:1000]}).encode()
        write_frame(replies, encoded)
    return 0


def _render(compiled: CompiledTemplate, request: Request, limit: _Limit) -> Reply:
    longest = OUTPUT + OUTPUT_PER_BYTE * limit.size
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for number, chat in enumerate(request["chats"]):
        limit.next_chat(number)
        if request["spans"]:
            spans.append(compiled.marked(chat))
            continue
        text = compiled.render(chat, prompt=request["prompt"])
        if len(text) > longest:
            raise TooLong(f"{len(text):,} characters")
        texts.append(text)
    return {"spans": spans} if request["spans"] else {"texts": texts}


def _kind(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RecursionError):
        return "recursion"
    if isinstance(error, TooLong):
        return "output"
    return "template" if isinstance(error, TemplateError | TypeError | ValueError) else "other"


class _Limit:
    """The processor time of a chat, and the note which chat it is. The kernel kills the process that needs more.

    Almost all chats need microseconds, so the note is a write into shared memory, and the limit is renewed four times a
    second instead of for each chat.
    """

    def __init__(self, current: int, seconds: int):
        self.seconds = seconds
        self.size = 0  # bytes of the request
        self._current = mmap.mmap(current, HEADER)
        self._renew_at = 0.0

    def next_chat(self, number: int) -> None:
        """Note a chat's number, and give it its processor time."""
        self._current[:] = number.to_bytes(HEADER, "big")
        now = time.monotonic()
        if now < self._renew_at:
            return
        self._renew_at = now + 0.25
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        end = int(time.process_time()) + 1 + self.seconds + SECONDS_PER_MB * (self.size >> 20)
        resource.setrlimit(resource.RLIMIT_CPU, (end if hard == resource.RLIM_INFINITY else min(end, hard), hard))

    def next_request(self, size: int) -> None:
        """Take the size of a new request into account."""
        self.size, self._renew_at = size, 0.0
        self.next_chat(0)


def _limit_memory(size: int) -> None:
    if sys.platform == "darwin":  # macOS accepts the limit only above what is mapped, and ignores it
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY + MEMORY_PER_BYTE * size
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
