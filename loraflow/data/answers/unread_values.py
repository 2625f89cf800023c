"""Columns that are not read and may say which answers are wrong: `human_verified: false`, `input_quality: very poor`.

No list of names is complete, so the values are looked at: a column has nothing but true and false, or a word that judges.
Such a column is a question to the user, and no row is left out by it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Literal

from pydantic import JsonValue

from loraflow.data.answers.judgements import FAILED_RUNS, HELD_OUT, TRAINED_ON, is_bad_word, values_at, word_side
from loraflow.data.answers.labels import ENOUGH, FALSE, NO, TRUE, Labels, answers_of, as_number, is_absent, plain
from loraflow.data.answers.mark_names import CONTAINERS, GOOD, JUDGEMENTS, LABELS, RUNS, normal_name
from loraflow.data.cell_values import Unreadable, is_object_text, objects_of, parsed_text

MAX_QUESTIONS = 5
_MAX_NAMES = 20  # of further columns
_MAX_WORD = 30  # characters of a value that is a word
_OTHER = ""  # any other value
_DOWN = "-1"  # beside 0 and 1, a vote against the answer
_FLAGS = frozenset({"true", "false", _DOWN})
_ANY = "a value"  # as that of deleted_at
# Beside empty cells
_TICKS = frozenset({"true", "x", "✓", _ANY})
# Words that judge only in a column that is named so: a size may be half
_DEGREES = frozenset({"low", "very low", "half", "partial", "partly"})
_ASKED = frozenset({
    "do not use", "do not train", "needs work", "draft", "in progress", "unverified", "hallucination",
    "refuse", "отклонено", "悪い",
})  # fmt: skip
# "Bad answer", "1 - poor", colours of thumbs
_AROUND = re.compile(r"\b(?:answer|response|completion|output|quality|\d)\b|[:.!()\U0001f3fb-\U0001f3ff]")
_PARTS = TRAINED_ON | HELD_OUT  # of a dataset
_LETTERS = frozenset("jso")
_YES = frozenset({"ja", "oui", "si", "sim", "da", "tak", "evet", "да", "はい", "是", "예"}) | _LETTERS | TRAINED_ON
_NO = NO | HELD_OUT
# Beside one other word
_APPROVED = frozenset({
    "approved", "approve", "accepted", "accept", "correct", "good", "keep", "pass", "passed", "acceptable", "valid", "ok",
})  # fmt: skip
_NOT = re.compile("^(?:(?:not|nicht|pas|niet|не) (?!guilty)|[不未])")
_SHORT = 3  # letters of codes such as `ko`
_MAX_LIST = 200  # characters of a list as text
_MAX_DEPTH = 8
# Last words of names that are about something else than the answer
_NEUTRAL = frozenset({
    "id", "ids", "idx", "index", "no", "number", "num", "count", "turn", "turns", "round", "step", "cluster", "seed",
    "epoch", "fold", "shard", "page", "line", "position", "offset", "locale", "country", "region", "city", "code",
    "iso", "author", "user", "username", "name", "names", "title", "gender", "sex", "model", "source", "url", "path",
    "file", "size", "date", "year",
})  # fmt: skip
_FLAG = re.compile(r"(?:is|has|was|were|are|should|can|did|does|needs?)_")
_JUDGING = re.compile(
    r"(?:^|_)(?:in)?(?:verdict|quality|correct|verif|valid|judg|grad[ei]|rat(?:ing|ed)|approv|accept|reject|review|evaluat|"
    r"assess|helpful|hallucin|factual|accura|annotat|feedback|resolved|solved|checked|(?:pass(?:ed|es)?|fail(?:ed)?|good|bad|"
    r"wrong|right|ok(?:ay)?|keep|usable|(?:un)?safe|harmful|flag(?:ged)?|check|vote|label|thumbs?|reaction|status|result|"
    r"outcome|answer|response|human|qa|eval|success|done|completed?|audit)(?:_|$))|^results|scores|critique|状态|审核"
)
# Of these, only false is a question too.
_DONE = re.compile(r"(?:.*_)?(?:success|successful|solved|resolved|(?:test|validation|verification)_result)")
# Scores of the answer, unlike toxicity_score
_SCORE = re.compile(r"(?:final_|answer_|response_)?(?:score|reward)|acc|exact_match|pass@\d+")
# Of these, any value is bad
_BAD_IF_SET = re.compile(
    r"(?:deleted|rejected|discarded|removed|hidden|failed|flagged|banned)_(?:at|by|on|date|reason)"
    r"|(?:rejection|reject|failure|deletion|error)_?(?:reason|message|type)|errors?|exception|issues"
)
_NOTHING = frozenset({"0", "0.0", "n/a", "na", "-", "ok"})
_WORD_PAIRS = LABELS | JUDGEMENTS
_OF_RUN = re.compile(r"(?:.*_)?(?:status|result|" + "|".join(RUNS) + ")")  # `error` judges in these
_REASON = re.compile(r"(?:^|_)(?:finish|stop)_?reason$")  # why an answer ends
_CUT_OFF = frozenset({"length", "max tokens", "content filter", "safety", "recitation", "refusal", "error"})

Told = tuple[tuple[str, str], ...]  # keys, and what their values say: true, false, -1, a word that judges, or nothing


def told_by(row: Mapping[str, JsonValue], unread: Sequence[str], labels: Labels | None = None) -> Told:
    """Return what the keys of a row that are not read say; `labels` knows the other rows."""
    found: list[tuple[str, str]] = []
    for key in unread:
        value, name = row.get(key), normal_name(key)
        column, _, inner = key.partition(".")
        if key not in row and column in row:  # of a message
            turns = (item for item in objects_of(row[column]) if not is_absent(item.get(inner)))
            found += {pair: 1 for item in turns for pair in _told(key, inner, item[inner], labels) if pair[1]}
            continue
        # labels.py judges labels, and `is_correct: ja` is learned
        hidden = (_YES | _NO if name in LABELS else _YES if name in GOOD else frozenset[str]()) - _PARTS
        pairs = [pair for pair in _told(key, key, value, labels) if pair[1] not in hidden]
        if pairs:
            if labels and pairs == [(key, "false")] and name in LABELS and _has_unknown(key, labels):
                pairs = [(key, str(value).strip().lower())]
            is_named = "label_text" in row or "label_name" in row
            if not (labels and is_named and key == "label" and str(value).isdigit() and labels.are_classes(key)):
                found += pairs
    return tuple(found)


def _is_opposed(path: str, key: str, value: str, labels: Labels) -> bool:
    """Tell whether a word has an opposite in a column that judges: `not X` beside X, or one unknown word beside approval.

    Of a row's `label`, any two words are opposites if one is unknown.
    """
    word, name = plain(value), normal_name(key)
    is_label = path == key and name in _WORD_PAIRS
    if not is_label and _kind_of(re.sub("_(status|result|outcome)$", "", name)) != "judging":
        return False  # order_status
    if is_label or word in _APPROVED:
        return _has_unknown(path, labels) and _has_more(1, path, labels) and not _has_more(2, path, labels)
    opposite = _NOT.sub("", word)
    if opposite == word or _has_more(ENOUGH, path, labels):
        return False
    return labels.some_row((f"is {opposite}", path), lambda row: opposite in _words(path, row))


def _has_more(count: int, path: str, labels: Labels) -> bool:
    seen = set[str]()

    def holds(row: Mapping[str, JsonValue]) -> bool:
        seen.update(_words(path, row))
        return len(seen) > count

    return labels.some_row((f"more than {count} words", path), holds)


def _words(path: str, row: Mapping[str, JsonValue]) -> set[str]:
    return {plain(str(value)) for value in values_at(row, tuple(path.split("."))) if not is_absent(value)}


def _has_unknown(path: str, labels: Labels) -> bool:
    """Tell whether a column has a word that neither judges nor is its row's answer."""
    return labels.some_row(
        ("an unknown word", path),
        lambda row: any(
            word_side(word) is as_number(word) is None and word not in _APPROVED and not _word_of_text("judging", word)
            for word in _words(path, row) - set(map(plain, answers_of(row)))
        ),
    )


