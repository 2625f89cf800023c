"""Find training prompts that are nearly the same and have different answers. They are counted and told, not dropped.

Prompts that are equal but for case, white space and Unicode form are counted by `loraflow.data.similar`.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraflow.data.check_report import Similar
from loraflow.data.near import Comparison, Sketches
from loraflow.data.shingles import comparable_text
from loraflow.data.similar import CheckedRow, is_last_learned
from loraflow.data.split import normalized_key


def with_near_prompts(similar: Similar, train: Sequence[CheckedRow]) -> Similar:
    """Return what was found about similar rows, with the prompts that are near to another one with another answer.

    Args:
        similar: what was found among equal prompts.
        train: training and validation rows. Answers that are not learned do not count.

    Raises:
        MissingExtra: rensa is not installed.
    """
    sketches, firsts, answers = Sketches(), list[CheckedRow](), list[int]()
    seen: set[int] = set()
    for row in train:
        messages = row.record["messages"]
        if is_last_learned(row.record) and (key := normalized_key(messages[:-1])) not in seen:
            seen.add(key)
            firsts.append(row)
            answers.append(normalized_key(messages[-1:]))
            sketches.add(comparable_text(messages[:-1]))
    candidates = sketches.candidates()
    comparison = Comparison(lambda number: comparable_text(firsts[number].record["messages"][:-1]))
    disputed: set[int] = set()
    pair = ""
    for number in range(len(firsts)):
        for other in candidates.before(number):
            # Answers first: comparing them is much cheaper. Of one template's many near prompts, one is enough.
            if answers[number] != answers[other] and comparison.is_near(number, other):
                pair = pair or f"{firsts[other].record['place']} and {firsts[number].record['place']}"
                disputed |= {number, other}
                break
    return similar.model_copy(update={"near_disputed_prompts": len(disputed), "near_disputed": pair})
