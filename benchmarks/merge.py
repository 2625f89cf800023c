"""Merge a Phi-3-mini-shaped checkpoint (7.6 GB): loraflow, peft and `cp -r` in one run; then compare every bit.

python benchmarks/merge.py [FOLDER]      about 25 GB of disk, 10 GB of memory
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import tempfile
from pathlib import Path

from measure import measure_command, measure_median, print_row

LORAFLOW = """
import sys; from pathlib import Path; from loraflow.adapters.merge_folders import merge
figures = merge(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
Path(sys.argv[3] + '.seconds').write_text(str(figures['seconds']))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size='5GB')
"""


def build(base: Path, adapter: Path) -> None:
    """Write random weights in Phi-3 mini's shape, in four files, and an adapter of rank 16 on all four projections."""
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config

    base.mkdir()
    adapter.mkdir()
    config = Phi3Config(architectures=["Phi3ForCausalLM"], dtype="bfloat16", tie_word_embeddings=False, pad_token_id=0)
    config.save_pretrained(base)
    shapes = {"qkv_proj": ("self_attn", 9216, 3072), "o_proj": ("self_attn", 3072, 3072),
              "gate_up_proj": ("mlp", 16384, 3072), "down_proj": ("mlp", 3072, 8192)}  # fmt: skip
    random, lora, index = torch.Generator().manual_seed(0), {}, {}
    for part in range(4):
        tensors = {}
        for layer in range(8 * part, 8 * part + 8):
            stem = f"model.layers.{layer}"
            for name, (block, rows, columns) in shapes.items():
                tensors[f"{stem}.{block}.{name}.weight"] = (
                    torch.randn(rows, columns, generator=random) * 0.02
                ).bfloat16()
                key = f"base_model.model.{stem}.{block}.{name}"
                lora[f"{key}.lora_A.weight"] = torch.randn(16, columns, generator=random) * 0.02
                lora[f"{key}.lora_B.weight"] = torch.randn(rows, 16, generator=random) * 0.02
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}.{norm}.weight"] = torch.ones(3072, dtype=torch.bfloat16)
        if part == 0:
            tensors["model.embed_tokens.weight"] = (torch.randn(32064, 3072, generator=random) * 0.02).bfloat16()
        if part == 3:
            tensors["lm_head.weight"] = (torch.randn(32064, 3072, generator=random) * 0.02).bfloat16()
            tensors["model.norm.weight"] = torch.ones(3072, dtype=torch.bfloat16)
        name = f"model-{part + 1:05d}-of-00004.safetensors"
        save_file(tensors, base / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(lora, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": sorted(shapes),
                "bias": "none", "inference_mode": True, "base_model_name_or_path": None}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))


def compare(merged: Path, by_peft: Path) -> tuple[int, int]:
    """Return (tensors, tensors that differ in a bit), one tensor in memory at a time."""
    from safetensors import safe_open

    def files_of_tensors(folder: Path) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
        return files

    first, second = files_of_tensors(merged), files_of_tensors(by_peft)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    different = 0
    for name in first:
        with safe_open(first[name], "pt") as a, safe_open(second[name], "pt") as b:
            different += not a.get_tensor(name).equal(b.get_tensor(name))
    return len(first), different


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        root = Path(folder)
        base, adapter = root / "base", root / "adapter"
        # In its own process, because a child process inherits its parent's peak memory.
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(base, adapter))
        builder.start()
        builder.join()
        print_row("what", "seconds", "peak MiB", "× cp")
        outs = [root / f"loraflow{i}" for i in range(3)]
        copies, merges = [], []
        for out in outs:  # alternate, so that both meet the disk in the same state
            copies.append(measure_command(["cp", "-r", str(base), str(root / "copy")])[0])
            shutil.rmtree(root / "copy")
            out.mkdir()
            merges.append(measure_command([sys.executable, "-c", LORAFLOW, str(base), str(adapter), str(out)]))
            if out is not outs[-1]:
                shutil.rmtree(out)
        copy, (loraflow, memory) = sorted(copies)[1], sorted(merges)[1]
        print_row("cp -r", copy, 0, 1.0)
        alone = sorted(float(Path(f"{out}.seconds").read_text()) for out in outs)[1]
        print_row("loraflow, the merge alone", alone, memory, alone / copy)
        print_row("loraflow, whole process", loraflow, memory, loraflow / copy)
        peft, peft_memory = measure_median([sys.executable, "-c", PEFT, str(base), str(adapter), str(root / "peft")], 1)
        print_row("peft merge_and_unload + save_pretrained, whole process", peft, peft_memory, peft / copy)
        print_row("peft / loraflow", peft / loraflow)
        tensors, different = compare(outs[-1], root / "peft")
        print(f"{tensors} tensors compared bit for bit, {different} differ")


if __name__ == "__main__":
    main()
