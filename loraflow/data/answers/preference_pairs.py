"""Preference pairs: which columns hold the two answers of a row, and rows whose answer is the worse one."""

import re
from collections.abc import Collection, Mapping
from functools import lru_cache, partial

from pydantic import JsonValue

from loraflow.data.answers.judgements import word_side
from loraflow.data.answers.labels import (
    ANSWERS,
    Labels,
    answers_of,
    as_number,
    is_absent,
    judges_badly,
    label_side,
    plain,
)
from loraflow.data.answers.mark_names import BAD_VERDICTS, CONTAINERS, normal_name
from loraflow.data.cell_values import is_missing
from loraflow.data.chats import BadRow, Message

# Two answers of a pair, or two judgements of one answer: better → worse.
_PAIRS = {
    "chosen": ("rejected", "reject"),
    "accept": ("reject",),
    "preferred": ("rejected", "dispreferred"),
    "accepted": ("rejected",),
    "good": ("bad",),
    "correct": ("incorrect", "wrong"),
}
# Columns with the worse answer, and the beginning of the name of the better one.
_WORSE = {
    "rejected": "chosen",
    "reject": "chosen",
    "rejected_response": "chosen",
    "rejected_answer": "chosen",
    "rejected_output": "chosen",
    "rejected_completion": "chosen",
    "rejected_messages": "chosen",
    "response_rejected": "response_chosen",
    "answer_rejected": "answer_chosen",
    "dispreferred": "preferred",
    "non_preferred_output": "preferred",
    "wrong_answer": "correct_answer",
    "incorrect_answer": "correct_answer",
    "bad_answer": "good_answer",
}


# A column with such a word that is read as the answer has the better answer of a pair.
_BETTER = frozenset(
    {"chosen", "preferred", "accepted", "good", "correct", "best", "better", "right", "winner", "winning"}
)
_CORRECTED = re.compile(
    r"(?:corrected|edited|revised|fixed|improved|rewritten|revision)_(?:answer|response|output|completion|reply|content)"
    r"|(?:answer|response|output|completion|reply|content)"
    r"_(?:(?P<flag>corrected|edited|revised|fixed|improved|rewritten)|correction)"
    r"|(?P<bare>corrected|correction|edited|revised|improved|rewritten)"
)
_UNCHANGED = re.compile(
    r"n/?a|lgtm|original|unchanged|not changed|same(?: as (?:above|answer|original))?|the answer is correct|already correct"
    r"|nothing to (?:correct|change)|(?:none|not|no (?:correction|change|edit|revision)s?) (?:needed|required|necessary)"
    r"|no (?:correction|change|edit)s?|(?:good |fine |ok |correct )?as is|looks (?:good(?: to me)?|fine|ok|okay)|good to me"
)
# as `plain` writes them
_DATE = re.compile(r"\d{4} \d\d? \d\d?(?:[ t][\d:.,+z ]*)?|\d\d?[./]\d\d?[./]\d{2,4}(?: [\d:]*)?")
_MARKS_OR_TEXTS = BAD_VERDICTS | {"dispreferred"}
# A pair of answers to a yes-or-no question; beside the answer yes, `rejected: False` is a mark.
_OPPOSITES = frozenset(
    frozenset(pair.split())
    for pair in ("yes no", "true false", "1 0", "y n", "t f", "on off", "right wrong", "correct incorrect", "good bad")
)


def answer_texts(
    values: Mapping[str, JsonValue], labels: Labels, columns: Collection[str], answers: Collection[str] = ()
) -> set[str]:
    """Return the keys of a row that are no marks, because their texts are the answers of a preference pair.

    Args:
        values: the row, without the columns that are read.
        columns: the columns that a recipe names as the answer, such as `chosen`; beside it, a text `rejected` is the other
            answer.

    Raises:
        BadRow: the keys may be answers or marks.
    """
    names = {normal_name(key): key for key in values if isinstance(key, str)}
    found: set[str] = set()
    is_better = any(not _BETTER.isdisjoint(normal_name(column).split("_")) for column in columns)
    for name in names.keys() & _MARKS_OR_TEXTS:
        worse = names[name]
        value = values[worse]
        if not isinstance(value, str):
            continue
        if is_better:
            found.add(worse)
            continue
        betters = [names[other] for other, worses in _PAIRS.items() if name in worses and other in names]
        better = next((key for key in betters if isinstance(values[key], str)), None)
        is_opposite = _is_opposite(value, answers)
        if not is_opposite and (better is None or not isinstance(label_side(value), bool)):
            continue
        is_answer = is_opposite or plain(value) in map(plain, answers)
        if not is_answer and not labels.some_row(("a pair", worse), partial(_is_pair, worse=worse)):
            continue
        is_pair = is_opposite and not labels.some_row(("no pair", worse), partial(_is_no_pair, worse=worse))
        if not is_pair and better is None:
            continue
        if not is_pair or not (better or columns):
            both = f"{better} {values[better]!r} and " if better else ""
            raise BadRow(
                f"{both}{worse} {value!r} may be another answer, or say whether the answer is right; set data.columns: "
                f"{{completion: {better or 'the column of the answer'}}} if it is an answer, else write it as true or false"
            )
        found |= {worse, better or worse}
    return found


