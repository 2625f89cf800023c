"""Split rows with a search for near-duplicates: `data.near_duplicates`. What is found is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import Chat, ChatRecord, Message
from loraflow.data.check_report import NearDuplicates
from loraflow.data.near import Comparison, Sketches
from loraflow.data.placement import Placement, Placer, Side, Split, Unplaced
from loraflow.data.readers import Row, is_answer_learned
from loraflow.data.shingles import comparable_text
from loraflow.data.split import draw, group_key, in_share, normalized_key

MAX_CLUSTER = 0.05  # share of rows that may go to one side together in a new recipe


class ValidRow(NamedTuple):
    """A row with a chat, before its split is decided."""

    row: Row
    messages: list[Message]
    set: str  # train, or the name of a held-out set
    key: str  # of its prompt


@dataclass
class Clusters:
    """The clusters of near-duplicates. Places are those of rows: file:line."""

    cluster: dict[str, str] = field(default_factory=dict)  # place → cluster, of rows that are near to another row
    group: dict[str, str] = field(default_factory=dict)  # place → cluster among the held-out rows
    near: dict[str, str] = field(default_factory=dict)  # place → place of the earlier row that it is near to
    counts: Counter[str] = field(default_factory=Counter)
    unproposed: int = 0

    def lines(self, records: Sequence[ChatRecord]) -> list[dict[str, str]]:
        """Return the lines of clusters.jsonl for the rows that are in a cluster with another of these rows."""
        named = [(record, self.cluster[record["place"]]) for record in records if record["place"] in self.cluster]
        sizes = Counter(cluster for _, cluster in named)
        return [
            {"id": record["id"], "set": record["set"], "place": record["place"], "cluster": cluster}
            for record, cluster in named
            if sizes[cluster] > 1
        ]

    def report(self, lines: Sequence[dict[str, str]]) -> NearDuplicates:
        """Summarise clusters.jsonl."""
        sets: dict[str, Counter[str]] = {}
        for line in lines:
            sets.setdefault(line["cluster"], Counter())[line["set"]] += 1
        within, between = Counter[str](), Counter[str]()
        for rows in sets.values():
            within.update({name: count - 1 for name, count in rows.items() if count > 1})
            names = sorted(rows, key=lambda name: (name not in ("train", "validation"), name))
            between.update({f"{one} and {other}": rows[one] for n, one in enumerate(names) for other in names[n + 1 :]})
        places = {line["place"] for line in lines}
        pair = next((f"{p} and {o}" for p, o in self.near.items() if p in places and o in places), "")
        largest = max((sum(rows.values()) for rows in sets.values()), default=0)
        return NearDuplicates(
            rows=len(lines),
            clusters=len(sets),
            largest=largest,
            within=dict(within),
            between=dict(between),
            pair=pair,
            unproposed=self.unproposed,
        )


def draw_split(row: ValidRow, config: CheckDatasetConfig) -> Split:
    """Return a row's split by its file, or by the seeded hash of its prompt or group."""
    if row.set != "train":
        return "heldout"
    key = _unit(row)
    may_be_held_out = not config.heldout and not is_pinned_to_train(row.row.place, config)
    if may_be_held_out and in_share(key, config.heldout_fraction, config.seed, "heldout"):
        return "heldout"
    if config.validation_fraction and in_share(key, config.validation_fraction, config.seed, "validation"):
        return "validation"
    return "train"


def is_pinned_to_train(place: str, config: CheckDatasetConfig) -> bool:
    """Tell whether a row's source is used for training only (data.sources, split: train)."""
    return any(source.split == "train" and place.startswith(f"{source.name}/") for source in config.sources)


def _unit(row: ValidRow) -> str:
    return row.key if row.row.group is None else group_key(row.row.group)


