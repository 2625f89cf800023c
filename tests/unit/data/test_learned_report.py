"""What a run's report says about the training rows: their lengths, the longest ones, what is learned of them."""

import base64
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from loraflow.data.tokens import chunk_encoder
from loraflow.data.tokens import tokenization as tokens
from loraflow.data.tokens.token_report import LONGEST, Lengths, LongRow, SampleRow, TokenReport, long_rows, longest_of
from loraflow.job import Inputs, Progress
from loraflow.reporting import markdown, sections
from loraflow.reporting.sections import Learned, learned_lines
from loraflow.store import chunk_cache
from tests.conftest import chat
from tests.job_factory import make_job
from tests.unit.reporting.test_report import report
from tests.unit.training.test_training import REF, base, recipe  # noqa: F401

SVG = "{http://www.w3.org/2000/svg}"


def lengths_of(values, max_length=128, too_long="drop"):
    values = list(values)
    rows = long_rows(lambda n: f"x:{n}", values)
    return Lengths.of(np.array(values, np.int32), rows, max_length=max_length, too_long=too_long)


@pytest.mark.parametrize("max_length", [1, 7, 128, 2048, 100_000])
@pytest.mark.parametrize("kind", ["few", "equal", "spread", "one very long", "all too long"])
def test_each_row_is_in_one_bar_and_max_length_is_between_two_bars(kind, max_length):
    random = np.random.default_rng(max_length)
    values = {
        "few": np.array([3, 90, 91]),
        "equal": np.full(50, 64),
        "spread": random.integers(1, 1000, 5000),
        "one very long": np.append(random.integers(1, 200, 100), 1_000_000),
        "all too long": max_length + random.integers(1, 4 * max_length + 1, 30),
    }[kind]
    found = lengths_of(values, max_length)
    ends = [found.first + n * found.width for n in range(len(found.rows))]
    drawn = values[values <= ends[-1]]
    assert found.rows == [int(((drawn > end - found.width) & (drawn <= end)).sum()) for end in ends]
    assert sum(found.rows) + found.beyond == len(values)
    assert found.beyond == (values > ends[-1]).sum() <= (values > 2 * max_length).sum()
    assert found.too_long_rows == (values > max_length).sum()
    assert not any(end - found.width < max_length < end for end in ends)
    assert len(found.rows) <= 50
    assert [row.tokens for row in found.longest] == sorted(values.tolist(), reverse=True)[:LONGEST]


def test_the_longest_rows_of_chunks_are_those_of_the_file_and_the_first_of_equal_ones():
    values = np.random.default_rng(0).integers(1, 40, 500).tolist()
    places = [f"x:{n}" for n in range(500)]
    longest: list[LongRow] = []
    for start in range(0, 500, 7):
        longest = longest_of([*longest, *long_rows(places[start : start + 7].__getitem__, values[start : start + 7])])
    assert longest == long_rows(places.__getitem__, values)
    assert [row.place for row in longest] == [
        places[n] for n in sorted(range(500), key=lambda n: (-values[n], n))[:LONGEST]
    ]


@pytest.mark.parametrize("max_length", [10, 128, 100_000])
def test_the_histogram_is_well_formed_with_a_bar_for_each_count_inside_the_image(max_length):
    found = lengths_of(np.random.default_rng(1).integers(20, 400, 300), max_length)
    root = ElementTree.fromstring(sections.svg(found, "lengths"))
    bars = [bar.attrib for bar in root.findall(f"{SVG}rect")[1:]]
    assert len(bars) == len(found.rows)
    for bar, count in zip(bars, found.rows, strict=True):
        left, top, wide, tall = (float(bar[key]) for key in ("x", "y", "width", "height"))
        assert left >= 0 and top >= 0 and left + wide <= sections.WIDTH and top + tall <= sections.HEIGHT
        assert (tall > 0) == (count > 0)
    over = sum(n for bar, n in zip(bars, found.rows, strict=True) if bar["fill"] == sections.OVER)
    assert over + found.beyond == found.too_long_rows
    labels = [text.text for text in root.findall(f"{SVG}text")]
    assert f"max_length {max_length}" + ("" if max_length <= 128 else " →") in labels


FIGURES = {"train_tokens": 900, "supervised_tokens": 345, "rows_nothing_to_learn": 6}
SAMPLE = SampleRow(
    place="a.jsonl:1", tokens=9, learned_tokens=4, parts=[("ask ", 0.0), ("```py\n1\n```", 1.0), ("x", 0.5)]
)


def shown(**changes):
    content = TokenReport(lengths=lengths_of([5, 5, 9, 200]), samples=[SAMPLE]).model_dump()
    return "\n".join(learned_lines(Learned(FIGURES, TokenReport(**content | changes)), image=False))


def test_the_report_says_how_much_is_learned_and_marks_it_in_samples():
    text = shown()
    assert "345 of 900 tokens of the training rows are learned (38.3%)" in text
    assert "rows without a token to learn: 6, left out" in text
    assert "1 rows are longer than max_length (128 tokens), and left out (data.too_long: drop)." in text
    assert "| x:3 | 200 (too long) |\n| x:2 | 9 |\n| x:0 | 5 |\n| x:1 | 5 |" in text
    assert "a.jsonl:1: 9 tokens, 4 learned\n\n````\nask ⟦```py\n1\n```⟧⟦x⟧×0.5\n````" in text