def _told(path: str, key: str, value: JsonValue, labels: Labels | None, judge: str = "") -> list[tuple[str, str]]:
    """Return what a value says, or the keys of an object such as `metadata`, or of a list of them.

    Args:
        judge: the key of an object around it that judges. Of such objects, not all flags are looked at.
    """
    name = normal_name(key)
    is_container = name in CONTAINERS
    judge = key if _kind_of(key) == "judging" else judge
    if (judge or is_container or name.endswith("_metadata")) and path.count(".") < _MAX_DEPTH:
        items = (
            (f"{path}.{k}", (judge or key) if k == "value" else k, v)
            for members in objects_of(value)
            for k, v in members.items()
            if isinstance(k, str)
            and (is_container or _kind_of(k) == "judging" or (judge and (k == "value" or type(v) in (str, dict, list))))
        )
        found = [
            pair
            for inner, k, v in items
            if not is_absent(v)
            for pair in _told(inner, k, v, labels, judge) or [(inner, _OTHER)]
        ]
        if found:
            return list(dict.fromkeys(found))
    word = _word(key, value)
    if not word and labels and isinstance(value, str) and len(value) <= _MAX_WORD:
        word = " ".join(value.split()) if _is_opposed(path, key, value, labels) else word
    return [(path, word)] if word else []


