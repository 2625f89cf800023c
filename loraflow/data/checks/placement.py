"""Decide the split of each row so that near-duplicates are never on both sides, and number the clusters.

Rows are placed one after another, in the order of the files, held-out files first. A row of a training file joins the side
of the earlier rows that it is near to; only a row that is near to none is drawn by the seeded hash. So rows that are added
after the others move none of them, and a row that is near to rows of two sides is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loraflow.data.checks.near import Candidates, Comparison, is_repeated

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
# The side of a row is a position in SPLITS, or the next number for a row of a held-out file.
TRAIN_SIDE, VALIDATION_SIDE, HELDOUT_SIDE, HELDOUT_FILE = range(4)
LEFT_OUT = -1


@dataclass(frozen=True)
class Unplaced:
    """What the placement has to know about each row [rows]."""

    sides: NDArray[np.int8]  # by its file, or by the seeded hash
    groups: NDArray[np.int32]  # -1: it has none
    prompts: NDArray[np.uint64]  # hash of the prompt without differences of case and white space
    is_leak: NDArray[np.bool_]  # its prompt or its group is held out by a file: it is left out anyway
    may_be_held_out: NDArray[np.bool_]  # its last answer is learned, and it has a group if data.group is set
    unit: Callable[[int], str]  # what the hash draws: the key of a row's prompt or of its group


@dataclass(frozen=True)
class Placement:
    """The result: a side or a reason for each row.

    Attributes:
        sides: for each row [rows], the position of its split in SPLITS; LEFT_OUT if it is left out.
        left_out: {row: (near_leak or near_both, the number of a row that it is near to)}.
        cluster: for each row [rows], the number of the first row of its cluster.
        heldout_cluster: the same among the held-out rows only; -1 for other rows.
        pairs: for each row [rows], the row before it that it was found near to; -1 for none.
        held_out_of_few: rows that are held out because the hash held out none.
    """

    sides: NDArray[np.int8]
    left_out: dict[int, tuple[Literal["near_leak", "near_both"], int]]
    cluster: NDArray[np.int64]
    heldout_cluster: NDArray[np.int64]
    pairs: NDArray[np.int64]
    held_out_of_few: int = 0


class Placer:
    """Place rows.

    Args:
        rows: all rows, those of held-out files first.
    """

    def __init__(self, rows: Unplaced, candidates: Candidates, comparison: Comparison):
        self._rows, self._candidates, self._comparison = rows, candidates, comparison
        count = len(rows.sides)
        self._parent = np.arange(count)
        self._pairs = np.full(count, -1)
        self._is_out = np.zeros(count, bool)
        self._left_out: dict[int, tuple[Literal["near_leak", "near_both"], int]] = {}
        self._sides = rows.sides.copy()
        # For the first row of each text, the first placed row with this text; -1: none yet.
        self._placed = np.where(candidates.alone, self._parent, -1)

    def keep_sides(self) -> Placement:
        """Number the clusters of near rows. Each row keeps its side. Held-out rows must be the first."""
        held_out = int((self._sides >= HELDOUT_SIDE).sum())
        others = np.flatnonzero(~self._candidates.alone)
        self._join_near(others[others < held_out])
        heldout = self._roots()
        self._join_near(others[others >= held_out])
        return self._result(0, heldout)

    def _join_near(self, rows: NDArray[np.int64]) -> None:
        for row in rows.tolist():
            for other in self._near(row):
                self._join(row, other)
            self._note_placed(row)

    def separate(self, choose: Callable[[Sequence[str]], str] | None) -> Placement:
        """Give near rows the same side, and leave training rows out that are near to a row of a held-out file.

        Args:
            choose: chooses the unit that is held out if the hash holds out none; None if files are held out.
        """
        rows, followed = self._rows, _Followed(self._rows)
        # A row of a held-out file that cannot be held out is never scored: no row is left out because of it.
        self._is_out = rows.is_leak | ((rows.sides == HELDOUT_FILE) & ~rows.may_be_held_out)
        self._placed[self._is_out] = -1
        for row in np.flatnonzero(~self._is_out & (followed.may_follow | ~self._candidates.alone)).tolist():
            if self._place(row, int(rows.sides[row]), followed):
                followed.add(row)
        return self._result(self._hold_out_cluster(choose))

    def _place(self, row: int, side: int, followed: _Followed) -> bool:
        near = list(self._near(row))
        if side != HELDOUT_FILE:
            near += [other for other in followed.before(row) if other not in near]
            of_files = [other for other in near if self._sides[other] == HELDOUT_FILE]
            sides = {int(self._sides[other]) for other in near} - {HELDOUT_FILE}
            if len(sides) > 1:
                others = [other for other in near if self._sides[other] in (HELDOUT_SIDE, VALIDATION_SIDE)]
                return self._leave_out(row, "near_both", others[0])
            side = next(iter(sides), side)
            if of_files and side != HELDOUT_SIDE:
                return self._leave_out(row, "near_leak", of_files[0])
        self._sides[row] = side
        self._note_placed(row)
        for other in near:
            self._join(row, other)
        return True

    def _note_placed(self, row: int) -> None:
        first = self._candidates.first[row]
        if self._placed[first] < 0:
            self._placed[first] = row

    def _near(self, row: int) -> Iterator[int]:
        """Yield one row before this one of each cluster that it is near to."""
        first = int(self._candidates.first[row])
        same = [int(self._placed[first])] if self._placed[first] not in (-1, row) else []
        found: set[int] = set()
        # Candidates are first rows of their texts. If such a row was left out, a later row with its text stands for it.
        for candidate in [*same, *self._candidates.before(first)]:
            placed = int(self._placed[candidate])
            other = candidate if candidate in same or placed < 0 else placed
            if self._is_out[other] or (root := self._root(other)) in found:
                continue
            if other in same or self._comparison.is_near(row, other):
                found.add(root)
                self._pairs[row] = other if self._pairs[row] < 0 else self._pairs[row]
                yield other

    def _leave_out(self, row: int, reason: Literal["near_leak", "near_both"], other: int) -> bool:
        self._is_out[row] = True
        first = self._candidates.first[row]
        if self._placed[first] == row:  # a later row with its text stands for it
            self._placed[first] = -1
        self._left_out[row] = (reason, other)
        return False

    def _join(self, row: int, other: int) -> None:
        roots = sorted((self._root(row), self._root(other)))
        self._parent[roots[1]] = roots[0]

    def _root(self, row: int) -> int:
        while (parent := int(self._parent[row])) != row:
            self._parent[row] = row = int(self._parent[parent])
        return row

    def _hold_out_cluster(self, choose: Callable[[Sequence[str]], str] | None) -> int:
        """Hold out one cluster if the hash held out none; return its number of rows."""
        may = self._rows.may_be_held_out & ~self._is_out
        if choose is None or (may & (self._sides == HELDOUT_SIDE)).any():
            return 0
        placed, roots = np.flatnonzero(~self._is_out), self._roots()
        if len(np.unique(roots[placed])) < 2 or not may.any():
            return 0
        unit = choose([self._rows.unit(row) for row in np.flatnonzero(may).tolist()])
        chosen = {int(roots[row]) for row in placed.tolist() if self._rows.unit(row) == unit}
        moved = placed[np.isin(roots[placed], list(chosen))]
        self._sides[moved] = HELDOUT_SIDE
        return int(may[moved].sum())

    def _roots(self) -> NDArray[np.int64]:
        roots = self._parent
        while not np.array_equal(further := roots[roots], roots):
            roots = further
        return roots.copy()

    def _result(self, held_out_of_few: int, heldout_roots: NDArray[np.int64] | None = None) -> Placement:
        sides = np.minimum(self._sides, HELDOUT_SIDE)
        sides[list(self._left_out)] = LEFT_OUT
        roots = self._roots()
        heldout = np.where(sides == HELDOUT_SIDE, roots if heldout_roots is None else heldout_roots, -1)
        return Placement(sides, self._left_out, roots, heldout, self._pairs, held_out_of_few)


class _Followed:
    """The rows whose side later rows follow, because they have the same group or the same prompt.

    Attributes:
        may_follow: for each row [rows], whether another row has its prompt, or it has a group.
    """

    def __init__(self, rows: Unplaced):
        self._rows = rows
        self._repeated = is_repeated(rows.prompts)
        self._has_group = (rows.groups >= 0) & (rows.sides != HELDOUT_FILE)
        self.may_follow = self._repeated | self._has_group
        self._first: dict[tuple[bool, int], int] = {}

    def add(self, row: int) -> None:
        """Remember a placed row, if others may follow it."""
        for key in self._keys(row):
            self._first.setdefault(key, row)

    def before(self, row: int) -> list[int]:
        """Return the first placed rows with this row's group and prompt."""
        return [self._first[key] for key in self._keys(row) if key in self._first]

    def _keys(self, row: int) -> Iterator[tuple[bool, int]]:
        if self._has_group[row]:
            yield True, int(self._rows.groups[row])
        if self._repeated[row]:
            yield False, int(self._rows.prompts[row])