def test_a_long_line_of_a_sample_is_continued_without_losing_a_character():
    words = "why is the kettle  that I ordered\tlast week not here\n\n" + "x" * 150 + " 漢字" * 40
    sample = SampleRow(place="a:1", tokens=9, learned_tokens=4, parts=[(words, 0.0), ("the answer", 1.0)])
    block = shown(samples=[sample]).split("```")[1].strip("\n")
    assert max(map(len, block.split("\n"))) <= 66
    assert block.replace("\n↪ ", "") == f"{words}⟦the answer⟧"


def test_a_report_of_an_earlier_tokenize_has_the_shares_alone():
    text = "\n".join(learned_lines(Learned(FIGURES, TokenReport()), image=False))
    assert "345 of 900" in text and "###" not in text and "⟦" not in text


def test_the_lengths_are_an_image_where_images_are_supported():
    learned = Learned(FIGURES, TokenReport(lengths=lengths_of([5, 9])))
    terminal = markdown.run_report(report(learned=learned))
    page = markdown.run_report(report(learned=learned), image=True)
    drawn = re.search(r"!\[lengths of the training rows\]\(data:image/svg\+xml;base64,([^)]*)\)", page)
    ElementTree.fromstring(base64.b64decode(drawn[1]))
    assert "![lengths" not in terminal and "▁" in terminal


@pytest.mark.parametrize("processes", [1, 2])
def test_tokenize_reports_the_lengths_that_transformers_counts_with_the_rows_that_it_leaves_out(
    base, tmp_path, processes, monkeypatch  # noqa: F811
):  # fmt: skip
    from transformers import AutoTokenizer

    monkeypatch.setattr(chunk_cache, "MAX_ROWS", 8)
    monkeypatch.setattr(chunk_encoder, "ONE_PROCESS_BYTES", 1)
    chats = [chat(n)["messages"] for n in range(30)]
    chats[17] = [{"role": "user", "content": "so long " * 70}, {"role": "assistant", "content": "yes"}]
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.mkdir(), out.mkdir()
    records = [{"id": str(n), "set": "train", "place": f"x:{n}", "messages": c} for n, c in enumerate(chats)]
    (rows / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (rows / "validation.jsonl").write_text("")
    job = make_job("tokenize", recipe(data__too_long="drop", runtime__processes=processes), {"rows": REF, "base": REF})
    summary = tokens.run(job, Inputs({"rows": rows, "base": base}), out, Progress())

    tokenizer = AutoTokenizer.from_pretrained(base)
    counted = [len(tokenizer.apply_chat_template(c, return_dict=True)["input_ids"]) for c in chats]
    found = TokenReport.model_validate(json.loads(json.dumps(dict(summary.report))))
    assert found.lengths == lengths_of(counted)
    assert found.lengths.longest[0] == LongRow(place="x:17", tokens=counted[17])
    assert summary.figures["rows_too_long"] == found.lengths.too_long_rows >= 1
    drawn = [int(sample.place.removeprefix("x:")) for sample in found.samples]
    assert len(set(drawn)) == 3 and drawn == sorted(drawn) != [0, 1, 2]
    for sample, messages, count in (
        (sample, chats[n], counted[n]) for sample, n in zip(found.samples, drawn, strict=True)
    ):
        learned = "".join(text for text, weight in sample.parts if weight)
        assert messages[-1]["content"] in learned and messages[0]["content"] not in learned
        assert "".join(text for text, _ in sample.parts) == tokenizer.decode(
            tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        )
        assert sample.tokens == count


def test_a_long_sample_is_shortened_in_its_middle(base, tmp_path):  # noqa: F811
    from loraflow.config.stage_configs import TokenizeConfig
    from loraflow.data.tokens.loss_mask import ChatTemplate
    from loraflow.data.tokens.mask_view import SAMPLE_CHARACTERS, sample_rows

    messages = [
        {"role": "user", "content": "begin " + "so long " * 400 + "end?"},
        {"role": "assistant", "content": "yes"},
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "0", "place": "x:0", "messages": messages}) + "\n")
    job = make_job("tokenize", recipe(), {"rows": REF, "base": REF})
    assert isinstance(job.config, TokenizeConfig)
    (row,) = sample_rows(tmp_path / "train.jsonl", ChatTemplate(base), job.config)
    text = row.parts[0][0]
    assert len(text) <= SAMPLE_CHARACTERS + 5 and "begin" in text and "end?" in text and " […] " in text
    assert "longer than max_length" in row.left_out
    drawn = []
    for long in (1, 3000):
        record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        lines = [
            json.dumps({**record, "id": "0", "place": f"x:{n}", "x": "a" * (long if n == 4 else 1)}) for n in range(9)
        ]
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
        drawn.append([row.place for row in sample_rows(tmp_path / "train.jsonl", ChatTemplate(base), job.config)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3, "each row is drawn with the same chance"
