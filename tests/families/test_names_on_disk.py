"""A folder that save_pretrained wrote, resolved and merged: its weights keep the names that they have on the disk.

For some architectures these differ from the names in memory (transformers' conversion of weights).
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from loraflow.adapters.lora_config import lora_config
from loraflow.adapters.merge_folders import merge
from loraflow.adapters.validation import check_adapter
from loraflow.base.stored_weights import model_without_weights
from loraflow.config.lora import PeftConfig
from tests.conftest import build_tokenizer
from tests.families.test_matrix import EXPERTS
from tests.families.tiny import FAMILIES, family_config
from tests.unit.base.test_base import resolve_base

VOCABULARY = 507  # of the tiny tokenizer


def names_on_disk(folder):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resolved_base_keeps_its_names_on_the_disk_and_merges_bit_for_bit(family, tmp_path):
    if FAMILIES[family][0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    build_tokenizer(tmp_path / "saved")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, vocab_size=VOCABULARY), dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    resolve_base(tmp_path / "saved", tmp_path / "base")
    names = names_on_disk(tmp_path / "base")
    assert names == names_on_disk(tmp_path / "saved") and names

    more = {"target_parameters": EXPERTS["peft_config__target_parameters"]} if "experts adapted" in family else {}
    settings = lora_config(PeftConfig(lora_dropout=0, **more), model_without_weights(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", tmp_path / "base")

    (tmp_path / "merged").mkdir()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert names_on_disk(tmp_path / "merged") == names
    resolve_base(tmp_path / "merged", tmp_path / "next")  # a fine-tune of the fine-tune
    for file in (tmp_path / "next").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    merged_weights = merged.state_dict()
    assert merged_weights.keys() == by_peft.keys() and all(
        torch.equal(merged_weights[name], by_peft[name]) for name in merged_weights
    )
