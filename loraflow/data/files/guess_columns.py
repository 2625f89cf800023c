"""Guess what `data.columns` of a recipe should be for a file whose columns have other names."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pydantic import JsonValue

from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.answers.preference_pairs import refuse_corrected
from loraflow.data.cell_values import objects_of
from loraflow.data.chats import BadRow
from loraflow.data.files.readers import read_values
from loraflow.data.formats.chat_formats import has_known_keys, is_bare_chat, read_chat
from loraflow.data.formats.published_formats import are_messages, is_history, pair_keys
from loraflow.data.formats.question_parts import LostPart, is_passage, is_phrase, question_parts

# usual names of (question, answer), in lower case
_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("problem", "solution"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("inputs", "targets"),  # FLAN, Aya, xP3
    ("inputs_pretokenized", "targets_pretokenized"),  # P3
    ("input", "target"),
    ("input_text", "target_text"),
    ("input_text", "output_text"),
    ("text_input", "output"),
    ("problem", "generated_solution"),
    ("question", "generated_solution"),
    ("document", "summary"),
    ("article", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
# Of rows without a column of turns, which these may only describe
_OTHER_PAIRS = (
    ("input", "expected_output"),
    ("input", "ideal"),  # OpenAI's evals
    ("question", "solution"),
    ("problem", "answer"),
    ("instruction", "generation"),  # distilabel
    ("message_1", "message_2"),  # Camel
    ("q", "a"),
    ("context", "response"),  # messages in HelpSteer3
    ("content", "summary"),
)
# Names that say something else without another column of text or of classes
_ALONE = frozenset({("context", "response"), ("content", "summary")})
# Names of columns that are never a part of a question, a class or another answer
_METADATA = re.compile(
    r"(?:.*[_-])?id|idx|index|system|system_prompt|feedback|domain|language|lang|source|split|url|date|license"
)

# Usual names of a text that a question is about, in lower case, and what such a text must be. The others of these columns
# hold ids, file names, categories or metadata.
_PASSAGES: Mapping[str, Callable[[str], bool]] = {
    **dict.fromkeys(("context", "passage", "paragraph", "document", "article", "story", "premise"), is_phrase),
    **dict.fromkeys(("contract", "clause", "transcript", "dialogue", "background", "facts", "body"), is_passage),
    "input": bool,  # Alpaca's
}
# What is to be done with a question or text, and what it must be
_TASKS: Mapping[str, Callable[[str], bool]] = {"instruction": bool, "definition": is_passage}
FIRST_ROWS = 50  # that a guess is tested on
# usual names of (text, class) in sets for classification
_TEXTS = (
    "text",
    "sentence",
    "utterance",
    "message",
    "body",
    "content",
    "document",
    "review",
    "ticket",
    "query",
    "comment",
)
_CLASSES = ("category", "label", "class", "intent", "topic", "sentiment", "label_text", "target", "department")
# Names of a list of pairs that are one chat, not examples of a task
_CHAT_NAMES = re.compile(r"conversation|dialog|chat|messages|turns", re.IGNORECASE)
# Names of one of several chats about the same prompt: the better, the worse, those of two models
_COMPARED = re.compile(r"chosen|reject|prefer|winn|loser|\b(good|bad|positive|negative)\b|[-_. ](a|b|w|l|[1-9])$")
# Names of a question or an answer that follows earlier turns
_LATER = re.compile(
    r"(?!system|commit)(?:.*_)?(?:response|answer|output|completion|reply|question|query|message|text|input|prompt)"
)
# Names of an answer's derivation, whose result is the `answer`
_DERIVATIONS = re.compile(r"solution|generation|explanation|rationale|reasoning|thought|response")
_LONG = 3  # words of a text that is no name or category
MAX_CLASS = 60  # characters of the name of a class


def is_classification(columns: dict[str, str]) -> bool:
    """Tell whether columns are the text and the class of a set for classification, by their names."""
    answer = columns.get("completion", "").lower()
    return columns.get("prompt", "").lower() in _TEXTS and answer in _CLASSES


def columns_of(path: Path, name: str) -> dict[str, str]:
    """Guess `data.columns` from a file's first rows; empty if its first row is a chat as it is.

    Raises:
        BadData: the file cannot be read.
    """
    rows = [value for _, value, _ in islice(read_values(path, name), FIRST_ROWS)]
    if not rows or not isinstance(rows[0], dict):
        return {}
    try:
        read_chat(rows[0])
    except LostPart:
        columns = guess_columns(rows[0], rows[1:])
        return columns if _reads_the_lost_part(columns, rows) else {}
    except BadRow:
        columns = {} if has_known_keys(rows[0]) else guess_columns(rows[0], rows[1:])
        return columns if any(_is_read(_concerned(row, columns), columns, LostPart) for row in rows) else {}
    return {}


def _reads_the_lost_part(columns: dict[str, str], rows: Sequence[JsonValue | BadRow]) -> bool:
    """Tell whether columns add a passage to most prompts, and whether no row lacks one of the columns."""
    if columns.get("instruction") not in ("prompt", "instruction"):
        return False
    objects = [row for row in rows if isinstance(row, dict)]
    if not all(row.keys() >= set(columns.values()) for row in objects):
        return False
    beside = [columns["input"]] if "input" in columns else ["input", "context"]
    passages = sum(any(isinstance(text := row.get(key), str) and is_passage(text) for key in beside) for row in objects)
    return 2 * passages > len(objects) and _is_read(rows[0], columns)


def _concerned(row: JsonValue | BadRow, columns: dict[str, str]) -> JsonValue | BadRow:
    """Return a row without the keys that a guess does not concern: marks are judged by the whole file."""
    if not isinstance(row, dict):
        return row
    return {key: value for key, value in row.items() if key in columns.values() or key in ("input", "context")}


def _is_read(row: JsonValue | BadRow, columns: dict[str, str], but: type[BadRow] = MarkedFalse) -> bool:
    """Tell whether a row is read with columns, left out by its marks, or refused for a reason of the type `but`."""
    if isinstance(row, BadRow):
        return False
    try:
        read_chat(row, "auto", columns)
    except BadRow as problem:
        return isinstance(problem, MarkedFalse | but)
    return True


def guess_columns(row: JsonValue, others: Sequence[JsonValue | BadRow] = ()) -> dict[str, str]:
    """Guess `data.columns` from a row: {loraflow's column: the row's column}; empty if no guess fits.

    The answer of a recipe's columns is taken as it is. So nothing is guessed beside an answer that was corrected.

    Args:
        others: the rows that follow. A passage must be one in most rows that have the column.
    """
    if not isinstance(row, dict):
        return {}
    columns = _columns_of(row, [row, *(other for other in others if isinstance(other, dict))])
    answer = row.get(columns.get("output", columns.get("completion", "")))
    try:
        if isinstance(answer, str):
            refuse_corrected(row, [{"role": "assistant", "content": answer}], {})
    except BadRow:
        return {}
    return columns


def _columns_of(row: dict[str, JsonValue], rows: Sequence[dict[str, JsonValue]]) -> dict[str, str]:
    names = {name.lower(): name for name in row}
    # An answer without the parts of its question cannot be learned; a chat has them in its messages.
    if not all(_is_question(part, names, rows) for part in question_parts(row)):
        return _column_of_turns(row)
    found = _columns_of_pair(_PAIRS, row, names, rows)
    if found is None:
        found = _column_of_turns(row) or _columns_of_pair(_OTHER_PAIRS, row, names, rows)
    return _columns_of_classes(names, rows) if found is None else found


def _columns_of_pair(
    pairs: Sequence[tuple[str, str]],
    row: dict[str, JsonValue],
    names: dict[str, str],
    rows: Sequence[dict[str, JsonValue]],
) -> dict[str, str] | None:
    """Return the columns of the first pair that a row has; empty if its answer is unclear, None without a pair."""
    for question, answer in pairs:
        asked, answered = names.get(question), names.get(answer)
        is_question = asked is not None and (isinstance(row[asked], str) or is_bare_chat(row[asked]))
        if asked and answered and is_question and isinstance(row[answered], str):
            if pairs is _OTHER_PAIRS and _is_a_part(names, asked, answered, rows):
                continue
            if (question, answer) in _ALONE and not _are_alone(asked, answered, rows):
                continue
            answered = _worked_answer(row, names, answered)
            if answered is None:
                return {}
            columns = _question_and_answer(names, asked, answered, rows)
            system = names.get("system", names.get("system_prompt", "system"))
            is_spelt = system in ("system", "system_prompt")  # not as System
            return columns if is_spelt or not isinstance(row[system], str) else {**columns, "system": system}
    return None


def _are_alone(asked: str, answered: str, rows: Sequence[dict[str, JsonValue]]) -> bool:
    """Tell whether no column beside a question and an answer has texts, lists, objects or classes; metadata may."""
    return not any(
        key.lower() in _CLASSES or isinstance(value, str | list | dict)
        for row in rows
        for key, value in row.items()
        if key not in (asked, answered) and not _METADATA.fullmatch(key.lower())
    )


def _is_question(part: str, names: dict[str, str], rows: Sequence[dict[str, JsonValue]]) -> bool:
    """Tell whether messages in `context` are the question of a `response`, as no other column has one."""
    answered = names.get("response")
    is_pair = part.lower() == "context" and answered is not None and is_bare_chat(rows[0][part])
    return is_pair and _are_alone(part, str(answered), rows)


def _is_a_part(names: dict[str, str], asked: str, answered: str, rows: Sequence[dict[str, JsonValue]]) -> bool:
    """Tell whether a column is only a part of the answer: the choice `a` of a quiz, or a result beside its derivation."""
    if answered.lower() != "answer":
        return (answered.lower() == "a" and "b" in names) or "message_3" in names
    return any(
        len(text) > len(str(row.get(answered))) and (len(text.split()) > _LONG or _DERIVATIONS.search(key.lower()))
        for row in rows
        for key, value in row.items()
        if key not in (asked, answered)
        for text in map(str, value if isinstance(value, list) else [value])
    )


def _worked_answer(row: dict[str, JsonValue], names: dict[str, str], answered: str) -> str | None:
    """Return the column of the answer: `solution`, if `answer` is only its result. None if they are different answers."""
    solution, result = names.get("solution"), row[answered]
    if answered.lower() != "answer" or solution is None or not isinstance(worked := row[solution], str):
        return answered
    return solution if isinstance(result, str) and result.strip() in worked else None


def _question_and_answer(
    names: dict[str, str], asked: str, answered: str, rows: Sequence[dict[str, JsonValue]]
) -> dict[str, str]:
    """Return the columns of a question and its answer. A task or context beside it is a part of the prompt: Alpaca's."""
    task = _first(_TASKS, names, rows, but=(answered,))
    if task is not None and task != asked:
        return {"instruction": task, "input": asked, "output": answered}
    beside = _first(_PASSAGES, names, rows, but=(asked, answered))
    if beside is None and asked.lower() != "instruction":
        return {"prompt": asked, "completion": answered}
    columns = {"instruction": asked, "output": answered}
    is_clear = beside in (None, "context", "input") and not names.keys() >= {"context", "input"}
    return columns if beside is None or is_clear else {**columns, "input": beside}