def _word(key: str, value: JsonValue) -> str:
    kind, name = _kind_of(key), normal_name(key)
    if kind == "bad" and not isinstance(value, list):
        text = str(value).strip()
        if is_absent(value) or text.lower() in _NOTHING:
            return _OTHER
        is_word = isinstance(value, bool | str) and not text.isdigit() and len(text) <= _MAX_WORD
        return (is_word and _word_of_text("judging", text)) or _ANY
    if kind == "neutral":
        return word if isinstance(value, str) and (word := plain(value)) in _PARTS else _OTHER
    if isinstance(value, str) and value.startswith("[") and len(value) <= _MAX_LIST:
        try:
            value = parsed_text(value)
        except Unreadable:
            return _OTHER
    if isinstance(value, list):  # of several judges
        words = {_OTHER if isinstance(item, list) else _word(key, item) for item in value}
        if len(words) == 1:
            return words.pop()
        bad = words - _FLAGS - {_OTHER}  # a tag, if no judge says the opposite
        return max(bad) if bad and not any(word_side(str(item)) for item in value) else _OTHER
    if _REASON.search(name):
        return value if isinstance(value, str) and plain(value) in _CUT_OFF else _OTHER
    if isinstance(value, bool):
        value = str(value)
    if (number := as_number(value)) in (0, 1, -1) and str(value).strip()[-1:].isdigit():
        value = str(int(number))  # 0.0 too
    if not isinstance(value, str) or len(value) > _MAX_WORD:
        return _OTHER
    if plain(value) in FAILED_RUNS and _OF_RUN.fullmatch(name):
        return value.strip().lower()
    word = _word_of_text(kind, value)
    return _OTHER if word in _LETTERS and kind == "other" and name not in _WORD_PAIRS else word


@lru_cache(4096)
def _kind_of(key: str) -> Literal["bad", "neutral", "judging", "flag", "other"]:
    """Return what a name tells of its values: a flag's 0 and 1 are false and true."""
    name = normal_name(key)
    if _BAD_IF_SET.fullmatch(name):
        return "bad"
    if name.rpartition("_")[2] in _NEUTRAL:
        return "neutral"
    if _JUDGING.search(name) or _SCORE.fullmatch(name):
        return "judging"
    if name.startswith("lang"):
        return "neutral"
    return "flag" if _FLAG.match(name) or key.rstrip().endswith("?") else "other"


@lru_cache(4096)
def _word_of_text(kind: str, value: str) -> str:
    text = value.strip().strip(":").lower()
    if text in TRUE or text in FALSE:
        return "true" if text in TRUE else "false"
    if text in ("0", "1", "+1") and kind != "other":
        return "false" if text == "0" else "true"
    if text == _DOWN:
        return _DOWN if kind == "judging" else _OTHER
    if text in _TICKS:
        return text
    word = " ".join(_AROUND.sub(" ", plain(text)).split())
    if word in _YES | _NO:
        return word
    is_code = len(text) <= _SHORT and text.isascii() and text != "bad"
    if kind != "judging" and (word in _DEGREES or is_code):
        return _OTHER
    return text if is_bad_word(text) or is_bad_word(word) or word in _ASKED else _OTHER


