"""Bring a recipe's text forward: keys that were renamed get their current names, and every other character stays."""

from __future__ import annotations

from typing import NamedTuple

from loraflow.config import yaml
from loraflow.config.load import parse_recipe
from loraflow.config.renamed_keys import IGNORED, REFUSED, TRANSLATED
from loraflow.config.yaml import Edit, apply, scalars
from loraflow.failures import BadConfig


class Upgraded(NamedTuple):
    """A file's text after the upgrade, and what a person has to do."""

    text: str
    notes: list[str]


def upgrade_recipe(text: str, name: str) -> Upgraded:
    """Rename the old keys of a recipe. The recipe means the same afterwards, or it is left unchanged, with a note."""
    try:
        edits, notes = _edits(text)
    except yaml.Syntax as error:
        return Upgraded(text, [f"line {error.line}: {error}"])
    new = apply(text, edits)
    if new == text:
        return Upgraded(text, notes)
    try:
        same = parse_recipe(text, name) == parse_recipe(new, name)
    except BadConfig as failure:
        return Upgraded(text, [*notes, f"left unchanged, because it has other problems: {failure.got or failure.what}"])
    return (
        Upgraded(new, notes) if same else Upgraded(text, [*notes, "left unchanged: new names would change its meaning"])
    )


def _edits(text: str) -> tuple[list[Edit], list[str]]:
    keys = [scalar for scalar in scalars(text) if scalar.is_key and len(scalar.path) == 2]
    present = {scalar.path for scalar in keys}
    edits, notes = [], []
    for key in keys:
        section, old = str(key.path[0]), key.value
        line = text.count("\n", 0, key.start) + 1
        new = TRANSLATED.get(section, {}).get(old)
        if new is not None and (section, new) in present:
            notes.append(f"line {line}: {section}.{old} and {section}.{new} are both set; leave {old} out")
        elif new is not None:
            edits.append(key.replaced_by(new))
        elif old in IGNORED.get(section, {}):
            notes.append(f"line {line}: {section}.{old} has no effect: {IGNORED[section][old]}")
        elif old in REFUSED.get(section, {}):
            notes.append(f"line {line}: {section}.{old} is not supported: {REFUSED[section][old]}")
    return edits, notes
