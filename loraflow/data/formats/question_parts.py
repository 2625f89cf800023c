"""Parts of a question that no column of a chat can name, such as the choices of a quiz.

Without them, the answer cannot be known.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.answers.labels import plain
from loraflow.data.cell_values import is_missing
from loraflow.data.chats import BadRow, Message

# Of these, a text is a part as well; an object must have texts, because `options` may be settings.
_CHOICES = frozenset({"choices", "options", "candidates", "endings"})
_PARTS = frozenset({
    "documents", "context", "contexts", "passages", "paragraphs", "table", "image", "images", "audio", "video", "schema",
})  # fmt: skip
# Usual names of a text that a question is about, or of the question itself beside a rendered prompt.
_TEXT_PARTS = (
    "context", "input", "passage", "paragraph", "document", "article", "story", "premise", "question", "query", "problem",
    "definition", "hypothesis", "transcript", "dialogue", "contract", "clause", "background", "facts", "schema", "table",
)  # fmt: skip
_TEXT_OR_LISTED = frozenset({*_TEXT_PARTS, "contexts", "documents", "passages", "paragraphs"})
_RETRIEVED = re.compile(r"retrieved_(?:context|doc|document|passage|chunk|text|paragraph)s?")
_QUESTIONS = frozenset({"question", "query", "problem", "hypothesis"})  # a prompt may say the same in other words
# Shares of a part's words that are in the prompt, from which on the prompt has the part.
_SHARE = 0.5
_SHARE_OF_QUESTIONS = 0.2
MIN_WORDS = 8  # of a passage
# Characters of a passage that is a single sentence; one without spaces between words counts three times.
MIN_LENGTH = 80
_MAX_LOOKED_AT = 4000  # characters of a text that are looked at to tell whether it is a passage
_WORDS = re.compile(r"\w{4,}")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese
_FILE = re.compile(r"\w\.[A-Za-z]\w{1,4}$|\w\.\w+\.\w")  # report.pdf, www.x.y
_PUNCTUATION = ".,;:!?()[]{}<>|'\"“”‘’«»*#。，、！？"
_CLOSING = "'\"”’»)]"
_STOPS = (".", "!", "?", "…", "।", "؟")
_WIDE_STOPS = re.compile(r"[。！？]")
_LETTERS = frozenset("abcd")
_CHOICE = re.compile(r"op[a-d]|options?_?[a-e1-5]|choices?_?[a-e1-5]|ending_?[0-4]")

_LABEL = re.compile(r"\(?(?:[A-Ha-h]|[0-9])[.)]*")
_QUOTED = re.compile(r"""(?<=['"])[^'"]+(?=['"])""")
_NUMBERING = re.compile(r"^\s*\(?(?:[A-Ha-h]|[0-9])[.):]\s*")


class LostPart(BadRow):
    """A row whose question has a part that is not in its prompt."""


def question_parts(row: Mapping[str, JsonValue]) -> list[str]:
    """Return the keys of a row that hold parts of its question beside the question itself."""
    names = {str(key).lower(): str(key) for key in row}
    found = [
        key
        for name, key in names.items()
        if (
            _is_choices(row[key])
            if name in _CHOICES
            else name in _PARTS and row[key] and isinstance(row[key], dict | list)
        )
    ]
    single = [key for name, key in names.items() if _CHOICE.fullmatch(name) and _is_text(row[key])]
    if len(single) > 1:
        found += single
    if names.keys() >= _LETTERS:
        found += [names[name] for name in sorted(_LETTERS)]
    return found


def refuse_answers_by_letter(row: Mapping[str, JsonValue], messages: list[Message], read: Collection[str]) -> None:
    """Refuse a row whose answer is the letter or number of a choice, if its question names no choice.

    Raises:
        BadRow: it is. What would be learned is a guess.
    """
    answer = messages[-1]["content"].strip()
    if not _LABEL.fullmatch(answer):
        return
    keys = [key for key in question_parts(row) if key not in read and key.lower() not in _PARTS]
    choices = {plain(text) for key in keys for text in _texts_of(row[key])} - {""}
    asked = plain(" ".join(message["content"] for message in messages[:-1]))
    if len(choices) > 1 and plain(answer) not in choices and not any(choice in asked for choice in choices):
        raise BadRow(
            f"the answer {answer!r} is the label of a choice, and {keys[0]} is not read: write a prompt that has "
            f"the choices, or name {keys[0]} in data.ignore"
        )


def refuse_lost_parts(
    row: Mapping[str, JsonValue], messages: list[Message], used: Mapping[str, str], columns: Mapping[str, str]
) -> None:
    """Refuse a row whose question has a part that is neither read nor written in the prompt, such as the text `context`.

    Only passages are such parts. Ids, file names, categories and short texts beside a prompt are metadata.

    Args:
        used: the keys that were read: loraflow's name → the row's column. Chats of messages have their parts.

    Raises:
        LostPart: it has. The answer would be learned without it.
    """
    question = next((key for key in ("prompt", "instruction") if key in used), None)
    answer = next((key for key in ("completion", "output", "response") if key in used), None)
    if question is None or answer is None:
        return
    named = {column for key, column in columns.items() if key in ("input", "context")}
    keys = [
        key
        for key in row
        if (key.lower() in _TEXT_OR_LISTED or _RETRIEVED.fullmatch(key.lower()) or key in named)
        and key not in used.values()
    ]
    asked: _Asked | None = None
    for key in keys:
        texts = _plain_texts(row[key])
        parts = [
            text for text in texts if (text.strip() and not is_missing(text) if key in named else is_passage(text))
        ]
        if not parts:
            continue
        asked = asked or _Asked(messages)
        share = _SHARE_OF_QUESTIONS if key.lower() in _QUESTIONS else _SHARE
        if not any(asked.has(part, share) for part in parts):
            raise LostPart(
                f"{key} has a text that the prompt lacks: {_way_out(key, row, (question, answer), used, columns)}"
            )


class _Asked:
    """The texts before a row's last answer, in which the parts of its question are looked for."""

    def __init__(self, messages: list[Message]):
        self._text = plain(" ".join(message["content"] for message in messages[:-1]))
        self._words = set(_WORDS.findall(self._text))
        self._answer = plain(messages[-1]["content"])

    def has(self, part: str, share: float) -> bool:
        """Tell whether a part is written there, literally or with at least a share of its words; or is the answer itself."""
        text = plain(part)
        words = set(_WORDS.findall(text))
        is_similar = bool(words) and len(words & self._words) >= share * len(words)
        return is_similar or text in self._text or text == self._answer


