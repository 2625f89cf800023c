import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from loraflow.data.common_prefix import common_prefix_length
from loraflow.data.loss_mask import ChatTemplate
from loraflow.evaluation import kv_cache, metric_modules, score
from loraflow.evaluation.generation import generate_answers
from loraflow.evaluation.kv_cache import preallocated_cache
from loraflow.evaluation.likelihood import answer_losses
from loraflow.evaluation.metric_modules import ModuleScores, compute, find_module
from loraflow.evaluation.prefix_cache import shared_prefix
from loraflow.evaluation.values import EvaluationReport, scores_to_dict
from loraflow.failures import BadConfig, BadData
from loraflow.hardware.process_group import ProcessGroup
from loraflow.job import Inputs, Progress
from tests.conftest import chat
from tests.job_factory import make_job
from tests.unit.test_training import REF, recipe


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")


PAIRS = [
    ("the cat sat", "the cat sat"),
    ("a cat sits on the mat", "the cat sat on the mat"),
    ("", "something"),
    ("नमस्ते दुनिया", "नमस्ते दुनिया"),
    ("你好世界", "你好朋友"),
    ("Привет мир", "Привет, мир!"),
    ("สวัสดี", "สวัสดี"),
]
PREDICTIONS, REFERENCES = map(list, zip(*PAIRS, strict=True))


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge", "chrf"])
def test_identical_texts_have_the_best_score_in_every_script(name):
    texts = [reference for _, reference in PAIRS]
    values, rows = compute(name, texts, texts)
    best = 100.0 if name == "chrf" else 1.0
    for key, value in values.items():
        wanted = 1.0 if key not in ("rouge2",) else None
        if wanted is not None:
            assert value == pytest.approx(best), key
            assert rows[key] == pytest.approx([best] * len(texts))


def test_rouge_equals_rouge_score_on_latin_text():
    from rouge_score import rouge_scorer

    predictions, references = ["The cats were sitting quietly.", "no"], ["A cat sat there quietly", "yes"]
    _, rows = compute("rouge", predictions, references)
    oracle = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for i, (p, r) in enumerate(zip(predictions, references, strict=True)):
        for kind, expected in oracle.score(r, p).items():
            assert rows[kind][i] == pytest.approx(expected.fmeasure), kind


def test_token_f1_equals_squads():
    values, rows = compute("token_f1", PREDICTIONS, REFERENCES)
    assert rows["token_f1"][:3] == [1.0, pytest.approx(2 * 4 / 12), 0.0]
    assert rows["token_f1"][4] == pytest.approx(0.5)
    assert values["token_f1"] == pytest.approx(np.mean(rows["token_f1"]))


def test_chrf_equals_sacrebleus():
    import sacrebleu

    _, rows = compute("chrf", PREDICTIONS, REFERENCES)
    assert rows["chrf"][1] == pytest.approx(sacrebleu.sentence_chrf(PREDICTIONS[1], [REFERENCES[1]]).score)


@pytest.mark.parametrize(
    ("prediction", "valid", "f1"),
    [
        ('{"a": 1, "b": {"c": [1, 2]}}', 1.0, 1.0),
        (' {"b": {"c": [2, 1]}, "a": 1}\n', 1.0, 1.0),
        ('{"a": 1}', 1.0, 0.5),
        ('{"a": "1", "b": {"c": [1, 2]}}', 1.0, 2 / 3),
        ('{"a": 1, "b": {"c": [1, 2]}', 0.0, 0.0),
        ("[1]", 0.0, 0.0),
        ('Sure! {"a": 1}', 0.0, 0.0),
    ],
)
def test_json_fields_scores_validity_and_field_f1(prediction, valid, f1):
    _, rows = compute("json_fields", [prediction], ['{"a": 1, "b": {"c": [1, 2]}}'])
    assert rows["json_valid"] == [valid]
    assert rows["field_f1"] == [pytest.approx(f1)]


