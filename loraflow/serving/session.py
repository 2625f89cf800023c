"""The session of `loraflow chat`, interactive or from a pipe: each line is a message, or a command such as /reset."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import ValidationError

from loraflow.failures import Failure
from loraflow.serving.chat import Chat, Sampling

HELP = """\
/reset                 forget the conversation
/system TEXT           set the system message and start again; without TEXT, remove it
/set                   show temperature, top_p, max_new_tokens and seed
/set temperature 0.7   change a setting (seed none: a different answer each time)
/help                  show this text
/quit                  end; so does Ctrl-D. Ctrl-C ends an answer, not the program
//text                 send a message that begins with a slash"""


class Quit(Exception):
    """The user entered /quit."""


class Session:
    """One model, or base and tuned side by side: each has its own conversation, with the same questions.

    Args:
        chats: name shown before the answers → conversation.
        write: takes the text of answers.
        note: takes all other text, one line at a time.
        interactive: after Ctrl-C or an error ask for the next line; a pipe ends instead.
    """

    def __init__(
        self,
        chats: dict[str, Chat],
        write: Callable[[str], None],
        note: Callable[[str], None],
        *,
        interactive: bool = True,
    ):
        self.chats, self.write, self.note, self.interactive = chats, write, note, interactive

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer lines until `read` raises EOFError or a line is /quit."""
        while True:
            try:
                self.handle_line(read().strip())
            except (EOFError, Quit):
                return
            except KeyboardInterrupt:  # at the prompt, drop the line that was typed so far
                if not self.interactive:
                    raise
                self.note("")
            except Failure as failure:
                if not self.interactive:
                    raise
                self.note(str(failure))

    def handle_line(self, line: str) -> None:
        """Answer a message, or run a command.

        Raises:
            Quit: the line is /quit.
            Failure: the message cannot be answered.
        """
        if not line:
            return
        if line.startswith("/") and not line.startswith("//"):
            self._command(*_split(line))
        else:
            self.ask(line.removeprefix("/") if line.startswith("//") else line)

    def ask(self, text: str) -> None:
        """Let each model answer a message."""
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
                if not self.interactive:
                    raise KeyboardInterrupt
                self.note("(interrupted)")
                return  # do not ask the other model

    def _command(self, name: str, rest: str) -> None:
        if name in ("/quit", "/exit"):
            raise Quit
        if name == "/help":
            self.note(HELP)
        elif name == "/reset":
            self._restart()
        elif name == "/system":
            for chat in self.chats.values():
                chat.system = rest or None
            self._restart()
        elif name == "/set":
            self._set(*_split(rest))
        else:
            self.note(f"there is no {name}; /help lists the commands, //… sends a message that begins with a slash")

    def _restart(self) -> None:
        for chat in self.chats.values():
            chat.reset()

    def _set(self, key: str, value: str) -> None:
        sampling = next(iter(self.chats.values())).sampling
        if key and key not in Sampling.model_fields:
            self.note(f"there is no {key}; settings are {', '.join(Sampling.model_fields)}")
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
        self.note(", ".join(f"{name} {value}" for name, value in sampling.model_dump().items()))


def _split(text: str) -> tuple[str, str]:
    first, _, rest = text.strip().partition(" ")
    return first, rest.strip()
