"""A changed byte of scores or weights: a run recomputes them, and every user of the model refuses it."""

import io
import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli import cli, parse_overrides
from loraflow.execution.sweep import read_curves
from loraflow.failures import CorruptArtifact
from loraflow.registry import PromotionLog
from loraflow.store import LocalStore, hash_memo
from tests.command_line import loraflow
from tests.flows.conftest import states
from tests.promoted_models import forget_promotions


@pytest.fixture
def store(project):
    """The store of a real run, without a champion."""
    store = LocalStore(project.store)
    forget_promotions(store)
    return store


@pytest.fixture
def champion(store, completed_project, monkeypatch):
    """The same, with the run's model promoted by hand, in a project with the run's recipe."""
    (store.root.parent / "configs").mkdir()
    shutil.copy(completed_project[0].recipe, store.root.parent / "configs" / "any name.yaml")
    monkeypatch.chdir(store.root.parent)
    loraflow(store, "promote", completed_project[1]["run"], "--reason", "better")
    return store


def artifact(store, stage):
    return next(ref for ref in store.artifacts() if ref.stage == stage)


def flip(file: Path, position: int = -7) -> None:
    """Change one byte. Size, mtime and inode stay."""
    before = file.stat()
    time.sleep(0.02)  # a tick of the kernel's clock
    with file.open("r+b") as handle:
        handle.seek(position, 2)
        byte = handle.read(1)
        handle.seek(position, 2)
        handle.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)


def test_replaced_scores_are_recomputed_and_not_believed(project, store, completed_project):
    """Scores of the same size, all better, and a gate that was not asked before."""
    first = completed_project[1]
    ref = store.find("evaluate", next(s["fingerprint"] for s in first["stages"] if s["stage"] == "evaluate tuned"))
    file = store.path(ref) / "scores.parquet"
    intact, written = file.read_bytes(), io.BytesIO()
    table = pd.read_parquet(file)
    table.assign(token_loss=table["token_loss"].to_numpy()[::-1] - 9).to_parquet(written, index=False)
    file.write_bytes(written.getvalue().ljust(len(intact), b"\0")[: len(intact)])
    again = project.run(gate__confidence=0.9)
    assert states(again)["evaluate tuned"] == "computed" and states(again)["merge"] == "cached"
    assert file.read_bytes() == intact and store.verify(ref) == []
    assert again["metrics"] == first["metrics"] and list((store.root / "set-aside").glob("evaluate-*.json"))


USERS = {
    "chat": ["chat", "champion", "--prompt", "what is red"],
    "chat --compare": ["chat", "champion", "--compare", "--prompt", "what is red"],
    "predict": ["predict", "champion", "in.csv", "out.csv"],
    "serve": ["serve", "champion"],
    "publish": ["publish", "champion", "--repo", "acme/tickets", "--dry-run"],
    "publish --adapter": ["publish", "champion", "--adapter", "--repo", "acme/tickets", "--dry-run"],
    "promote": ["promote", "RUN", "--reason", "again"],
    "a run's model": ["chat", "RUN", "--prompt", "what is red"],
    "a path": ["chat", "MERGED", "--prompt", "what is red"],
    "a link": ["chat", "LINK", "--prompt", "what is red"],
    "an adapter": ["chat", "ADAPTER", "--prompt", "what is red"],
    "an adapter's base": ["chat", "ADAPTER", "--prompt", "what is red"],
    "evaluate": ["evaluate", "champion", "tiny.yaml"],
    "evaluate a path": ["evaluate", "MERGED", "tiny.yaml"],
    "merge": ["merge", "ADAPTER", "BASE", "out"],
    "convert": ["adapters", "convert", "ADAPTER", "BASE", "out"],
}
DAMAGED = {"chat --compare": "resolve_base", "publish --adapter": "train", "an adapter": "train", "merge": "train",
           "an adapter's base": "resolve_base", "convert": "resolve_base"}  # fmt: skip


