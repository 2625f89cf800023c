import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.data.tokens.packing import best_fit_decreasing, documents_of_rows


def slow_best_fit(lengths, capacity):
    """Longest first; each into the open row with the least room that still takes it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=300)
@given(st.lists(st.integers(1, 64), max_size=120), st.integers(64, 100))
def test_packing_equals_best_fit_decreasing(lengths, capacity):
    rows = best_fit_decreasing(np.array(lengths, np.int32), capacity)
    used = np.bincount(rows, weights=lengths) if lengths else np.empty(0)
    assert sorted(capacity - used.astype(int)) == slow_best_fit(lengths, capacity)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=120))
def test_every_document_is_in_one_row(lengths):
    rows = best_fit_decreasing(np.array(lengths, np.int32), 64)
    documents, offsets = documents_of_rows(rows)
    assert sorted(documents.tolist()) == list(range(len(lengths)))
    assert set(rows.tolist()) == set(range(len(offsets) - 1)), "rows are numbered without gaps"
    for row in range(len(offsets) - 1):
        assert (rows[documents[offsets[row] : offsets[row + 1]]] == row).all()


def test_packing_needs_as_many_rows_as_trl():
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, 3000), 1, 256).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int32)))})
    assert int(best_fit_decreasing(lengths, 256).max()) + 1 == len(_pack_bfd(table, 256))


@pytest.mark.parametrize("lengths", [[0, 3], [3, 65]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError):
        best_fit_decreasing(np.array(lengths), 64)