def test_token_loss_is_weighted_by_tokens():
    values, rows = compute("token_loss", [2.0, 30.0], [2, 10])
    assert values["token_loss"] == pytest.approx(32 / 12)
    assert values["perplexity"] == pytest.approx(math.exp(32 / 12))
    assert rows["token_loss"] == [1.0, 3.0]


def test_a_users_metric_module_is_scored_row_by_row(tmp_path):
    folder = tmp_path / "same_length"
    folder.mkdir()
    (folder / "same_length.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass SameLength(evaluate.Metric):\n"
        "    def _info(self):\n        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "            features=datasets.Features({'predictions': datasets.Value('string'), 'references': datasets.Value('string')}))\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'same_length': sum(len(p) == len(r) for p, r in zip(predictions, references)) / len(predictions)}\n"
    )
    values, rows = compute(str(folder), ["ab", "c"], ["xy", "zz"])
    assert values == {"same_length": 0.5} and rows == {"same_length": [1.0, 0.0]}


@pytest.mark.parametrize("name", ["prompt", "group", "nll", "stops", "perplexity", "macro_f1", "exact_match"])
def test_a_metric_whose_score_would_replace_another_column_is_refused(name, monkeypatch):
    """Groups and prompts say which rows are independent; and the gate decides on the score that the report shows."""
    table = pd.DataFrame({"prompt": ["q"], "answer": ["x"], "reference": ["x"]})
    own = compute("exact_match", ["x"], ["x"])._replace(rows={name: [1.0]})
    monkeypatch.setattr(
        metric_modules, "compute", lambda metric, *texts: own if "/" in metric else compute(metric, *texts)
    )
    config = SimpleNamespace(metrics=["exact_match", "./metrics/own"], modules={})
    with pytest.raises(BadConfig, match=rf"name of another column(.|\n)*metrics/own(.|\n)*{name}"):
        score._row_scores(table, config)


def test_a_metric_without_a_score_for_each_row_is_refused(monkeypatch):
    table = pd.DataFrame({"answer": ["x", "y"], "reference": ["x", "x"]})
    monkeypatch.setattr(metric_modules, "compute", lambda *_: ModuleScores({"own": 1.0}, {"own": [1.0]}))
    with pytest.raises(BadConfig, match=r"a score for each row(.|\n)*2 values in own_scores(.|\n)*got: +1"):
        score._row_scores(table, SimpleNamespace(metrics=["./metrics/own"], modules={}))


def test_a_bare_name_is_never_looked_up_on_the_hub():
    with pytest.raises(BadConfig, match="no such metric"):
        find_module("bleu")


@pytest.fixture(scope="module")
def model(phi3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32).eval()


def test_batched_answers_equal_answers_to_single_prompts(phi3, model):
    from loraflow.base.load import load_tokenizer, stop_ids

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts = template.prompt_ids(
        [chat(i)["messages"] for i in (1, 22, 333, 4444)] + [[{"role": "user", "content": "a " * 40}]]
    )
    options = {"stop_ids": stop_ids(phi3), "max_new_tokens": 12}
    alone = [generate_answers(model, tokenizer, [p], batch_size=1, **options)[0] for p in prompts]
    assert generate_answers(model, tokenizer, prompts, batch_size=3, **options) == alone
    assert {a["finish"] for a in alone} <= {"stop", "length"}


def test_what_the_template_writes_before_an_answer_is_removed_from_it(phi3, model):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    (prompt,), options = (
        template.prompt_ids([chat(1)["messages"]]),
        {"stop_ids": [], "max_new_tokens": 6, "batch_size": 1},
    )
    (whole,) = generate_answers(model, tokenizer, [prompt], **options)
    start = whole["text"][:2]
    (rest,) = generate_answers(model, tokenizer, [prompt], inserted=start, **options)
    assert start and rest == {**whole, "text": whole["text"][2:]}


