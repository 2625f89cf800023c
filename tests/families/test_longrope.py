"""LongRoPE: a document has the angles that transformers gives it alone, in training, in scoring and in answers."""

import inspect
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from loraflow.base.load import load_tokenizer
from loraflow.base.longrope import compute_angles_per_document, document_lengths, fixed_angles
from loraflow.data.tokens.loss_mask import Encoded
from loraflow.data.tokens.positions import Positions
from loraflow.data.tokens.token_files import TokenRows
from loraflow.evaluation import greedy_decoding
from loraflow.evaluation.generation import generate_answers
from loraflow.evaluation.likelihood import answer_losses
from loraflow.evaluation.prefix_cache import group_rows
from loraflow.failures import BadModel
from loraflow.hardware.attention import DOCUMENTS
from loraflow.training import attention, train
from loraflow.training.collation import concatenated, packed, padded
from tests.families.test_cells import documents
from tests.families.tiny import family_config
from tests.unit.training import test_training
from tests.unit.training.test_training import build_phi3, chat, run, tokenize

SWITCH = 16
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    "original_max_position_embeddings": SWITCH, "short_mscale": 1.1, "long_mscale": 1.3,
}  # fmt: skip
NAMES = ["Phi-3 mini 128k", "Phi-3.5 mini", "Phi-4 mini", "Phi-3.5-MoE"]
LENGTHS = (5, 30, 16, 17, 1, 24)


def build(name, attention_name="sdpa", **more):
    options = {"rope_parameters": ROPE, "original_max_position_embeddings": SWITCH, **more}
    if name == "Phi-3.5-MoE":  # with a factor for each side as well
        sizes = {
            key: value
            for key, value in family_config("Phi-4").to_dict().items()
            if key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        }
        config = AutoConfig.for_model(
            "phimoe", **sizes, intermediate_size=32, max_position_embeddings=512, num_local_experts=2, pad_token_id=0,
            **options,
        )  # fmt: skip
    else:
        config = family_config(name, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # wide enough that angles matter
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.15, generator=generator)
    return model.eval()


def with_adapter(model):
    torch.manual_seed(2)
    targets = "all-linear" if model.config.model_type == "phi3" else ["q_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def loss_and_gradients(model, inputs):
    model.zero_grad()
    total = 0.0
    for values, labels in inputs:
        logits = model(**values, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def of_grid(grid):
    return {name: value for name, value in grid.items() if name != "labels"}, grid["labels"]


def of_concatenated(docs):
    batch = concatenated([docs], 128, len(docs) + 2, max(LENGTHS), 0)
    labels = torch.full((1, 128), -100)
    labels[0, batch["loss_index"] + 1] = batch["targets"]
    return {name: value for name, value in batch.items() if name not in ("loss_index", "targets")}, labels


@pytest.mark.parametrize("layout", ["padded", "packed", "concatenated"])
@pytest.mark.parametrize("name", NAMES)
def test_documents_on_both_sides_of_the_switch_equal_each_document_alone_in_loss_and_gradients(name, layout):
    """The oracle is transformers, without our angles, on one document at a time."""
    if layout == "concatenated" and name == "Phi-3.5-MoE":
        pytest.skip("the fast engine does not train it")
    attention.register()
    docs = documents(LENGTHS)
    alone = with_adapter(build(name))
    expected = loss_and_gradients(alone, [of_grid(padded([[doc]], 0)) for doc in docs])
    inputs = {
        "padded": lambda: [of_grid(padded([[doc] for doc in docs], 0, with_positions=True))],
        "packed": lambda: [of_grid(packed([docs[:3], docs[3:]], 80, 0))],
        "concatenated": lambda: [of_concatenated(docs)],
    }[layout]()
    model = with_adapter(build(name, DOCUMENTS if layout == "concatenated" else "sdpa"))
    together = loss_and_gradients(model, inputs)
    assert together[0] != pytest.approx(expected[0], rel=1e-4), "transformers has one kind of angles for all of them"
    assert compute_angles_per_document(model, SWITCH)
    loss, gradients = loss_and_gradients(model, inputs)
    assert gradients.keys() == expected[1].keys()
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for weight, gradient in gradients.items():
        assert (gradient - expected[1][weight]).norm() < 2e-5 * expected[1][weight].norm(), weight


def test_the_padding_of_packed_rows_does_not_change_the_angles_of_short_documents():
    docs = [doc for doc in documents(LENGTHS) if len(doc[0]) <= SWITCH]
    grid = packed([docs], 80, 0)
    model = build("Phi-4 mini")
    ids = torch.from_numpy(docs[0][0])
    with torch.no_grad():
        alone = model(ids[None], use_cache=False).logits[0]
        changed = model(grid["input_ids"], position_ids=grid["position_ids"], use_cache=False).logits[0, : len(ids)]
        assert Positions(512, SWITCH).switched_angles([len(ids) for ids, _ in docs], 80) == SWITCH
        compute_angles_per_document(model, SWITCH)
        found = model(grid["input_ids"], position_ids=grid["position_ids"], use_cache=False).logits[0, : len(ids)]
    assert (changed - alone).abs().max() > 1e-3, "58 positions of padding are beyond the switch"
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "row_length", "switch"),
    [([3, 16], None, None), ([3, 17], None, 16), ([17, 20], None, None), ([17, 20], 64, None), ([3, 16], 16, None),
     ([3, 16], 17, 16), ([], 64, None)],
)  # fmt: skip
def test_angles_are_computed_per_document_where_a_call_may_have_both_sides(lengths, row_length, switch):
    assert Positions(512, SWITCH).switched_angles(lengths, row_length) == switch
    assert Positions(512).switched_angles(lengths, row_length) is None


