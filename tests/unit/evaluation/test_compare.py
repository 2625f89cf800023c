"""`loraflow compare`: scores, paired differences, settings and flipped rows of two or three runs."""

import html.parser
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats

from loraflow import identity
from loraflow.cli import cli
from loraflow.evaluation.compare import compare_tables
from loraflow.evaluation.gate import decide
from loraflow.evaluation.intervals import tango_bound
from loraflow.failures import BadConfig, BadData
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.serving.compared import compare_models, terminal_lines
from loraflow.store import LocalStore, Summary

A, B, C = (f"20260101-00000{i}-abcdef" for i in (1, 2, 3))


def table(right, **columns):
    n = len(right)
    prompts = [json.dumps([{"role": "user", "content": f"<b>question {i}</b>"}]) for i in range(n)]
    fixed = {"id": [f"r{i:03d}" for i in range(n)], "set": "heldout", "prompt": prompts, "reference": "yes"}
    texts = {"answer": ["yes" if hit else "<script>no</script>" for hit in right], "finish": "stop"}
    return pd.DataFrame({**fixed, **texts, "exact_match": np.asarray(right, dtype=float), **columns})


def add_run(store, run, scores, gate=None, config=None, **settings):
    payload = identity.payload("evaluate", 1, {}, {"x": run})
    staged = store.staging("evaluate", identity.fingerprint(payload))
    scores.to_parquet(staged / "scores.parquet")
    ref = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})
    payload = identity.payload("train", 1, {}, {"x": run})
    staged = store.staging("train", identity.fingerprint(payload))
    (staged / "telemetry").mkdir()
    (staged / "weights").write_text(run)
    (staged / "telemetry" / "curves.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    train = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})
    made = {"evaluate tuned": ref, "train": train}
    if config is not None:
        payload = identity.payload("resolve_base", 1, {}, {"x": run})
        staged = store.staging("resolve_base", identity.fingerprint(payload))
        (staged / "config.json").write_text(json.dumps(config))
        made["resolve_base"] = store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})
    stages = [
        StageRun(stage=label, state="computed", fingerprint=found.fingerprint, digest=found.digest)
        for label, found in made.items()
    ]
    merged = StageRun(stage="merge", state="computed", fingerprint="f", digest=run)
    resolved = {"training_config": {"learning_rate": 0.01, **settings}, "runtime": {"store": run}, "gate": gate or {}}
    record = RunRecord(run=run, recipe="tickets", stages=[*stages, merged], resolved=resolved)
    store.write_document(f"runs/{run}.json", record.document)


@pytest.fixture
def store(tmp_path):
    store = LocalStore(tmp_path / "store")
    first, second = [True] * 60 + [False] * 40, [False] * 5 + [True] * 75 + [False] * 20
    add_run(store, A, table(first))
    add_run(store, B, table(second), learning_rate=0.02)
    add_run(store, C, table(first[:50]))
    return store


def compare(store, *arguments):
    return CliRunner().invoke(cli, ["compare", *arguments, "--store", store.uri])


def test_the_terminal_shows_scores_differences_settings_and_flipped_rows(store):
    done = compare(store, A, B)
    assert done.exit_code == 0, (done.output, done.exception)
    line = next(line for line in done.output.splitlines() if line.strip().startswith("exact_match "))
    assert line.split()[1:4] == ["0.6000", "0.7500", "+0.1500"] and "20, 5" in line
    assert "learning_rate 0.01 → 0.02" in done.output and "runtime" not in done.output
    assert "exact_match better: r060 0.000 → 1.000" in done.output
    assert done.output.splitlines()[1] == "   training loss 2.000 █▁ 1.000 at step 2"


def test_the_bars_of_a_long_training_end_with_its_last_loss(store):
    comparison = compare_models(store, (A, B))
    losses = tuple((step, 1.0) for step in range(1, 200))
    model = replace(comparison.models[0], losses=(*losses, (200, 3.0)))
    line = list(terminal_lines(replace(comparison, models=(model,))))[1]
    start, bars = line.split(maxsplit=4)[2:4]
    assert start == "1.000" and len(bars) <= 40 and bars == "▁" * (len(bars) - 1) + "█"


def test_a_third_model_is_compared_with_the_first_on_the_rows_of_both(store):
    done = compare(store, A, B, C)
    assert (
        "C against A on 50 held-out rows; scored for one of the two only: 50 rows of A, 0 of the other" in done.output
    )
    values = json.loads(compare(store, A, B, C, "--json").output)
    assert [pairing["scores"]["rows"] for pairing in values["against_first"]] == [100, 50]


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "action", "srcset", "onload", "onclick")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_page_has_everything_and_loads_and_runs_nothing(store, tmp_path):
    file = tmp_path / "page.html"
    done = compare(store, A, B, "--html", str(file))
    assert done.exit_code == 0, done.exception
    page = Page()
    page.feed(file.read_text())
    assert page.links == [] and not {"script", "link", "iframe", "img", "b"} & set(page.tags)
    assert page.tags.count("svg") == 2 and "default-src 'none'" in file.read_text()
    for part in ("+0.1500", "learning_rate 0.01 → 0.02", "20 rows better", "5 rows worse", "<script>no</script>"):
        assert part in page.text, part


