"""Publishing a run's model to a stand-in of the hub: one commit, of facts and weights, and nothing of this machine."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import BadConfig, Network
from loraflow.serving.models import find_model
from loraflow.serving.publish import package, publish
from loraflow.store import LocalStore
from tests.flows.test_finetune import promote
from tests.hub import Hub

TOKEN = "hf_thisTokenMustNeverBeSeen"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    one = Hub(TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", one.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are no part of the hub's API
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield one
    one.close()


@pytest.fixture
def run(filled):
    return filled[1]


def loraflow(place, *arguments):
    return CliRunner().invoke(cli, [*arguments, "--store", str(place.store)])


def test_a_merged_model_is_one_commit_and_opens_without_loraflow(hub, place, run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = loraflow(place, "publish", run["run"], "--repo", "acme/tickets", "--license", "mit")
    assert done.exit_code == 0, done.exception
    repo = hub.repos["acme/tickets"]
    assert repo["private"] is True and len(repo["commits"]) == 1
    assert re.match(r"tiny [0-9a-f]{12}, LoRA r=4, dataset [0-9a-f]{12}$", repo["commits"][0]["message"])
    assert f"{hub.endpoint}/acme/tickets/commit/" in done.stdout
    merged = Path(run["merged"])
    assert repo["files"]["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert "manifest.json" not in repo["files"] and not any("telemetry" in name for name in repo["files"])
    for name, data in repo["files"].items():
        (tmp_path / name).write_bytes(data)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "phi3"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_card_states_facts_and_no_place_and_no_token(hub, place, run, tmp_path):
    done = loraflow(place, "publish", run["run"], "--repo", "acme/tickets", "--license", "mit")
    card = hub.repos["acme/tickets"]["files"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "transformers" and "base_model" not in front
    loss = run["metrics"]["tuned"]["heldout"]["token_loss"]
    assert f"{loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]" in card and "95%" in card
    assert f"**{run['decision']['verdict']}**" in card and run["decision"]["reasons"][0] in card
    dataset = json.loads(next(place.store.glob("version_dataset/*/*/manifest.json")).read_text())
    assert dataset["payload"]["config"]["md5"] in card and "80 train" in card
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recipe["peft_config"]["r"] == 4 and recipe["training_config"]["learning_rate"] == 0.01
    assert "runtime" not in recipe and "logging_steps" not in recipe["training_config"]
    import transformers

    assert f"transformers {transformers.__version__}" in card
    sent = (
        b"".join(hub.repos["acme/tickets"]["files"].values())
        + json.dumps(hub.repos["acme/tickets"]["commits"]).encode()
    )
    everything = sent + done.stdout.encode() + done.stderr.encode()
    kept = b"".join(path.read_bytes() for path in place.store.glob("runs/**/*.json"))
    for secret in (TOKEN, str(place.store), str(place.folder), str(place.phi3), str(Path.home()) + "/"):
        assert secret.encode() not in everything, secret
    assert TOKEN.encode() not in kept


def test_a_base_that_names_a_local_path_does_not_carry_it_out(hub, place, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run["merged"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "secret")}))
    store = LocalStore(place.store)
    with package(store, find_model(store, str(folder)), "acme/x", "merged", None) as (packed, _):
        assert "secret" not in (packed / "config.json").read_text()
    (folder / "generation_config.json").write_text(json.dumps({"note": f"{place.store}/x"}))
    with (
        pytest.raises(Exception, match="path of this machine"),
        package(store, find_model(store, str(folder)), "acme/x", "merged", None),
    ):
        pytest.fail("it was packed")


def test_the_adapter_alone_comes_with_its_tokenizer(hub, place, run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = loraflow(place, "publish", run["run"], "--repo", "acme/lora", "--adapter", "--public")
    assert done.exit_code == 0, done.exception
    repo = hub.repos["acme/lora"]
    assert repo["private"] is False and "model.safetensors" not in repo["files"]
    for name, data in repo["files"].items():
        (tmp_path / name).write_bytes(data)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.phi3), str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["library_name"] == "peft"


def test_publishing_again_sends_nothing_and_old_shards_go(hub, place, run):
    store = LocalStore(place.store)
    model = find_model(store, run["run"])
    publish(store, model, "acme/tickets", what="merged", private=True)
    assert loraflow(place, "publish", run["run"], "--repo", "acme/tickets").exit_code == 0
    assert len(hub.repos["acme/tickets"]["commits"]) == 1
    hub.repos["acme/tickets"]["files"]["model-00001-of-00002.safetensors"] = b"old"
    publish(store, model, "acme/tickets", what="merged", private=True)
    assert hub.repos["acme/tickets"]["commits"][1]["changed"] == ["model-00001-of-00002.safetensors"]


def test_the_record_of_a_publication_is_not_taken_for_a_run(hub, place, run):
    assert loraflow(place, "publish", run["run"], "--repo", "acme/tickets").exit_code == 0
    assert list((place.store / "runs" / "published").iterdir())
    listed = loraflow(place, "runs", "--json")
    assert listed.exit_code == 0, listed.exception
    assert [one["run"] for one in json.loads(listed.stdout)] == [run["run"]]
    shutil.rmtree(place.store / "registry", ignore_errors=True)
    promoted = loraflow(place, "promote", run["run"], "--reason", "better answers")
    assert promoted.exit_code == 0 and "is the champion of tiny" in promoted.stdout, promoted.exception


def test_a_dry_run_shows_the_card_and_asks_nobody(hub, place, run):
    done = loraflow(place, "publish", run["run"], "--repo", "acme/tickets", "--dry-run")
    assert done.exit_code == 0 and "# tickets" in done.stdout and "model.safetensors" in done.stdout
    assert hub.requests == []


def test_refusals_name_what_to_do(hub, place, run, monkeypatch):
    store = LocalStore(place.store)
    model = find_model(store, run["run"])

    def attempt(repo="acme/tickets", private=True):
        publish(store, model, repo, what="merged", private=private)

    with pytest.raises(BadConfig, match="ORG/NAME"):
        attempt("tickets")
    attempt("acme/open", private=False)
    with pytest.raises(BadConfig, match="is public"):
        attempt("acme/open")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadConfig, match="refuses the token") as caught:
        attempt()
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(BadConfig, match="no token"):
        attempt()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(Network, match="did not answer"):
        attempt()


def test_the_flow_publishes_a_promoted_model_once_and_a_failure_undoes_nothing(hub, place, run):
    shutil.rmtree(place.store / "registry", ignore_errors=True)
    rejected = place.run(publish__repo="acme/tickets", gate__min_gain=1000.0)
    assert rejected["published"] is None and hub.requests == [], "only a champion is published"
    merged = Path(rejected["merged"])
    promote(place, merged)
    hub.refuse_commits = 99
    failed = place.run(publish__repo="acme/tickets")
    assert failed["published"] == {"repo": "acme/tickets", "problem": "The hub answered with an error."}
    assert find_model(LocalStore(place.store), "champion").folder == merged
    hub.refuse_commits = 0
    done = place.run(publish__repo="acme/tickets", publish__private=False, publish__what="adapter")
    assert done["published"]["url"].startswith(hub.endpoint)
    asked = len(hub.requests)
    again = place.run(publish__repo="acme/tickets", publish__private=False, publish__what="adapter")
    assert again["published"]["commit"] == done["published"]["commit"] and len(hub.requests) == asked
    assert "adapter_model.safetensors" in hub.repos["acme/tickets"]["files"]
