"""Find rows that are equal but for case, white space and Unicode form, and near prompts with different answers.

They are counted and told, not dropped.
"""

from __future__ import annotations

import numpy as np

from loraflow.data.chat_table import ChatTable, Columns, Rows
from loraflow.data.check_report import Similar
from loraflow.data.near import Compared, Comparison, comparable_text, first_equal, is_repeated
from loraflow.data.row_segment import LAST_LEARNED


def find_similar(table: ChatTable, columns: Columns, train: Rows, heldout: Rows) -> Similar:
    """Compare training rows with held-out rows, and with each other.

    Args:
        table: all rows.
        columns: what is known of them.
        train: training and validation rows; no prompt of them is a held-out prompt.
        heldout: held-out rows.
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
    ordered, said = prompts[order], answers[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(order)]
    groups = np.repeat(said[starts] != said[ends - 1], ends - starts)
    found[order[groups]] = True
    return found


def with_near_prompts(similar: Similar, table: ChatTable, columns: Columns, train: Rows, compared: Compared) -> Similar:
    """Return what was found about similar rows, with the prompts that are near to another one with another answer.

    Args:
        similar: what was found among equal prompts.
        table: all rows.
        columns: what is known of them.
        train: training and validation rows. Answers that are not learned do not count.
        compared: pairs of texts that were compared before.

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
