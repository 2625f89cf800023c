"""Decide the split of each row so that near-duplicates are never on both sides, and number the clusters.

Rows are placed one after another, in the order of the files, held-out files first. A row of a training file joins the side
of the earlier rows that it is near to; only a row that is near to none is drawn by the seeded hash. So rows that are added
after the others move none of them, and a row that is near to rows of two sides is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from loraflow.data.near import Candidates, Comparison

Split = Literal["train", "validation", "heldout"]
Side = Split | Literal["heldout file"]


class Unplaced(NamedTuple):
    """What the placement has to know about a row."""

    side: Side  # by its file, or by the seeded hash
    unit: str  # what the hash draws: the key of the prompt or of the group
    has_group: bool  # the unit is a group's
    prompt: int  # 64-bit hash of the prompt without differences of case and white space
    is_leak: bool  # its prompt or its group is held out by a file: it is left out anyway
    may_be_held_out: bool  # its last answer is learned, and it has a group if data.group is set


@dataclass(frozen=True)
class Placement:
    """The result: a side or a reason for each row.

    Attributes:
        sides: for each row, None if it is left out.
        left_out: {row: (near_leak or near_both, the number of a row that it is near to)}.
        cluster: for each row [rows], the number of the first row of its cluster.
        heldout_cluster: the same among the held-out rows only; -1 for other rows.
        pairs: for each row [rows], the row before it that it was found near to; -1 for none.
        held_out_of_few: rows that are held out because the hash held out none.
    """

    sides: list[Split | None]
    left_out: dict[int, tuple[Literal["near_leak", "near_both"], int]]
    cluster: np.ndarray
    heldout_cluster: np.ndarray
    pairs: np.ndarray
    held_out_of_few: int = 0


class Placer:
    """Place rows.

    Args:
        rows: all rows, those of held-out files first.
        candidates: pairs that are worth comparing.
        comparison: of two rows.
    """

    def __init__(self, rows: Sequence[Unplaced], candidates: Candidates, comparison: Comparison):
        self._rows, self._candidates, self._comparison = rows, candidates, comparison
        self._parent = np.arange(len(rows))
        self._pairs = np.full(len(rows), -1)
        self._is_out = np.zeros(len(rows), bool)
        self._left_out: dict[int, tuple[Literal["near_leak", "near_both"], int]] = {}
        self._sides: list[Side] = [row.side for row in rows]
        self._placed: dict[int, int] = {}  # the first row of a text → the first placed row with this text

    def keep_sides(self) -> Placement:
        """Number the clusters of near rows. Each row keeps its side. Held-out rows must be the first."""
        heldout = None
        for row in range(len(self._rows)):
            if heldout is None and self._sides[row] in ("train", "validation"):
                heldout = self._roots()
            for other in self._near(row):
                self._join(row, other)
            self._placed.setdefault(int(self._candidates.first[row]), row)
        return self._result(0, heldout)

    def separate(self, hold_out_one: Callable[[Sequence[str]], str] | None) -> Placement:
        """Give near rows the same side, and leave training rows out that are near to a row of a held-out file.

        Args:
            hold_out_one: chooses the unit that is held out if the hash holds out none; None if files are held out.
        """
        followed = _Followed(self._rows)
        for number, row in enumerate(self._rows):
            # A row of a held-out file that cannot be held out is never scored: no row is left out because of it.
            if row.is_leak or (row.side == "heldout file" and not row.may_be_held_out):
                self._is_out[number] = True
            elif self._place(number, row.side, followed):
                followed.add(number)
        return self._result(self._hold_out_one(hold_out_one))

    def _place(self, row: int, side: Side, followed: _Followed) -> bool:
        """Choose the side of a row; tell whether it has one."""
        near = list(self._near(row))
        if side != "heldout file":
            near += [other for other in followed.before(row) if other not in near]
            of_files = [other for other in near if self._sides[other] == "heldout file"]
            sides = {self._sides[other] for other in near} - {"heldout file"}
            if len(sides) > 1:
                others = [other for other in near if self._sides[other] in ("heldout", "validation")]
                return self._leave_out(row, "near_both", others[0])
            side = next(iter(sides), side)
            if of_files and side != "heldout":
                return self._leave_out(row, "near_leak", of_files[0])
        self._sides[row] = side
        self._placed.setdefault(int(self._candidates.first[row]), row)
        for other in near:
            self._join(row, other)
        return True

    def _near(self, row: int) -> Iterator[int]:
        """Yield one row before this one of each cluster that it is near to."""
        first = int(self._candidates.first[row])
        same = [self._placed[first]] if first in self._placed else []
        found: set[int] = set()
        # Candidates are first rows of their texts. If such a row was left out, a later row with its text stands for it.
        for other in [*same, *(self._placed.get(other, other) for other in self._candidates.before(first))]:
            if self._is_out[other] or (root := self._root(other)) in found:
                continue
            if other in same or self._comparison.is_near(row, other):
                found.add(root)
                self._pairs[row] = other if self._pairs[row] < 0 else self._pairs[row]
                yield other

    def _leave_out(self, row: int, reason: Literal["near_leak", "near_both"], other: int) -> bool:
        self._is_out[row] = True
        self._left_out[row] = (reason, other)
        return False

    def _join(self, one: int, other: int) -> None:
        roots = sorted((self._root(one), self._root(other)))
        self._parent[roots[1]] = roots[0]

    def _root(self, row: int) -> int:
        while (parent := int(self._parent[row])) != row:
            self._parent[row] = row = int(self._parent[parent])
        return row

    def _hold_out_one(self, choose: Callable[[Sequence[str]], str] | None) -> int:
        """Hold out one cluster if the hash held out none; return its number of rows."""
        placed = [row for row in range(len(self._rows)) if not self._is_out[row]]
        if choose is None or any(self._sides[row] == "heldout" and self._rows[row].may_be_held_out for row in placed):
            return 0
        roots = {self._root(row) for row in placed}
        may = [self._rows[row].unit for row in placed if self._rows[row].may_be_held_out]
        if len(roots) < 2 or not may:
            return 0
        unit = choose(may)
        chosen = {self._root(row) for row in placed if self._rows[row].unit == unit}
        count = 0
        for row in placed:
            if self._root(row) in chosen:
                self._sides[row] = "heldout"
                count += self._rows[row].may_be_held_out
        return count

    def _roots(self) -> np.ndarray:
        return np.fromiter(map(self._root, range(len(self._rows))), np.int64, len(self._rows))

    def _result(self, held_out_of_few: int, heldout_roots: np.ndarray | None = None) -> Placement:
        sides: list[Split | None] = [
            None if row in self._left_out else "heldout" if side == "heldout file" else side
            for row, side in enumerate(self._sides)
        ]
        roots = self._roots()
        is_heldout = np.fromiter((side == "heldout" for side in sides), bool, len(sides))
        heldout = np.where(is_heldout, roots if heldout_roots is None else heldout_roots, -1)
        return Placement(sides, self._left_out, roots, heldout, self._pairs, held_out_of_few)


class _Followed:
    """The rows whose side later rows follow, because they have the same group or the same prompt."""

    def __init__(self, rows: Sequence[Unplaced]):
        self._rows = rows
        prompts = np.fromiter((row.prompt for row in rows), np.uint64, len(rows))
        values, counts = np.unique(prompts, return_counts=True)
        self._repeated = set(values[counts > 1].tolist())  # the others need no entry
        self._first: dict[int | str, int] = {}

    def add(self, row: int) -> None:
        """Remember a placed row, if others may follow it."""
        for key in self._keys(row):
            self._first.setdefault(key, row)

    def before(self, row: int) -> list[int]:
        """Return the first placed rows with this row's unit and prompt."""
        return [self._first[key] for key in self._keys(row) if key in self._first]

    def _keys(self, row: int) -> Iterator[int | str]:
        found = self._rows[row]
        if found.has_group and found.side != "heldout file":
            yield found.unit
        if found.prompt in self._repeated:
            yield found.prompt
