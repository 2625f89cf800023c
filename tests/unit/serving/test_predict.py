"""Batch prediction: the order of rows, file formats, errors of single rows, and resuming a killed run."""

import json
import os
import signal
from types import SimpleNamespace

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.data.chats import BadRow
from loraflow.data.formats.chat_formats import to_prompt
from loraflow.failures import BadConfig, BadData
from loraflow.serving.chat import Sampling
from loraflow.serving.models import Model, load
from loraflow.serving.predict import PredictOptions, predict
from loraflow.serving.tables import Prediction, read_questions, write_answers
from tests.conftest import chat
from tests.forked_process import run_in_fork

SHORT = Sampling(max_new_tokens=6)
QUESTIONS = [
    "what is red",
    "please answer the bird of the tree and the house",
    "no",
    "what is the cat of dog",
    "one two",
]


@pytest.fixture
def rows(tmp_path):
    """A file of questions, long and short ones mixed."""
    file = tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": " ".join([QUESTIONS[i % 5]] * (1 + i % 3))} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(phi3, source, target, sampling=SHORT, **options):
    on_batch = options.pop("on_batch", None)
    chosen = PredictOptions(sampling=sampling, **{"batch_size": 4, **options})
    return predict(Model("tiny", phi3), source, target, chosen, on_batch=on_batch)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_answer_equals_generate_on_the_single_row(phi3, rows, tmp_path):
    done = run(phi3, rows, tmp_path / "out.jsonl")
    assert done == {"rows": 20, "errors": 0, "resumed": 0, "out": str(tmp_path / "out.jsonl")}
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == list(range(20)), (
        "the order of rows is unchanged although batches are sorted by length"
    )
    loaded = load(Model("tiny", phi3), "float32")
    for row in out[:6]:
        ids = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new = loaded.model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["prediction"] == loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert row["finish"] == ("stop" if new[-1] in loaded.stops else "length") and row["error"] is None
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize(
    "sampling", [SHORT, Sampling(temperature=1.0, seed=3, max_new_tokens=6)], ids=["greedy", "sampled"]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(phi3, rows, tmp_path, sampling):
    run(phi3, rows, tmp_path / "uninterrupted.jsonl", sampling)

    def stop(done, total):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(phi3, rows, tmp_path / "out.jsonl", sampling, on_batch=stop)
    assert not (tmp_path / "out.jsonl").exists()
    answers = tmp_path / "out.jsonl.partial" / "answers.jsonl"
    with answers.open("a") as file:
        file.write('{"index": 3, "te')  # the line in which a power cut fell
    seen = []
    done = run(phi3, rows, tmp_path / "out.jsonl", sampling, on_batch=lambda n, total: seen.append(n))
    assert done["resumed"] == 8 and seen == [12, 16, 20], "the first two batches are not answered again"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()


def _killed(base, source, target):
    def kill(done, total):
        if done >= 8:
            os.kill(os.getpid(), signal.SIGKILL)

    run(base, source, target, on_batch=kill)


def test_a_killed_run_resumes_to_the_same_bytes(phi3, rows, tmp_path):
    target = tmp_path / "out.jsonl"
    assert run_in_fork(_killed, phi3, rows, target) == -signal.SIGKILL and not target.exists()
    assert run(phi3, rows, target)["resumed"] == 8
    run(phi3, rows, tmp_path / "uninterrupted.jsonl")
    assert target.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()


def test_rows_of_two_models_or_inputs_are_never_mixed(phi3, rows, tmp_path):
    from tests.conftest import build_phi3

    def stop(done, total):
        raise KeyboardInterrupt

    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(phi3, rows, target, on_batch=stop)
    other = build_phi3(tmp_path / "other", seed=7)
    with pytest.raises(BadConfig, match="has answers for another") as caught:
        run(other, rows, target)
    assert "changed: model" in caught.value.got
    with pytest.raises(BadConfig) as caught:
        run(phi3, rows, target, Sampling(max_new_tokens=7))
    assert "max_new_tokens 6 → 7" in caught.value.got
    rows.write_text(rows.read_text() + '{"prompt": "more"}\n')
    with pytest.raises(BadConfig) as caught:
        run(phi3, rows, target)
    assert "changed: input" in caught.value.got


def test_an_output_that_another_process_finished_meanwhile_is_not_replaced(phi3, rows, tmp_path, monkeypatch):
    """It ends, with another model perhaps, while this one hashes its model."""
    target = tmp_path / "out.jsonl"
    monkeypatch.setattr(Model, "digest", lambda *_: target.write_text("another's") and "d")
    with pytest.raises(BadConfig, match="already exists"):
        run(phi3, rows, target)
    assert target.read_text() == "another's" and not (tmp_path / "out.jsonl.partial").exists()


def test_sampled_answers_never_come_from_the_greedy_decoding_of_evaluation(phi3):
    from loraflow.evaluation.greedy_decoding import is_supported
    from loraflow.serving.predict import _Sampler

    model = load(Model("tiny", phi3), "float32").model
    on_gpu = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        config=SimpleNamespace(_attn_implementation="sdpa"),
        forward=model.forward,
        generation_config=model.generation_config,
    )
    assert is_supported(on_gpu) and not is_supported(_Sampler(on_gpu, Sampling(temperature=1.0)))


