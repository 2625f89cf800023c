"""Whether layers are compiled follows from measured gains: by width, dropout and the number of passes."""

from types import SimpleNamespace

import numpy as np
import pytest

from loraflow.training.compile_gain import COMPILE_SECONDS, TABLE, seconds_saved
from loraflow.training.fast_engine import choose_compile

# (name, hidden, layers, dropout, tokens of a pass, measured: saved milliseconds of a pass on one H100)
MEASURED = [
    ("SmolLM2", 576, 30, 0.0, 1024, 150.5), ("SmolLM2", 576, 30, 0.05, 1024, 291.8),
    ("SmolLM2", 576, 30, 0.05, 8192, 299.9), ("Llama 1B", 2048, 16, 0.0, 8192, 58.3),
    ("Llama 1B", 2048, 16, 0.05, 8192, 283.0), ("Phi-3 mini", 3072, 32, 0.0, 8192, 114.5),
    ("Phi-3 mini", 3072, 32, 0.05, 8192, 778.4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "width", "layers", "dropout", "tokens", "saved"), MEASURED)
def test_the_table_repeats_what_was_measured(name, width, layers, dropout, tokens, saved):
    assert seconds_saved(width, layers, dropout, 1, tokens) * 1e3 == pytest.approx(saved, rel=0.03), name


def test_widths_between_the_measured_ones_take_the_smaller_and_tiny_ones_the_smallest():
    assert seconds_saved(1024, 1, 0.0, 1, 8192) == TABLE[0].without_dropout / 1e3
    assert seconds_saved(64, 1, 0.0, 1, 8192) == TABLE[0].without_dropout / 1e3
    assert seconds_saved(8192, 1, 0.1, 1, 99999) == TABLE[-1].with_dropout / 1e3


def setup_of(steps: int, dropout: float = 0.05, device: str = "cuda", **runtime):
    """A training of Phi-3 mini's shape in steps of 16 rows with 1,000 tokens."""
    return SimpleNamespace(
        runtime=SimpleNamespace(**{"compile": "auto", **runtime}),
        device=device,
        rows=SimpleNamespace(tokens=np.full(16, 1000)),
        order=np.arange(16).repeat(steps),
        step_rows=np.arange(16 * steps).reshape(-1, 16),
        group=SimpleNamespace(size=1),
        shape=SimpleNamespace(hidden=3072, layers=32),
        config=SimpleNamespace(peft_config=SimpleNamespace(lora_dropout=dropout)),
    )


FLAT, GRID = SimpleNamespace(concatenated=True), SimpleNamespace(concatenated=False)


def test_a_training_is_compiled_once_it_saves_more_than_compiling_takes():
    at_once, in_parts = 16_000, 8_000
    assert choose_compile(setup_of(steps=30), FLAT, at_once)[0] is False
    assert choose_compile(setup_of(steps=60), FLAT, at_once)[0] is True
    assert choose_compile(setup_of(steps=30), FLAT, in_parts)[0] is True, "twice as many passes"
    assert choose_compile(setup_of(steps=60, dropout=0.0), FLAT, at_once)[0] is False
    _, why = choose_compile(setup_of(steps=60), FLAT, at_once)
    assert f"takes about {COMPILE_SECONDS:.0f} s" in why and "60 passes" in why


def test_compile_is_taken_as_asked_for_and_never_on_grids_or_a_cpu():
    assert choose_compile(setup_of(1, compile="on"), GRID, 1)[0] is True
    assert choose_compile(setup_of(9999, compile="off"), FLAT, 1)[0] is False
    assert choose_compile(setup_of(9999), GRID, 16_000)[0] is False
    assert choose_compile(setup_of(9999, device="cpu"), FLAT, 16_000)[0] is False
