"""The report of check_dataset: what was read, dropped and split, and what the training rows look like;
quarantine.jsonl, the rows that are left out, with the reason; and how training rows changed since the champion.
"""

from collections import Counter
from collections.abc import Sequence
from typing import IO, Annotated, Literal, TypedDict

from pydantic import BeforeValidator, JsonValue, PlainSerializer

from loraflow.config.data import ProfileCheckName
from loraflow.data.checks.split import to_json
from loraflow.frozen import StoredModel


class SplitCounts(StoredModel):
    """Rows of each split."""

    train: int
    validation: int
    heldout: int


class Spread(StoredModel):
    """Median and maximum of a length."""

    median: int
    max: int


class Profile(StoredModel):
    """What the training rows look like, for people and for comparing two versions of a dataset."""

    turns: dict[str, int]  # messages per chat → chats
    with_system: float  # share of chats with a system message
    prompt_characters: Spread
    answer_characters: Spread


class Similar(StoredModel):
    """Rows that are equal but for case, white space and Unicode form. They are counted, not dropped."""

    near_leaks: int = 0  # training and validation rows whose prompt is nearly a held-out prompt
    near_leak: str = ""  # the places of the first pair
    disputed_prompts: int = 0  # training prompts with different answers
    disputed_rows: int = 0  # their rows
    disputed: str = ""  # the places of the first pair
    # training prompts that are nearly the same as another one with another answer; only with data.near_duplicates
    near_disputed_prompts: int = 0
    near_disputed: str = ""  # the places of the first pair


class NearDuplicates(StoredModel):
    """Rows that are nearly the same as another row: data.near_duplicates."""

    rows: int = 0  # in a cluster with another row
    clusters: int = 0
    largest: int = 0  # rows of the largest cluster
    within: dict[str, int] = {}  # set → rows beyond the first of each cluster
    between: dict[str, int] = {}  # "train and heldout" → rows of the first set whose cluster has rows of the second
    pair: str = ""  # the places of the first pair
    unproposed: int = 0  # pairs that were not compared, because very many rows share a part of their text


MAX_EXAMPLES = 3  # of a finding
WHAT: dict[ProfileCheckName, str] = {
    "refusals": "placeholder or refusing answers",
    "openings": "answers with one opening",
    "disputed": "questions with different answers",
    "scripts": "answers in another script than most",
    "broken_text": "damaged text",
    "control_tokens": "control tokens of chat templates in the text",
    "personal": "personal data",
}


class Finding(StoredModel):
    """What a check of data.profile found."""

    check: ProfileCheckName
    rows: int
    share: float  # of the valid rows
    limit: float  # the share above which the check acts
    action: Literal["warn", "quarantine", "fail"]
    examples: list[str]  # places, and what was found there

    @property
    def is_over(self) -> bool:
        """Whether the check acts."""
        return self.share > self.limit


def finding_lines(finding: Finding, examples: int = MAX_EXAMPLES) -> Sequence[str]:
    """Return a line that says what was found, and lines with examples."""
    head = f"{finding.check}: {finding.rows} rows ({finding.share:.1%}), {WHAT[finding.check]}"
    return [head, *(f"  {example}" for example in finding.examples[:examples])]


class CheckReport(StoredModel):
    """The content of report.json, and the report in the artifact's manifest."""

    rows: SplitCounts
    sets: dict[str, int]  # held-out rows of each set
    # rows read, malformed, marked_false, duplicate, leak, near_leak (near to a row of a held-out file),
    # near_both (near to rows of two splits), group_leak (its data.group is held out), over_limit. Not left out are
    # carriage_returns (they are learned), partly_marked (some answers are learned), weighted (an answer's weight in the loss
    # is not 0 or 1) and held_out_of_few (the hash had held out none)
    counts: dict[str, int]
    malformed_share: float
    first_problems: list[str]  # place and problem of the first rows in quarantine
    unread: dict[str, int] = {}  # keys that have values and were not read → rows
    marks: dict[str, int] = {}  # key and value of a mark → rows that it left out; left out of the JSON without any
    doubtful: dict[
        str, dict[str, int]
    ] = {}  # columns that may mark answers: {column: {value: rows}}; left out without any
    unread_files: list[str] = []  # files that no pattern names, the first ones; left out without any
    unread_file_count: int = 0
    similar: Similar = Similar()
    findings: list[Finding] = []  # left out of the JSON without data.profile
    # of each of data.sources, its rows: read, malformed, over_limit, not_drawn (by its weight), train, validation, heldout,
    # and repeated (of train); left out of the JSON without sources
    sources: dict[str, dict[str, int]] = {}
    near: NearDuplicates | None = None  # left out of the JSON without data.near_duplicates
    # In JSON, {} stands for the profile of no rows.
    profile: Annotated[
        Profile | None,
        BeforeValidator(lambda profile: profile or None),
        PlainSerializer(lambda profile: {} if profile is None else profile.model_dump()),
    ] = None

    def as_json(self) -> dict[str, JsonValue]:
        """Return the report as JSON values."""
        optional = ("near", "findings", "sources", "marks", "doubtful", "unread_files", "unread_file_count")
        absent = {name for name in optional if not getattr(self, name)}
        values: dict[str, JsonValue] = self.model_dump(mode="json", exclude=absent)
        return values


