"""The memory estimate by part, and the peak that a worker measures of itself."""

import json
import subprocess
import sys
import time

import pytest

from loraflow.cli.show import memory_of, run_memory_lines
from loraflow.execution.job_file import clear_memory, read_memory, record_peak
from loraflow.execution.launcher import saves_since
from loraflow.job import Progress
from loraflow.registry.runs import StageRun
from loraflow.training import memory
from loraflow.training.memory import StepMemory, generation_parts, training_parts

MIB = 2**20
SMOLLM2 = memory.ModelShape(576, 1536, 30, 9, 3, 64, 49152, True)
PHI3 = memory.ModelShape(3072, 8192, 32, 32, 32, 96, 32064, False)


@pytest.mark.parametrize(("rows", "measured"), [(4, 1945), (8, 2644)])
def test_the_estimate_of_the_quickstarts_training_is_within_a_tenth_of_the_measurement(rows, measured):
    """VmHWM in MiB of the train stage on two cores, 12 and 6 steps; the longest row has 182 tokens, a third are learned."""
    parts = training_parts(SMOLLM2, "cpu", "float32", 16, StepMemory(rows * 182, 0.27), width=4)
    assert parts.total / MIB == pytest.approx(measured, rel=0.1)
    assert parts.weights == 134_515_008 * 4 - 61 * 576 * 4, "all weights but the norms"
    assert parts.optimizer == parts.adapters == memory.lora_weights(SMOLLM2, 16) * 8


def test_the_common_prefix_of_prompts_is_computed_once_and_kept_in_each_row():
    whole, shared = (
        generation_parts(PHI3, "cpu", "float32", 8, 120, 40, width=4, shared=shared) for shared in (0, 100)
    )
    assert whole.activations == pytest.approx(shared.activations * 120 / 20)
    assert whole.generation == shared.generation and whole.weights == shared.weights


def test_the_parts_add_up_to_the_estimate_by_which_a_gpus_micro_batch_is_chosen():
    for tokens, recompute in ((8192, "none"), (32768, "full")):
        parts = training_parts(PHI3, "cuda", "bfloat16", 16, StepMemory(tokens, 1.0, recompute), width=2)
        whole = memory.fixed_bytes(PHI3, "bfloat16", 16) + tokens * memory.token_bytes(PHI3, recompute)
        assert parts.total == pytest.approx(whole)
    assert "generation" not in parts.as_bytes() and sum(parts.as_bytes().values()) == pytest.approx(whole, abs=10)


def test_keys_and_values_of_a_batch_are_what_transformers_allocates():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    cache = LlamaForCausalLM(config)(torch.ones(5, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = memory.shape_of(config.to_dict())
    assert generation_parts(shape, "cpu", "float32", 5, 4, 3, width=4).generation == held


def test_the_peak_is_the_process_s_own_and_not_that_of_the_process_that_started_it(tmp_path):
    ballast = bytearray(400 * MIB)  # ru_maxrss of a child starts with the memory of its parent
    code = f"""
import sys; from pathlib import Path; from loraflow.execution.job_file import record_peak
record_peak(Path({str(tmp_path)!r}), "0"); block = bytearray(200 << 20); del block; record_peak(Path({str(tmp_path)!r}), "1")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    before, after = (json.loads((tmp_path / f"memory-peak-{n}.json").read_text())["host"] for n in (0, 1))
    assert before < 250 * MIB and 180 * MIB < after - before < 260 * MIB, "memory that was freed counts"
    assert read_memory(tmp_path) == {"peak_bytes": {"host": after}}, "the largest process"
    del ballast


def test_estimate_and_peak_are_recorded_and_an_older_attempts_are_removed(tmp_path):
    assert read_memory(tmp_path) is None
    Progress(work=tmp_path).expect_memory({"program": 512 * MIB, "weights": 1})
    record_peak(tmp_path, "0")
    found = read_memory(tmp_path)
    assert found["estimate_bytes"] == {"program": 512 * MIB, "weights": 1} and found["peak_bytes"]["host"] > 10 * MIB
    (tmp_path / "memory-peak-0.json").write_text("{")
    assert read_memory(tmp_path) is None
    clear_memory(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_line_compares_the_estimate_with_the_peak():
    class Fake:
        provenance = {
            "memory": {
                "peak_bytes": {"host": 2 * 2**30, "gpu": 2**30},
                "estimate_bytes": {"weights": 2**29, "logits": 2**28},
            }
        }

    assert memory_of(Fake) == "peak 1.00 GiB on the GPU, estimated 0.75 (75%): weights 0.50, logits 0.25"
    Fake.provenance = {"memory": {"peak_bytes": {"host": 2**30}}}
    assert memory_of(Fake) == "peak 1.00 GiB of main memory"
    for old in ({}, {"memory": 3}, {"memory": {"peak_bytes": {}}}):
        Fake.provenance = old
        assert memory_of(Fake) is None


def test_the_lines_of_a_run_are_aligned_whatever_its_stages_are_called():
    class Fake:
        uri, provenance = "", {"memory": {"peak_bytes": {"host": 2**30}}}

        def manifest(self, ref):
            return self

    stages = [
        StageRun(stage=stage, state="cached", fingerprint="f", digest="d") for stage in ("train", "score_general tuned")
    ]
    line = "peak 1.00 GiB of main memory"
    assert list(run_memory_lines(Fake(), stages)) == [
        f"  train                {line}",
        f"  score_general tuned  {line}",
    ]


@pytest.mark.parametrize(
    "name", ["checkpoints/checkpoint-3/complete.json", "answers.jsonl", "answers-1.jsonl", "shards/a"]
)
def test_only_what_a_later_attempt_uses_counts_as_progress(tmp_path, name):
    started = time.time() - 1
    for other in ("progress.jsonl", "log.txt", "checkpoints/checkpoint-2/weights"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("x")
    assert not saves_since(tmp_path, started, is_shared=True)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    assert saves_since(tmp_path, started, is_shared=True) and not saves_since(tmp_path, started + 60, is_shared=True)
    assert saves_since(tmp_path, started, is_shared=False) == name.startswith("checkpoints"), "a bucket has these only"
