"""Find rows that are equal but for case, white space and Unicode form. They are counted and told, not dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loraflow.data.chats import ChatRecord
from loraflow.data.check_report import Similar
from loraflow.data.split import normalized_key


class CheckedRow(NamedTuple):
    """A row of a split, with the key of its prompt."""

    record: ChatRecord
    prompt: str


def find_similar(train: Sequence[CheckedRow], heldout: Sequence[CheckedRow]) -> Similar:
    """Compare training rows with held-out rows, and with each other.

    Args:
        train: training and validation rows; no prompt of them is a held-out prompt.
        heldout: held-out rows.
    """
    held = {normalized_key(row.record["messages"][:-1]): row.record["place"] for row in heldout}
    prompts, answers = np.empty(len(train), np.uint64), np.empty(len(train), np.uint64)
    near: list[str] = []
    near_leaks = 0
    for number, (record, _) in enumerate(train):
        prompts[number] = key = normalized_key(record["messages"][:-1])
        answers[number] = normalized_key(record["messages"][-1:])
        if key in held:
            near_leaks += 1
            near = near or [f"{record['place']} and {held[key]}"]
    learned = np.array([is_last_learned(record) for record, _ in train], bool)
    disputed = _disputed(prompts, answers, learned)
    rows: list[int] = np.flatnonzero(disputed).tolist()
    places = [train[n].record["place"] for n in rows if prompts[n] == prompts[rows[0]]]
    return Similar(
        near_leaks=near_leaks,
        near_leak=near[0] if near else "",
        disputed_prompts=len(np.unique(prompts[rows])),
        disputed_rows=len(rows),
        disputed=" and ".join(places[:2]),
    )


def is_last_learned(record: ChatRecord) -> bool:
    """Tell whether a chat's last answer is learned."""
    learned = record.get("learned")
    return learned is None or learned[-1] == len(record["messages"]) - 1


def _disputed(prompts: np.ndarray, answers: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Tell for each row whether a row with its prompt has another answer. Answers that are not learned do not count."""
    found = np.zeros(len(prompts), bool)
    ordered = np.sort(prompts)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated) == 0:  # as in most datasets: the rest needs several times the memory of the keys
        return found
    order = np.flatnonzero(learned & np.isin(prompts, repeated))
    order = order[np.lexsort((answers[order], prompts[order]))]
    if len(order) == 0:
        return found
    ordered, said = prompts[order], answers[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(order)]
    groups = np.repeat(said[starts] != said[ends - 1], ends - starts)
    found[order[groups]] = True
    return found