def test_every_stop_id_ends_an_answer(phi3, model):
    from loraflow.base.load import load_tokenizer, stop_ids

    assert len(stop_ids(phi3)) == 2
    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    (prompt,) = template.prompt_ids([chat(1)["messages"]])
    (free,) = generate_answers(model, tokenizer, [prompt], stop_ids=[], max_new_tokens=6, batch_size=1)
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    (stopped,) = generate_answers(model, tokenizer, [prompt], stop_ids=[first], max_new_tokens=6, batch_size=1)
    assert free["finish"] == "length" and stopped == {"text": "", "tokens": 0, "finish": "stop"}


def test_finished_batches_are_not_recomputed(phi3, model, tmp_path):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts, file = template.prompt_ids([chat(i)["messages"] for i in range(6)]), tmp_path / "done.jsonl"
    options = {"stop_ids": [], "max_new_tokens": 4, "batch_size": 2, "done_file": file}
    uninterrupted = generate_answers(model, tokenizer, prompts, **options)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:10])  # killed while it wrote
    batches: list[int] = []
    assert generate_answers(model, tokenizer, prompts, on_batch=batches.append, **options) == uninterrupted
    assert len(batches) == 2, "the first batch was read from the file"


def test_losses_equal_those_from_all_logits(phi3, model):
    template = ChatTemplate(phi3)
    rows = template.encode([chat(i)["messages"] for i in range(5)], "last_assistant")
    found = answer_losses(model, rows, 0, batch_size=3)
    for row, (total, count) in zip(rows, found, strict=True):
        ids, labels = torch.tensor(row.ids[None].astype("int64")), torch.tensor(row.labels.astype("int64"))
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        assert total == pytest.approx(wanted.item(), rel=1e-4)
        assert count == int((labels[1:] != -100).sum())


def test_the_order_of_batches_does_not_change_answers(phi3, model):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = [chat(i)["messages"] for i in range(7)]
    forwards = generate_answers(
        model, tokenizer, template.prompt_ids(chats), stop_ids=[], max_new_tokens=4, batch_size=2
    )
    backwards = generate_answers(
        model, tokenizer, template.prompt_ids(chats[::-1]), stop_ids=[], max_new_tokens=4, batch_size=5
    )
    assert forwards == backwards[::-1]
    assert json.dumps(forwards)


def test_a_preallocated_cache_equals_transformers_cache_without_copies():
    from transformers import DynamicCache

    draw = torch.Generator().manual_seed(0)
    ours, expected, addresses = preallocated_cache(2, 9), DynamicCache(), set()
    for tokens in (4, 1, 3):
        for layer in range(2):
            new = [torch.randn(3, 2, tokens, 5, generator=draw) for _ in range(2)]
            for tensor, other in zip(ours.update(*new, layer), expected.update(*new, layer), strict=True):
                assert torch.equal(tensor, other)
            addresses.add(ours.layers[layer].keys.data_ptr())
        assert ours.get_seq_length() == expected.get_seq_length()
        assert ours.get_mask_sizes(2, 0) == expected.get_mask_sizes(2, 0)
    assert len(addresses) == 2, "written in place"
    with pytest.raises(ValueError, match="10 tokens in a cache for 9"):
        ours.update(*(torch.zeros(3, 2, 2, 5),) * 2, 0)


@pytest.mark.parametrize(
    "system", [None, "please answer what is the house of the red bird and one green cat likes the tree"]
)
def test_answers_equal_those_with_the_cache_of_transformers(phi3, model, monkeypatch, system):
    from loraflow.base.load import load_tokenizer
    from loraflow.evaluation import generation

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = spoken(range(6), system) if system else [chat(i)["messages"] for i in range(6)]
    prompts, options = template.prompt_ids(chats), {"stop_ids": [], "max_new_tokens": 12, "batch_size": 3}
    caches = []
    real = kv_cache.preallocated_cache
    monkeypatch.setattr(kv_cache, "preallocated_cache", lambda *a: caches.append(a) or real(*a))
    ours = generate_answers(model, tokenizer, prompts, **options)
    assert len(caches) == 2
    monkeypatch.setattr(generation, "has_plain_cache", lambda *_: False)
    without_prefix(monkeypatch)
    assert ours == generate_answers(model, tokenizer, prompts, **options)
    assert len(caches) == 2