def test_the_bounds_are_those_of_the_gate_and_a_lower_loss_is_better():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, 300)
    before, after = rng.lognormal(0, 0.3, 300), rng.lognormal(-0.2, 0.3, 300)
    first, second = (table([True] * 300, token_loss=loss, reference_tokens=tokens) for loss in (before, after))
    loss = next(found for found in compare_tables(first, second).differences if found.metric == "token_loss")
    assert loss.first == pytest.approx((before * tokens).sum() / tokens.sum())
    assert loss.bounds.mean == pytest.approx(loss.first - loss.second) and loss.bounds.mean > 0
    assert loss.better_rows == int((after < before).sum())
    worst = int(np.argmax(after - before))
    assert loss.worse[0].id == f"r{worst:03d}"
    match = compare_tables(table([True] * 60 + [False] * 40), table([True] * 80 + [False] * 20)).differences[0]
    assert match.bounds.lower < 0.2 < match.bounds.upper
    exact = stats.binomtest(20, 100).proportion_ci(0.9)
    assert match.bounds.lower == pytest.approx(exact.low, abs=0.02)


def test_the_interval_of_a_difference_is_under_its_heading_beside_the_bounds(store, tmp_path):
    """In the terminal, on the page and in JSON, with a line that says which of the two decides."""
    file = tmp_path / "page.html"
    lines = compare(store, A, B, "--html", str(file)).output.splitlines()
    [row] = json.loads(compare(store, A, B, "--json").output)["against_first"][0]["scores"]["differences"][:1]
    assert row["metric"] == "exact_match"
    (gain, low, high), (_, lower, upper) = row["interval"], row["bounds"]
    assert gain == pytest.approx(0.15) and low == pytest.approx(tango_bound(20, 5, 100, 0.975))
    cells = {"95 % interval": [low, high], "one-sided 95 % bounds": [lower, upper]}
    head = next(i for i, line in enumerate(lines) if "95 % interval" in line)
    match = next(line for line in lines[head:] if line.strip().startswith("exact_match "))
    text = file.read_text()
    heads = re.findall("<th>(.*?)</th>", text[text.index("<th>metric</th>") :])
    row_cells = re.search("<tr><td>exact_match</td>(.*?)</tr>", text)[1]
    for name, ends in cells.items():
        shown = "[" + ", ".join(f"{end:+.4f}" for end in ends) + "]"
        assert match.index(shown) == lines[head].index(name)
        assert re.findall('<td class="n">(.*?)</td>', row_cells)[heads.index(name) - 1] == shown
    sign = "A difference above 0 means that B is better than A, also for a loss."
    for note in (sign, "The interval says how large the difference is. The gate decides with the bounds."):
        assert f"  {note}" in lines and f"<p>{note}</p>" in text


def test_an_end_that_does_not_exist_is_null_in_json(tmp_path):
    store = LocalStore(tmp_path / "store")
    own_scores(store, A, np.array([0.1, 0.5, 0.3]), {})
    own_scores(store, B, np.array([0.2, 0.9, 0.6]), {})
    values = json.loads(compare(store, A, B, "--json").output, parse_constant=pytest.fail)
    [found] = [part for part in values["against_first"][0]["scores"]["differences"] if part["metric"] == "brevity"]
    assert found["interval"][1:] == found["bounds"][1:] == [None, None]
    [line] = [line for line in compare(store, A, B).output.splitlines() if line.startswith("  brevity  ")]
    assert line.count("(no interval)") == 2 and "inf" not in line


def test_losses_of_different_tokenizers_are_left_out_and_named(tmp_path):
    store = LocalStore(tmp_path / "store")
    columns = {"token_loss": np.full(100, 2.0), "reference_tokens": 10}
    add_run(store, A, table([True] * 100, **columns))
    add_run(store, B, table([True] * 100, **columns | {"reference_tokens": 20}))
    done = compare(store, A, B)
    assert "token_loss is per token, and the models split the references into different tokens" in done.output, (
        done.exception
    )
    assert not any(line.split()[:1] == ["token_loss"] for line in done.output.splitlines())


def own_scores(store, run, values, ranges, **gate):
    """Add a run with scores of a metric of the user's own, and the gate of its recipe."""
    add_run(store, run, table([True] * len(values), brevity=values), {"ranges": ranges, **gate})


