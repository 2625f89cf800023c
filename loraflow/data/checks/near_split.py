"""Split rows with a search for near-duplicates: `data.near_duplicates`. What is found is counted and named."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import Chat
from loraflow.data.checks.chat_table import ChatTable, Columns, Rows
from loraflow.data.checks.check_report import NearDuplicates
from loraflow.data.checks.near import Compared, Comparison, candidates_of, comparable_text
from loraflow.data.checks.placement import (
    HELDOUT_FILE,
    HELDOUT_SIDE,
    LEFT_OUT,
    TRAIN_SIDE,
    Placement,
    Placer,
    Split,
    Unplaced,
)
from loraflow.data.checks.row_segment import LAST_LEARNED, PINNED_TO_TRAIN, Keys
from loraflow.data.checks.split import draw, normalized_key

MAX_CLUSTER = 0.05  # share of rows that may go to one side together in a new recipe


@dataclass(frozen=True)
class ClusterNames:
    """The cluster of each row of the table [rows]."""

    names: Keys
    has: NDArray[np.bool_]  # whether the row is in a cluster with another row


@dataclass(frozen=True)
class Clusters:
    """The clusters of near-duplicates."""

    clusters: ClusterNames
    groups: ClusterNames  # clusters among the held-out rows
    near: Rows  # a row and the earlier row that it is near to [pairs, 2], in the order in which rows were placed
    held_out_of_few: int
    unproposed: int

    def group(self, number: int) -> str | None:
        """Return the cluster of a held-out row among the held-out rows; None if it is near to none of them."""
        return f"{int(self.groups.names[number]):016x}" if self.groups.has[number] else None

    def among(self, rows: Mapping[Split, Rows]) -> tuple[Rows, list[Split]]:
        """Return the rows that are in a cluster with another of these rows, and the split of each."""
        numbers = np.concatenate([*rows.values()])
        splits = np.repeat(np.arange(len(rows)), [len(found) for found in rows.values()])
        named = self.clusters.has[numbers]
        numbers, splits = numbers[named], splits[named]
        _, inverse, sizes = np.unique(self.clusters.names[numbers], return_inverse=True, return_counts=True)
        several = sizes[inverse] > 1
        names = list(rows)
        return numbers[several], [names[split] for split in splits[several].tolist()]

    def lines(self, table: ChatTable, numbers: Rows, splits: Sequence[Split]) -> Iterator[dict[str, str]]:
        """Yield the lines of clusters.jsonl."""
        for number, split in zip(numbers.tolist(), splits, strict=True):
            yield {
                "id": table.id_of(number),
                "set": table.set_of(number, split),
                "place": table.place(number),
                "cluster": f"{int(self.clusters.names[number]):016x}",
            }

    def report(self, table: ChatTable, numbers: Rows, splits: Sequence[Split]) -> NearDuplicates:
        """Summarise clusters.jsonl."""
        codes: dict[str, int] = {}
        sets = [
            codes.setdefault(table.set_of(number, split), len(codes))
            for number, split in zip(numbers.tolist(), splits, strict=True)
        ]
        names = list(codes)
        within, between = Counter[str](), Counter[str]()
        clusters, largest = 0, 0
        for rows in self._sets_of_clusters(numbers, np.array(sets, np.int64), names):
            clusters, largest = clusters + 1, max(largest, sum(rows.values()))
            within.update({name: count - 1 for name, count in rows.items() if count > 1})
            ordered = sorted(rows, key=lambda name: (name not in ("train", "validation"), name))
            between.update({f"{a} and {b}": rows[a] for n, a in enumerate(ordered) for b in ordered[n + 1 :]})
        return NearDuplicates(
            rows=len(numbers),
            clusters=clusters,
            largest=largest,
            within=dict(within),
            between=dict(between),
            pair=self._pair(table, numbers),
            unproposed=self.unproposed,
        )

    def _sets_of_clusters(self, numbers: Rows, sets: Rows, names: list[str]) -> Iterator[dict[str, int]]:
        """Yield {set: rows} of each cluster, in the order of the clusters' first rows."""
        _, first, of_row = np.unique(self.clusters.names[numbers], return_index=True, return_inverse=True)
        pairs, first_of_pair, counts = np.unique(
            of_row * max(len(names), 1) + sets, return_index=True, return_counts=True
        )
        clusters, of_pair = np.divmod(pairs, max(len(names), 1))
        found: dict[str, int] = {}
        before = -1
        for pair in np.lexsort((first_of_pair, first[clusters])).tolist():
            if clusters[pair] != before and found:
                yield found
                found = {}
            before = int(clusters[pair])
            found[names[int(of_pair[pair])]] = int(counts[pair])
        if found:
            yield found

    def _pair(self, table: ChatTable, numbers: Rows) -> str:
        is_in = np.zeros(len(table), bool)
        is_in[numbers] = True
        found = self.near[is_in[self.near].all(axis=1)]
        return " and ".join(map(table.place, found[0].tolist())) if len(found) else ""


