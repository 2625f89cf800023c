"""A conversation with a model's folder: the answer is printed as it comes, greedily, and ends at a stop token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraflow.base.load import load_model, load_tokenizer, stop_ids


class Chat:
    """A model, and what was said so far."""

    def __init__(self, folder: Path, system: str | None, max_new_tokens: int, runtime: dict[str, Any] | None = None):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, "bfloat16", runtime or {})
        self.stops = stop_ids(folder)
        self.system, self.max_new_tokens = system, max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.said: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> str:
        """Print and return the answer to a message."""
        import torch
        from transformers import TextStreamer

        self.said.append({"role": "user", "content": text})
        ids = self.tokenizer.apply_chat_template(
            self.said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            out = self.model.generate(
                **ids,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=self.stops,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
            )
        reply = self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        self.said.append({"role": "assistant", "content": reply})
        return reply
