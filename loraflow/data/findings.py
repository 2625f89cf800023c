"""Look for what often makes a fine-tune bad: refusals, repeated openings, disputed questions, damaged text."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import JsonValue

from loraflow.config.data_profile import ProfileCheckName, ProfileRule
from loraflow.data.broken_text import broken_text, control_token, script
from loraflow.data.chat_table import ChatTable
from loraflow.data.chats import Chat
from loraflow.data.check_report import CheckReport, Finding
from loraflow.data.personal_data import personal_data
from loraflow.data.placeholders import Placeholders
from loraflow.data.refusals import refuses
from loraflow.data.row_segment import LAST_LEARNED
from loraflow.data.split import normalize, normalized_key
from loraflow.failures import LimitExceeded

OPENING_WORDS = 5  # of an answer that has at least twice as many words
MIN_REPEATED = 5  # answers with one opening
MAX_EXAMPLES = 3
_QUOTED = 60  # characters of a quoted text
WHAT: dict[ProfileCheckName, str] = {
    "refusals": "placeholder or refusing answers",
    "openings": "answers with one opening",
    "disputed": "questions with different answers",
    "scripts": "answers in another script than most",
    "broken_text": "damaged text",
    "control_tokens": "control tokens of chat templates in the text",
    "personal": "personal data",
}


class Detector:
    """Look at rows one after another. Rows are numbered from 0.

    Args:
        rules: the checks to make.
    """

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
            place: where it is.
            set_name: its set.
            chat: its messages.
            is_learned: whether its last answer is. Checks of answers leave out those that are not.
        """
        number, answer = len(self._places), chat[-1]["content"]
        self._places.append(place)
        self._add_texts(number, chat)
        self._scripts.append(script(answer) if is_learned and "scripts" in self._rules else None)
        if is_learned:
            self._add_answer(number, set_name, chat, answer)

    def _add_texts(self, number: int, chat: Chat) -> None:
        details: dict[ProfileCheckName, Callable[[], str | None]] = {
            "broken_text": lambda: _first(broken_text, chat),
            "control_tokens": lambda: _first(control_token, chat),
            "personal": lambda: _first(personal_data, chat),
        }
        for name, detail in details.items():
            if name in self._rules and (found := detail()) is not None:
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
            least = max(MIN_REPEATED, self._rules["openings"].limit("openings") * len(self._places))
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
            limit=rule.limit(name),
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
        table: all rows.
        rules: the recipe's.
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


def refuse_findings(report: Mapping[str, JsonValue], where: str) -> None:
    """Stop the run if a check of data.profile with `fail` found too many rows.

    Raises:
        LimitExceeded: it did.
    """
    failed = [f for f in CheckReport.model_validate(report).findings if f.is_over and f.action == "fail"]
    if failed:
        raise LimitExceeded(
            "The rows of the dataset do not pass data.profile.",
            where=where,
            expected=", ".join(f"{f.check}: at most {f.limit:.2%}" for f in failed),
            got="".join(f"\n            {line}" for f in failed[:3] for line in finding_lines(f, examples=1)),
            next_step="correct these rows, then run `loraflow data add`, or set another action or share in data.profile",
        )


def finding_lines(finding: Finding, examples: int = MAX_EXAMPLES) -> Sequence[str]:
    """Return a line that says what was found, and lines with examples."""
    head = f"{finding.check}: {finding.rows} rows ({finding.share:.1%}), {WHAT[finding.check]}"
    return [head, *(f"  {example}" for example in finding.examples[:examples])]


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