def place_near(
    table: ChatTable,
    columns: Columns,
    numbers: Rows,
    config: CheckDatasetConfig,
    hold_out: Callable[[int], None],
    leave_out: Callable[[int, str, str], None],
    compared: Compared,
) -> tuple[Clusters, NDArray[np.int8]]:
    """Return the clusters, and the side of each row [numbers]. With `drop`, near rows are never on two sides.

    Args:
        numbers: the rows to place: those of held-out files, then those of training files.
        leave_out: is called with each row that has no side, the reason, and a sentence.

    Raises:
        MissingExtra: rensa is not installed.
    """
    sides = np.where(columns.sets != 0, np.int8(HELDOUT_FILE), columns.drawn)
    # Without drop, held-out rows come first: their clusters must not depend on training rows.
    order = numbers
    if config.near_duplicates != "drop":
        order = numbers[np.argsort(sides[numbers] < HELDOUT_SIDE, kind="stable")]
    placement, unproposed = _placement(table, _unplaced(table, columns, sides, order, config), order, config, compared)
    is_pinned = columns.has(PINNED_TO_TRAIN)
    positions = np.argsort(order, kind="stable")  # of each of `numbers`, which ascend
    of_numbers = placement.sides[positions]
    for row in np.flatnonzero((of_numbers == LEFT_OUT) | (of_numbers == HELDOUT_SIDE)).tolist():
        number, position = int(numbers[row]), int(positions[row])
        if of_numbers[row] == HELDOUT_SIDE:
            if is_pinned[number]:
                leave_out(number, "near_leak", "its prompt, its group, or a row that is nearly the same is held out")
            else:
                hold_out(number)
            continue
        reason, other = placement.left_out[position]
        what = "held out" if reason == "near_leak" else "on another side of the split, and it is near to a row of each"
        leave_out(number, reason, f"nearly the same as {table.place(int(order[other]))}, which is {what}")
    return _clusters(table, order, placement, unproposed), of_numbers


def _placement(
    table: ChatTable, rows: Unplaced, order: Rows, config: CheckDatasetConfig, compared: Compared
) -> tuple[Placement, int]:
    """Place the rows; return also how many pairs were not proposed."""
    assert table.texts is not None
    candidates = table.texts.candidates(order)
    comparison = Comparison(
        lambda position: comparable_text(table.messages(int(order[position]))), candidates.keys, compared
    )
    placer = Placer(rows, candidates, comparison)
    if config.near_duplicates != "drop":
        placement = placer.keep_sides()
    elif config.heldout or not config.heldout_fraction:
        placement = placer.separate(None)
    else:
        placement = placer.separate(lambda units: min(units, key=lambda unit: draw(unit, config.seed, "heldout")))
    return placement, candidates.unproposed


def near_policy(chats: Sequence[Chat]) -> Literal["report", "drop"]:
    """Choose `data.near_duplicates` for a new recipe: drop, unless so many rows are near that they would be one side.

    Raises:
        MissingExtra: rensa is not installed.
    """
    candidates = candidates_of([comparable_text(chat) for chat in chats])
    comparison = Comparison(lambda number: comparable_text(chats[number]))
    count = len(chats)
    rows = Unplaced(
        sides=np.full(count, TRAIN_SIDE, np.int8),
        groups=np.full(count, -1, np.int32),
        prompts=np.zeros(count, np.uint64),
        is_leak=np.zeros(count, bool),
        may_be_held_out=np.ones(count, bool),
        unit=lambda row: "",
    )
    sizes = np.bincount(Placer(rows, candidates, comparison).keep_sides().cluster, minlength=1)
    return "drop" if sizes.max() <= max(3, MAX_CLUSTER * count) else "report"


def _unplaced(
    table: ChatTable, columns: Columns, sides: NDArray[np.int8], order: Rows, config: CheckDatasetConfig
) -> Unplaced:
    keys, groups, ordered = columns.drawn_keys[order], columns.groups[order], sides[order]
    may_be_held_out = columns.has(LAST_LEARNED)[order] & ~columns.has(PINNED_TO_TRAIN)[order]
    if config.group is not None:
        may_be_held_out &= groups >= 0
    held = (ordered == HELDOUT_FILE) & may_be_held_out
    held_groups = groups[held & (groups >= 0)]
    return Unplaced(
        sides=ordered,
        groups=groups,
        prompts=columns.asked[order],
        is_leak=(ordered < HELDOUT_SIDE) & (np.isin(keys, keys[held]) | np.isin(groups, held_groups)),
        may_be_held_out=may_be_held_out,
        unit=lambda row: table.unit(int(order[row]), int(keys[row])),
    )


def _clusters(table: ChatTable, order: Rows, placement: Placement, unproposed: int) -> Clusters:
    has_near = placement.pairs >= 0
    return Clusters(
        clusters=_names(table, order, placement.cluster),
        groups=_names(table, order, placement.heldout_cluster),
        near=np.stack((order[has_near], order[placement.pairs[has_near]]), axis=1),
        held_out_of_few=placement.held_out_of_few,
        unproposed=unproposed,
    )


def _names(table: ChatTable, order: Rows, firsts: Rows) -> ClusterNames:
    sizes = np.bincount(firsts[firsts >= 0], minlength=len(order))
    several = np.flatnonzero((firsts >= 0) & (sizes[firsts] > 1))
    different, inverse = np.unique(firsts[several], return_inverse=True)
    found = [normalized_key(table.messages(int(order[first]))) for first in different.tolist()]
    names, has = np.zeros(len(table), np.uint64), np.zeros(len(table), bool)
    names[order[several]] = np.array(found, np.uint64)[inverse]
    has[order[several]] = True
    return ClusterNames(names, has)