def test_a_difference_of_capped_losses_says_what_it_is_without_the_cap(tmp_path):
    """Two scores of 1.0 and 1.19 beside a difference of -0.11 would be read as a mistake."""
    store, ones = LocalStore(tmp_path), np.ones(100)
    losses = {A: ones, B: np.r_[ones[1:], 20.0], C: ones + 1}
    for run, loss in losses.items():
        add_run(store, run, table([True] * 100, token_loss=loss, reference_tokens=3))
    shown = compare(store, A, B, C).output
    assert re.search(r"token_loss +1\.0000 +1\.1900 +-0\.1148", shown), "(20 - 1) / 100, or with at most ln(2^18)"
    message = (
        "on 100 held-out rows; a row's token_loss counts at most 12.5 in the difference, which is -0.1900 otherwise"
    )
    assert f"B against A {message}" in shown and shown.count("at most") == 1


@pytest.mark.parametrize("vocabulary", [32_064, None])
def test_a_loss_has_the_bounds_of_the_gate_for_the_vocabulary_of_the_base(tmp_path, vocabulary):
    store, losses = LocalStore(tmp_path), (np.r_[12.0, np.ones(99)], np.full(100, 0.8))
    tables = [table([True] * 100, token_loss=loss, reference_tokens=3) for loss in losses]
    for run, scores in zip((A, B), tables, strict=True):
        add_run(store, run, scores, config={"text_config": {"vocab_size": vocabulary}})
    decision = decide(
        tables[1], {"base": tables[0]}, primary="token_loss", min_gain=0.0, guards={}, confidence=0.95, vocabulary=vocabulary
    )  # fmt: skip
    shown = json.loads(compare(store, A, B, "--json").output)["against_first"][0]["scores"]
    loss = next(found for found in shown["differences"] if found["metric"] == "token_loss")
    gain = decision.comparisons[0]
    assert loss["bounds"] == [gain.difference, gain.lower, gain.upper] and shown["vocabulary"] == (vocabulary or 2**18)
    assert (gain.difference == pytest.approx(0.2 + 0.11)) == (vocabulary is None), "12 is more than ln(32064)"


@pytest.mark.parametrize("order", [(A, B), (B, A)])
def test_a_range_that_a_recorded_recipe_has_wrong_is_not_used_and_is_named(tmp_path, order):
    store = LocalStore(tmp_path / "store")
    values = np.linspace(0, 10, 100)
    own_scores(store, A, values, {"brevity": [0, 10]})
    own_scores(store, B, values + 1, {})
    done = compare(store, *order)
    assert done.exit_code == 0, done.exception
    assert "brevity has values outside of gate.ranges" in done.output
    sure = 1 if order == (A, B) else -1
    [found] = [
        difference
        for difference in json.loads(compare(store, *order, "--json").output)["against_first"][0]["scores"][
            "differences"
        ]
        if difference["metric"] == "brevity"
    ]
    assert found["bounds"] == pytest.approx([sure] * 3), "of the differences that were seen"


def test_ranges_and_directions_of_both_recipes_count(tmp_path):
    store = LocalStore(tmp_path / "store")
    values = np.linspace(0, 10, 100)
    own_scores(store, A, values, {"brevity": [0, 10]}, lower_is_better=["brevity"])
    own_scores(store, B, values + 1, {"brevity": [0, 20]})
    bounds = []
    for order in ((A, B), (B, A)):
        done = compare(store, *order, "--json")
        scores = json.loads(done.output)["against_first"][0]["scores"]
        assert scores["out_of_range"] == []
        bounds.append(
            next(difference["bounds"] for difference in scores["differences"] if difference["metric"] == "brevity")
        )
    (gain, low, high), reversed_order = bounds
    assert gain == pytest.approx(-1) and reversed_order == pytest.approx([-gain, -high, -low])
    tables = table([True] * 100, brevity=values), table([True] * 100, brevity=values + 1)
    expected = compare_tables(*tables, lower_is_better=["brevity"], ranges={"brevity": (0, 20)})
    assert next(
        difference.bounds for difference in expected.differences if difference.metric == "brevity"
    ) == pytest.approx((gain, low, high))


def test_a_row_with_the_same_id_and_another_prompt_is_not_compared():
    first, second = table([True] * 30), table([True] * 30)
    second.loc[0, "prompt"] = second.loc[1, "prompt"]
    assert compare_tables(first, second).rows == 29
    second["prompt"] = "other"
    with pytest.raises(BadData, match="not scored on a common row"):
        compare_tables(first, second)


@pytest.mark.parametrize("names", [[A], [A, B, C, A], [A, "20990101-000000-abcdef"], [A, "champion"]])
def test_names_that_cannot_be_compared_are_refused(store, names):
    assert isinstance(compare(store, *names).exception, BadConfig)


def test_a_single_row_is_no_plural(tmp_path):
    store, page = LocalStore(tmp_path / "store"), tmp_path / "page.html"
    add_run(store, A, table([True] * 9 + [False]))
    add_run(store, B, table([True] * 10))
    assert compare(store, A, B, "--html", str(page)).exit_code == 0
    assert "1 row better" in page.read_text() and "1 rows" not in page.read_text()