def _first(
    kinds: Mapping[str, Callable[[str], bool]],
    names: dict[str, str],
    rows: Sequence[dict[str, JsonValue]],
    but: tuple[str, ...],
) -> str | None:
    """Return the first column of a kind whose texts are of that kind in most rows that have a value; None without."""
    for name, is_kind in kinds.items():
        column = names.get(name)
        if column is None or column in but:
            continue
        if is_kind is bool:
            return column
        texts = [text for row in rows if isinstance(text := row.get(column), str) and text.strip()]
        if texts and 2 * sum(map(is_kind, texts)) > len(texts):
            return column
    return None


def _columns_of_classes(names: dict[str, str], rows: Sequence[dict[str, JsonValue]]) -> dict[str, str]:
    row = rows[0]
    if are_messages(rows):
        return {}
    texts = [names[name] for name in _TEXTS if name in names and isinstance(row[names[name]], str)]
    classes = [names[name] for name in _CLASSES if name in names and isinstance(row[names[name]], str)]
    if len(texts) != 1 or len(classes) != 1 or len(str(row[classes[0]])) > MAX_CLASS:
        return {}
    return {"prompt": texts[0], "completion": classes[0]}


def _column_of_turns(row: dict[str, JsonValue]) -> dict[str, str]:
    """Return the column that holds a valid list of turns. Preference pairs, and chats to compare, are left to the user."""
    found: dict[str, str] = {}  # column of the row → loraflow's
    for name, value in row.items():
        turns = [dict(turn) for turn in objects_of(value)] if isinstance(value, list | str) else []
        is_cell = isinstance(value, str)  # it may be a history
        is_beside = (is_cell or is_history(name)) and any(
            isinstance(text, str) and (_LATER.fullmatch(key.lower()) or (is_cell and is_phrase(text)))
            for key, text in row.items()
            if key != name
        )
        if not turns or is_beside or _COMPARED.search(name.lower()):
            continue
        if _CHAT_NAMES.search(name) or not any(map(pair_keys, turns)):
            keys = {key for turn in turns for key in turn}
            column = "conversations" if "from" in keys and "role" not in keys else "messages"
            found |= {name: column} if _is_read({column: value}, {}) else {}
    return {column: name for name, column in found.items()} if len(found) == 1 else {}