def place_near(
    rows: Iterable[ValidRow],
    config: CheckDatasetConfig,
    place: Callable[[ValidRow, Split], None],
    leave_out: Callable[[ValidRow, str, str], None],
) -> Clusters:
    """Decide the split of each row. With `drop`, near rows are never on two sides.

    Args:
        rows: the rows of held-out files, then those of training files.
        config: the stage's config.
        place: is called with each row that has a split.
        leave_out: is called with each row that has none, the reason, and a sentence.

    Raises:
        MissingExtra: rensa is not installed.
    """
    sketches, read = Sketches(), list[ValidRow]()
    for valid in rows:
        read.append(valid)
        sketches.add(comparable_text(valid.messages))
    is_drop = config.near_duplicates == "drop"
    unplaced = _unplaced(read, config)
    # Without drop, held-out rows come first: their clusters must not depend on training rows.
    order = range(len(read)) if is_drop else sorted(range(len(read)), key=lambda n: "heldout" not in unplaced[n].side)
    candidates = sketches.candidates(np.fromiter(order, np.int64, len(read)))
    comparison = Comparison(lambda number: comparable_text(read[order[number]].messages))
    placer = Placer([unplaced[number] for number in order], candidates, comparison)
    if not is_drop:
        placement = placer.keep_sides()
    elif config.heldout or not config.heldout_fraction:
        placement = placer.separate(None)
    else:
        placement = placer.separate(lambda units: min(units, key=lambda unit: draw(unit, config.seed, "heldout")))
    ordered = [read[number] for number in order]
    sides = dict(zip(order, placement.sides, strict=True))
    reasons = {order[number]: (reason, ordered[other]) for number, (reason, other) in placement.left_out.items()}
    for number, valid in enumerate(read):
        side = sides[number]
        if side is not None:
            place(valid, side)
            continue
        reason, other = reasons[number]
        what = "held out" if reason == "near_leak" else "on another side of the split, and it is near to a row of each"
        leave_out(valid, reason, f"nearly the same as {other.row.place}, which is {what}")
    return _clusters(ordered, placement, candidates.unproposed)


def near_policy(chats: Sequence[Chat]) -> Literal["report", "drop"]:
    """Choose `data.near_duplicates` for a new recipe: drop, unless so many rows are near that they would be one side.

    Raises:
        MissingExtra: rensa is not installed.
    """
    sketches = Sketches()
    for chat in chats:
        sketches.add(comparable_text(chat))
    comparison = Comparison(lambda number: comparable_text(chats[number]))
    rows = [Unplaced("train", "", has_group=False, prompt=0, is_leak=False, may_be_held_out=True)] * len(chats)
    sizes = np.bincount(Placer(rows, sketches.candidates(), comparison).keep_sides().cluster, minlength=1)
    return "drop" if sizes.max() <= max(3, MAX_CLUSTER * len(chats)) else "report"


def _unplaced(rows: Sequence[ValidRow], config: CheckDatasetConfig) -> list[Unplaced]:
    may_be_held_out = [
        is_answer_learned(row.row)
        and (config.group is None or row.row.group is not None)
        and not is_pinned_to_train(row.row.place, config)
        for row in rows
    ]
    held_out = [row for row, may in zip(rows, may_be_held_out, strict=True) if row.set != "train" and may]
    held = {row.key for row in held_out}
    groups = {row.row.group for row in held_out if row.row.group is not None}
    found = []
    for row, may in zip(rows, may_be_held_out, strict=True):
        side: Side = "heldout file" if row.set != "train" else draw_split(row, config)
        found.append(
            Unplaced(
                side=side,
                unit=_unit(row),
                has_group=row.row.group is not None,
                prompt=normalized_key(row.messages[:-1]),
                is_leak=side in ("train", "validation") and (row.key in held or row.row.group in groups),
                may_be_held_out=may,
            )
        )
    return found


def _clusters(rows: Sequence[ValidRow], placement: Placement, unproposed: int) -> Clusters:
    found = Clusters(unproposed=unproposed)
    if placement.held_out_of_few:
        found.counts["held_out_of_few"] = placement.held_out_of_few
    names: dict[int, str] = {}

    def name(number: int) -> str:
        if number not in names:
            names[number] = f"{normalized_key(rows[number].messages):016x}"
        return names[number]

    for labels, places in ((placement.cluster, found.cluster), (placement.heldout_cluster, found.group)):
        sizes = np.bincount(labels[labels >= 0], minlength=len(rows))
        for number in np.flatnonzero((labels >= 0) & (sizes[labels] > 1)).tolist():
            places[rows[number].row.place] = name(int(labels[number]))
    for number in np.flatnonzero(placement.pairs >= 0).tolist():
        found.near[rows[number].row.place] = rows[int(placement.pairs[number])].row.place
    return found
