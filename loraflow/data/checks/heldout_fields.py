"""The values of row fields that divide the gate's held-out rows into parts: `evaluation.slices` and `gate.slices`.

They are in a file of their own, which is in no facet: a field that is added scores nothing again.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from loraflow.data.checks.chat_table import source_of
from loraflow.data.files.readers import read_values
from loraflow.failures import BadData

FILE = "heldout_fields.jsonl"  # {"id": of a held-out row, FIELD: value}
MAX_VALUES = 20  # different values of a field: with more, most parts have too few rows to compare
NO_VALUE = "(no value)"  # the part of the rows that have none
_SHOWN = 5  # values in a message
_LINE = TypeAdapter(dict[str, str])

FieldValues = Mapping[str, Mapping[str, str]]  # row id → field → value


def write_field_values(
    files: Path,
    gate_rows: Iterable[tuple[str, str]],
    fields: Sequence[str],
    out: Path,
    queries: Mapping[str, str] | None = None,
) -> None:
    """Read the fields of the gate's held-out rows from the dataset's files, and write their values.

    Args:
        gate_rows: (id, place) of each of them.

    Raises:
        BadData: no row has one of the fields, it has many different values, or a value is a list or an object.
    """
    rows = {place: row_id for row_id, place in gate_rows}
    values: dict[str, dict[str, str]] = {}
    others: Counter[str] = Counter()  # fields that rows have
    for name in dict.fromkeys(place.rpartition(":")[0] for place in rows):
        for place, value, _ in read_values(files / name, name, (queries or {}).get(source_of(name))):
            if place in rows and isinstance(value, dict):
                others.update(str(key) for key in value)
                values[place] = {field: _text(value.get(field), field, place) for field in fields}
    for field in fields if rows else ():  # without rows, the run stops with a message about that
        _require_few_values(field, [values[place][field] for place in rows], others)
    lines = (json.dumps({"id": row_id, **values[place]}, ensure_ascii=False) + "\n" for place, row_id in rows.items())
    (out / FILE).write_text("".join(lines), encoding="utf-8")


def parse_field_values(content: bytes) -> FieldValues:
    """Return the values by row id, from the content of `heldout_fields.jsonl`."""
    rows = [_LINE.validate_json(line) for line in content.removesuffix(b"\n").split(b"\n") if line]
    return {row["id"]: row for row in rows}


def _text(value: JsonValue, field: str, place: str) -> str:
    """Return a value as text: numbers and true or false are values like any other."""
    if isinstance(value, list | dict):
        raise BadData(
            "Rows cannot be divided by a field whose values are lists or objects.",
            where=f"{place}: {field}",
            expected="a text, a number, or true or false",
            got=json.dumps(value, ensure_ascii=False, default=str)[:100],
            next_step="write a field with one value to the rows, or remove the field from evaluation.slices and gate.slices",
        )
    if value is None or (isinstance(value, float) and math.isnan(value)):  # an empty cell of a Parquet column
        return NO_VALUE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():  # pandas writes 7 as 7.0 if another cell is empty
        value = int(value)
    return unicodedata.normalize("NFC", " ".join(str(value).split())) or NO_VALUE


def _require_few_values(field: str, values: Sequence[str], others: Counter[str]) -> None:
    counts = Counter(values)
    named = [value for value in counts if value != NO_VALUE]
    if not named:
        raise BadData(
            "No held-out row has a value in a field that the rows are divided by.",
            where=f"evaluation.slices or gate.slices: {field}",
            expected=f"length, script, or a field of the rows: {', '.join(name for name, _ in others.most_common(10))}",
            got=field,
            next_step="correct the name, or write the field to the rows of data.heldout",
        )
    if len(named) > MAX_VALUES:
        raise BadData(
            "A field that the held-out rows are divided by has too many different values.",
            where=f"evaluation.slices or gate.slices: {field}",
            expected=f"at most {MAX_VALUES} different values",
            got=f"{len(named)} in {len(values)} rows, such as {', '.join(named[:_SHOWN])}",
            next_step="write a field with few values to the rows, such as a range for a number, and name that field",
        )
