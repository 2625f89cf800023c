"""Find rows with equal keys and near-duplicates: propose pairs, and confirm them by the exact Jaccard index of 5-grams.

Two rows are proposed if a band of their MinHash sketches is equal. With 16 bands of 5 values, a pair with an index of 0.8
is proposed with a probability of 0.998, and one of 0.9 practically always.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraflow.data.chats import Chat
from loraflow.data.checks.split import normalize, text_key, to_json, without_call_ids
from loraflow.failures import MissingExtra
from loraflow.store.chunk_cache import ChunkCache

THRESHOLD = 0.8  # Jaccard index from which two rows are near-duplicates
BAND = 5  # MinHash values of a band
# Equal values of two sketches below which a pair is not compared: four standard deviations below 0.8, that is 0.62.
MIN_EQUAL = 50
WINDOW = 64  # rows before a row that are proposed to it in a band: keeps time linear if thousands of rows share a text
_SIZE = 17  # bytes of a pair that was compared: two keys and the result
_MAX_KEPT = 250_000  # such pairs: 40 MB of memory. Beyond them, texts are compared again
_CHUNK = 100_000  # pairs whose sketches are compared together


class Sketches:
    """The sketches of rows and the keys of their texts, in a temporary file.

    Args:
        folder: where the file is.
    """

    def __init__(self, folder: Path):
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed below

    def append(self, sketches: NDArray[np.uint8], keys: NDArray[np.uint64]) -> None:
        """Add rows by what `sketch` and `text_key` return for their texts."""
        rows = np.empty(len(keys), _SKETCH)
        rows["sketch"], rows["key"] = sketches.reshape(-1, HASHES), keys
        self._file.write(rows.data)

    def close(self) -> None:
        """Delete the sketches."""
        self._file.close()

    def candidates(self, order: NDArray[np.int64]) -> Candidates:
        """Return the pairs that are worth comparing.

        Args:
            order: some or all rows, in another order; the pairs have the positions in it.
        """
        self._file.flush()
        # Mapped, so that they do not have to be in memory together. An empty file cannot be mapped.
        rows = np.asarray(np.memmap(self._file, _SKETCH, "r")) if len(order) else np.empty(0, _SKETCH)
        return Candidates(rows["sketch"], rows["key"], order)


class Candidates:
    """Pairs of rows that are worth comparing.

    Attributes:
        keys: of the texts [rows].
        first: for each row [rows], the first row with the same text; its own number if there is none before it.
        has_before: for each row [rows], whether `before` returns a row.
        alone: for each row [rows], whether there is neither such a row nor one before it with the same text.
        unproposed: pairs that share a band and were not proposed, because more than WINDOW rows share it.
    """

    def __init__(self, sketches: NDArray[np.uint8], keys: NDArray[np.uint64], order: NDArray[np.int64]):
        self.keys = keys[order]
        self.first = first_equal(self.keys)
        self.unproposed = 0
        is_first = self.first == np.arange(len(order))
        unique = np.flatnonzero(is_first)
        pairs = self._propose(sketches, order[unique], unique)
        pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
        self._earlier = pairs[:, 0]
        self._starts = np.searchsorted(pairs[:, 1], np.arange(len(order) + 1))
        self.has_before = np.diff(self._starts) > 0
        self.alone = is_first & ~self.has_before

    def before(self, row: int) -> list[int]:
        """Return the rows before this one that may be near it, in ascending order, without rows of equal texts."""
        found: list[int] = self._earlier[self._starts[row] : self._starts[row + 1]].tolist()
        return found

    def _propose(self, sketches: NDArray[np.uint8], of: NDArray[np.int64], rows: NDArray[np.int64]) -> np.ndarray:
        """Return pairs of row numbers [pairs, 2], the smaller one first. The sketch of rows[n] is sketches[of[n]]."""
        found = np.empty(0, np.int64)
        for start in range(0, HASHES, BAND):
            packed = [found]
            begin = min(start, HASHES - 8)  # 8 bytes are read, of which BAND are the band's
            words = sketches[:, begin : begin + 8].view("<u8")[:, 0][of]
            words >>= np.uint64(8 * (start - begin))
            words <<= np.uint64(64 - 8 * BAND)
            for first, second in self._in_bands(words):
                for at in range(0, len(first), _CHUNK):
                    a, b = first[at : at + _CHUNK], second[at : at + _CHUNK]
                    near = np.count_nonzero(sketches[of[a]] == sketches[of[b]], axis=1) >= MIN_EQUAL
                    packed.append(a[near] * len(rows) + b[near])
            found = np.sort(np.concatenate(packed))  # np.unique would hash first, which takes longer
            found = found[np.diff(found, prepend=-1) > 0]
        first, second = np.divmod(found, max(len(rows), 1))
        return np.stack((rows[first], rows[second]), axis=1)

    def _in_bands(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs of positions whose keys are equal, at most WINDOW for each position."""
        order, ordered = _with_equal(keys)
        for distance in range(1, WINDOW + 1):
            equal = ordered[distance:] == ordered[:-distance]
            if not equal.any():
                return
            yield order[:-distance][equal], order[distance:][equal]
        counts = np.unique(ordered, return_counts=True)[1]
        left = np.maximum(counts - WINDOW - 1, 0)
        self.unproposed += int((left * (left + 1) // 2).sum())


class Comparison:
    """Compare rows by the exact Jaccard index of their 5-grams.

    Args:
        keys: of the texts [rows].
        compared: pairs of texts that were compared before.
    """

    def __init__(
        self,
        text_of: Callable[[int], str],
        keys: Sequence[int] | NDArray[np.uint64] = (),
        compared: Compared | None = None,
    ):
        self._grams = lru_cache(maxsize=64)(lambda row: grams(text_of(row)))
        self._keys, self._compared = keys, compared

    def index(self, row: int, other: int) -> float:
        """Return the Jaccard index of two rows."""
        return jaccard(self._grams(row), self._grams(other))

    def is_near(self, row: int, other: int) -> bool:
        """Tell whether two rows are near-duplicates."""
        if self._compared is None:
            return self.index(row, other) >= THRESHOLD
        keys = sorted((int(self._keys[row]), int(self._keys[other])))
        return self._compared.result(keys, lambda: self.index(row, other) >= THRESHOLD)


class Compared:
    """Pairs of texts that were compared, and whether they are near-duplicates. A cache keeps them for the next check.

    Args:
        cache: of the stage; None keeps nothing.
    """

    def __init__(self, cache: ChunkCache | None, of_job: bytes):
        self._cache, self._entry = cache, sha256(b"compared" + of_job).hexdigest()
        content = b"" if cache is None else cache.read(self._entry) or b""
        values = (int.from_bytes(content[begin : begin + _SIZE]) for begin in range(0, len(content), _SIZE))
        self._known = {value >> 1: bool(value & 1) for value in values}
        self._used: dict[int, bool] = {}

    def result(self, keys: Sequence[int], compare: Callable[[], bool]) -> bool:
        """Return what `compare` returns for the texts with these two keys."""
        pair = keys[0] << 64 | keys[1]
        found = self._known.get(pair)
        if found is None:
            found = compare()
        if self._cache is not None and len(self._used) < _MAX_KEPT:
            self._used[pair] = found
        return found

    def keep(self) -> None:
        """Write the pairs that were used into the cache."""
        if self._cache is not None and self._used.keys() != self._known.keys():
            values = ((pair << 1 | found).to_bytes(_SIZE) for pair, found in self._used.items())
            self._cache.write(self._entry, b"".join(values))


GRAM = 5  # characters
HASHES = 80  # MinHash values of a text; a byte of each is kept
_SKETCH = np.dtype([("sketch", np.uint8, HASHES), ("key", np.uint64)])
_SEED = 1
# Of texts that are sketched together: their arrays stay in a core's cache, which is twice as fast as 1,000,000.
_BATCH_CHARACTERS = 12_000
# Odd numbers with mixed bits (from the golden ratio and from MurmurHash3): a gram's hash only decides what is proposed.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


def comparable_text(messages: Chat) -> str:
    """Return a chat's text without differences of case, white space and Unicode form, and without its system message.

    Datasets often have one long system message for all rows, which would make all rows similar.
    """
    parts: list[str] = []
    for message in messages:
        if message["role"] != "system":
            parts.append(message["content"] or "")
            others = {k: v for k, v in without_call_ids(message).items() if k not in ("role", "content", "tools")}
            if others:  # such as tool calls; the tools themselves are often the same in all rows
                parts.append(to_json(others))
    return normalize(" ".join(parts))


def candidates_of(texts: Sequence[str]) -> Candidates:
    """Return the pairs of texts that are worth comparing."""
    keys = np.fromiter(map(text_key, texts), np.uint64, len(texts))
    return Candidates(sketch(texts), keys, np.arange(len(texts)))


def grams(text: str) -> set[str]:
    """Return the 5-grams of a text. A shorter text is its own gram."""
    return {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}


def jaccard(first: set[str], second: set[str]) -> float:
    """Return the Jaccard index of two sets: the share of their union that is in both."""
    both = len(first & second)
    return both / (len(first) + len(second) - both)


def sketch(texts: Sequence[str]) -> np.ndarray:
    """Return the low byte of each MinHash value [texts, HASHES]. The share of equal bytes estimates the Jaccard index.

    Raises:
        MissingExtra: rensa is not installed.
    """
    parts = [np.empty((0, HASHES), np.uint8)]
    begin = characters = 0
    for end, text in enumerate(texts, 1):
        characters += max(len(text), GRAM)
        if characters >= _BATCH_CHARACTERS or end == len(texts):
            parts.append(_sketch(texts[begin:end]))
            begin, characters = end, 0
    return np.concatenate(parts)


def _sketch(texts: Sequence[str]) -> np.ndarray:
    hashes, offsets = _hashed_grams(texts)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, HASHES, _SEED)
    # An array of each row takes a fifth of the time of one numpy array of the lists.
    values = b"".join([array("I", row).tobytes() for row in matrix.to_rows()])
    return np.frombuffer(values, np.uint32).astype(np.uint8).reshape(-1, HASHES)


def _hashed_grams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each 5-gram of all texts, and where each text's hashes begin."""
    padded = [text if len(text) >= GRAM else text.ljust(GRAM, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    ends = np.cumsum(lengths)
    inside = np.ones(len(codes), bool)
    for back in range(1, GRAM):  # grams that would reach into the next text
        inside[ends - back] = False
    size = len(codes) - GRAM + 1
    hashes = codes[:size].copy()
    for offset in range(1, GRAM):
        hashes *= _FACTOR
        hashes += codes[offset : offset + size]
    hashes = hashes[inside[:size]]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    return hashes, np.concatenate(([0], np.cumsum(lengths - GRAM + 1))).astype(np.uint64)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise MissingExtra(
            "The search for near-duplicates needs the package rensa.",
            where="data.near_duplicates",
            got=str(error),
            next_step="`pip install rensa`, or set data.near_duplicates: off",
        ) from error
    return rensa


def _with_equal(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the positions whose key is that of another position, ordered by key and position; and their keys.

    Args:
        keys: of which the highest 40 bits count [rows].
    """
    # Numbers of a key and a position are sorted several times as fast as positions by keys. Beyond 2**24 rows, fewer
    # bits count.
    bits = np.uint64(max(24, len(keys).bit_length()))
    numbers = keys >> bits
    numbers <<= bits
    numbers |= np.arange(len(keys), dtype=np.uint64)
    numbers.sort()
    same = (numbers[1:] ^ numbers[:-1]) >> bits == 0
    shared = np.zeros(len(numbers), bool)
    shared[1:] |= same
    shared[:-1] |= same
    ordered = numbers[shared] >> bits
    return (numbers[shared] ^ ordered << bits).astype(np.int64), ordered


def first_equal(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each position [rows] the first one with the same key: its own number if there is none before it."""
    first = np.arange(len(keys))
    some, _ = _with_equal(keys * _FACTOR)
    _, index, inverse = np.unique(keys[some], return_index=True, return_inverse=True)
    first[some] = some[index[inverse]]
    return first


def is_repeated(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell for each position [rows] whether another one has its key."""
    first = first_equal(keys)
    found: NDArray[np.bool_] = first != np.arange(len(keys))
    found[first[found]] = True
    return found
