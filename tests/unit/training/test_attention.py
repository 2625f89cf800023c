"""Attention over concatenated documents, against a loop over single documents."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.failures import BadModel
from loraflow.training import attention


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1, 3, 20]), st.sampled_from([1, 2]))
def test_attention_stays_inside_a_document_and_its_window(lengths, window, groups):
    tokens, heads, width = sum(lengths), 4, 8
    torch.manual_seed(tokens)
    q = torch.randn(1, heads, tokens, width)
    k, v = (torch.randn(1, heads // groups, tokens, width) for _ in range(2))
    begins = torch.tensor([0, *np.cumsum(lengths), tokens, tokens], dtype=torch.int32)
    got, _ = attention.attend(
        None, q, k, v, scaling=0.3, sliding_window=window, cu_seq_lens_q=begins, max_length_q=max(lengths)
    )
    expected = torch.zeros(tokens, heads, width)
    for start, end in itertools.pairwise(begins.tolist()):
        for i in range(int(start), int(end)):
            for h in range(heads):
                first = max(int(start), i - window + 1) if window else int(start)
                p = (k[0, h // groups, first : i + 1] @ q[0, h, i] * 0.3).softmax(0)
                expected[i, h] = p @ v[0, h // groups, first : i + 1]
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("argument", ["s_aux", "softcap", "dropout"])
def test_an_argument_that_the_kernels_would_ignore_is_refused(argument):
    q, borders = torch.randn(1, 2, 8, 16), torch.tensor([0, 8], dtype=torch.int32)
    attention.attend(None, q, q, q, cu_seq_lens_q=borders, max_length_q=8, **{argument: None})
    with pytest.raises(BadModel, match="does not support this model's attention") as caught:
        attention.attend(None, q, q, q, cu_seq_lens_q=borders, max_length_q=8, **{argument: 0.5})
    assert argument in caught.value.got
