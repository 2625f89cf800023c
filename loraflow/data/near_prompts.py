"""Find training prompts that are nearly the same and have different answers. They are counted and told, not dropped.

Prompts that are equal but for case, white space and Unicode form are counted by `loraflow.data.similar`.
"""

from __future__ import annotations

import numpy as np

from loraflow.data.chat_table import ChatTable, Columns, Rows
from loraflow.data.check_report import Similar
from loraflow.data.equal_keys import first_equal
from loraflow.data.near import Compared, Comparison
from loraflow.data.row_segment import LAST_LEARNED
from loraflow.data.shingles import comparable_text


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
