"""Find text that was damaged on its way: UTF-8 that was read as Windows-1252 or Latin-1, U+FFFD, lone surrogates.

Also control tokens of common chat templates, which do not belong into a message's text, and the script of a text.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache


def _misread(first: int, last: int) -> str:
    """Return what the bytes of a range look like in Windows-1252, and in Latin-1, for a set in an expression."""
    found = {chr(byte) for byte in range(first, last + 1)}
    found |= {bytes([byte]).decode("cp1252", "ignore") for byte in range(first, last + 1)}
    return "".join(map(re.escape, sorted(found - {""})))


_NEXT = f"[{_misread(0x80, 0xBF)}]"  # of a byte that goes on a character
_QUOTES = "‘’“”–—…‹›«»"  # these may also close a word, as in 'ÃO' in quotes
_PLAIN = f"(?:(?![{_QUOTES}]){_NEXT})"
_MOJIBAKE = re.compile(
    rf"Ã{_PLAIN}|[ÃÄÅ]{_NEXT}(?=[a-zà-ÿ])|Â[\xa0-\xbf](?!\w{{2}}\b)|(?:[ÎÏÐÑØÙ×ÄÅ]{_NEXT}){{2,}}"
    rf"|â(?:€|‚|„|†|ˆ|‰|[\x80-\x9f]){_NEXT}|ð(?:Ÿ|\x9f){_NEXT}{{2}}|(?:[à-ï]{_NEXT}{{2}}){{2,}}"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(
    r"<\|[A-Za-z][\w.-]{0,40}\|>|<｜[^｜\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
_MIN_LETTERS = 10  # fewer say nothing about the script of an answer
_JOINED = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK"}  # Japanese mixes them


def broken_text(text: str) -> str | None:
    """Return how a text is damaged; None if it is not."""
    if text.isascii():
        return None
    if "\ufffd" in text:
        return f"U+FFFD in {_around(text, text.index(chr(0xFFFD)))}"
    if found := _SURROGATE.search(text):
        return f"a lone surrogate, U+{ord(found[0]):04X}"
    if found := _MOJIBAKE.search(text):
        return f"UTF-8 read as another encoding: {_around(text, found.start())}"
    return None


def control_token(text: str) -> str | None:
    """Return a control token of a common chat template that a text contains; None if there is none."""
    if found := _CONTROL.search(text):
        return found[0]
    if text.count("<s>") != text.count("</s>"):  # in pairs they are HTML
        return "<s>" if "<s>" in text else "</s>"
    return None


def script(text: str, min_letters: int = _MIN_LETTERS) -> str | None:
    """Return the script of most letters of a text, such as Latin, Cyrillic or CJK; None if it has fewer letters.

    It is the first word of the letters' Unicode names. Japanese is CJK, and full-width letters are what they stand for.
    """
    counts = Counter(_script_of(character) for character in text[:2000] if character.isalpha())
    if counts.total() < min_letters:
        return None
    name = min(counts, key=lambda script: (-counts[script], script))
    return name if name == "CJK" else name.capitalize()


@lru_cache(10_000)
def _script_of(character: str) -> str:
    name = re.split("[ -]", unicodedata.name(unicodedata.normalize("NFKC", character)[0], "unknown"))[0]
    return _JOINED.get(name, name)


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 12) : at + 20])


def has_carriage_return(texts: Iterable[str]) -> bool:
    """Tell whether a text has a carriage return, as texts from Windows have at the end of each line."""
    return any("\r" in text for text in texts)