BAD = [
    json.dumps(chat(1)), "{broken", '{"prompt": 3}', '{"nothing": "here"}', '{"prompt": "say <|end|> please"}',
    json.dumps({"prompt": "tree " * 600}), '{"messages": [{"role": "system", "content": "s"}]}', '"text"', json.dumps(chat(2)),
]  # fmt: skip


def test_an_invalid_row_has_an_error_and_the_other_rows_have_answers(phi3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("\n".join(BAD) + "\n")
    command = ["predict", str(phi3), "in.jsonl", "out.jsonl", "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1 and "7 of 9 rows have no answer" in str(result.exception)
    out = read(tmp_path / "out.jsonl")
    assert len(out) == 9
    assert [row["error"] is None for row in out] == [True, *[False] * 7, True]
    for row, says in zip(out[1:8], ("in.jsonl:2: column 2", "content is int", "nothing", "<|end|>", "at most 512",
                                    "must be a user message", "expected an object"), strict=True):  # fmt: skip
        assert says in row["error"] and row["prediction"] is None
    assert isinstance(out[0]["prediction"], str) and out[0]["messages"] == chat(1)["messages"]


def test_a_folder_as_the_input_is_refused_with_a_file_in_it(phi3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "in.jsonl").write_text(json.dumps(chat(1)) + "\n")
    error = CliRunner().invoke(cli, ["predict", str(phi3), "rows", "out.jsonl"]).exception
    assert isinstance(error, BadConfig) and "The input is a folder" in str(error) and "rows/in.jsonl" in str(error)


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("target_suffix", [".jsonl", ".csv", ".parquet"])
def test_every_input_format_gives_the_same_answers_in_every_output_format(phi3, tmp_path, source_suffix, target_suffix):
    table = pd.DataFrame(
        {"n": [3, 1, 2], "prompt": ["what is red", 'say "x", please\nnow', "नमस्ते"], "weight": [0.5, 1.5, 2.5]}
    )
    source = tmp_path / f"in{source_suffix}"
    if source_suffix == ".jsonl":
        table.to_json(source, orient="records", lines=True, force_ascii=False)
    elif source_suffix == ".csv":
        table.to_csv(source, index=False)
    else:
        table.to_parquet(source)
    run(phi3, source, tmp_path / f"out{target_suffix}")
    readers = {".jsonl": lambda f: pd.read_json(f, lines=True), ".csv": pd.read_csv, ".parquet": pd.read_parquet}
    out = readers[target_suffix](tmp_path / f"out{target_suffix}")
    assert list(out.columns) == ["n", "prompt", "weight", "prediction", "tokens", "finish", "error"]
    assert out["n"].astype(int).tolist() == [3, 1, 2] and out["prompt"].tolist() == table["prompt"].tolist()
    assert out["weight"].astype(float).tolist() == [0.5, 1.5, 2.5]
    run(phi3, source, tmp_path / "plain.jsonl")
    assert out["prediction"].tolist() == [row["prediction"] for row in read(tmp_path / "plain.jsonl")]
    if (source_suffix, target_suffix) == (".parquet", ".parquet"):
        assert out["n"].dtype == table["n"].dtype and out["weight"].dtype == table["weight"].dtype


def test_chats_in_a_csv_can_be_read_again(phi3, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(3)))
    run(phi3, tmp_path / "in.jsonl", tmp_path / "out.csv")
    again = pd.read_csv(tmp_path / "out.csv").drop(columns=["prediction", "tokens", "finish", "error"])
    again.to_csv(tmp_path / "again.csv", index=False)
    asked = [question.messages for question in read_questions(tmp_path / "again.csv", "auto", None, None)]
    assert asked == [chat(i)["messages"][:1] for i in range(3)]


USER = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "asks"),
    [
        ({"messages": USER}, USER),
        ({"messages": [*USER, {"role": "assistant", "content": ""}]}, USER),
        ({"conversations": [{"from": "human", "value": "q"}]}, USER),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, USER),
        ({"instruction": "q"}, USER),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}]),
        ({"prompt": "q"}, USER),
        ({"prompt": USER}, USER),
        ({"prompt": "q", "completion": ""}, USER),
    ],
)
def test_a_question_is_read_with_and_without_its_answer(row, asks):
    assert to_prompt(row) == asks


