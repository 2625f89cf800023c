"""Make broken files from good ones, the same ones for the same seed."""

from __future__ import annotations

import random

# What parsers stumble over: nesting, sizes, names that lead elsewhere, half characters, numbers at limits.
TOKENS = [
    b"[" * 20_000, b'{"a":' * 5000, b"- " * 2000, b"{a: " * 500, b"..", b"../", b"/", b"\\", b"\0", b"\r\n", b"\n", b'"', b"'", b",", b";", b":", b"\t",
    b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"null", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 5000, b"true",
    b"{}", b"[]", b"[[]]", b'""', b"&a", b"*a", b"<<: ", b"!!python/object:x", b"? ", b"| ", b"%s", b"18446744073709551615", b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\xff" * 8, b"\0" * 8, b"sep=", b"messages", b"role", b"content", b"md5", b"relpath", b".git", b"://",
]  # fmt: skip
MAX_BYTES = 400_000


def mutated(corpus: list[bytes], chance: random.Random) -> bytes:
    """Return a file of the corpus after one to four random changes."""
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.randint(1, 4)):
        _CHANGES[chance.randrange(len(_CHANGES))](data, corpus, chance)
    return bytes(data[:MAX_BYTES])


def _at(data: bytearray, chance: random.Random) -> int:
    return chance.randint(0, len(data))


def _flip(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    token, at = chance.choice(TOKENS), _at(data, chance)
    data[at : at + len(token)] = token


def _insert(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    at = _at(data, chance)
    data[at:at] = chance.choice(TOKENS)


def _truncate(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    del data[_at(data, chance) :]


def _delete(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    at = _at(data, chance)
    del data[at : at + chance.randint(1, 40)]


def _repeat(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    at = _at(data, chance)
    data[at:at] = data[at : at + chance.randint(1, 60)] * chance.choice((1, 2, 50))


def _splice(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    other = chance.choice(corpus)
    data[_at(data, chance) :] = other[chance.randint(0, len(other)) :]


def _replace_value(data: bytearray, corpus: list[bytes], chance: random.Random) -> None:
    """Put another value between two delimiters, so that the syntax often stays valid."""
    marks = [at for at, byte in enumerate(data) if byte in b':,[]{}"\n']
    if len(marks) > 1:
        which = chance.randrange(len(marks) - 1)
        data[marks[which] + 1 : marks[which + 1]] = chance.choice(TOKENS[14:])


_CHANGES = (_flip, _overwrite, _insert, _truncate, _delete, _repeat, _splice, _replace_value)
