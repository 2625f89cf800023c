"""A conversation with a model. Answers are streamed, and end at any of the model's stop tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraflow.base.generation_settings import ONE_ANSWER
from loraflow.data.chats import Message
from loraflow.failures import Failure
from loraflow.serving.models import Loaded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


Write = Callable[[str], None]
Finish = Literal["stop", "length", "interrupted"]


class GenerateArguments(TypedDict):
    """The arguments of `generate` that choose tokens."""

    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    num_beams: int
    max_new_tokens: int


class Sampling(BaseModel):
    """How the next token is chosen. At temperature 0 it is the most likely token, and answers repeat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    seed: int | None = None

    def arguments(self) -> GenerateArguments:
        """Return the arguments of `generate`. They override the sampling of the model's own generation config."""
        sample = self.temperature > 0
        return {
            "do_sample": sample,
            "temperature": self.temperature if sample else None,
            "top_p": self.top_p if sample else None,
            "top_k": 0 if sample else None,
            "num_beams": 1,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class ChatReply:
    """An answer. `finish` is stop, length (max_new_tokens were not enough) or interrupted."""

    text: str
    tokens: int
    finish: Finish
    forgotten: int  # the oldest messages, dropped to make room


class Chat:
    """A model and the messages of one conversation."""

    def __init__(self, loaded: Loaded, system: str | None = None, sampling: Sampling | None = None):
        self.loaded, self.system, self.sampling = loaded, system, sampling or Sampling()
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.turn = 0

    def answer(self, text: str, write: Write | None = None) -> ChatReply:
        """Answer a message, and stream the answer's text to `write`. Ctrl-C ends the answer and keeps its beginning.

        Raises:
            Failure: the message does not fit into the model's context; it is not remembered.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids, forgotten = self._fit()
            new_ids, finish = self._generate(ids, write)
        except BaseException:
            self.messages = before
            raise
        reply = _decode(self.loaded.tokenizer, new_ids).removeprefix(self.loaded.template.inserted_text())
        if reply.strip():
            self.messages.append({"role": "assistant", "content": reply})
        else:  # chat templates refuse two user messages in a row, so forget the question too
            self.messages = before
        return ChatReply(reply, len(new_ids), finish, forgotten)

    def _fit(self) -> tuple[list[int], int]:
        """Drop the oldest turns until prompt and answer fit; return the prompt's ids and the number of messages dropped."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        forgotten = 0
        while True:
            (ids,) = self.loaded.template.prompt_ids([self.messages])
            room = self.loaded.positions
            if room is None or len(ids) + self.sampling.max_new_tokens <= room:
                return ids, forgotten
            if len(self.messages) - first < 3:
                raise Failure(
                    "The message is too long.",
                    where="chat",
                    expected=f"at most {max(0, room - self.sampling.max_new_tokens)} tokens: "
                    f"the model's {room} minus {self.sampling.max_new_tokens} for the answer",
                    got=f"{len(ids)} tokens",
                    next_step="shorten the message, or leave less room for the answer: /set max_new_tokens",
                )
            del self.messages[first : first + 2]
            forgotten += 2

    def _generate(self, ids: list[int], write: Write | None) -> tuple[list[int], Finish]:
        """Return the answer's ids without their stop token, and how the answer ended."""
        import torch

        model, stops = self.loaded.model, self.loaded.stops
        prompt = torch.tensor([ids], device=model.device)
        stream = Stream(self.loaded.tokenizer, stops, write, self.loaded.template.inserted_text())
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + self.turn)  # `--compare` draws the same numbers for base and tuned
        self.turn += 1
        finish: Finish = "length"
        try:
            with torch.inference_mode():
                model.generate(  # type: ignore[operator]  # hidden by __getattr__ of nn.Module
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    eos_token_id=stops,
                    pad_token_id=self.loaded.tokenizer.pad_token_id,
                    streamer=stream,
                    **ONE_ANSWER,
                    **self.sampling.arguments(),
                )
        except KeyboardInterrupt:
            finish = "interrupted"
        stream.end()
        return stream.ids, "stop" if stream.stopped else finish


class Stream:
    """A streamer for `generate`: decodes tokens one by one into exactly the text of decoding them all at once.

    `inserted`, which the chat template writes before an answer, is not written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[int], write: Write | None, inserted: str = ""):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stops, self.write = tokenizer, set(stops), write
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.written = ""
        self.inserted = inserted
        self.stopped = False
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt [1, tokens] at first, then one token [1] at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token in self.stops:
                self.stopped = True
                return
            self.ids.append(token)
            self._emit(self.decoder.step(self.tokenizer.backend_tokenizer, token))

    def end(self) -> None:
        """Write the rest that the decoder held back: half of a character, when the answer was cut."""
        whole = _decode(self.tokenizer, self.ids)
        if whole.startswith(self.written):
            self._emit(whole[len(self.written) :], is_last=True)

    def _emit(self, text: str | None, *, is_last: bool = False) -> None:
        text = text or ""
        self.written += text
        if self.inserted:  # hold the text back until it is known whether it begins so
            if self.inserted.startswith(self.written) and not is_last:
                return
            text, self.inserted = self.written.removeprefix(self.inserted), ""
        if text and self.write is not None:
            self.write(text)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)  # a list only for several rows of ids


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
