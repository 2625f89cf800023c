"""The heavy stages on a CUDA device: the code path of configs/phi3-mini.yaml, without a hub.

make test-gpu        prints what docs/performance.md keeps, with card and versions
"""

import json
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RECIPE = """\
name: gpu
data: {{source: {data}, train: [train.jsonl], heldout: [heldout.jsonl]}}
base: {{model: {base}}}
training_config:
  learning_rate: 1.0e-3
  max_steps: {steps}
  per_device_train_batch_size: 8
  max_length: 512
  packing: true
  gradient_checkpointing: {checkpointing}
  logging_steps: 1
  save_steps: 1000
peft_config: {{lora_dropout: 0.0, target_modules: [qkv_proj, o_proj, gate_up_proj, down_proj]}}
evaluation: {{metrics: [token_loss, exact_match, json_fields], max_rows: 16, max_new_tokens: 16, dtype: bfloat16}}
merge: {{verify_prompts: 2, max_kl: 0.1}}
runtime: {{store: {store}, device: cuda}}
"""


def walk(folder: Path, base: Path, steps: int, checkpointing: bool = False, **overrides):
    """Run data to scores; return (the walker, refs by stage, seconds by stage)."""
    from loraflow.config import parse_recipe
    from loraflow.direct import Direct
    from tests.conftest import chat

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train.jsonl", range(2000)), ("heldout.jsonl", range(5000, 5016))):
        (data / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    text = RECIPE.format(
        data=data, base=base, store=folder / "store", steps=steps, checkpointing=str(checkpointing).lower()
    )
    direct = Direct(parse_recipe(text, overrides=overrides))
    refs, seconds = {}, {}

    def stage(name, **inputs):
        started = time.perf_counter()
        refs[name] = direct.stage(name, **inputs)
        seconds[name] = round(time.perf_counter() - started, 1)
        return refs[name]

    rows = stage("check_dataset", dataset=stage("version_dataset"))
    resolved = stage("resolve_base")
    adapter = stage("train", tokens=stage("tokenize", rows=rows, base=resolved), base=resolved)
    merged = stage("merge", base=resolved, adapter=adapter)
    stage("verify", base=resolved, adapter=adapter, merged=merged, rows=rows)
    stage("evaluate", model=merged, rows=rows)
    return direct, refs, seconds


def losses(direct, refs) -> list[float]:
    curve = direct.jobs.store.path(refs["train"]) / "telemetry" / "curves.jsonl"
    return [row["loss"] for line in curve.read_text().splitlines() if "loss" in (row := json.loads(line))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.conftest import build_phi3

    return build_phi3(tmp_path_factory.mktemp("base") / "phi3", hidden_size=256, intermediate_size=512)


def test_all_heavy_stages_run_on_the_gpu_and_agree_with_the_stock_engine(tmp_path, tiny):
    direct, refs, _ = walk(tmp_path / "fast", tiny, 12)
    fast = losses(direct, refs)
    stock = losses(*walk(tmp_path / "stock", tiny, 12, **{"runtime.engine": "stock"})[:2])
    assert fast == pytest.approx(stock, rel=0.02), "bf16 on both sides"
    assert fast[-1] < fast[0]
    figures = direct.jobs.store.manifest(refs["verify"]).figures
    assert figures["mean_kl"] < 0.05
    assert 0 <= direct.jobs.store.manifest(refs["evaluate"]).figures["heldout.exact_match"] <= 1


def test_the_gpu_gives_what_the_cpu_gives(tmp_path, tiny):
    exact = {"base.dtype": "float32", "training_config.bf16": False}
    gpu = losses(*walk(tmp_path / "gpu", tiny, 6, **exact)[:2])
    cpu = losses(*walk(tmp_path / "cpu", tiny, 6, **exact, **{"runtime.device": "cpu"})[:2])
    assert gpu == pytest.approx(cpu, abs=5e-3)


def test_phi3_mini_in_its_own_size_trains_merges_and_answers(tmp_path, capsys):
    """3.82 billion random parameters, packed rows, checkpointing as in configs/phi3-mini.yaml."""
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

    from tests.conftest import build_tokenizer

    base = tmp_path / "base"
    base.mkdir()
    build_tokenizer(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Phi3ForCausalLM(Phi3Config(tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
                                           bos_token_id=1, sliding_window=2047))  # fmt: skip
        torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(base)
    del model
    torch.cuda.empty_cache()
    direct, refs, seconds = walk(tmp_path, base, 20, checkpointing=True, **{"training_config.learning_rate": 1e-4})
    manifest = direct.jobs.store.manifest(refs["train"])
    assert manifest.figures["trainable_parameters"] == 25_165_824
    assert len(losses(direct, refs)) == 20
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {manifest.provenance['versions']}")
        print(f"seconds by stage: {seconds}; losses {losses(direct, refs)[0]} → {losses(direct, refs)[-1]}")
        print(f"verify: {direct.jobs.store.manifest(refs['verify']).figures}")
