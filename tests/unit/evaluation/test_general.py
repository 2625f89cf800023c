"""General rows show whether a model forgets: they are checked, scored as transformers scores them, and guard a promotion."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from loraflow.config import load_recipe
from loraflow.config.recipe import Recipe
from loraflow.data.chats import read_general
from loraflow.data.checks.general import check_limits
from loraflow.data.checks.general import run as check_general
from loraflow.evaluation import general as stage
from loraflow.evaluation.gate import decide
from loraflow.evaluation.general import CHATS, CHOICES, encode_choice, is_right
from loraflow.evaluation.guards import general_guards
from loraflow.evaluation.power import rows_for_margin
from loraflow.execution.launcher import run_job
from loraflow.execution.plan_notes import forgetting_lines
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, BadData, DirtyData
from loraflow.job import Inputs, Progress
from loraflow.stages import CHECK_DATASET, CHECK_GENERAL, SCORE_GENERAL, VERSION_DATASET
from loraflow.store import Ref
from loraflow.tasks.guards import require_general_comparable
from tests.conftest import write_chats
from tests.job_factory import make_job

CHAT = {"messages": [{"role": "user", "content": "Is tea a herb?"}, {"role": "assistant", "content": "No, a shrub."}]}
QUESTION = {"question": "What is tea made of?", "choices": ["leaves", "stones", "a cup"], "answer": 0}


def general_of(recipe, *rows, text=None, **settings):
    """Run check_general on rows; return its workspace and artifact."""
    file = recipe.parent / "general.jsonl"
    file.write_text(text if text is not None else "".join(json.dumps(row) + "\n" for row in rows))
    workspace = Workspace(load_recipe(recipe, {"evaluation.general": str(file), **settings}))
    dataset = run_job(workspace.job(VERSION_DATASET, {}), workspace.store)
    checked = run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), workspace.store)
    return workspace, run_job(workspace.job(CHECK_GENERAL, {"rows": checked}), workspace.store)


def test_chats_and_questions_are_read_and_counted(recipe):
    prompted = {"prompt": "Tea is", "choices": ["wet", "dry"], "answer": "dry"}
    workspace, ref = general_of(recipe, CHAT, QUESTION, prompted)
    rows = read_general(workspace.store.path(ref) / "general.jsonl")
    assert workspace.store.manifest(ref).figures == {"chats": 1, "choices": 2}
    assert [row.get("context") for row in rows] == [None, "Question: What is tea made of?\nAnswer:", "Tea is"]
    assert [row.get("answer") for row in rows] == [None, 0, 1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"choices": None}, "choices: expected a list of at least two texts"),
        ({"choices": []}, "choices: expected a list of at least two texts"),
        ({"choices": ["leaves"]}, "choices: expected a list of at least two texts"),
        ({"choices": ["leaves", " "]}, "choices: expected texts that are not empty"),
        ({"choices": ["leaves", 3]}, "choices: expected texts that are not empty"),
        ({"choices": ["leaves", "Leaves "]}, "two of them are the same text"),
        ({"answer": 3}, "answer: expected a position from 0 to 2"),
        ({"answer": -1}, "answer: expected a position from 0 to 2"),
        ({"answer": True}, "answer: expected a position from 0 to 2"),
        ({"answer": 1.0}, "answer: expected a position from 0 to 2"),
        ({"answer": "bark"}, "answer: expected a position from 0 to 2, or the text of a choice"),
        ({"answer": None}, "answer: expected a position from 0 to 2"),
        ({"prompt": "both"}, "expected either a question or a prompt"),
        ({"question": " "}, "expected either a question or a prompt"),
        ({"question": 5}, "expected either a question or a prompt"),
    ],
)
def test_a_question_that_cannot_be_scored_is_refused_with_file_and_line(recipe, change, problem):
    with pytest.raises(BadData, match="1 row of the general set cannot be used") as caught:
        general_of(recipe, CHAT, {**QUESTION, **change})
    assert caught.value.where == "general.jsonl:2" and problem in str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "general.jsonl:2"),
        ([1], "expected one JSON object"),
        ({"text": "no chat"}, "general.jsonl:2"),
        ({**CHAT, "id": 7}, "the same row as general.jsonl:1"),
        ({"messages": [{"role": "user", "content": "what is the dog of red 1"}, {"role": "assistant", "content": "x"}]}, None),
    ],
)  # fmt: skip
def test_malformed_and_duplicate_rows_are_refused(recipe, row, problem):
    if problem is None:
        general_of(recipe, CHAT, row)
        return
    with pytest.raises(BadData) as caught:
        general_of(recipe, CHAT, row)
    assert problem in str(caught.value) and caught.value.where == "general.jsonl:2"


def test_the_same_question_with_its_choices_in_another_order_is_a_duplicate(recipe):
    with pytest.raises(BadData, match="the same row as general.jsonl:1"):
        general_of(recipe, QUESTION, {**QUESTION, "choices": ["stones", "a cup", "leaves"], "answer": 2})


def test_text_that_is_no_json_and_an_empty_file_are_refused(recipe):
    with pytest.raises(BadData) as caught:
        general_of(recipe, text=json.dumps(CHAT) + "\n{oops\n")
    assert caught.value.where == "general.jsonl:2"
    with pytest.raises(BadData, match="The general set has no rows"):
        general_of(recipe, text="\n")


@pytest.mark.parametrize("kind", ["chat", "question", "prompt"])
def test_a_row_that_was_trained_on_is_refused_with_both_places(recipe, dataset, kind):
    asked = json.loads((dataset / "train.jsonl").read_text().splitlines()[3])["messages"][-2]["content"]
    row = {
        "chat": {"messages": [{"role": "user", "content": f" {asked.upper()}"}, {"role": "assistant", "content": "x"}]},
        "question": {**QUESTION, "question": asked},
        "prompt": {"prompt": asked, "choices": ["a", "b"], "answer": 0},
    }[kind]
    with pytest.raises(BadData, match="its prompt is that of the training row train.jsonl:4") as caught:
        general_of(recipe, QUESTION, row)
    assert caught.value.where == "general.jsonl:2"


def test_scores_are_those_of_a_slow_loop_over_the_logits_of_transformers(recipe, quick_phi3, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions = [
        {"question": f"what is the {word}", "choices": ["red", "a blue dog and a cat", "{}"], "answer": n % 3}
        for n, word in enumerate(["dog", "cat", "sky", "sea"])
    ]
    questions.append({"prompt": "the dog is ", "choices": ["red", "blue 10"], "answer": 1})  # ends with a space
    chats = [CHAT, {"messages": [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "red " * 9}]}]
    workspace, ref = general_of(recipe, *questions, *chats)
    given = {"model": Ref(stage="resolve_base", fingerprint="f", digest="d", uri=""), "general": ref}
    job = make_job(
        "score_general", load_recipe(recipe, {"evaluation.general": "x", "runtime.eval_batch_size": 3}), given
    )
    out = tmp_path / "out"
    out.mkdir()
    inputs = Inputs({"model": quick_phi3, "general": workspace.store.path(ref)})
    summary = stage.run(job, inputs, out, Progress())

    tokenizer, model = AutoTokenizer.from_pretrained(quick_phi3), AutoModelForCausalLM.from_pretrained(quick_phi3)

    def log_likelihood(ids, start):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logs[at - 1, ids[at]]) for at in range(start, len(ids)))

    table = pd.read_parquet(out / "choices.parquet")
    for row, question in zip(table.itertuples(), questions, strict=True):
        context = f"Question: {question['question']}\nAnswer:" if "question" in question else question["prompt"]
        start = len(tokenizer(context.rstrip())["input_ids"])
        joined = [
            context + choice if context.endswith(" ") else f"{context} {choice}" for choice in question["choices"]
        ]
        sums = [log_likelihood(tokenizer(text)["input_ids"], start) for text in joined]
        assert list(-row.nll) == pytest.approx(sums, rel=1e-5)
        lengths = [len(choice) for choice in question["choices"]]
        assert row.accuracy == (np.argmax(sums) == question["answer"])
        assert row.accuracy_norm == (np.argmax(np.divide(sums, lengths)) == question["answer"])
    losses = pd.read_parquet(out / "loss.parquet")
    for row, chat in zip(losses.itertuples(), chats, strict=True):
        prompt = tokenizer.apply_chat_template(
            chat["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(chat["messages"], tokenize=True, return_dict=False)
        answer = len(whole) - len(
            prompt
        )  # with the end of turn and the end of text, which the template writes behind it
        assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[-2:]) == "<|end|><|endoftext|>"
        assert row.token_loss == pytest.approx(-log_likelihood(whole, len(prompt)) / answer, rel=1e-5)
        assert row.reference_tokens == answer
    weighted = np.average(losses["token_loss"], weights=losses["reference_tokens"])
    assert summary.report["metrics"][CHATS]["loss"]["value"] == pytest.approx(weighted)
    assert summary.report["metrics"][CHOICES]["accuracy"]["value"] == table["accuracy"].mean()


def test_other_training_rows_leave_the_scores_of_a_model_in_the_store(recipe, dataset):
    model = Ref(stage="resolve_base", fingerprint="f", digest="d", uri="")
    before = general_of(recipe, CHAT, QUESTION)
    write_chats(dataset / "train.jsonl", range(60))
    after = general_of(recipe, CHAT, QUESTION)
    jobs = [space.job(SCORE_GENERAL, {"model": model, "general": ref}) for space, ref in (before, after)]
    assert before[1].fingerprint != after[1].fingerprint, "these rows are checked against the new training rows"
    assert jobs[0].fingerprint == jobs[1].fingerprint
    other = general_of(recipe, CHAT, {**QUESTION, "answer": 1})
    assert other[0].job(SCORE_GENERAL, {"model": model, "general": other[1]}).fingerprint != jobs[0].fingerprint


def test_a_missing_file_is_refused_with_the_key_of_the_recipe(recipe):
    with pytest.raises(BadData, match="file with general rows does not exist") as caught:
        _ = Workspace(load_recipe(recipe, {"evaluation.general": "absent.jsonl"})).general
    assert caught.value.next_step == "correct evaluation.general"


@pytest.mark.parametrize(
    ("outs", "message"), [("outs: []", "evaluation.general names the .dvc file"), (None, "correct evaluation.general")]
)
def test_a_dvc_file_that_pins_nothing_or_is_missing_names_the_key_of_the_recipe(recipe, monkeypatch, outs, message):
    monkeypatch.chdir(recipe.parent)
    if outs is not None:
        (recipe.parent / "general.jsonl.dvc").write_text(outs)
    with pytest.raises(BadData, match=message):
        _ = Workspace(load_recipe(recipe, {"evaluation.general": "general.jsonl.dvc"})).general


def check_file(recipe, source, tmp_path):
    """Run check_general on a file or folder, with no training rows."""
    workspace = Workspace(load_recipe(recipe, {"evaluation.general": str(source)}))
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir(), out.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (rows / name).touch()
    given = Ref(stage="check_dataset", fingerprint="f", digest="d", uri="")
    return check_general(workspace.job(CHECK_GENERAL, {"rows": given}), Inputs({"rows": rows}), out, Progress())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("g.txt", "g.txt\n  expected: .csv, .db, .json, .jsonl"),
        ("g", "give it the suffix .jsonl"),
        ("g.jsonl.gz", "gunzip --keep g.jsonl.gz"),
        ("g.jsonl", r"general: .*g.jsonl\n  expected: .*of a type among .csv, .db, .json(.|\n)*no row in g.jsonl"),
    ],
)
def test_a_file_of_another_type_or_without_rows_is_named_with_the_types_that_are_read(recipe, tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(BadData, match=message):
        check_file(recipe, tmp_path / name, tmp_path)


def test_a_folder_of_hidden_files_is_named(recipe, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".g.jsonl").write_text(json.dumps(QUESTION))
    with pytest.raises(BadData, match=r"evaluation.general: .*folder\n  expected: .*not hidden") as caught:
        check_file(recipe, tmp_path / "folder", tmp_path)
    assert caught.value.got == "no such file"


@pytest.mark.parametrize("name", ["g.csv", "my rows.csv"])
def test_a_bad_row_of_a_table_is_named_with_file_and_row(recipe, tmp_path, name):
    (tmp_path / name).write_text("question,choices,answer\nq,a|b,0\nr,a|b,0\n")
    with pytest.raises(BadData, match="2 rows of the general set cannot be used") as caught:
        check_file(recipe, tmp_path / name, tmp_path)
    assert caught.value.where == f"{name}:row 1" and f"{name}:row 2: choices" in str(caught.value)


def test_rows_that_dvc_pins_are_read_and_a_changed_file_is_refused(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    file = recipe.parent / "general.jsonl"
    file.write_text(json.dumps(QUESTION) + "\n")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    (recipe.parent / "general.jsonl.dvc").write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: general.jsonl\n")
    pinned = {"evaluation.general": "general.jsonl.dvc"}
    workspace = Workspace(load_recipe(recipe, pinned))
    assert workspace.general.md5 == md5
    file.write_text(json.dumps({**QUESTION, "answer": 1}) + "\n")
    with pytest.raises(DirtyData):
        _ = Workspace(load_recipe(recipe, pinned)).general


def test_a_variant_of_a_recipe_that_names_other_general_rows_does_not_use_those_of_the_recipe(recipe):
    names = ("general.jsonl", "other.jsonl")
    for answer, name in enumerate(names):
        (recipe.parent / name).write_text(json.dumps({**QUESTION, "answer": answer}) + "\n")
    first, other = (load_recipe(recipe, {"evaluation.general": str(recipe.parent / name)}) for name in names)
    workspace = Workspace(first)
    assert workspace.general.name == "general.jsonl"
    assert workspace.with_recipe(other).general.name == "other.jsonl"
    assert workspace.with_recipe(load_recipe(recipe)).general is None
    assert workspace.with_recipe(first).general is workspace.general


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_chooses_no_answer_and_stops_the_run_with_the_row(bad):
    rows = [{"id": "a", "place": "g.jsonl:3", "context": "q", "choices": ["x", "y"], "answer": 0}]
    with pytest.raises(BadData, match="not a finite number") as caught:
        stage._question_table(rows, [(bad, 1), (2.0, 1)])
    assert caught.value.where.startswith("g.jsonl:3")
    chat = [{"id": "a", "place": "g.jsonl:4", "messages": CHAT["messages"]}]
    with pytest.raises(BadData, match="not a finite number"):
        stage._chat_table(chat, [(bad, 1)])


def test_a_long_choice_wins_by_its_likelihood_per_character_only():
    assert is_right([2.0, 6.0], ["no", "certainly not, my dear"], 1) == (0.0, 1.0)
    assert is_right([2.0, 2.0], ["a", "b"], 0) == (1.0, 1.0), "of equal ones the first"


def test_a_question_without_tokens_is_refused(quick_phi3):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="no token"):
        encode_choice(AutoTokenizer.from_pretrained(quick_phi3), " ", "a")


def test_an_interval_counts_rows_with_one_prompt_once():
    right = (np.arange(200) % 4 < 3).astype(float)
    once = pd.DataFrame({"prompt": [str(i) for i in range(200)], "accuracy": right})
    config = SimpleNamespace(confidence=0.95)
    single, double, other = (
        stage._value(table, "accuracy", config)
        for table in (once, pd.concat([once, once]), pd.concat([once, once.assign(prompt=once["prompt"] + "?")]))
    )
    assert double.value == single.value and double.n == 400
    width = double.high - double.low
    assert width == pytest.approx(single.high - single.low, rel=0.05) and width > 1.3 * (other.high - other.low)


# -- the gate -------------------------------------------------------------------------------------------------------

N = 800


def heldout(score):
    return pd.DataFrame({"id": [f"r{i}" for i in range(100)], "exact_match": np.full(100, score)})


def rows(loss=2.0, right=N, n=N):
    ids = [f"g{i}" for i in range(n)]
    accuracy = (np.arange(n) < right).astype(float)
    return {
        CHATS: pd.DataFrame({"id": ids, "prompt": ids, "token_loss": np.full(n, loss), "reference_tokens": 5}),
        CHOICES: pd.DataFrame({"id": ids, "prompt": ids, "accuracy": accuracy, "accuracy_norm": accuracy}),
    }


def gate(margins, challenger, **others):
    general = general_guards(margins, challenger, others)
    tables = {name: heldout(0.0) for name in others}
    return decide(
        heldout(1.0), tables, primary="exact_match", min_gain=0.0, guards={}, confidence=0.95, vocabulary=500, general=general
    )  # fmt: skip


MARGINS = {"loss": 0.05, "accuracy": 0.02, "accuracy_norm": 0.02}


def test_a_model_that_forgets_nothing_is_promoted():
    decision = gate(MARGINS, rows(), base=rows())
    assert decision.verdict == "promote", decision.reasons
    assert [comparison.metric for comparison in decision.comparisons] == [
        "exact_match", "general_loss", "general_accuracy", "general_accuracy_norm",
    ]  # fmt: skip


@pytest.mark.parametrize("worse", [{"loss": 2.5}, {"right": 600}])
@pytest.mark.parametrize("against", ["base", "champion"])
def test_a_model_that_is_clearly_worse_on_general_rows_is_rejected(worse, against):
    weaker = rows(**worse)
    others = {"base": weaker, "champion": weaker} | {against: rows()}
    decision = gate(MARGINS, weaker, **others)
    assert decision.verdict == "reject"
    assert all("general_" in reason and against in reason for reason in decision.reasons if "refuted" in reason)


def test_too_few_general_rows_to_be_certain_leave_it_undecided_with_the_number_of_rows():
    decision = gate({"loss": 0.05}, rows(n=100), base=rows(n=100))
    assert decision.verdict == "undecided" and "such rows would be enough" in decision.reasons[0]


def test_without_a_general_guard_general_rows_decide_nothing():
    assert gate({}, rows(loss=9.0, right=0), base=rows()).verdict == "promote"


def test_models_that_were_scored_on_other_general_rows_are_not_compared():
    other = rows()
    other[CHATS]["id"] = [f"x{i}" for i in range(N)]
    with pytest.raises(BadData, match="not scored on the same examples"):
        gate(MARGINS, rows(), base=other)


@pytest.mark.parametrize(("column", "value"), [("id", "g4"), ("prompt", "another"), ("token_loss", float("nan"))])
def test_general_scores_that_cannot_be_compared_are_refused_with_the_command_that_scores_them_again(column, value):
    other = rows(n=120)
    other[CHATS].loc[3, column] = value
    with pytest.raises(BadData) as caught:
        require_general_comparable(general_guards({"loss": 0.05}, rows(n=120), {"champion": other}))
    assert "champion on general rows" in caught.value.where and "--force score_general" in caught.value.next_step


def test_a_guard_without_enough_rows_of_its_kind_stops_the_run_before_training():
    chats = [{"kind": "chat", "messages": [{"role": "user", "content": str(i)}, {}]} for i in range(20)]
    questions = [
        {"kind": "choice", "context": str(i % 19)} for i in range(30)
    ]  # of which 11 have the prompt of another
    lines = "\n".join(map(json.dumps, [*chats, *questions])).encode()
    check_limits(lines, {"loss": 0.05}, 20)
    with pytest.raises(BadConfig, match="too few multiple-choice questions") as caught:
        check_limits(lines, {"loss": 0.05, "accuracy_norm": 0.02}, 20)
    assert caught.value.where == "gate.forgetting: accuracy_norm" and caught.value.got == "19"


@pytest.mark.parametrize("value", [{"loss": 0}, {"loss": -1}, {"bleu": 0.1}, {"loss": float("nan")}])
def test_margins_are_positive_and_of_known_scores(value):
    document = {
        "name": "r",
        "base": {"model": "b"},
        "evaluation": {"general": "g.jsonl"},
        "gate": {"forgetting": value},
    }
    with pytest.raises(ValidationError):
        Recipe.model_validate(document)


def test_a_margin_needs_general_rows():
    with pytest.raises(ValidationError, match=r"gate.forgetting needs evaluation.general"):
        Recipe.model_validate({"name": "r", "base": {"model": "b"}, "gate": {"forgetting": {"loss": 0.05}}})


def test_the_plan_says_how_many_general_rows_a_margin_needs(recipe):
    workspace, _ = general_of(recipe, CHAT, QUESTION, **{"gate.forgetting": {"loss": 0.05, "accuracy": 0.02}})
    loss, accuracy = forgetting_lines(workspace)
    assert "even unchanged outputs do not pass: a margin of 0.02 needs 133 rows, you have 1" in accuracy
    needed = int(loss.split("needs ")[1].split(" ")[0])
    assert (
        gate({"loss": 0.05}, rows(n=needed_for_500()), base=rows(n=needed_for_500())).verdict == "promote"
        and needed > 300
    )


def test_the_plan_and_the_gate_count_rows_with_one_prompt_once(recipe):
    asked = [
        {**QUESTION, "question": f"What is tea {i // 2}?", "choices": ["leaves", f"stones {i}"]} for i in range(238)
    ]
    margin = {"gate.forgetting": {"accuracy": 0.025}}  # 119 groups of equal size rule out 0.0249
    workspace, _ = general_of(recipe, *asked, **margin)
    assert forgetting_lines(workspace) == [
        "  general_accuracy: unchanged outputs pass: a margin of 0.025 needs 119 rows, you have 119"
    ]
    workspace, ref = general_of(recipe, *asked[2:], CHAT, **margin)
    assert "needs 119 groups of equal size, you have 118" in forgetting_lines(workspace)[0]
    prompts = [row["context"] for row in read_general(workspace.store.path(ref) / "general.jsonl") if "context" in row]
    for extra, state in (([], "open"), (["another"] * 2, "passed")):
        each = [*prompts, *extra]
        table = {CHOICES: pd.DataFrame({"id": list(map(str, range(len(each)))), "prompt": each, "accuracy": 1.0})}
        assert gate({"accuracy": 0.025}, table, base=table).comparisons[-1].state == state


def needed_for_500():
    return rows_for_margin(0.05, 0.95, "token_loss", np.log(500)) + 1
