"""The command that a refusal names computes the same model: it loads to the recipe that the run recorded."""

import re
import shlex
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from loraflow.cli import cli, parse_overrides
from loraflow.config import load_recipe
from loraflow.execution.repair import find_damage
from loraflow.failures import CorruptArtifact
from loraflow.registry import PromotionLog
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.store import LocalStore, Ref
from tests.promoted_models import add_model, promote, record_run

REF = Ref(stage="merge", fingerprint="f" * 64, digest="d" * 64, uri="")


def record(store, recipe, number=1, state="computed", **overrides):
    """Write the record of a run that made a merged model."""
    run = f"20260101-00000{number}-abcdef"
    stage = StageRun(stage="merge", state=state, fingerprint=REF.fingerprint, digest=REF.digest)
    loaded = load_recipe(recipe, overrides)
    values = {"run": run, "recipe": loaded.name, "recipe_text": recipe.read_text(), "stages": [stage]}
    resolved = loaded.model_dump(by_alias=True, mode="json")
    store.write_document(f"runs/{run}.json", RunRecord(resolved=resolved, **values).document)
    return resolved


def load(command):
    """Return what `loraflow run` would load."""
    program, run, file, *options = shlex.split(command)
    assert (program, run, set(options[::2])) in [("loraflow", "run", {"--set"}), ("loraflow", "run", set())]
    return load_recipe(file, parse_overrides(tuple(options[1::2]))).model_dump(by_alias=True, mode="json")


OVERRIDES = {
    "training_config.learning_rate": 2e-5,
    "peft_config.target_modules": ["qkv_proj", "o_proj"],
    "data.system": 'it\'s "brief": yes, é',
    "merge.dtype": "float32",
    "training_config.bf16": False,
    "data.columns": {"prompt": "question"},
}


@pytest.mark.parametrize("overrides", [{}, *({key: value} for key, value in OVERRIDES.items())])
def test_the_command_has_the_settings_of_the_run(recipe, tmp_path, monkeypatch, overrides):
    store = LocalStore(tmp_path / "store")
    resolved = record(store, recipe, **overrides)
    (tmp_path / "configs").mkdir()
    shutil.move(recipe, tmp_path / "configs" / "another name.yaml")
    monkeypatch.chdir(tmp_path)
    text = how_to_rebuild(store, REF)
    assert load(re.match("`(.*)` rebuilds it", text)[1]) == resolved


def test_a_recipe_that_was_edited_since_is_run_with_the_settings_of_before(recipe, tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "store")
    resolved = record(store, recipe, **{"training_config.seed": 3})
    recipe.write_text(recipe.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 5.0e-2"))
    (tmp_path / "configs").mkdir()
    shutil.move(recipe, tmp_path / "configs" / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert load(re.match("`(.*)` rebuilds it", how_to_rebuild(store, REF))[1]) == resolved


def test_a_recipe_that_is_gone_is_written_from_the_record(recipe, tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "a store")
    resolved = record(store, recipe, **{"training_config.seed": 3})
    recipe.unlink()
    monkeypatch.chdir(tmp_path)
    write, run = re.findall("`([^`]*)`", how_to_rebuild(store, REF))
    subprocess.run(
        f"loraflow() {{ cat '{store.root}/runs/20260101-000001-abcdef.json'; }}\n{write}", shell=True, check=True
    )
    assert load(run) == {**resolved, "runtime": {**resolved["runtime"], "store": store.uri}}


def test_the_command_computes_in_the_store_that_lost_the_model_although_it_was_moved_since(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    resolved = record(LocalStore(tmp_path / "store"), recipe)
    (tmp_path / "store").rename(tmp_path / "restored")
    command = re.match("`(.*)` rebuilds it", how_to_rebuild(LocalStore(tmp_path / "restored"), REF))[1]
    assert load(command)["runtime"] == {**resolved["runtime"], "store": str(tmp_path / "restored")}


def test_a_store_that_the_run_named_by_a_relative_path_is_not_named_again(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "store"), "store"))
    store = LocalStore(tmp_path / "store")
    record(store, recipe)
    assert "`loraflow run tiny.yaml` rebuilds it" in how_to_rebuild(store, REF)
    assert "`loraflow run tiny.yaml --force train` rebuilds it" in how_to_rebuild(store, REF, " --force train")


def test_of_several_runs_the_one_that_computed_the_model_is_named(recipe, tmp_path):
    store = LocalStore(tmp_path / "store")
    for number, state in enumerate(("cached", "computed", "cached"), 1):
        record(store, recipe, number, state)
    assert "run 20260101-000002-abcdef" in how_to_rebuild(store, REF)


def test_without_a_record_the_log_and_a_rollback_are_named(tmp_path):
    assert "loraflow rollback" in how_to_rebuild(LocalStore(tmp_path), REF)


def test_repair_lists_what_no_run_can_recompute_and_damaged_logs(tmp_path):
    store = LocalStore(tmp_path / "store")
    log, unknown, recorded = PromotionLog(store, "tickets"), add_model(store, "a"), add_model(store, "b")
    promote(log, unknown)
    promote(log, recorded)
    record_run(store, "20260101-000001-abcdef", recorded)
    for ref in (unknown, recorded):
        shutil.rmtree(store.path(ref))
    damage = find_damage(store)
    assert damage.repairable == [] and damage.logs == []
    assert {lost.ref.digest: lost.why_not.split(":")[0] for lost in damage.irreparable} == {
        unknown.digest: "no run record names it", recorded.digest: "The recipe has 1 problem",
    }  # fmt: skip
    (store.root / "registry" / "tickets" / "log" / "000002.json").unlink()
    done = CliRunner().invoke(cli, ["repair", "--yes", "--store", store.uri])
    assert isinstance(done.exception, CorruptArtifact) and done.exception.exit_code == 1
    assert "lost       promotion log" in done.stdout and "backup" in done.stdout
