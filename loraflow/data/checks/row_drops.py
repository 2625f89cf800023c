"""Drop duplicated rows, and training rows whose prompt or group is held out.

Rows that are equal but for case, white space and Unicode form, and near prompts with different answers, are counted.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loraflow.data.checks.chat_table import ChatTable, Columns, Rows
from loraflow.data.checks.check_report import Similar
from loraflow.data.checks.near import Compared, Comparison, comparable_text, first_equal, is_repeated
from loraflow.data.checks.placement import Split
from loraflow.data.checks.row_segment import LAST_LEARNED

Drop = Callable[[int, str, str, str], None]  # a row, its set, the reason, and a sentence


def drop_duplicates(
    table: ChatTable, columns: Columns, splits: dict[Split, Rows], policy: Literal["drop", "keep"], drop: Drop
) -> None:
    """Drop duplicates within a split. Held-out duplicates are always dropped: ids join the scores of two models.

    Chats with other marks are not duplicates.
    """
    for split, rows in splits.items():
        if policy == "keep" and split != "heldout":
            continue
        # Of a held-out row, marks are not used; training rows that are held out are in the gate's set.
        marks = np.zeros(len(rows), np.uint64) if split == "heldout" else columns.marks[rows]
        sets = np.maximum(columns.sets[rows], 1)
        first = _first(columns.ids[rows], marks, sets)
        duplicates = first != np.arange(len(rows))
        for position in np.flatnonzero(duplicates).tolist():
            number, same = int(rows[position]), int(rows[first[position]])
            drop(number, table.set_of(number, split), "duplicate", f"same as {table.place(same)}")
        splits[split] = rows[~duplicates]


def _first(keys: NDArray[np.uint64], *others: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return for each row [rows] the first row with the same key and the same values in the other columns."""
    first = np.arange(len(keys))
    some = np.flatnonzero(is_repeated(keys))
    columns = (keys, *others)
    order = some[np.lexsort([column[some] for column in columns])]
    begins = np.ones(len(order), bool)
    begins[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]  # lexsort is stable: the first of equal rows
    return first


def drop_leaks(table: ChatTable, columns: Columns, splits: dict[Split, Rows], drop: Drop) -> None:
    """Drop training and validation rows whose prompt is held out: scores must not come from rows that were learned."""
    heldout = splits["heldout"]
    held = columns.keys[heldout]
    order = np.argsort(held, kind="stable")
    names: tuple[Split, ...] = ("train", "validation")
    for split in names:
        rows = splits[split]
        leaks = np.isin(columns.keys[rows], held)
        last = np.searchsorted(held[order], columns.keys[rows[leaks]], side="right") - 1
        for number, other in zip(rows[leaks].tolist(), heldout[order[last]].tolist(), strict=True):
            drop(number, split, "leak", f"its prompt is held out ({table.place(other)})")
        splits[split] = rows[~leaks]


def heldout_groups(columns: Columns, rows: Rows) -> dict[int, int]:
    """Return {number of a group: its first row} of held-out rows."""
    groups = columns.groups[rows]
    numbers, first = np.unique(groups, return_index=True)
    return {group: int(rows[n]) for group, n in zip(numbers.tolist(), first.tolist(), strict=True) if group >= 0}


def drop_group_leaks(
    table: ChatTable,
    columns: Columns,
    splits: dict[Split, Rows],
    heldout: dict[int, int],
    drop: Drop,
) -> None:
    """Drop training and validation rows of a group that is held out. A seeded split has kept groups together already.

    Args:
        splits: the rows of each split; changed in place.
        heldout: {group: row}, also of held-out rows that were dropped as duplicates: their content is held out.
        drop: is called with each dropped row, its split, the reason, and a sentence.
    """
    names: tuple[Split, ...] = ("train", "validation") if heldout else ()
    for name in names:
        leaks = np.isin(columns.groups[splits[name]], list(heldout))
        for number in splits[name][leaks].tolist():
            place = table.place(heldout[int(columns.groups[number])])
            drop(number, name, "group_leak", f"a row of its group is held out ({place})")
        splits[name] = splits[name][~leaks]


def find_similar(table: ChatTable, columns: Columns, train: Rows, heldout: Rows) -> Similar:
    """Compare training rows with held-out rows, and with each other.

    Args:
        train: training and validation rows; no prompt of them is a held-out prompt.
    """
    prompts, held = columns.prompts[train], columns.prompts[heldout]
    near = np.flatnonzero(np.isin(prompts, held))
    near_leak = ""
    if len(near):
        other = heldout[np.flatnonzero(held == prompts[near[0]])[-1]]
        near_leak = f"{table.place(int(train[near[0]]))} and {table.place(int(other))}"
    disputed = _disputed(prompts, columns.answers[train], columns.has(LAST_LEARNED)[train])
    rows = np.flatnonzero(disputed)
    first = rows[prompts[rows] == prompts[rows[0]]][:2].tolist() if len(rows) else []
    return Similar(
        near_leaks=len(near),
        near_leak=near_leak,
        disputed_prompts=len(np.unique(prompts[rows])),
        disputed_rows=len(rows),
        disputed=" and ".join(table.place(int(train[row])) for row in first),
    )


def _disputed(prompts: np.ndarray, answers: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Tell for each row whether a row with its prompt has another answer. Answers that are not learned do not count."""
    found = np.zeros(len(prompts), bool)
    order = np.flatnonzero(learned & is_repeated(prompts))
    order = order[np.lexsort((answers[order], prompts[order]))]
    if len(order) == 0:
        return found
    ordered, ordered_answers = prompts[order], answers[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(order)]
    groups = np.repeat(ordered_answers[starts] != ordered_answers[ends - 1], ends - starts)
    found[order[groups]] = True
    return found


def with_near_prompts(similar: Similar, table: ChatTable, columns: Columns, train: Rows, compared: Compared) -> Similar:
    """Return what was found about similar rows, with the prompts that are near to another one with another answer.

    Args:
        train: training and validation rows. Answers that are not learned do not count.

    Raises:
        MissingExtra: rensa is not installed.
    """
    assert table.prompts is not None
    learned = train[columns.has(LAST_LEARNED)[train]]
    firsts = learned[first_equal(columns.prompts[learned]) == np.arange(len(learned))]  # of each prompt
    answers = columns.answers[firsts]
    candidates = table.prompts.candidates(firsts)
    comparison = Comparison(
        lambda number: comparable_text(table.messages(int(firsts[number]))[:-1]), candidates.keys, compared
    )
    disputed: set[int] = set()
    pair = ""
    for number in np.flatnonzero(candidates.has_before).tolist():
        for other in candidates.before(number):
            # Answers first: comparing them is much cheaper. Of one template's many near prompts, one is enough.
            if answers[number] != answers[other] and comparison.is_near(number, other):
                pair = pair or f"{table.place(int(firsts[other]))} and {table.place(int(firsts[number]))}"
                disputed |= {number, other}
                break
    return similar.model_copy(update={"near_disputed_prompts": len(disputed), "near_disputed": pair})
