"""Every family end to end, tiny and on the CPU: train, resume, save, load with PEFT, merge, load with transformers.

What a cell proves is in the test's name. `docs/models.md` is generated from the same families (tests/families/page.py).
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from loraflow.adapters.merge_folders import merge
from loraflow.adapters.validation import check_adapter
from loraflow.store.checkpoints import FOLDER
from tests.conftest import WORDS
from tests.families.tiny import FAMILIES, family_config
from tests.unit.training.test_training import build_phi3, run, tokenize
from tests.variants import _documents, _loss, _validation_loss

STEPS = 4
SETTINGS = {
    "data__validation_fraction": 0.1,
    "training_config__eval_strategy": "steps",
    "training_config__eval_steps": STEPS,
    "training_config__max_steps": STEPS,
    "peft_config__target_modules": "all-linear",
}
CHATS, TRAINED = 8, 30  # chats that a model learns by heart, and the steps in which it does
OVERFIT = {
    **SETTINGS,
    "training_config__eval_steps": TRAINED,
    "training_config__max_steps": TRAINED,
    "training_config__save_steps": TRAINED - 2,
    "training_config__per_device_train_batch_size": CHATS,
    "training_config__learning_rate": 2e-2,
    "peft_config__r": 16,
    "peft_config__lora_alpha": 16,
}
EXPERTS = {"peft_config__target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def short_chat(number):
    question, *answer = (WORDS[at % len(WORDS)] for at in (number, 3 * number + 1, 5 * number + 2, 7 * number))
    said = {"role": "assistant", "content": " ".join(answer)}
    return {"messages": [{"role": "user", "content": f"what is the {question}"}, said]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tokenizer, and chats that were tokenized with it: the same for all families."""
    folder = tmp_path_factory.mktemp("prepared")
    phi3 = build_phi3(folder / "phi3", dtype="float32")
    short = tokenize(phi3, folder / "short", chats=CHATS, chat_of=short_chat, **OVERFIT)
    return SimpleNamespace(phi3=phi3, short=short)


def build(family, prepared, folder):
    size = json.loads((prepared.phi3 / "config.json").read_text())["vocab_size"]
    shutil.copytree(prepared.phi3, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family_config(family, vocab_size=size), dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


def widened(base):
    """Widen random weights: at their usual size, no head can be as certain of a token as eight chats ask for."""
    generator, model = torch.Generator().manual_seed(1), load(base)
    of_tokens = 0.25 / getattr(model.config, "embedding_multiplier", 1.0)  # Granite 3's is 12
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "A_log" not in name and "vision" not in name:
                size = of_tokens if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0.12
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    model.save_pretrained(base)
    return base


def require_answers(merged, base):
    """Require that a merged model answers each chat as it was trained, and stops there, in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for number in range(CHATS):
        question, answer = short_chat(number)["messages"]
        asked = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            said = merged.generate(**asked, max_new_tokens=48, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(said) == answer["content"] + "<|end|>"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_resumes_and_merges_bit_for_bit_and_loads_with_plain_libraries(family, prepared, tmp_path):
    if FAMILIES[family][0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    settings, shards = {**OVERFIT, **(EXPERTS if "experts adapted" in family else {})}, prepared.short
    base = widened(build(family, prepared, tmp_path / "base"))
    trained, losses = run(base, shards, tmp_path / "straight", **settings)
    assert losses[TRAINED] < losses[1], "it learns"

    # What a killed run leaves behind: its work folder, with the checkpoint before the last one.
    shutil.copytree(tmp_path / "straight" / "work", tmp_path / "resumed" / "work")
    shutil.rmtree(tmp_path / "resumed" / "work" / FOLDER / f"checkpoint-{TRAINED}")
    assert (tmp_path / "resumed" / "work" / FOLDER / f"checkpoint-{TRAINED - 2}").exists()
    resumed, _ = run(base, shards, tmp_path / "resumed", **settings)
    assert resumed.keys() == trained.keys() and all(torch.equal(trained[name], resumed[name]) for name in trained)

    adapter = tmp_path / "straight" / "out" / "adapter"
    check_adapter(adapter, base)
    in_peft = PeftModel.from_pretrained(load(base), str(adapter)).eval()
    exported = _loss(in_peft, _documents(shards / "validation", 5))
    # For mixtures, trl adds the router's loss to the validation loss too: 0.001 times a number of about 2.
    tolerance = 0.005 if getattr(in_peft.config.get_text_config(), "num_experts", 0) else 1e-4
    assert exported == pytest.approx(_validation_loss(tmp_path / "straight"), abs=tolerance), (
        "what was trained was saved"
    )

    (tmp_path / "merged").mkdir()
    merge(base, adapter, tmp_path / "merged")
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = in_peft(input_ids=ids).logits
        by_peft = in_peft.merge_and_unload()
        merged = load(tmp_path / "merged")
        found = merged(input_ids=ids).logits
    theirs, ours = by_peft.state_dict(), merged.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    require_answers(merged, base)