@pytest.mark.parametrize(
    "system", [None, "please answer what is the house of the red bird and one green cat likes the tree"]
)
@pytest.mark.parametrize("stops", ["none", "early"])
def test_decoding_step_by_step_gives_the_answers_of_generate(phi3, model, monkeypatch, system, stops):
    """The step that a GPU records and replays, on a CPU, for rows of several lengths that end at several steps."""
    from loraflow.base.load import load_tokenizer
    from loraflow.evaluation import greedy_decoding

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = spoken(range(7), system) if system else [chat(10**i)["messages"] for i in range(7)]
    prompts = template.prompt_ids(chats)
    options = {"stop_ids": [], "max_new_tokens": 40, "batch_size": 3}
    if stops == "early":  # an id that this random model gives in the middle of its answers
        free = [answer_ids(model, prompt, 40) for prompt in prompts]
        ends = {token: len({ids.index(token) if token in ids else 40 for ids in free}) for token in set().union(*free)}
        options["stop_ids"] = [max(ends, key=ends.__getitem__)]
    expected = generate_answers(model, tokenizer, prompts, **options)
    calls = []
    monkeypatch.setattr(greedy_decoding, "is_supported", lambda _: True)
    real = greedy_decoding.decode
    monkeypatch.setattr(greedy_decoding, "decode", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert generate_answers(model, tokenizer, prompts, **options) == expected
    assert len(calls) == 3
    if stops == "early":
        assert len({answer["tokens"] for answer in expected}) > 1


def answer_ids(model, prompt, tokens):
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def test_a_model_with_a_repetition_penalty_uses_generate(model, monkeypatch):
    from loraflow.evaluation import greedy_decoding

    class OnGpu:
        device, config, forward = torch.device("cuda"), model.config, model.forward
        generation_config = copy.deepcopy(model.generation_config)

    assert greedy_decoding.is_supported(OnGpu)
    OnGpu.generation_config.repetition_penalty = 1.3
    assert not greedy_decoding.is_supported(OnGpu)


def spoken(numbers, system="please answer what is the house of the red bird and one green cat likes the tree"):
    return [[{"role": "system", "content": system}, *chat(i)["messages"]] for i in numbers]


def without_prefix(monkeypatch):
    for module in ("generation", "likelihood"):
        monkeypatch.setattr(f"loraflow.evaluation.{module}.shared_prefix", lambda *_: None)


def test_a_shared_system_prompt_is_computed_once_and_does_not_change_answers(phi3, model, monkeypatch):
    from loraflow.base.load import load_tokenizer, stop_ids

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts = template.prompt_ids(spoken((1, 22, 333, 4444, 55555, 666666)))
    found = shared_prefix(model, prompts, 1000, 1000)
    assert found is not None and len(found.ids) > 16
    assert {tuple(p[: len(found.ids)]) for p in prompts} == {tuple(found.ids)}
    options = {"stop_ids": stop_ids(phi3), "max_new_tokens": 24, "batch_size": 4}
    read: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    try:
        shared = generate_answers(model, tokenizer, prompts, **options)
        with_prefix, read[:] = sum(read), []
        without_prefix(monkeypatch)
        assert shared == generate_answers(model, tokenizer, prompts, **options)
    finally:
        hook.remove()
    assert with_prefix == sum(read) - len(found.ids) * (len(prompts) - 1)


def test_a_shared_system_prompt_does_not_change_losses(phi3, model, monkeypatch):
    rows = ChatTemplate(phi3).encode(spoken((1, 22, 333, 4444, 55555)), "last_assistant")
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    shared = answer_losses(model, rows, 0, batch_size=2)
    hook.remove()
    assert max(seen[1:]) < min(len(row.ids) for row in rows), "the batches hold only what is not shared"
    without_prefix(monkeypatch)
    for loss, expected in zip(shared, answer_losses(model, rows, 0, batch_size=2), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_the_first_learned_token_is_predicted_from_the_batch_itself(phi3, model, monkeypatch):
    """All rows are equal up to the middle of their answers: the shared prefix must end before the first label."""
    same = [[{"role": "user", "content": "what is the cat of the house of the bird"}, {"role": "assistant", "content": text}]
            for text in ("yes one", "yes two", "yes three", "yes")]  # fmt: skip
    rows = ChatTemplate(phi3).encode(same, "last_assistant")
    shared = answer_losses(model, rows, 0, batch_size=3)
    without_prefix(monkeypatch)
    for loss, expected in zip(shared, answer_losses(model, rows, 0, batch_size=3), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 8},
        {"sliding_window": 59},
        {"attention_chunk_size": 32},
        {"_attn_implementation": "flash_attention_2"},
        {"rope_parameters": {"rope_type": "longrope"}},
        {"layer_types": ["full_attention", "linear_attention"]},
    ],
    ids=str,
)
def test_no_prefix_is_shared_if_it_may_not_be_exact(model, monkeypatch, change):
    rows = [[5] * 40 + [i] for i in range(6)]
    assert shared_prefix(model, rows, 40, 60) is not None
    for key, value in change.items():
        monkeypatch.setattr(model.config, key, value, raising=False)
    assert shared_prefix(model, rows, 40, 60) is None


