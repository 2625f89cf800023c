"""A configuration that transformers cannot use is refused in one sentence, before weights are copied."""

import json

import pytest

from loraflow.base.architecture import read_config
from loraflow.base.usable import refuse_unusable_folder
from loraflow.failures import BadModel

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
         "num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 300}  # fmt: skip


def written(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 66}, "66"),
        ({"rope_parameters": "linear"}, ""),
    ],
)
def test_a_configuration_that_transformers_does_not_accept_is_refused_with_its_reason(tmp_path, change, reason):
    with pytest.raises(BadModel, match="transformers cannot use the base's configuration") as caught:
        refuse_unusable_folder(written(tmp_path, {**LLAMA, **change}), trust=False, known_to_transformers=True)
    assert reason in caught.value.got and "\n" not in caught.value.got


def test_a_model_with_several_language_models_is_refused(tmp_path):
    parts = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
             "decoder": {"model_type": "musicgen_melody_decoder"}}  # fmt: skip
    values = {"architectures": ["MusicgenMelodyForConditionalGeneration"], "model_type": "musicgen_melody", **parts}
    with pytest.raises(BadModel, match="cannot use the base's configuration"):
        refuse_unusable_folder(written(tmp_path, values), trust=False, known_to_transformers=True)


def test_a_usable_configuration_is_read(tmp_path):
    assert read_config(written(tmp_path, LLAMA)).hidden_size == 64


def test_an_encoder_decoder_is_refused_though_its_file_does_not_say_that_it_is_one(tmp_path):
    values = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    with pytest.raises(BadModel, match="encoder-decoder"):
        refuse_unusable_folder(written(tmp_path, values), trust=False, known_to_transformers=True)


@pytest.mark.parametrize("kind", ["qwen2_vl", "paligemma", "llava", "idefics3"])
def test_a_model_for_images_whose_language_model_cannot_be_loaded_alone_is_refused(tmp_path, kind):
    values = {"architectures": ["AnyForConditionalGeneration"], "model_type": kind}
    with pytest.raises(BadModel, match="reads images") as caught:
        refuse_unusable_folder(written(tmp_path, values), trust=False, known_to_transformers=True)
    assert caught.value.got == kind