@pytest.mark.parametrize("user", USERS)
def test_a_model_with_a_changed_byte_is_refused_with_the_command_that_rebuilds_it(
    champion, project, completed_project, user
):
    run = completed_project[1]["run"]
    damaged = artifact(champion, DAMAGED.get(user, "merge"))
    merged, adapter, base = (champion.path(artifact(champion, name)) for name in ("merge", "train", "resolve_base"))
    Path("in.csv").write_text("prompt\nwhat is red\n")
    Path("link").symlink_to(merged)
    names = {"RUN": run, "MERGED": merged, "LINK": "link", "ADAPTER": adapter / "adapter", "BASE": base}
    command = [str(names.get(part, part)) for part in USERS[user]]
    if user == "promote":
        forget_promotions(champion)
    if user not in ("merge", "convert", "evaluate", "evaluate a path"):
        command += ["--store", champion.uri]
    flip(next(champion.path(damaged).rglob("*.safetensors")))
    done = CliRunner().invoke(cli, command)
    failure = done.exception
    assert isinstance(failure, CorruptArtifact) and failure.exit_code == 1, failure
    assert "damaged" in failure.what and "hash mismatch" in failure.got and "set-aside" in failure.where
    assert "`loraflow run 'configs/any name.yaml' --set runtime.store=" in failure.next_step or (
        "`loraflow run 'configs/any name.yaml'` rebuilds it" in failure.next_step
    )
    assert run in failure.next_step and not Path("out").exists() and not Path("out.csv").exists()
    if user == "promote":
        assert PromotionLog(champion, "tiny").head() is None


def test_the_named_command_rebuilds_a_damaged_champion(champion, project):
    from loraflow.flows.finetune import finetune

    merged = artifact(champion, "merge")
    flip(champion.path(merged) / "model.safetensors")
    failure = loraflow(champion, "chat", "champion", "--prompt", "x", fails=CorruptArtifact).exception
    assert "gone" in loraflow(champion, "chat", "champion", "--prompt", "x", fails=CorruptArtifact).exception.what
    _, _, recipe, *options = shlex.split(re.findall("`([^`]*)`", failure.next_step)[0])
    sets = {**parse_overrides(tuple(options[1::2])), "runtime.store": champion.uri}
    summary = finetune(recipe=recipe, settings=sets)
    assert states(summary)["merge"] == "computed" and set(states(summary).values()) == {"computed", "cached"}
    assert champion.find("merge", merged.fingerprint) == merged and champion.verify(merged) == []
    assert summary["decision"]["reasons"] == ["the challenger is the champion"]


def test_a_cached_run_recomputes_the_champions_changed_weights_and_hashes_unchanged_ones_once(
    champion, project, monkeypatch
):
    from loraflow.store import files

    hashed, hash_file = [], files.hash_file
    monkeypatch.setattr(
        files, "hash_file", lambda file, kind="sha256": hashed.append(Path(file)) or hash_file(file, kind)
    )
    monkeypatch.setattr("loraflow.store.artifact.hash_file", files.hash_file)
    merged = artifact(champion, "merge")
    assert set(states(project.run()).values()) == {"cached"}
    assert champion.path(merged) / "model.safetensors" not in hashed, (
        "the promotion hashed it, and it has not changed since"
    )
    flip(champion.path(merged) / "model.safetensors")
    summary = project.run()
    assert states(summary)["merge"] == "computed" and states(summary)["train"] == "cached"
    assert summary["decision"]["reasons"] == ["the challenger is the champion"]
    assert champion.verify(merged) == [] and list((champion.root / "set-aside").glob("merge-*.json"))


def test_show_champion_says_whether_the_weights_are_known_to_be_intact(champion):
    assert loraflow(champion, "show", "champion").stdout.count("intact: hashed on this machine") == 2
    flip(champion.path(artifact(champion, "merge")) / "model.safetensors")
    text = loraflow(champion, "show", "champion").stdout
    assert text.count("contents not checked") == 1 and text.count("intact: hashed") == 1
    hash_memo(champion).path.unlink()
    merged = json.loads(loraflow(champion, "show", "champion", "--json").stdout)["merged"]
    assert merged["contents"] == "not checked" and merged["problems"] == []


def test_a_damaged_training_log_is_left_out_of_the_report(store):
    adapter = artifact(store, "train")
    curves = read_curves(store, adapter)
    assert curves is not None and len(curves.training) == 6
    flip(store.path(adapter) / "telemetry" / "curves.jsonl")
    assert read_curves(store, adapter) is None
    assert store.check(adapter) == [], "nothing is decided by it, so nothing is retrained"
