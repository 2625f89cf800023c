"""What a run reads from files that may change while it runs: the text is read once, or a change is refused."""

import json
from pathlib import Path

import pytest

from loraflow.config import load_recipe
from loraflow.config.load import read_recipe
from loraflow.config.recipe_text import recipes_read_once
from loraflow.failures import BadConfig, BadData, BadModel, Network
from loraflow.registry.runs import RunRecord, read_runs
from loraflow.store import LocalStore
from loraflow.tasks import run as run_module
from loraflow.tasks.run import open_run
from tests.conftest import RECIPE, write_chats


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose dataset and base are just large enough to be looked up."""
    write_chats(tmp_path / "data" / "train.jsonl", range(3))
    (tmp_path / "base").mkdir()
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model.safetensors").touch()
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.format(data=tmp_path / "data", base=tmp_path / "base", store=tmp_path / "store"))
    return file


def record_of(recipe: Path) -> RunRecord:
    (record,) = read_runs(LocalStore(recipe.parent / "store"))
    return record


def test_a_recipe_deleted_during_a_run_is_recorded_with_its_overrides(recipe):
    text = recipe.read_text()
    with open_run(str(recipe), {"training_config.seed": 3}, []):
        recipe.unlink()
    record = record_of(recipe)
    assert (record.state, record.error) == ("done", None)
    assert record.recipe_text == text and record.overrides == {"training_config.seed": 3}
    assert record.section("training_config")["seed"] == 3


def test_a_recipe_edited_during_a_run_is_recorded_as_it_ran(recipe):
    text = recipe.read_text()
    with open_run(str(recipe), {}, []) as run:
        recipe.write_text(text.replace("max_steps: 6", "max_steps: 7"))
    assert record_of(recipe).recipe_text == text
    assert run.workspace.recipe.training_config.max_steps == 6


def test_a_recipe_deleted_between_the_commands_check_and_the_flow_is_still_run(recipe):
    with recipes_read_once():
        before = load_recipe(recipe, {"name": "checked"})
        recipe.unlink()
        assert read_recipe(recipe, {"name": "checked"}).recipe == before
        with open_run(str(recipe), {}, []):
            pass
    assert record_of(recipe).state == "done"
    with pytest.raises(BadConfig, match="no such recipe"):
        load_recipe(recipe)


@pytest.mark.parametrize("cause", ["the dataset is missing", "data.add fails", "the branch cannot be fetched"])
def test_a_run_that_fails_before_its_first_stage_has_a_record(recipe, monkeypatch, cause):
    settings, find = {}, None
    if cause == "the dataset is missing":
        settings = {"data.source": "nowhere"}
    elif cause == "data.add fails":
        settings = {"data.add": True, "data.source": "data.dvc"}
        monkeypatch.setattr(run_module, "_add_data", lambda workspace: _raise(BadData("no room")))
    else:
        find = lambda recipe: _raise(Network("git does not answer"))  # noqa: E731
    with pytest.raises((BadData, Network)), open_run(str(recipe), settings, [], find):
        raise AssertionError("no stage may run")
    record = record_of(recipe)
    assert record.state == "failed" and record.error and record.overrides == settings


def _raise(error: Exception) -> None:
    raise error


def test_settings_that_are_found_after_the_start_are_recorded(recipe):
    with open_run(str(recipe), {"data.rev": "HEAD"}, [], lambda recipe: {"data.rev": None}) as run:
        assert run.workspace.recipe.data.rev is None
    assert record_of(recipe).overrides == {"data.rev": None}


def test_an_old_record_without_overrides_is_read(recipe):
    with open_run(str(recipe), {}, []):
        pass
    (file,) = (recipe.parent / "store" / "runs").glob("*.json")
    values = json.loads(file.read_text())
    del values["overrides"], values["checksum"]  # records of that time had none
    file.write_text(json.dumps(values))
    assert record_of(recipe).overrides == {}


def test_a_metric_edited_during_a_run_is_refused(tmp_path):
    from loraflow.evaluation.metric_modules import module_hashes, require_unchanged
    from loraflow.store.files import HashMemo

    script = tmp_path / "mine" / "mine.py"
    script.parent.mkdir()
    script.write_text("first = 1\n")
    name = str(script.parent)
    hashes = module_hashes([name], HashMemo(None))
    require_unchanged(name, hashes[name])
    script.write_text("first = 2\n")
    with pytest.raises(BadConfig, match="was edited during the run"):
        require_unchanged(name, hashes[name])


def test_a_base_changed_during_a_run_is_refused(recipe):
    from loraflow.base.resolve import _require_unchanged, locate
    from loraflow.config.stage_configs import ResolveBaseConfig
    from loraflow.store.files import HashMemo

    found = locate(load_recipe(recipe).base, HashMemo(None))
    config = ResolveBaseConfig.of({"source": found.source, "repack": None, "trust_remote_code": False})
    _require_unchanged(found.origin, config)
    (recipe.parent / "base" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(BadModel, match="changed during the run"):
        _require_unchanged(found.origin, config)
