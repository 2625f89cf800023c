"""The lengths of micro-batches: as little padding as their number allows."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.data.tokens.token_files import TokenRows
from loraflow.training.batches import MAX_LENGTHS, StepDataset, choose_lengths, concatenated_layout


def padding(used, lengths):
    return sum(next(length for length in sorted(lengths) if length >= tokens) - tokens for tokens in used)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.floats(0, 100))
def test_no_other_lengths_have_less_padding_and_cost(used, cost):
    values = sorted(set(used))
    best = min(
        padding(used, (*some, values[-1])) + cost * (len(some) + 1)
        for number in range(len(values))
        for some in combinations(values[:-1], number)
    )
    found = choose_lengths(np.array(used), cost)
    assert list(found) == sorted(set(found)) and found[-1] == values[-1]
    assert padding(used, found) + cost * len(found) == pytest.approx(best)


def test_there_are_never_more_lengths_than_graphs_that_are_kept():
    found = choose_lengths(np.arange(1, 500), 0.0)
    assert len(found) == MAX_LENGTHS and found[-1] == 499


def rows_of(tokens, row_length=None):
    rows = TokenRows.__new__(TokenRows)
    rows.lengths, rows.tokens, rows.row_length = np.array(tokens), np.array(tokens), row_length
    rows.documents, rows.offsets = np.arange(len(tokens)), np.arange(len(tokens) + 1)
    return rows


def padded_share(rows, layout, steps):
    data = StepDataset(rows, steps, layout, 0)
    used = [int(rows.tokens[steps[n]][part].sum()) for n in range(len(steps)) for part in data.assignment(n)]
    return padding(used, layout.lengths) / (sum(used) + padding(used, layout.lengths))


@pytest.mark.parametrize("row_length", [None, 32_768])
def test_documents_of_16_to_32_thousand_tokens_have_at_most_three_percent_of_padding(row_length):
    """One fills a micro-batch alone. With four equal steps of length, and packed, it was a sixth and a quarter."""
    tokens = np.random.default_rng(0).integers(16_000, 32_768, 400)
    tokens[0] = 32_768
    steps = np.random.default_rng(1).permutation(400).reshape(50, 8)
    rows = rows_of(tokens, row_length)
    assert padded_share(rows, concatenated_layout(rows, steps, 32_768), steps) <= 0.03


def test_packed_rows_that_are_full_have_one_length():
    rows = rows_of([2040, 2048] * 8, 2048)
    assert concatenated_layout(rows, np.arange(16).reshape(4, 4), 4096).lengths == (4096,)
