"""`loraflow chat` at the keyboard or from a pipe: a line is a message, unless it begins with a slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from loraflow.failures import Failure
from loraflow.serving.chat import Chat, Sampling

HELP = """\
/reset                 forget what was said
/system TEXT           set the system message and begin anew; /system alone takes it away
/set                   show temperature, top_p, max_new_tokens and seed
/set temperature 0.7   change one of them (seed none: another answer each time)
/help                  this text
/quit                  end; so does Ctrl-D. Ctrl-C ends an answer, not the program
//text                 a message that begins with a slash"""


class Quit(Exception):
    """The person asked to end."""


class Session:
    """One model, or base and tuned side by side: each has a conversation of its own, with the same questions."""

    def __init__(
        self, chats: dict[str, Chat], write: Callable[[str], Any], note: Callable[[str], Any], *, person: bool = True
    ):
        self.chats = chats
        self.write = write  # answers
        self.note = note  # all else, a line each
        self.person = person  # somebody is there to go on after Ctrl-C or an error; a pipe's reader wants it to end

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer until the lines end (EOFError) or somebody says /quit."""
        while True:
            try:
                self.take(read().strip())
            except (EOFError, Quit):
                return
            except KeyboardInterrupt:  # at the prompt it drops the line that was begun
                if not self.person:
                    raise
                self.note("")
            except Failure as failure:
                if not self.person:
                    raise
                self.note(str(failure))

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            Quit: it says /quit.
            Failure: it cannot be answered.
        """
        if not line:
            return
        if line.startswith("/") and not line.startswith("//"):
            self._command(*_split(line))
        else:
            self.ask(line.removeprefix("/") if line.startswith("//") else line)

    def ask(self, text: str) -> None:
        """Have each model answer."""
        for name, chat in self.chats.items():
            if token := chat.loaded.control_token_in(text):
                self.note(f"(the model reads {token} as a control token, not as text)")
            if len(self.chats) > 1:
                self.write(f"{name}: ")
            answer = chat.answer(text, self.write)
            self.write("\n")
            if answer.forgotten:
                self.note(f"(the oldest {answer.forgotten} messages no longer fit and were forgotten)")
            if answer.finish == "length":
                self.note(f"(cut at {answer.tokens} tokens; /set max_new_tokens allows more)")
            if answer.finish == "interrupted":
                if not self.person:
                    raise KeyboardInterrupt
                self.note("(interrupted)")
                return  # the other model is not asked

    def _command(self, name: str, rest: str) -> None:
        if name in ("/quit", "/exit"):
            raise Quit
        if name == "/help":
            self.note(HELP)
        elif name == "/reset":
            self._begin_anew()
        elif name == "/system":
            for chat in self.chats.values():
                chat.system = rest or None
            self._begin_anew()
        elif name == "/set":
            self._set(*_split(rest))
        else:
            self.note(f"there is no {name}; /help lists what there is, //… sends a message that begins with a slash")

    def _begin_anew(self) -> None:
        for chat in self.chats.values():
            chat.reset()

    def _set(self, key: str, value: str) -> None:
        sampling = next(iter(self.chats.values())).sampling
        if key and key not in Sampling.model_fields:
            self.note(f"there is no {key}; there are {', '.join(Sampling.model_fields)}")
            return
        if key:
            try:
                change = {key: None if value in ("", "none") else value}
                sampling = Sampling.model_validate({**sampling.model_dump(), **change})
            except ValidationError as error:
                self.note(f"{key}: {error.errors()[0]['msg']}")
                return
            for chat in self.chats.values():
                chat.sampling = sampling
        self.note(", ".join(f"{name} {held}" for name, held in sampling.model_dump().items()))


def _split(text: str) -> tuple[str, str]:
    first, _, rest = text.strip().partition(" ")
    return first, rest.strip()
