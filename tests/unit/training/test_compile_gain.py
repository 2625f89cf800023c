"""Whether layers are compiled follows from measured gains: by width, dropout and the number of passes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraflow.training.cuda_graphs import COMPILE_SECONDS, TABLE, choose_graphs, seconds_saved
from loraflow.training.fast_engine import choose_compile, passes_of
from loraflow.training.layers import draws_in_passes
from loraflow.training.lora_kernels import accelerate_loras
from loraflow.training.memory import MemoryFit, ModelShape

# (name, hidden, layers, dropout, tokens of a pass, measured: saved milliseconds of a pass on one H200)
MEASURED = [
    ("SmolLM2", 576, 30, 0.0, 1024, 123.0), ("SmolLM2", 576, 30, 0.05, 1024, 180.1),
    ("SmolLM2", 576, 30, 0.05, 8192, 96.2),
    ("Llama 1B", 2048, 16, 0.0, 8192, 87.6), ("Llama 1B", 2048, 16, 0.05, 8192, 57.4),
    ("Phi-3 mini", 3072, 32, 0.0, 8192, 119.8), ("Phi-3 mini", 3072, 32, 0.05, 8192, 167.7),
]  # fmt: skip


@pytest.mark.parametrize(("name", "width", "layers", "dropout", "tokens", "saved"), MEASURED)
def test_compiling_is_not_expected_to_save_more_than_was_measured(name, width, layers, dropout, tokens, saved):
    expected = seconds_saved(width, layers, dropout, 1, tokens) * 1e3
    assert 0.5 * saved < expected < 1.03 * saved, name


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


def compiles(setup, attention, micro_batch_tokens, *, graphed: bool = False):
    return choose_compile(setup, attention, *passes_of(setup, micro_batch_tokens), graphed=graphed)


def test_a_training_is_compiled_once_it_saves_more_than_compiling_takes():
    at_once, in_parts = 16_000, 8_000
    assert compiles(setup_of(steps=120), FLAT, at_once)[0] is False
    assert compiles(setup_of(steps=240), FLAT, at_once)[0] is True
    assert compiles(setup_of(steps=120), FLAT, in_parts)[0] is True, "twice as many passes"
    assert compiles(setup_of(steps=240, dropout=0.0), FLAT, at_once)[0] is False
    _, why = compiles(setup_of(steps=240), FLAT, at_once)
    assert f"takes about {COMPILE_SECONDS:.0f} s" in why and "240 passes" in why


def test_compile_is_taken_as_asked_for_and_never_on_grids_or_a_cpu():
    assert compiles(setup_of(1, compile="on"), GRID, 1)[0] is True
    assert compiles(setup_of(9999, compile="off"), FLAT, 1)[0] is False
    assert compiles(setup_of(9999), GRID, 16_000)[0] is False
    assert compiles(setup_of(9999, device="cpu"), FLAT, 16_000)[0] is False


# (name, hidden, layers, dropout, tokens of a pass, measured: saved milliseconds of a pass that is recorded as a graph, on one
# H200; Qwen3 on one H100)
RECORDED = [
    ("SmolLM2", 576, 30, 0.0, 1024, 1.3), ("SmolLM2", 576, 30, 0.05, 1024, 6.7), ("SmolLM2", 576, 30, 0.05, 8192, 21.4),
    ("Qwen3 0.6B", 1024, 28, 0.0, 1024, 3.2), ("Qwen3 0.6B", 1024, 28, 0.0, 16384, 102.2),
    ("Llama 1B", 2048, 16, 0.0, 8192, 34.7), ("Llama 1B", 2048, 16, 0.05, 8192, 34.4),
    ("Phi-3 mini", 3072, 32, 0.0, 8192, 105.6), ("Phi-3 mini", 3072, 32, 0.05, 8192, 113.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "width", "layers", "dropout", "tokens", "saved"), RECORDED)
def test_of_a_recorded_pass_compiling_is_not_expected_to_save_more_than_was_measured(
    name, width, layers, dropout, tokens, saved
):
    expected = seconds_saved(width, layers, dropout, 1, tokens, graphed=True) * 1e3
    assert 0.25 * saved < expected < 1.5 * saved + 1, name  # a millisecond is noise


def test_a_short_training_of_a_small_model_is_recorded_instead_of_compiled():
    setup = setup_of(steps=1000)
    setup.shape = SimpleNamespace(hidden=576, layers=30)
    assert compiles(setup, FLAT, 16_000)[0] is True
    assert compiles(setup, FLAT, 16_000, graphed=True)[0] is True, "16,000 tokens of a pass"
    setup.rows.tokens[:] = 60
    assert compiles(setup, FLAT, 16_000)[0] is True
    assert compiles(setup, FLAT, 16_000, graphed=True)[0] is False, "960 tokens of a pass"


def graph_setup(layers: int, linear_weights: int, free: float = 70e9, **runtime):
    shape = ModelShape(1024, 3072, layers, 16, 8, 128, 32000, True)
    assert shape.linear_weights == linear_weights
    return SimpleNamespace(
        runtime=SimpleNamespace(**{"cuda_graphs": "auto", **runtime}), device="cuda", shape=shape,
        weight_format="bfloat16", activation_width=2, rank=16, is_sharded=False, free_bytes=lambda: free,
    )  # fmt: skip


def trainer_of(*modules: torch.nn.Module):
    decoder = torch.nn.ModuleList(modules)
    decoder.config = LlamaConfig()
    trained = list(decoder.parameters())
    return SimpleNamespace(decoder=decoder, embed=torch.nn.Embedding(2, 2), trained=trained, loras=[])


def chosen(setup, trainer, tokens: int = 16_384, passes: int = 1000, recompute="none"):
    fit = MemoryFit(tokens, recompute, 0.0, "")
    return choose_graphs(setup, FLAT, fit, trainer, passes=passes)


def test_passes_are_recorded_where_starting_their_kernels_takes_longer_than_computing_them():
    small, trainer = graph_setup(28, 440_401_920), trainer_of(torch.nn.Linear(2, 2))
    assert chosen(small, trainer)[0] is True
    assert chosen(small, trainer, tokens=65_536)[0] is False, "the products take longer"
    assert chosen(small, trainer, passes=20)[0] is False
    recorded, why = chosen(graph_setup(28, 440_401_920, free=20e9), trainer)
    assert recorded is False and "GiB" in why
    assert chosen(graph_setup(28, 440_401_920, cuda_graphs="on"), trainer, tokens=65_536)[0] is True
    assert chosen(graph_setup(28, 440_401_920, cuda_graphs="off"), trainer)[0] is False


def test_what_a_graph_cannot_hold_is_not_recorded_even_if_asked_for():
    setup = graph_setup(28, 440_401_920, cuda_graphs="on")
    plain = trainer_of(torch.nn.Linear(2, 2))
    assert chosen(SimpleNamespace(**vars(setup) | {"is_sharded": True}), plain)[0] is False
    assert chosen(setup, plain, recompute="offload")[0] is False
    assert "dropout" in chosen(setup, trainer_of(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)))[1]
    switching = trainer_of(torch.nn.Linear(2, 2))
    switching.decoder.config.rope_parameters = {"full_attention": {"rope_type": "longrope", "factor": 2.0}}
    assert "longrope" in chosen(setup, switching)[1]
    with_embedding = trainer_of(torch.nn.Linear(2, 2))
    with_embedding.trained += list(with_embedding.embed.parameters())
    assert "embedding" in chosen(setup, with_embedding)[1]
    assert choose_graphs(
        SimpleNamespace(runtime=setup.runtime, device="cpu", shape=setup.shape), FLAT, MemoryFit(1, "none", 0, ""), plain,
        passes=99,
    )[0] is False  # fmt: skip


def test_dropout_of_fast_loras_does_not_prevent_recording_and_other_dropout_does():
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2)),
        LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]),
    )  # fmt: skip
    decoder = model.get_base_model().get_decoder()
    assert draws_in_passes(decoder) is True, "peft's own layers"
    accelerate_loras(model, torch.float32)
    assert draws_in_passes(decoder) is False
    decoder.extra = torch.nn.Dropout(0.1)
    assert draws_in_passes(decoder) is True
