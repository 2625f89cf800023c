"""Read a GGUF file once and fast, where transformers reads it three times."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import gguf
import numpy as np
from numpy.typing import NDArray


class _Reader(gguf.GGUFReader):
    """gguf's reader, with the file as a plain array: parsing takes millions of slices, and a memmap's are slow."""

    @property  # type: ignore[override]
    def data(self) -> NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, value: NDArray[np.uint8]) -> None:
        self._data = np.asarray(value)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse each GGUF file once inside the block, in place of once each for tokenizer, config and weights.

    transformers also builds the table of tensor names again for each module of the model. Inside the block, the results of
    both functions of gguf are cached.
    """
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(_Reader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield
