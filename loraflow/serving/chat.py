"""A conversation with a model. Answers are streamed, and end at any of the model's stop tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field

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
                    "The message does not fit.",
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