FIRST = 5  # problems in the report


class Quarantined(TypedDict):
    """A line of quarantine.jsonl."""

    place: str  # file:line, or file:row
    set: str  # train, or the name of a held-out set
    problem: str
    row: str  # the row's text; empty if the row is valid but was dropped


class Quarantine:
    """Count the rows that are left out, and write them.

    Attributes:
        counts: reason → rows, with other counts of the report.
    """

    def __init__(self, file: IO[str]):
        self._file = file
        self.counts: Counter[str] = Counter()
        self._malformed: list[str] = []  # the first malformed rows, which can stop the run
        self._others: list[str] = []

    def add(self, reason: str, place: str, set_name: str, problem: str, raw: str = "", *, first: bool = False) -> None:
        """Count and write a row.

        Args:
            raw: the row's text, unless it is valid.
            first: whether the report names it before others.
        """
        self.counts[reason] += 1
        line: Quarantined = {"place": place, "set": set_name, "problem": problem, "row": raw}
        self._file.write(to_json(line) + "\n")
        problems = self._malformed if first and len(self._malformed) < FIRST else self._others
        if len(problems) < FIRST:
            problems.append(f"{place}: {problem}")

    def first_problems(self) -> list[str]:
        """Return places and problems of the first rows: the malformed ones before the others."""
        return [*self._malformed, *self._others][:FIRST]


class DataDrift(StoredModel):
    """What changed between the champion's training rows and new ones."""

    before: int  # rows
    after: int
    added: int = 0
    removed: int = 0
    edited: int = 0
    shift: float = 0.0  # the largest one, from 0 to 1
    shifted: str = ""  # what has it
    lines: list[str] = []  # for people
    lengths: dict[
        str, list[tuple[float, float]]
    ] = {}  # of answers, before and now: characters, and the share up to them

    @property
    def changed(self) -> int:
        """The number of rows that were added, removed or edited."""
        return self.added + self.removed + self.edited


class StoredSource(StoredModel):
    """A source of a mixture, as an artifact of check_dataset names it, and how its files are read."""

    name: str
    files: list[str] = ["*"]
    query: str | None = None


class StoredSources(StoredModel):
    """The part of check_dataset's config that names its sources. Those of earlier versions are read too."""

    sources: list[StoredSource] = []


def unchanged_rows(report: CheckReport) -> DataDrift:
    """Return the drift of a dataset whose training rows are the champion's."""
    rows = report.rows.train + report.rows.validation
    return DataDrift(before=rows, after=rows, lines=["the training rows are those of the champion"])


def why_wait(drift: DataDrift | None, min_changed_rows: int, min_shift: float) -> str:
    """Return why a retraining waits for more data; empty if it does not.

    Args:
        drift: None if there is no champion, or its rows are gone: then nothing waits.
        min_changed_rows: enough rows that were added, removed or edited; 0 asks for nothing.
        min_shift: a large enough shift; 0 asks for nothing. One of the two is enough.
    """
    if drift is None or not (min_changed_rows or min_shift):
        return ""
    if (min_changed_rows and drift.changed >= min_changed_rows) or (min_shift and drift.shift >= min_shift):
        return ""
    asked = [f"{min_changed_rows} changed rows (min_changed_rows)"] if min_changed_rows else []
    asked += [f"a shift of {min_shift:g} (min_shift)"] if min_shift else []
    what = f", {drift.shifted}" if drift.shifted else ""
    return (
        f"The data changed too little since the champion: {drift.changed} training rows, and a largest shift of "
        f"{drift.shift:.3f}{what}; {' or '.join(asked)} would be enough."
    )