def _is_opposite(value: str, answers: Collection[str]) -> bool:
    return any(frozenset((plain(value), plain(answer).rstrip(".!"))) in _OPPOSITES for answer in answers)


def _is_pair(row: dict[str, JsonValue], worse: str) -> bool:
    value = row.get(worse)
    return isinstance(value, str) and _is_opposite(value, tuple(answers_of(row)))


def _is_no_pair(row: dict[str, JsonValue], worse: str) -> bool:
    return not is_absent(row.get(worse)) and not _is_pair(row, worse)


def refuse_rejected(row: Mapping[str, JsonValue], messages: list[Message], read: Collection[str]) -> None:
    """Refuse a row whose answer is the rejected one of its preference pair.

    Args:
        read: columns that a recipe names as the answer: then it means what it says.

    Raises:
        BadRow: it is.
    """
    answer = messages[-1]["content"].strip()
    for key, value in row.items():
        name = normal_name(key) if isinstance(key, str) and key not in read else ""
        better = _WORSE.get(name)
        is_mark = name in BAD_VERDICTS and isinstance(label_side(value), bool)  # `rejected: no` beside the answer no
        if better is None or not answer or is_mark or not _is_text(value, answer):
            continue
        others = [other for key, other in row.items() if isinstance(key, str) and normal_name(key).startswith(better)]
        if all(not _is_text(other, answer) for other in others):
            raise BadRow(f"its answer is the text of {key}: an answer that was not chosen would be learned")


@lru_cache(4096)
def _correction(name: str) -> re.Match[str] | None:
    return _CORRECTED.fullmatch(name)


def refuse_corrected(row: Mapping[str, JsonValue], messages: list[Message], used: Mapping[str, str]) -> None:
    """Refuse a row whose answer was corrected in another column, such as `corrected_answer` or `edited_response`.

    Args:
        used: the keys that were read: loraflow's name → the row's column. An answer that a recipe names was chosen.

    Raises:
        BadRow: the column has another text than the answer.
    """
    if any(key != column for key, column in used.items() if key in ANSWERS):
        return
    answer = messages[-1]["content"].strip()
    for key, value in row.items():
        if not isinstance(key, str):
            continue
        if key in ("messages", "conversations") and isinstance(value, list):
            for turn in value:
                if isinstance(turn, dict) and len(turn) > 2:
                    content = turn.get("content", turn.get("value"))
                    _refuse_members(turn, content.strip() if isinstance(content, str) else "", key)
        elif isinstance(value, dict) and normal_name(key) in CONTAINERS:
            _refuse_members(value, answer, key)
        elif key not in used and _is_correction(key, value, answer):
            raise BadRow(f"{key} has another text than the answer; {_way_out(key, used)}")


def _refuse_members(members: Mapping[str, JsonValue], answer: str, where: str) -> None:
    for key, value in members.items():
        if isinstance(key, str) and _is_correction(key, value, answer):
            way = f"write it into the chat, or name {where}.{key} in data.ignore"
            raise BadRow(f"{where}.{key} has another text than the answer; {way}")


def _is_correction(key: str, value: JsonValue, answer: str) -> bool:
    found = _correction(normal_name(key))
    if found is None or not answer or (found["bare"] and not (isinstance(value, str) and " " in value.strip())):
        return False  # not even an editor's name, or a flag
    return _corrects(value, answer, is_flag=bool(found["flag"] or found["bare"]))


def _corrects(value: JsonValue, answer: str, *, is_flag: bool) -> bool:
    """Tell whether a value replaces an answer: not if it says that nothing was changed, or whether or when it was."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = None if is_flag else as_number(answer)
        return number is not None and number != as_number(value)
    if not isinstance(value, str) or is_absent(value) or is_missing(value) or value.strip() == answer:
        return False
    text, plain_answer = plain(value), plain(answer)
    if _UNCHANGED.fullmatch(text.rstrip(".! ")) or not any(sign.isalnum() for sign in text):
        return False
    if _DATE.fullmatch(text):
        return not is_flag and _DATE.fullmatch(plain_answer) is not None
    # Such a word says whether the answer is right, unless the answer is such a word itself.
    if isinstance(label_side(text), bool) or judges_badly(text):
        first = re.match(r"\w+", plain_answer)
        return not is_flag and first is not None and word_side(first[0]) is not None
    return True


def _way_out(key: str, used: Mapping[str, str]) -> str:
    if used.keys() & {"messages", "conversations"}:
        return f"write it into the chat, or name {key} in data.ignore"
    name = "output" if "instruction" in used else "completion"
    own = name if name in used else "response"
    return f"set data.columns: {{{name}: {key}}} if each row has it, else write it into {own}, or name {key} in data.ignore"


def _is_text(value: JsonValue, answer: str) -> bool:
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if isinstance(value, bool):
        return plain(answer) == str(value).lower()
    if isinstance(value, int | float):
        return as_number(value) is not None and as_number(answer) == as_number(value)
    return isinstance(value, str) and value.strip() == answer