def doubtful(
    told: Mapping[tuple[str, str], int], unread: Mapping[str, int], total: int = 0
) -> dict[str, dict[str, int]]:
    """Return the columns that may mark answers: {column: {value: rows}}. `total` is the number of all rows."""
    columns: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (key, word), rows in told.items():
        columns[key][word] = rows
    return {
        key: {word: rows for word, rows in words.items() if word != _OTHER}
        for key, words in columns.items()
        if _is_doubtful(key, words, unread.get(key, sum(words.values())), total)
    }


def _is_doubtful(key: str, words: Mapping[str, int], rows: int, total: int) -> bool:
    said = words.keys() - {_OTHER}
    name = normal_name(key.rpartition(".")[2])
    is_verdict = name in JUDGEMENTS or (name in LABELS and "." in key)  # labels of a row may be classes
    no, yes = _PARTS if is_verdict else _NO, _PARTS if name in JUDGEMENTS - GOOD else _YES  # rejected: ja
    if said - _FLAGS - _TICKS - no - yes:
        return True
    is_whole = sum(words[word] for word in said) >= rows
    is_done = "false" in said and _DONE.fullmatch(name) is not None
    if is_done and ("true" in said or is_whole):
        return True
    has_both = said & (_YES | {"true"}) and said & (_NO | {"false", _DOWN})
    return is_whole and (bool(has_both) or (said <= _TICKS and rows < total))


def questions(columns: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a question for each column of `doubtful`."""
    lines = []
    for key, words in list(columns.items())[:MAX_QUESTIONS]:
        most = sorted(words.items(), key=lambda item: -item[1])[:4]
        counts = ", ".join(f"{word} in {rows} rows" for word, rows in most)
        way = "write it as is_correct (true or false)"
        is_flag = words.keys() <= {"true", "false"} and "." not in key
        if is_flag and "false" not in words and _kind_of(key) != "judging" and "gold" not in key:
            way = f"set data.columns: {{exclude: {key}}} to leave these rows out, or {way}"
        elif is_flag and "false" in words:
            way = (
                f"set data.columns: {{train: {key}}} to learn where it is true, or {{exclude: {key}}} where it is false"
            )
        marks = "say that answers were cut off" if _REASON.search(normal_name(key)) else "mark wrong answers"
        if not words.keys().isdisjoint(TRAINED_ON):
            marks, way = "keep rows for tests", "name the column split"
        lines.append(f"does {key} {marks}? ({counts}) It is not read. If so, {way}; else name {key} in data.ignore")
    if more := list(columns)[MAX_QUESTIONS:]:
        rest = f" and {len(more) - _MAX_NAMES} more" if len(more) > _MAX_NAMES else ""
        lines.append(f"{len(more)} more columns like these: {', '.join(more[:_MAX_NAMES])}{rest}")
    return lines


def counted(told: Sequence[Told]) -> Counter[tuple[str, str]]:
    """Return how often keys said something."""
    return Counter(item for row in told for item in row)


def without_ignored(row: Mapping[str, JsonValue], ignore: Collection[str]) -> dict[str, JsonValue]:
    """Return a row or message without the keys of `data.ignore`.

    Args:
        ignore: the keys. `metadata.quality` is that of the object, list or JSON text `metadata`, unless a key is so named.
    """
    kept = {key: value for key, value in row.items() if key not in ignore}
    for name in ignore:
        outer, dot, inner = name.partition(".")
        if dot and name not in row and outer in kept:
            kept[outer] = _without_member(kept[outer], inner)
    return kept


def _without_member(value: JsonValue, name: str) -> JsonValue:
    if isinstance(value, str) and is_object_text(value):
        try:
            value = parsed_text(value)
        except Unreadable:
            return value
    if isinstance(value, dict):
        return without_ignored(value, (name,))
    if not isinstance(value, list):
        return value
    items: list[object] = list(value)
    if any(isinstance(item, tuple) for item in items):  # a map of Parquet
        return [item for item in value if not (isinstance(item, tuple) and item[:1] == (name,))]
    return [_without_member(item, name) for item in value]
