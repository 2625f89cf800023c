"""Lines are read and cut into segments block by block, and rows with equal keys are found: as simple loops do it."""

import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraflow.data.chats import BadRow
from loraflow.data.checks.near import first_equal, is_repeated
from loraflow.data.files import json_reader
from loraflow.store import chunk_cache


def cut_row_by_row(rows: list[bytes], max_bytes: int) -> list[list[bytes]]:
    found: list[list[bytes]] = [[]]
    for row in rows:
        found[-1].append(row)
        size = sum(map(len, found[-1]))
        if len(found[-1]) == chunk_cache.MAX_ROWS or size >= max_bytes or zlib.crc32(row) % chunk_cache.MEAN_ROWS == 0:
            found.append([])
    return [rows for rows in found if rows]


@pytest.mark.parametrize("batch", [1, 7, 5000])
@pytest.mark.parametrize("max_bytes", [60, 10**6])
def test_segments_do_not_depend_on_the_batches(monkeypatch, batch, max_bytes):
    monkeypatch.setattr(chunk_cache, "MEAN_ROWS", 20)
    monkeypatch.setattr(chunk_cache, "MAX_ROWS", 30)
    rows = [b"row %d" % number for number in range(800)]
    batches = [rows[at : at + batch] for at in range(0, len(rows), batch)]
    found = list(chunk_cache.segments(batches, lambda items: items, max_bytes))
    assert found == cut_row_by_row(rows, max_bytes)


@settings(max_examples=60)
@example([b"c" * 31], False)
@given(st.lists(st.sampled_from([b"", b"a", b"\r", b"bb" * 9, b"c" * 31, b"d" * 40]), max_size=12), st.booleans())
def test_lines_are_those_of_the_file_whatever_is_read_together(tmp_path_factory, parts, is_ended):
    content = b"\xef\xbb\xbf" + b"\n".join(parts) + b"\n" * is_ended
    file = tmp_path_factory.mktemp("lines") / "x.jsonl"
    file.write_bytes(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [line + b"\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "MAX_ROW_BYTES", 30)
        patch.setattr(json_reader, "_BLOCK", 16)
        found = {}
        for first, part in json_reader.read_lines(file, "x.jsonl"):
            found |= dict(enumerate([part] if isinstance(part, BadRow) else part, first))
    assert list(found) == list(range(1, len(found) + 1))
    expected = expected or [b""]  # of nothing but a byte order mark
    assert len(found) == len(expected)
    for line, part in zip(expected, found.values(), strict=True):
        assert isinstance(part, BadRow) if len(line.rstrip(b"\n")) > 30 else part == line


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=60))
@example([])
def test_rows_with_equal_keys_are_those_of_a_dictionary(keys):
    first: dict[int, int] = {}
    expected = [first.setdefault(key, number) for number, key in enumerate(keys)]
    array = np.array(keys, np.uint64)
    assert first_equal(array).tolist() == expected
    repeated = [keys.count(key) > 1 for key in keys]
    assert is_repeated(array).tolist() == repeated
