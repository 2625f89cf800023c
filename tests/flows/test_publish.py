"""Publish a run's model to a fake hub: one commit with the model and its card, without paths of this machine."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.evaluation.values import MetricValue
from loraflow.failures import BadConfig, Network
from loraflow.registry.runs import RunRecord, RunSummary
from loraflow.serving.card import Facts, write_card
from loraflow.serving.lineage import Lineage
from loraflow.serving.models import find_model
from loraflow.serving.publish import package, publish
from loraflow.store import LocalStore
from tests.fake_hub import FakeHub
from tests.flows.test_finetune import promote
from tests.promoted_models import forget_promotions

TOKEN = "hf_thisTokenMustNeverBeSeen"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    fake = FakeHub(TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are not part of the hub's API
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield fake
    fake.close()


@pytest.fixture
def run(completed_project):
    return completed_project[1]


def loraflow(project, *arguments):
    return CliRunner().invoke(cli, [*arguments, "--store", str(project.store)])


def test_a_merged_model_is_published_in_one_commit_and_opens_without_loraflow(hub, project, run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = loraflow(project, "publish", run["run"], "--repo", "acme/tickets", "--license", "mit")
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


def test_the_model_card_contains_the_facts_but_no_path_and_no_token(hub, project, run, tmp_path):
    done = loraflow(project, "publish", run["run"], "--repo", "acme/tickets", "--license", "mit")
    card = hub.repos["acme/tickets"]["files"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "transformers" and "base_model" not in front
    loss = run["metrics"]["tuned"]["heldout"]["token_loss"]
    assert f"{loss['value']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]" in card and "95%" in card
    assert f"**{run['decision']['verdict']}**" in card and run["decision"]["reasons"][0] in card
    dataset = json.loads(next(project.store.glob("version_dataset/*/*/manifest.json")).read_text())
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
    records = b"".join(path.read_bytes() for path in project.store.glob("runs/**/*.json"))
    for secret in (TOKEN, str(project.store), str(project.folder), str(project.phi3), str(Path.home()) + "/"):
        assert secret.encode() not in everything, secret
    assert TOKEN.encode() not in records


def test_the_local_path_of_a_base_is_not_published(hub, project, run, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(run["merged"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "secret")}))
    store = LocalStore(project.store)
    with package(store, find_model(store, str(folder)), "acme/x", "merged", None) as (packed, _):
        assert "secret" not in (packed / "config.json").read_text()
    (folder / "generation_config.json").write_text(json.dumps({"note": f"{project.store}/x"}))
    with (
        pytest.raises(Exception, match="path of this machine"),
        package(store, find_model(store, str(folder)), "acme/x", "merged", None),
    ):
        pytest.fail("it was packed")


def test_an_adapter_is_published_with_its_tokenizer(hub, project, run, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = loraflow(project, "publish", run["run"], "--repo", "acme/lora", "--adapter", "--public")
    assert done.exit_code == 0, done.exception
    repo = hub.repos["acme/lora"]
    assert repo["private"] is False and "model.safetensors" not in repo["files"]
    for name, data in repo["files"].items():
        (tmp_path / name).write_bytes(data)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.phi3), str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["library_name"] == "peft"


def test_publishing_again_uploads_nothing_and_deletes_old_shards(hub, project, run):
    store = LocalStore(project.store)
    model = find_model(store, run["run"])
    publish(store, model, "acme/tickets", what="merged", private=True)
    assert loraflow(project, "publish", run["run"], "--repo", "acme/tickets").exit_code == 0
    assert len(hub.repos["acme/tickets"]["commits"]) == 1
    hub.repos["acme/tickets"]["files"]["model-00001-of-00002.safetensors"] = b"old"
    publish(store, model, "acme/tickets", what="merged", private=True)
    assert hub.repos["acme/tickets"]["commits"][1]["changed"] == ["model-00001-of-00002.safetensors"]


def test_a_publication_record_is_not_listed_as_a_run(hub, project, run):
    assert loraflow(project, "publish", run["run"], "--repo", "acme/tickets").exit_code == 0
    assert list((project.store / "runs" / "published").iterdir())
    listed = loraflow(project, "runs", "--json")
    assert listed.exit_code == 0, listed.exception
    assert [listed_run["run"] for listed_run in json.loads(listed.stdout)] == [run["run"]]
    forget_promotions(LocalStore(project.store))
    promoted = loraflow(project, "promote", run["run"], "--reason", "better answers")
    assert promoted.exit_code == 0 and "is the champion of tiny" in promoted.stdout, promoted.exception


def test_a_dry_run_shows_the_card_and_sends_no_request(hub, project, run):
    done = loraflow(project, "publish", run["run"], "--repo", "acme/tickets", "--dry-run")
    assert done.exit_code == 0 and "# tickets" in done.stdout and "model.safetensors" in done.stdout
    assert hub.requests == []


def test_refusals_name_the_next_step(hub, project, run, monkeypatch):
    store = LocalStore(project.store)
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
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    with pytest.raises(Network, match="did not answer"):
        attempt()


def test_the_flow_publishes_a_promoted_model_once_and_a_failure_does_not_undo_the_promotion(hub, project, run):
    forget_promotions(LocalStore(project.store))
    rejected = project.run(publish__repo="acme/tickets", gate__min_gain=1000.0)
    assert rejected["published"] is None and hub.requests == [], "only a champion is published"
    merged = Path(rejected["merged"])
    promote(project, merged)
    hub.refuse_commits = 99
    failed = project.run(publish__repo="acme/tickets")
    assert failed["published"] == {"repo": "acme/tickets", "problem": "The hub answered with an error."}
    assert find_model(LocalStore(project.store), "champion").folder == merged
    hub.refuse_commits = 0
    done = project.run(publish__repo="acme/tickets", publish__private=False, publish__what="adapter")
    assert done["published"]["url"].startswith(hub.endpoint)
    requests = len(hub.requests)
    again = project.run(publish__repo="acme/tickets", publish__private=False, publish__what="adapter")
    assert again["published"]["commit"] == done["published"]["commit"] and len(hub.requests) == requests
    assert "adapter_model.safetensors" in hub.repos["acme/tickets"]["files"]


def test_a_card_of_a_model_whose_adapter_is_gone_names_no_version_and_says_what_its_columns_are():
    """The version that writes the card is not the one that trained."""
    score = {"heldout": {"exact_match": MetricValue(value=0.5, low=0.4, high=0.6, n=100)}}
    said = "`tuned` is this model, `champion` the one that it was compared with."
    for sides in (("base", "tuned"), ("base", "tuned", "champion")):
        summary = RunSummary(run="r", recipe="tickets", metrics=dict.fromkeys(sides, score))
        facts = Facts("tickets", "d" * 64, Lineage(), RunRecord(run="r", recipe="tickets", summary=summary), {})
        card = write_card(facts, "merged", "me/tickets")
        assert "made with" not in card and (said in card) == ("champion" in sides)
        assert f"| metric | {' | '.join(sides)} |" in card