def test_the_length_of_a_document_follows_from_the_position_ids():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert document_lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2, 2, 2], [8] * 8]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = build_phi3(tmp_path_factory.mktemp("b") / "phi3", dtype="float32")
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    factors = [1.0] * (config["hidden_size"] // heads // 2)
    rope = {
        **ROPE,
        "short_factor": factors,
        "long_factor": [5.0] * len(factors),
        "original_max_position_embeddings": 24,
    }
    config |= {"rope_parameters": rope, "original_max_position_embeddings": 24, "sliding_window": None}
    config.pop("rope_scaling", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def rows_of_both_sides(base, tmp_path, monkeypatch):
    def longer(number):
        messages = chat(number)["messages"]
        return {"messages": [{**messages[0], "content": messages[0]["content"] * (1 + number % 3)}, *messages[1:]]}

    monkeypatch.setattr(test_training, "chat", longer)
    shards = tokenize(base, tmp_path / "rows")
    lengths = TokenRows(shards / "train").lengths
    assert lengths.min() <= 24 < lengths.max()
    return shards


def test_both_engines_and_all_layouts_train_the_same_adapter_on_rows_of_both_sides(base, rows_of_both_sides, tmp_path):
    options, shards = {"training_config__learning_rate": 1e-3, "training_config__max_steps": 4}, rows_of_both_sides
    fast, losses = run(base, shards, tmp_path / "fast", **options)
    for name, more in {"stock": {"runtime__engine": "stock"}, "one": {"runtime__micro_batch": 1}}.items():
        other, found = run(base, shards, tmp_path / name, **options, **more)
        assert losses == pytest.approx(found, abs=2e-4)
        assert all(torch.allclose(fast[key], other[key], rtol=0, atol=1e-5) for key in fast)


def test_code_that_comes_with_a_model_is_refused_on_rows_of_both_sides(base, rows_of_both_sides, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compute_angles_per_document", lambda model, switch: False)
    with pytest.raises(BadModel, match="both sides of the model's longrope switch"):
        run(base, rows_of_both_sides, tmp_path / "run")


# Answers and scores


def generated_alone(model, prompts, new_tokens):
    with torch.inference_mode():
        return [
            model.generate(  # type: ignore[operator]
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]  # fmt: skip


def prompts_of(size, shared):
    draw = np.random.default_rng(0)
    first = draw.integers(5, size, shared).tolist()
    return [first + draw.integers(5, size, length).tolist() for length in (3, 22, 50, 8, 20, 28, 21, 40, 9, 4)]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shared", [0, 18])
def test_answers_equal_those_of_each_prompt_alone_before_at_and_behind_the_switch(base, recorded, shared, monkeypatch):
    tokenizer = load_tokenizer(base)
    model = build("Phi-3.5 mini", vocab_size=len(tokenizer), rope_parameters={**ROPE, "original_max_position_embeddings": 32}, original_max_position_embeddings=32)  # fmt: skip
    prompts = prompts_of(len(tokenizer), shared)
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in generated_alone(model, prompts, 6)
    ]
    calls = []
    decode = greedy_decoding.decode
    monkeypatch.setattr(greedy_decoding, "is_supported", lambda model: recorded)
    monkeypatch.setattr(
        greedy_decoding, "decode", lambda *args, **more: calls.append(len(args[1])) or decode(*args, **more)
    )
    found = generate_answers(model, tokenizer, prompts, stop_ids=[], max_new_tokens=6, batch_size=4)
    assert [answer["text"] for answer in found] == texts
    groups = group_rows([len(prompt) for prompt in prompts], 4, 32, 6)
    assert {group.side for group in groups} == {"short", "long", "unchanged"}
    recordable = sum(len(group.rows) for group in groups if group.side != "unchanged")
    assert sum(calls) == (recordable if recorded else 0), "recorded where prompt and answer lie on one side"
    # transformers chooses by itself again
    assert [texts[0]] == [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in generated_alone(model, prompts[:1], 6)]  # fmt: skip


@pytest.mark.parametrize("shared", [0, 18])
def test_scores_equal_those_of_each_row_alone(base, shared):
    size = len(load_tokenizer(base))
    model = build("Phi-4 mini", vocab_size=size)
    rows = [np.array(ids, np.int32) for ids in prompts_of(size, shared)]
    encoded = [
        Encoded(ids, np.where(np.arange(len(ids)) < len(ids) - 2, -100, ids).astype(np.int32), 1) for ids in rows
    ]
    expected = []
    for row in encoded:
        with torch.no_grad():
            logits = model(torch.from_numpy(row.ids.astype("int64"))[None], use_cache=False).logits[0, :-1]
        labels = torch.from_numpy(row.labels[1:].astype("int64"))
        expected.append(float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum")))
    found = [loss for loss, _ in answer_losses(model, encoded, 0, 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fixed_angles_are_those_of_a_call_on_that_side_and_are_undone(name):
    model = build(name)
    rotary = model.get_decoder().rotary_emb
    x = torch.zeros(1)
    long_row, short_row = torch.arange(40)[None], torch.arange(12)[None]
    of_long, of_short = rotary(x, long_row), rotary(x, short_row)
    with fixed_angles(model, SWITCH, "long"):
        for ours, theirs in zip(rotary(x, short_row), of_long, strict=True):
            torch.testing.assert_close(ours, theirs[:, :12], rtol=0, atol=0)
    with fixed_angles(model, SWITCH, "short"):
        for ours, theirs in zip(rotary(x, short_row), of_short, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert "forward" not in vars(rotary) and inspect.ismethod(rotary.forward)
    torch.testing.assert_close(rotary(x, long_row)[0], of_long[0], rtol=0, atol=0)
