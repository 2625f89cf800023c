"""A conversation with a model: the answer is handed on as it comes, and ends at any of the model's stop tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from loraflow.failures import Failure
from loraflow.serving.models import Loaded

Write = Callable[[str], Any]


class Sampling(BaseModel):
    """How the next token is chosen. At temperature 0 it is the likeliest one, and answers repeat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what `generate` is given; what a model's own generation config says of sampling is set aside."""
        if self.temperature == 0:
            choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            choice = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {**choice, "num_beams": 1, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Answer:
    """What was said: `finish` is stop, length (max_new_tokens were not enough) or interrupted."""

    text: str
    tokens: int
    finish: str
    forgotten: int  # messages that no longer fit in front of the question


class Chat:
    """A model, and what was said so far."""

    def __init__(self, loaded: Loaded, system: str | None = None, sampling: Sampling | None = None):
        self.loaded, self.system, self.sampling = loaded, system, sampling or Sampling()
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.said: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.turn = 0

    def answer(self, text: str, write: Write | None = None) -> Answer:
        """Answer a message, and hand the answer's text to `write` as it comes. Ctrl-C ends the answer, and keeps it.

        Raises:
            Failure: the message does not fit into what the model can read; it is forgotten.
        """
        before = list(self.said)
        self.said.append({"role": "user", "content": text})
        try:
            ids, forgotten = self._fit()
            new, finish = self._generate(ids, write)
        except BaseException:
            self.said = before
            raise
        reply = _decode(self.loaded.tokenizer, new)
        if reply.strip():
            self.said.append({"role": "assistant", "content": reply})
        else:  # nothing to go on from: templates refuse two questions in a row
            self.said = before
        return Answer(reply, len(new), finish, forgotten)

    def _fit(self) -> tuple[list[int], int]:
        """Return the prompt, the oldest turns forgotten until question and answer fit, and how many messages that were."""
        first = 1 if self.said[0]["role"] == "system" else 0
        forgotten = 0
        while True:
            (ids,) = self.loaded.template.prompt_ids([self.said])
            room = self.loaded.positions
            if room is None or len(ids) + self.sampling.max_new_tokens <= room:
                return ids, forgotten
            if len(self.said) - first < 3:
                raise Failure(
                    "The message does not fit.",
                    where="chat",
                    expected=f"at most {max(0, room - self.sampling.max_new_tokens)} tokens: "
                    f"the model's {room} less {self.sampling.max_new_tokens} for the answer",
                    got=f"{len(ids)} tokens",
                    next_step="shorten it, or leave less room for the answer: /set max_new_tokens",
                )
            del self.said[first : first + 2]
            forgotten += 2

    def _generate(self, ids: list[int], write: Write | None) -> tuple[list[int], str]:
        """Return the answer's ids without their stop token, and how it ended."""
        import torch

        model, stops = self.loaded.model, self.loaded.stops
        prompt = torch.tensor([ids], device=model.device)
        stream = Stream(self.loaded.tokenizer, stops, write)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed + self.turn)  # base and tuned, side by side, draw the same numbers
        self.turn += 1
        finish = "length"
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    eos_token_id=stops,
                    pad_token_id=self.loaded.tokenizer.pad_token_id,
                    streamer=stream,
                    **self.sampling.arguments(),
                )
        except KeyboardInterrupt:
            finish = "interrupted"
        stream.end()
        return stream.ids, "stop" if stream.stopped else finish


class Stream:
    """Takes tokens as `generate` makes them, and hands their text on: in the end exactly what decoding them all gives."""

    def __init__(self, tokenizer: Any, stops: list[int], write: Write | None):
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.stops, self.write = tokenizer, set(stops), write
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.written = ""
        self.stopped = False
        self.prompt_seen = False

    def put(self, value: Any) -> None:
        """Take the prompt, and after it one token at a time."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token in self.stops:
                self.stopped = True
                return
            self.ids.append(token)
            self._hand_on(self.decoder.step(self.tokenizer.backend_tokenizer, token))

    def end(self) -> None:
        """Hand on what was held back: half of a character, when the answer was cut."""
        whole = _decode(self.tokenizer, self.ids)
        if whole.startswith(self.written):
            self._hand_on(whole[len(self.written) :])

    def _hand_on(self, text: str | None) -> None:
        if text:
            self.written += text
            if self.write is not None:
                self.write(text)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
