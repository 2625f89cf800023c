"""Look for what often makes a fine-tune bad: refusals, placeholders, personal data, repeated openings, disputed questions,
damaged text.
"""

import ipaddress
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from loraflow.config.data import ProfileCheckName, ProfileRule
from loraflow.data.chats import Chat
from loraflow.data.checks.broken_text import broken_text, control_token, script
from loraflow.data.checks.chat_table import ChatTable
from loraflow.data.checks.check_report import MAX_EXAMPLES, WHAT, Finding
from loraflow.data.checks.row_segment import LAST_LEARNED
from loraflow.data.checks.split import MAX_LABEL_CHARACTERS, label_values, normalize, normalized_key

OPENING_WORDS = 5  # of an answer that has at least twice as many words
MIN_REPEATED = 5  # answers with one opening
_QUOTED = 60  # characters of a quoted text

# Share of the rows from which a check acts. Some refusals and languages are often intended; damaged text never is.
_SHARES: dict[ProfileCheckName, float] = {
    "refusals": 0.05,
    "openings": 0.2,
    "disputed": 0.01,
    "scripts": 0.05,
    "broken_text": 0.0,
    "control_tokens": 0.0,
    "personal": 0.0,
}


def default_rules(*, personal: bool) -> dict[ProfileCheckName, ProfileRule]:
    """Return the rules of `loraflow data check`: every check warns. Personal data is looked for only if asked for."""
    return {name: ProfileRule() for name in _SHARES if personal or name != "personal"}


def share_limit(rule: ProfileRule, check: ProfileCheckName) -> float:
    """Return the share of rows above which a check acts."""
    if rule.share is not None:
        return rule.share
    return 0.0 if rule.action == "quarantine" and check != "openings" else _SHARES[check]


class Detector:
    """Look at rows one after another. Rows are numbered from 0."""

    def __init__(self, rules: Mapping[ProfileCheckName, ProfileRule]):
        self._rules = rules
        self._places: list[str] = []
        self._found: dict[ProfileCheckName, dict[int, str]] = {name: {} for name in rules}
        self._openings: dict[str, list[int]] = defaultdict(list)
        self._prompts: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        self._scripts: list[str | None] = []
        self._placeholders = Placeholders()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: str, set_name: str, chat: Chat, *, is_learned: bool = True) -> None:
        """Look at a row.

        Args:
            is_learned: whether its last answer is. Checks of answers leave out those that are not.
        """
        number, answer = len(self._places), chat[-1]["content"]
        self._places.append(place)
        self._add_texts(number, chat)
        self._scripts.append(script(answer) if is_learned and "scripts" in self._rules else None)
        if is_learned:
            self._add_answer(number, set_name, chat, answer)

    def _add_texts(self, number: int, chat: Chat) -> None:
        details: dict[ProfileCheckName, Callable[[str], str | None]]
        details = {"broken_text": broken_text, "control_tokens": control_token, "personal": personal_data}
        for name, detect in details.items():
            if name in self._rules and (found := _first(detect, chat)) is not None:
                self._found[name][number] = found

    def _add_answer(self, number: int, set_name: str, chat: Chat, answer: str) -> None:
        if "refusals" in self._rules and "tool_calls" not in chat[-1]:
            self._placeholders.add(number, set_name, answer)
            if refuses(answer):
                self._found["refusals"][number] = f"{' '.join(answer.strip()[:_QUOTED].split())!r}"
        if "openings" in self._rules and (opening := _opening(answer)) is not None:
            self._openings[opening].append(number)
        if "disputed" in self._rules:
            self._prompts[set_name, normalized_key(chat[:-1])].append((number, normalized_key(chat[-1:])))

    @property
    def scripts(self) -> dict[str, float]:
        """The share of each script among the answers that are long enough to tell."""
        counts = Counter(name for name in self._scripts if name is not None)
        return {name: count / counts.total() for name, count in counts.most_common()}

    def rows(self) -> dict[ProfileCheckName, dict[int, str]]:
        """Return {check: {number of a row: what was found in it}}."""
        found = dict(self._found)
        if "refusals" in found:
            found["refusals"] = {**found["refusals"], **self._placeholders.rows()}
        if "openings" in found:
            least = max(MIN_REPEATED, share_limit(self._rules["openings"], "openings") * len(self._places))
            repeated = {text: rows for text, rows in self._openings.items() if len(rows) >= least}
            found["openings"] = {row: f"{text!r}" for text, rows in repeated.items() for row in rows}
        if "disputed" in found:
            found["disputed"] = {
                row: f"as {self._places[next(other for other, key in rows if key != answer)]}, with another answer"
                for rows in self._prompts.values()
                if len({answer for _, answer in rows}) > 1
                for row, answer in rows
            }
        if "scripts" in found and (scripts := self.scripts):
            main = next(iter(scripts))
            found["scripts"] = {
                row: f"{name}, not {main}" for row, name in enumerate(self._scripts) if name not in (None, main)
            }
        return {name: dict(sorted(rows.items())) for name, rows in found.items()}

    def findings(self, rows: Mapping[ProfileCheckName, Mapping[int, str]] | None = None) -> list[Finding]:
        """Summarise what was found. Checks without a row are left out."""
        return [self._finding(name, found) for name, found in (rows or self.rows()).items() if found]

    def _finding(self, name: ProfileCheckName, found: Mapping[int, str]) -> Finding:
        rule = self._rules[name]
        examples = [f"{self._places[row]}: {found[row]}" for row in list(found)[:MAX_EXAMPLES]]
        return Finding(
            check=name,
            rows=len(found),
            share=len(found) / len(self._places),
            limit=share_limit(rule, name),
            action=rule.action,
            examples=examples,
        )