@pytest.mark.parametrize(
    "row", [{}, {"messages": []}, {"prompt": ""}, {"prompt": None}, {"messages": "q"}, 3, {"text": "q"}]
)
def test_a_row_without_a_question_is_refused(row):
    with pytest.raises(BadRow):
        to_prompt(row)


def test_a_table_without_questions_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("id,text\n1,Where is my kettle?\n2,It broke.\n")
    monkeypatch.setattr("loraflow.serving.predict.load", None)
    model = SimpleNamespace(digest=lambda memo: "d")
    for column, says, step in ((None, "the columns are id, text", "--column NAME"), ("id", "in.csv:row 1", "correct")):
        if column:
            (tmp_path / "in.csv").write_text("id,text\n,Where is my kettle?\n,It broke.\n")
        with pytest.raises(BadData) as caught:
            options = PredictOptions(sampling=Sampling(), column=column)
            predict(model, tmp_path / "in.csv", tmp_path / "out.csv", options)
        assert says in caught.value.got and step in caught.value.next_step
        assert not (tmp_path / "out.csv.partial").exists()


def test_a_column_and_a_system_message_can_be_given(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\nhello,a\n")
    (question,) = read_questions(tmp_path / "x.csv", "auto", "text", "be brief")
    assert question.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    with pytest.raises(BadConfig, match="no such column"):
        read_questions(tmp_path / "x.csv", "auto", "txt", None)
    (tmp_path / "y.csv").write_text("prompt,prediction\nhello,a\n")
    with pytest.raises(BadConfig, match="columns"):
        read_questions(tmp_path / "y.csv", "auto", None, None)


@pytest.mark.parametrize("value", [2**64, 2**64 - 1, -(2**63) - 1, {}, [{}], [[2**64]], {"a": {"b": {}}}])
def test_a_value_that_parquet_cannot_store_is_named_with_its_column(tmp_path, value):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"id": value, "prompt": "q"}) + "\n")
    questions = read_questions(source, "auto", None, None)
    with pytest.raises(BadData) as caught:
        write_answers(tmp_path / "out.parquet", questions, [Prediction("a")], source)
    assert caught.value.where == "id" and "write .jsonl or .csv" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    write_answers(tmp_path / "out.jsonl", questions, [Prediction("a")], source)
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == value


def test_an_unwritable_output_is_reported_before_generation(phi3, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": {"y": 2}}\n')
    with pytest.raises(BadData, match="different types"):
        run(phi3, tmp_path / "in.jsonl", tmp_path / "out.parquet", on_batch=lambda *_: pytest.fail("it was answered"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"], "nothing is left behind"
    for target, says in (
        ("out.txt", "not supported for output"),
        ("no/out.csv", "no such folder"),
        ("in.jsonl", "already exists"),
    ):
        with pytest.raises(BadConfig, match=says):
            run(phi3, tmp_path / "in.jsonl", tmp_path / target)