@pytest.mark.parametrize("change", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_no_prefix_is_shared_if_the_model_has_another_cache(model, monkeypatch, change):
    for key, value in change.items():
        monkeypatch.setattr(model.generation_config, key, value)
    assert shared_prefix(model, [[5] * 40 + [i] for i in range(6)], 40, 60) is None


@pytest.mark.parametrize(("window", "shares"), [(200, True), (24, False)])
def test_a_sliding_window_does_not_change_answers(phi3, model, monkeypatch, window, shares):
    from loraflow.base.load import load_tokenizer

    monkeypatch.setattr(model.config, "sliding_window", window)
    tokenizer = load_tokenizer(phi3)
    prompts = ChatTemplate(phi3).prompt_ids(spoken((1, 22, 333, 4444, 55555, 666666)))
    options = {"stop_ids": [], "max_new_tokens": 12}
    places = max(map(len, prompts)) + 12
    assert (shared_prefix(model, prompts, min(map(len, prompts)) - 1, places) is not None) == shares
    together = generate_answers(model, tokenizer, prompts, batch_size=3, **options)
    without_prefix(monkeypatch)
    assert together == generate_answers(model, tokenizer, prompts, batch_size=3, **options)


def test_no_prefix_is_shared_if_it_saves_too_little(model):
    assert shared_prefix(model, [[5] * 40, [5] * 41], 40, 60) is None
    assert shared_prefix(model, [[5] * 4 + [i] * 40 for i in range(6)], 44, 60) is None
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2]], 9) == 2
    assert common_prefix_length([[1, 2], [1, 2]], 1) == 1
    assert common_prefix_length([], 5) == 0


@pytest.fixture
def evaluate(phi3, tmp_path):
    """Run the evaluate stage on seven rows of two sets; return its folder and its summary."""

    def run(**settings):
        out, rows = tmp_path / "out", tmp_path / "rows"
        out.mkdir()
        rows.mkdir()
        lines = [json.dumps({"id": f"r{i}", "set": "hard" if i % 3 == 2 else "heldout", **chat(i)}) for i in range(7)]
        (rows / "heldout.jsonl").write_text("\n".join(lines) + "\n")
        metrics = ["exact_match", "token_loss"]
        asked = recipe(
            evaluation__metrics=metrics, evaluation__max_new_tokens=4, gate__primary="exact_match", **settings
        )
        ref = REF.model_copy(update={"facets": {"heldout": "d"}})
        job = make_job("evaluate", asked, {"model": REF, "rows": ref})
        return out, score.run(job, Inputs({"model": phi3, "rows": rows}), out, Progress())

    return run