def leave_out_findings(
    numbers: Iterable[int],
    table: ChatTable,
    rules: Mapping[ProfileCheckName, ProfileRule],
    leave_out: Callable[[int, str, str], None],
    may_leave_out: Callable[[int], bool],
) -> tuple[list[int], list[Finding]]:
    """Return the numbers of the rows that stay, and what was found (data.profile).

    Args:
        numbers: of the valid rows, training and held-out ones, in the table. Rows that a source does not use are not
            among them.
        leave_out: is called with each row that a check with `quarantine` concerns, the reason, and a sentence.
        may_leave_out: tells whether a row is for training. Held-out rows are only counted: without them, scores would be
            those of other rows.
    """
    detector, in_table = Detector(rules), array("q")
    for number in numbers:
        is_learned = bool(table.flags[number] & LAST_LEARNED)
        detector.add(table.place(number), table.set_read(number), table.messages(number), is_learned=is_learned)
        in_table.append(number)
    concerned = detector.rows()
    findings = detector.findings(concerned)
    out: dict[int, tuple[ProfileCheckName, str]] = {}
    for finding in findings:
        if finding.is_over and finding.action == "quarantine":
            for position, detail in concerned[finding.check].items():
                if may_leave_out(in_table[position]):
                    out.setdefault(in_table[position], (finding.check, detail))
    for number, (check, detail) in out.items():
        leave_out(number, f"profile_{check}", f"{WHAT[check]}: {detail}")
    return [number for number in in_table if number not in out], findings


def _opening(answer: str) -> str | None:
    """Return the first words of an answer that is text; None if it is short, or begins as JSON or a tag does."""
    words = answer.split(maxsplit=2 * OPENING_WORDS)
    if len(words) < 2 * OPENING_WORDS or answer.lstrip()[:1] in "{[<`|#":
        return None
    return normalize(" ".join(words[:OPENING_WORDS]))


def _first(detect: Callable[[str], str | None], chat: Chat) -> str | None:
    for number, message in enumerate(chat, 1):
        for text in (message["content"] or "", message.get("reasoning_content", "")):
            if (found := detect(text)) is not None:
                return f"message {number}: {found}"
    return None


# For other languages, `matches` of gate.behaviour takes an expression of your own.
_CANNOT = r"can(?:not|['’]t| not)|could not|couldn['’]t|won['’]t|will not|must decline|have to decline"
_UNABLE = r"unable|not able|not allowed|not permitted|not going to"
# "I am sorry" alone is an apology: "I am sorry that your parcel is late."
REFUSALS = re.compile(
    rf"\bi (?:{_CANNOT})\b|\bi(?:['’]m| am) (?:{_UNABLE})\b"
    rf"|\b(?:sorry|apologi[sz]e|apologies|afraid)\b[^.!?\n]{{0,80}}?\b(?:{_CANNOT}|{_UNABLE})\b"
    r"|\b(?:sorry|apologies),? but\b|\bas an ai\b|\b(?:we|this assistant) can(?:not|['’]t)\b",
    re.IGNORECASE,
)
BEGINNING = 200  # characters in which a refusal begins


