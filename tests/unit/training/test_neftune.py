"""NEFTune's noise: as large as the paper says, whatever else is in the batch, and the same for every micro-batch."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from loraflow.data.tokens.token_files import TokenRows
from loraflow.training.batches import GridRows, StepDataset, concatenated_layout
from loraflow.training.lora_kernels import add_noise
from tests.unit.training.test_training import base, run, same, straight, tokenize  # noqa: F401

ALPHA, WIDTH = 5.0, 512


def noise_of_rows(rows: TokenRows, layout, chosen: np.ndarray) -> dict[int, torch.Tensor]:
    """Return the noise of each row of a step, by its index in the step: [tokens, WIDTH]."""
    data = StepDataset(rows, chosen[None], layout, 0, noise=True)
    found: dict[int, torch.Tensor] = {}
    for indices, batch in zip(data.assignment(0), data[0]["micro_batches"], strict=True):
        shape = (*batch["input_ids"].shape, WIDTH)
        noise = add_noise(torch.zeros(shape), batch["token_keys"], batch["document_lengths"], ALPHA)
        flat = noise.view(-1, WIDTH)
        start = 0
        for number, index in enumerate(indices):
            tokens = int(rows.tokens[chosen[index]])
            start = number * shape[1] if shape[0] > 1 else start
            found[index] = flat[start : start + tokens]
            start += tokens
        used = sum(int(rows.tokens[chosen[index]]) for index in indices)
        assert int((flat != 0).any(1).sum()) == used  # padding has none
    return found


def test_noise_is_uniform_up_to_the_papers_bound_for_the_documents_own_length(straight):  # noqa: F811
    """The reference: github.com/neelsjain/NEFTune takes the length from the attention mask's sum."""
    shards, _, _ = straight
    rows, chosen = TokenRows(shards / "train"), np.arange(6)
    for index, noise in noise_of_rows(rows, GridRows(3), chosen).items():
        bound = ALPHA / math.sqrt(int(rows.tokens[index]) * WIDTH)
        assert noise.abs().max() <= bound
        assert stats.kstest(noise.flatten().numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4


def test_noise_does_not_depend_on_what_else_is_in_the_batch(straight):  # noqa: F811
    shards, _, _ = straight
    rows, chosen = TokenRows(shards / "train"), np.arange(6)
    first = noise_of_rows(rows, GridRows(1), chosen)
    for layout in (GridRows(2), GridRows(6), concatenated_layout(rows, chosen[None], 200)):
        other = noise_of_rows(rows, layout, chosen)
        assert all(torch.equal(first[index], other[index]) for index in first)
    assert not torch.equal(first[0][:5], first[1][:5])


@pytest.mark.parametrize("packing", [False, True])
def test_the_micro_batch_does_not_change_a_training_with_noise(base, straight, tmp_path, packing):  # noqa: F811
    shards, plain, _ = straight
    if packing:
        shards = tokenize(base, tmp_path / "packed", training_config__packing=True)
    noisy = {"training_config__neftune_noise_alpha": ALPHA, "training_config__packing": packing}
    together, _ = run(base, shards, tmp_path / "a", **noisy)
    apart, _ = run(base, shards, tmp_path / "b", runtime__micro_batch=1, **noisy)
    assert same(together, apart, 2e-5)
    assert not same(together, plain, 1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_the_stock_engine_has_the_same_noise(base, straight, tmp_path, packing):  # noqa: F811
    """The fingerprint does not contain the engine. transformers' noise is as weak as the batch is long."""
    shards = tokenize(base, tmp_path / "packed", training_config__packing=True) if packing else straight[0]
    noisy = {
        "training_config__neftune_noise_alpha": ALPHA,
        "training_config__packing": packing,
        "training_config__max_steps": 3,
    }
    fast, _ = run(base, shards, tmp_path / "fast", **noisy)
    stock, _ = run(base, shards, tmp_path / "stock", runtime__engine="stock", runtime__micro_batch=2, **noisy)
    assert same(fast, stock, 1e-4)