def _way_out(
    key: str, row: Mapping[str, JsonValue], pair: tuple[str, str], used: Mapping[str, str], columns: Mapping[str, str]
) -> str:
    if (name := next((name for name, column in columns.items() if column == key), None)) is not None:
        return f"in data.columns, {name} goes with instruction and output, not with {pair[0]} and {pair[1]}"
    way = "write it there"
    are_texts = isinstance(row[key], str) and isinstance(row[used[pair[0]]], str)
    if are_texts and "input" not in used and (key == "input" or "input" not in row):
        way = f"set data.columns: {{instruction: {used[pair[0]]}, input: {key}, output: {used[pair[1]]}}}"
    return f"{way}, or name {key} in data.ignore if no answer needs it"


def is_passage(text: str) -> bool:
    """Tell whether a text is a passage: several words in sentences or of some length; no id, name, path, or list of tags."""
    if len(text) < 2 * MIN_WORDS:
        return False
    shape = _shape(text)
    is_long = len(text.strip()) + 2 * shape.wide >= MIN_LENGTH or shape.sentences >= 2
    return shape.words >= MIN_WORDS and is_long and 2 * shape.words >= shape.tokens and not shape.is_listed


def is_phrase(text: str) -> bool:
    """Tell whether a text has more than a name: at least two words, and in a short text no path, URL or file name."""
    shape = _shape(text)
    is_name = shape.has_path and shape.words < MIN_WORDS
    return shape.words >= 2 and 2 * shape.words >= shape.tokens and not is_name


class _Shape(NamedTuple):
    words: int  # tokens that are words, without ids, numbers and paths
    tokens: int
    sentences: int
    wide: int  # characters of languages that are written without spaces
    is_listed: bool  # most words are followed by a comma, as tags are
    has_path: bool


def _shape(text: str) -> _Shape:
    tokens = text[:_MAX_LOOKED_AT].split()
    words = sentences = wide = listed = paths = 0
    for token in tokens:
        core = token.strip(_PUNCTUATION)
        has_slashes = core.startswith("/") or core.count("/") > 1 or "\\" in core  # not his/her
        is_path = has_slashes or "@" in core or _FILE.search(core) is not None
        paths += is_path
        if is_path or not any(sign.isalpha() for sign in core):
            continue
        if unspaced := len(_UNSPACED.findall(core)):
            wide += unspaced
            words += max(1, unspaced // 2)
        elif not any(sign.isdigit() for sign in core):
            words += 1
        listed += token[-1] in ",;|"
        sentences += max(token.rstrip(_CLOSING)[-1:] in _STOPS, len(_WIDE_STOPS.findall(token)))
    return _Shape(words, len(tokens), sentences, wide, not wide and listed > 0.6 * len(tokens), bool(paths))


def _plain_texts(value: JsonValue) -> Iterator[str]:
    """Yield the texts in a value, without recursion: rows may be nested deeply."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict | list):
            pending += item.values() if isinstance(item, dict) else item
        elif isinstance(item, str):
            yield item


def _texts_of(value: JsonValue) -> Iterable[str]:
    """Yield the texts of choices: of a list, of an object, or the parts of a text such as "['w', 'x']"."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(item)
    elif isinstance(value, str):
        texts = _QUOTED.findall(value) if value.lstrip().startswith(("[", "{")) else value.splitlines()
        yield from (_NUMBERING.sub("", text).strip() for text in texts)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _is_choices(value: JsonValue) -> bool:
    """Tell whether a value is a text, a list, or an object of texts or lists: {"A": "w"}, {"text": [], "label": []}."""
    if isinstance(value, dict):
        return any(isinstance(item, list) or _is_text(item) for item in value.values())
    return _is_text(value) or (isinstance(value, list) and bool(value))


def _is_text(value: JsonValue) -> bool:
    return isinstance(value, str) and bool(value.strip())