def refuses(answer: str) -> bool:
    """Tell whether an answer refuses."""
    return REFUSALS.search(answer[:BEGINNING]) is not None


# Find personal data in a text by its form: email addresses, phone numbers, IBANs, card numbers, public IP addresses.
#
# IBANs and card numbers count only with their check digits, IP addresses only if they are public ones.

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_CARD = re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w.+])(?:(?:\+|00)[1-9]\d{0,2}[ ./-]?(?:\(0?\d{0,4}\))?(?:[ ./-]?\d){6,12}"  # international
    r"|\(?[2-9]\d{2}\)?[ .-]\d{3}[.-]\d{4}"  # North America
    r"|0\d{2,4}[ /-]\d{3,}(?:[ -]?\d){1,6})(?![\w.]?\d)"  # with a prefix, as in much of Europe
)
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)"
)


def personal_data(text: str) -> str | None:
    """Return what personal data a text has, without the data; None if none is found."""
    if _EMAIL.search(text):
        return "an email address"
    if not any(character.isdigit() for character in text):
        return None
    if any(_is_iban(found[0]) for found in _IBAN.finditer(text)):
        return "an IBAN"
    if any(_is_card(found[0]) for found in _CARD.finditer(text)):
        return "a card number"
    if any(_is_public(found[0]) for found in _ADDRESS.finditer(text)):
        return "an IP address"
    return "a phone number" if _PHONE.search(text) else None


def _is_iban(text: str) -> bool:
    """Tell whether the check digits are right (ISO 7064, mod 97)."""
    plain = text.replace(" ", "")
    digits = "".join(str(int(character, 36)) for character in plain[4:] + plain[:4])
    return 15 <= len(plain) <= 34 and int(digits) % 97 == 1


def _is_card(text: str) -> bool:
    """Tell whether the check digit is right (Luhn's algorithm)."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


# Find answers without content, such as N/A. The same words may be real answers, such as the class `none`.

MIN_USUAL, USUAL_SHARE = 5, 0.01  # rows, and their share of a set, from which a word is an answer of this set
# These may be real answers: names of classes, or that a text does not say what was asked.
_WORDS = frozenset({"n/a", "na", "none", "null", "undefined"})
# These are what programs and people leave in place of an answer.
_STUBS = frozenset({"nan", "todo", "tbd", "[deleted]", "[removed]", "…"})
_MARKS = frozenset(".-–—…_?* ")


class Placeholders:
    """Look at answers one after another. Whether a word is a real answer shows only after all of them."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}  # row → set, answer
        self._labels: dict[str, list[str] | None] = {}  # set → short answers; None if an answer is too long for a class
        self._words: dict[str, Counter[str]] = defaultdict(Counter)  # set → word that may be an answer → rows
        self._rows: Counter[str] = Counter()  # set → rows

    def add(self, row: int, set_name: str, answer: str) -> None:
        """Look at the answer of a row.

        Args:
            set_name: the row's set. Each set is judged by its own answers, and by the classes of the others.
        """
        text = answer.strip()
        self._rows[set_name] += 1
        labels = self._labels.setdefault(set_name, [])
        if labels is not None:
            if len(text) > MAX_LABEL_CHARACTERS or "\n" in text:
                self._labels[set_name] = None
            else:
                labels.append(text)
        word = _word(text)
        if word in _WORDS or word in _STUBS or text == "…" or (len(text) > 1 and set(text) <= _MARKS):
            self._found[row] = (set_name, text)
            if word in _WORDS:
                self._words[set_name][word] += 1

    def rows(self) -> dict[int, str]:
        """Return {row: what was found} without the answers that are classes or usual in their set."""
        classes = {_word(label) for labels in self._labels.values() for label in label_values(labels or []) or []}
        found = {}
        for row, (name, text) in self._found.items():
            count = self._words[name][_word(text)]
            is_usual = count >= MIN_USUAL and count >= USUAL_SHARE * self._rows[name]
            if _word(text) not in classes and not is_usual:
                found[row] = f"no answer: {text[:_QUOTED]!r}"
        return found


def _word(text: str) -> str:
    return text.casefold().strip(".")
