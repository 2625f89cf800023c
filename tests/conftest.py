"""Shared fixtures, small and real: a random Phi-3 with a tokenizer and the stock template, a dataset, an adapter."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from loraflow.store import LocalStore

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts a background job with SIGINT ignored, and every child inherits that. Tests send SIGINT to children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # More threads than cores would slow down all test processes.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
# A deadline for each example fails where other processes use the processor too.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, and the flow's in two parts: what a part shares is built once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "the other flows" if file.startswith("tests/flows/") and "finetune" not in file else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _no_signal_stays_ignored() -> Iterator[None]:
    """Children inherit an ignored signal, so a test that leaves one would break later tests in the same process."""
    yield
    left = [number.name for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_IGN]
    for name in left:
        signal.signal(getattr(signal, name), getattr(signal, "default_int_handler" if name == "SIGINT" else "SIG_DFL"))
    assert not left, "the test left signals ignored"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave the imported libraries out of garbage collections: the one at the end of a training took a third of it."""
    gc.freeze()


# Phi-3's template on the hub. Control tokens strip the white space after them, and no {% generation %} marks the answer.
PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CONTROL = ["<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "likes",
    "sees",
    "house",
    "tree",
    "please",
    "answer",
    "what",
    "is",
    "the",
    "of",
    "and",
    "yes",
    "no",
]


def chat(i: int) -> dict:
    """Return a small chat; the answer follows from the question."""
    a, b = WORDS[i % 9], WORDS[(i * 7 + 3) % 11]
    return {
        "messages": [
            {"role": "user", "content": f"what is the {a} of {b} {i}"},
            {"role": "assistant", "content": json.dumps({"a": a, "b": b})},
        ]
    }


def write_chats(file: Path, numbers: Iterable[int]) -> None:
    """Write the chats of these numbers as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))


def build_tokenizer(folder: Path, template: str = PHI3_TEMPLATE) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = [json.dumps(chat(i)) for i in range(200)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(t, rstrip=t != "<|endoftext|>", special=True) for t in CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def build_phi3(folder: Path, *, layers: int = 2, dtype: str = "bfloat16", seed: int = 0, **config) -> Path:
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    values = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(Phi3Config(**{**values, **config})).to(getattr(torch, dtype))
    stops = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|end|>")]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server; its settings are in the environment."""
    from importlib.util import find_spec

    from tests.object_server import program, running

    if find_spec("boto3") is None or program() is None:
        pytest.skip("`make test-s3` installs boto3 and a real S3 server")

    with running(tmp_path_factory.mktemp("s3") / "server") as server:
        yield server


@pytest.fixture
def bucket_uri(s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The uri of an empty store in a bucket, with an empty local cache."""
    monkeypatch.setenv("LORAFLOW_CACHE", str(tmp_path / "cache"))
    return s3_server.new_store_uri()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """An empty store in a folder."""
    from loraflow.store import LocalStore

    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="session")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 of two layers, bf16, with grouped-query attention."""
    return build_phi3(tmp_path_factory.mktemp("base") / "tiny-phi3")


@pytest.fixture(scope="session")
def quick_phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 in float32, several times faster than bf16 on a CPU without bf16 units."""
    return build_phi3(tmp_path_factory.mktemp("base") / "quick-phi3", dtype="float32")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with 80 chats to train on and 20 held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_chats(folder / "train.jsonl", range(80))
    write_chats(folder / "heldout.jsonl", range(1000, 1020))
    return folder


RECIPE = """\
name: tiny
data:
  source: {data}
  train: [train.jsonl]
  heldout: [heldout.jsonl]
base:
  model: {base}
training_config:
  learning_rate: 1.0e-2
  max_steps: 6
  per_device_train_batch_size: 4
  max_length: 128
  gradient_checkpointing: false
  logging_steps: 1
  save_steps: 2
peft_config:
  r: 4
  lora_alpha: 8
  lora_dropout: 0.0
  target_modules: [qkv_proj, o_proj, gate_up_proj, down_proj]
evaluation:
  metrics: [token_loss, exact_match, json_fields]
  max_rows: 8
  max_new_tokens: 8
merge:
  verify_prompts: 2
gate:
  primary: token_loss
register:
  model: tiny
runtime:
  store: {store}
  eval_batch_size: 8
  threads: 1
"""


@pytest.fixture
def recipe(tmp_path: Path, dataset: Path, phi3: Path) -> Path:
    """A recipe over the small parts, with a store of its own."""
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(data=dataset, base=phi3, store=tmp_path / "store"))
    return file
