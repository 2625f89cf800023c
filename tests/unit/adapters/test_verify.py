"""Verify: a merged model that differs from base plus adapter does not pass."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraflow.adapters import verify
from loraflow.adapters.merge_folders import merge
from loraflow.failures import LimitExceeded
from loraflow.job import Inputs, Progress
from loraflow.stages import STAGES
from tests.conftest import build_phi3, chat
from tests.job_factory import make_job
from tests.tiny_adapters import make_adapter
from tests.unit.training.test_training import REF, recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base, an adapter in its artifact's folder, held-out rows, and the model merged from them."""
    folder = tmp_path_factory.mktemp("parts")
    base = build_phi3(folder / "base")
    adapter = make_adapter(base, folder / "artifact" / "adapter")
    for name in ("merged", "rows"):
        (folder / name).mkdir()
    merge(base, adapter, folder / "merged")
    rows = [json.dumps({"id": str(i), "set": "heldout", **chat(i)}) + "\n" for i in range(1000, 1006)]
    (folder / "rows" / "heldout.jsonl").write_text("".join(rows))
    return {"base": base, "adapter": adapter.parent, "rows": folder / "rows", "merged": folder / "merged"}


def report_on(parts, out, prompts=4, **overrides):
    facets = REF.model_copy(update={"facets": {"adapter": "d", "heldout": "d"}})
    job = make_job("verify", recipe(merge__verify_prompts=prompts, **overrides), dict.fromkeys(parts, facets))
    out.mkdir()
    report = verify.run(job, Inputs(parts), out, Progress()).report
    assert report == json.loads((out / "report.json").read_text())
    return report


def test_the_distance_equals_one_computed_from_the_logits(parts, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = report_on(parts, tmp_path / "out", prompts=6)
    tokenizer = AutoTokenizer.from_pretrained(parts["base"])
    wide = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # noqa: E731
    tuned, merged = (
        PeftModel.from_pretrained(wide(parts["base"]), str(parts["adapter"] / "adapter")),
        wide(parts["merged"]),
    )
    rows = [json.loads(line)["messages"] for line in (parts["rows"] / "heldout.jsonl").read_text().splitlines()]
    kl, largest = [], 0.0
    for messages in rows:
        ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
        with torch.no_grad():
            p, q = tuned(input_ids=ids).logits[0].double(), merged(input_ids=ids).logits[0].double()
        kl += torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q))).tolist()
        largest = max(largest, float((p - q).abs().max()))
    assert report["tokens"] == len(kl)
    assert report["max_logit_difference"] == pytest.approx(largest, abs=2e-6)
    assert report["mean_kl"] == pytest.approx(sum(kl) / len(kl), abs=2e-8) and 0 < report["mean_kl"] < 1e-4


def test_a_merged_model_beyond_the_limit_stops_the_run(parts, tmp_path):
    good = report_on(parts, tmp_path / "good")
    verify.check_limits(good, good["mean_kl"])
    with pytest.raises(LimitExceeded, match="differ too much from base plus adapter") as caught:
        verify.check_limits(good, good["mean_kl"] / 2)
    assert "merge.max_kl" in str(caught.value)
    broken = shutil.copytree(parts["merged"], tmp_path / "broken")  # the update of one matrix was lost
    state, plain = load_file(broken / "model.safetensors"), load_file(parts["base"] / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**state, name: plain[name]}, broken / "model.safetensors", metadata={"format": "pt"})
    bad = report_on({**parts, "merged": broken}, tmp_path / "bad")
    assert bad["mean_kl"] > 100 * good["mean_kl"]
    with pytest.raises(LimitExceeded):
        verify.check_limits(bad, 10 * good["mean_kl"])
    with pytest.raises(LimitExceeded):  # what is no number is no proof
        verify.check_limits({**good, "mean_kl": float("nan")}, 1.0)


def test_merge_and_verify_run_in_separate_processes():
    assert STAGES["merge"].in_worker and STAGES["verify"].in_worker, (
        "what a merge left in memory is not what is compared"
    )


def test_verify_compares_rows_of_each_set_and_label_not_the_first_ones(tmp_path):
    file = tmp_path / "heldout.jsonl"
    sets = [("hard", "yes")] * 40 + [("heldout", "yes")] * 20 + [("heldout", "no")] * 20
    file.write_text("".join(
        json.dumps({"id": str(n), "set": name, "place": "", "messages": [
            {"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": label}]}) + "\n"
        for n, (name, label) in enumerate(sets)))  # fmt: skip
    taken = verify.sample_rows(file, 8)
    found = [(row["set"], row["messages"][-1]["content"]) for row in taken]
    assert found == [("hard", "yes")] * 4 + [("heldout", "yes")] * 2 + [("heldout", "no")] * 2
    assert [row["id"] for row in taken[:4]] != ["0", "1", "2", "3"] and taken == verify.sample_rows(file, 8)