def test_the_stage_report_contains_the_scores_and_the_first_answers(evaluate):
    out, summary = evaluate()
    table, report = pd.read_parquet(out / "scores.parquet"), EvaluationReport.from_dict(summary.report)
    assert json.loads((out / "metrics.json").read_text()) == scores_to_dict(report.metrics) == summary.report["metrics"]
    assert {rows: part["exact_match"].n for rows, part in report.metrics.items()} == {"heldout": 5, "hard": 2}
    part = table[table["set"] == "heldout"]
    loss = report.metrics["heldout"]["token_loss"]
    assert loss.value == pytest.approx(part["nll"].sum() / part["reference_tokens"].sum())
    assert report.metrics["heldout"]["perplexity"].low == pytest.approx(math.exp(loss.low))
    assert summary.figures["heldout.token_loss"] == round(loss.value, 6)
    assert [sample.id for sample in report.samples] == ["r0", "r1", "r3", "r4", "r6"]
    assert report.samples[0].prompt == chat(0)["messages"][0]["content"]
    assert report.samples[0].answer == part["answer"].iloc[0]


def test_max_rows_limits_each_set(evaluate):
    out, summary = evaluate(evaluation__max_rows=2)
    table = pd.read_parquet(out / "scores.parquet")
    assert table["set"].value_counts().to_dict() == {"heldout": 2, "hard": 2}
    report = EvaluationReport.from_dict(summary.report)
    assert report.available == {"heldout": 5, "hard": 2} and report.longest > 0


def heldout_file(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """Write held-out rows of (prompt, label)."""
    lines = [json.dumps({"id": f"r{n}", "set": "heldout", "messages": [{"role": "user", "content": prompt},
             {"role": "assistant", "content": label}]}) + "\n" for n, (prompt, label) in enumerate(rows)]  # fmt: skip
    file = folder / "heldout.jsonl"
    file.write_text("".join(lines))
    return file


def test_max_rows_is_a_sample_that_adding_rows_hardly_changes(tmp_path):
    rows = [(f"question {n}", f"label {n // 40}") for n in range(77 * 40)]  # sorted by label
    taken, available = score.read_rows(heldout_file(tmp_path, rows), 100, 0)
    assert len(taken) == 100 and available == {"heldout": 3080}
    assert len({row.messages[-1]["content"] for row in taken}) == 77, "the first 100 rows have 3 labels"
    assert [int(row.id[1:]) for row in taken] == sorted(int(row.id[1:]) for row in taken), "in the file's order"
    prompts = {row.messages[0]["content"] for row in taken}
    more, _ = score.read_rows(heldout_file(tmp_path, [("new", "x"), *reversed(rows)]), 100, 0)
    assert len(prompts & {row.messages[0]["content"] for row in more}) >= 98
    other, _ = score.read_rows(heldout_file(tmp_path, rows), 100, 1)
    assert prompts != {row.messages[0]["content"] for row in other}
    everything, _ = score.read_rows(heldout_file(tmp_path, rows), 5000, 0)
    assert [row.id for row in everything] == [f"r{n}" for n in range(3080)]


def test_without_heldout_rows_nothing_is_scored(tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(BadData, match="no held-out rows"):
        score.read_rows(tmp_path / "heldout.jsonl", None, 0)


def test_of_several_devices_only_the_first_scores(evaluate, monkeypatch):
    monkeypatch.setattr(score, "join", lambda _: Second(rank=1, size=2))
    out, summary = evaluate()
    assert summary.report == {} and not list(out.iterdir())


class Second(ProcessGroup):
    """The second of two devices, without the first: nothing is exchanged."""

    def gather_results(self, found):
        return found

    def broadcast(self, value):
        return value


def test_a_non_finite_score_ends_the_stage(evaluate, monkeypatch):
    monkeypatch.setattr(metric_modules, "compute", lambda name, *_: ModuleScores({}, {name: [math.nan] * 7}))
    with pytest.raises(BadData, match="not a finite number"):
        evaluate()
