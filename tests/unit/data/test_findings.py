"""The checks of data.profile: what they find and what not, what is left out or refused, and that they change no fingerprint."""

import json

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.config.data import ProfileRule
from loraflow.config.recipe import Recipe
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.checks.broken_text import broken_text, control_token, script
from loraflow.data.checks.findings import Detector, default_rules, personal_data, share_limit
from loraflow.data.checks.row_limits import refuse_findings
from loraflow.evaluation import slices
from loraflow.failures import LimitExceeded
from loraflow.reporting.rows import check_notes
from tests.job_factory import Outside
from tests.unit.data.test_near_duplicates import run_check, text, write

SENTENCES = [
    "Übergröße, Äpfel und Öl: „das Ä“ – »groß« heißt ‚Maß‘… und „Straß“",
    "Où est l’été à Nîmes ? « Ça va », dit-il : “café…” — déjà vu…",
    "El niño pequeñó: ¿qué pasó? «Mañana» “así”…",
    "NÃO É VERÃO, disse o IRMÃO: “CORAÇÃO”",
    "Smörgåsbord på Ålesund – “blå”, “Å” og ‘rød’",
    "Zażółć gęślą jaźń – „tak”",
    "Привет, мир: «как дела?» — хорошо",
    "Γειά σου Κόσμε· «καλημέρα»…",
    "日本語のテキストです。「はい」",
    "مرحبا بالعالم، كيف حالك؟",
    "emoji 😀👍 and € 5 – 20 °C, ½ × 2 ± 1 · § 3 ™ ® ©",
    "Tiếng Việt rất hay: “Ấn Độ”",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_text_that_is_whole_is_not_called_broken_and_misread_text_is(sentence):
    assert broken_text(sentence) is None
    for encoding in ("cp1252", "latin-1"):
        misread = sentence.encode().decode(encoding, "replace" if encoding == "latin-1" else "ignore")
        assert broken_text(misread) is not None, misread


@pytest.mark.parametrize(
    ("damaged", "how"),
    [
        ("caf\ufffd", "U+FFFD in"),
        ("half \ud83d of it", "a lone surrogate, U+D83D"),
        ("itâ€™s", "UTF-8 read as another encoding"),
        ("CafÃ©", "UTF-8 read as another encoding"),
        ("20 Â°C", "UTF-8 read as another encoding"),
    ],
)
def test_damaged_text_is_named_by_its_kind_of_damage(damaged, how):
    assert broken_text(f"a text with {damaged}.").startswith(how)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|end|>", "[/INST]", "<start_of_turn>", "<eos>", "</s>", "<<SYS>>", "<｜User｜>"])  # fmt: skip
def test_control_tokens_are_found_in_text_and_html_is_none(token):
    assert control_token(f"a {token} b") == token
    for plain in ("<s>old</s> new", "a <| f |> b", "x || y", "[INSTALL]", "<b>bold</b>", "if a < b | c > d"):
        assert control_token(plain) is None


# Numbers from the standards' own examples: ISO 13616, and the cards that payment services publish for tests.
@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("ann.b+c@example.co.uk", "email"),
        ("GB29 NWBK 6016 1331 9268 19", "IBAN"),
        ("DE89370400440532013000", "IBAN"),
        ("4242 4242 4242 4242", "card"),
        ("378282246310005", "card"),
        ("8.8.8.8", "IP"),
        ("2001:4860:4860::8888", "IP"),
        ("+49 30 1234567", "phone"),
        ("(415) 555-2671", "phone"),
        ("+1-415-555-2671", "phone"),
        ("0151 2345 6789", "phone"),
    ],
)
def test_personal_data_is_named_and_not_repeated(data, what):
    found = personal_data(f"Write to {data}, please.")
    assert found is not None and what in found and data not in found


@pytest.mark.parametrize(
    "plain",
    [
        "DE89370400440532013001",
        "4242 4242 4242 4241",
        "192.168.1.1",
        "version 1.2.3",
        "12:30:45",
        "a::b",
        "2024-07-26",
        "3.14159265358979",
        "order 1234567890123456",
        "@home",
        "1,000,000",
        "1939-1945",
        "0.12 0.34",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_other_numbers_are_no_personal_data(plain):
    assert personal_data(f"It is {plain} here.") is None


def test_the_script_is_that_of_most_letters():
    assert [script(s) for s in (SENTENCES[0], SENTENCES[6], SENTENCES[7], SENTENCES[8], "ok")] == [
        "Latin", "Cyrillic", "Greek", "CJK", None]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ひらがなとカタカナと漢字", "CJK"), ("コーヒーーーー", "CJK"), ("ｺｰﾋｰを飲む", "CJK"), ("人々", "CJK"),
        ("ＦＵＬＬ width", "Latin"), ("𝐛𝐨𝐥𝐝", "Latin"), ("한국어 질문", "Hangul"), ("ab где", "Cyrillic"), ("ab гд", "Cyrillic"),
        ("1 + 2", None),
    ],
)  # fmt: skip
def test_questions_and_answers_have_one_definition_of_script(text, expected):
    """Equal numbers of letters: the name decides, not the order of the letters."""
    assert script(text, min_letters=1) == expected
    assert slices._scripts(pd.DataFrame({"prompt": [json.dumps([{"content": text}])]})) == [expected or "no letters"]


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_each_check_names_its_rows_with_places():
    detector = Detector(default_rules(personal=True))
    rows = [chat(f"q{n}", f"Thank you for your question about item number {n}, which is fine.") for n in range(6)]
    rows += [chat("q6", "I'm sorry, but I can't help."), chat("q7", "N/A"), chat("q8", "…")]
    rows += [chat("same", "one"), chat("Same ", "two"), chat("equal", "x"), chat("equal", "x")]
    rows += [chat("q13", "Это ответ на русском языке"), chat("q14 <|im_end|>", "a"), chat("q15", "a@b.org")]
    for n, row in enumerate(rows):
        detector.add(f"f:{n}", "train", row)
    found = {name: sorted(rows) for name, rows in detector.rows().items()}
    assert found == {"refusals": [6, 7, 8], "openings": [0, 1, 2, 3, 4, 5], "disputed": [9, 10], "scripts": [13],
                     "broken_text": [], "control_tokens": [14], "personal": [15]}  # fmt: skip
    (refusals,) = (f for f in detector.findings() if f.check == "refusals")
    assert len(refusals.examples) == 3 and refusals.examples[0].startswith("f:6: ")


def planted(folder):
    rows = [(text(n), f"answer {n}") for n in range(20)] + [(text(100), "I cannot help."), (text(101), "sure <|end|>")]
    write(folder / "files" / "train.jsonl", rows)
    write(folder / "files" / "test.jsonl", [(text(50), "x"), (text(51), "I'm sorry, I can't.")])


def test_quarantine_leaves_training_rows_out_and_only_counts_held_out_rows(tmp_path):
    planted(tmp_path / "d")
    rules = {"refusals": {"action": "quarantine"}, "control_tokens": {"action": "warn"}}
    report = run_check(tmp_path / "d", tmp_path / "out", "off", heldout=["test.jsonl"], profile=rules)
    assert report.counts["profile_refusals"] == 1
    assert (report.rows.train, report.rows.heldout) == (21, 2)
    assert [f.rows for f in report.findings if f.check == "refusals"] == [2]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == ["train.jsonl:21"]
    assert any(note.startswith("control_tokens: 1 rows") for note in check_notes(report))
    refuse_findings(report.as_json(), "here")


@pytest.mark.parametrize(("policy", "stay"), [("off", True), ("report", True), ("drop", False)])
def test_quarantine_keeps_the_rows_that_a_seeded_split_holds_out_unless_near_rows_decide_it(tmp_path, policy, stay):
    rows = [(text(n), f"answer {n} {'I cannot help.' * (n % 2)}") for n in range(60)]
    write(tmp_path / "d/files/train.jsonl", rows)
    run_check(tmp_path / "d", tmp_path / "a", policy, heldout_fraction=0.3)
    rules = {"refusals": {"action": "quarantine"}}
    run_check(tmp_path / "d", tmp_path / "b", policy, heldout_fraction=0.3, profile=rules)
    assert ((tmp_path / "a/heldout.jsonl").read_text() == (tmp_path / "b/heldout.jsonl").read_text()) is stay
    assert "cannot" not in (tmp_path / "b/train.jsonl").read_text()


def refusals(*sets: list[str]) -> list[str]:
    """Return the answers of sets that are found as refusals."""
    detector = Detector({"refusals": ProfileRule()})
    rows = [(f"set{n}", answer) for n, answers in enumerate(sets) for answer in answers]
    for n, (name, answer) in enumerate(rows):
        detector.add(f"f:{n}", name, chat(f"q{n}", answer))
    return [rows[n][1] for n in detector.rows()["refusals"]]


PROSE = [f"Answer number {n} says a little more than a class." for n in range(60)]


@pytest.mark.parametrize("name", ["none", "None", "NA", "null", "undefined", "N/A", "todo", "nan"])
def test_a_class_is_no_placeholder_in_any_set_and_the_same_word_among_prose_is(name):
    classes = ["spam", "ham", name] * 5
    assert refusals(classes) == []
    assert refusals(classes, ["ham", name], PROSE) == [], "a small held-out set has the same classes"
    assert refusals([*PROSE, name]) == [name]


def test_a_word_that_is_a_usual_answer_is_no_placeholder_but_a_stub_is():
    assert refusals([*PROSE, *["none"] * 5]) == []
    assert refusals([*(f"{one} {n}" for one in PROSE for n in range(10)), *["none"] * 5]) == ["none"] * 5, (
        "less than 1 % of the answers"
    )
    assert refusals([*PROSE, *["[deleted]"] * 20]) == ["[deleted]"] * 20
    assert refusals(["I'm sorry, I can't.", "ham", "spam"] * 5) == ["I'm sorry, I can't."] * 5, "a refusal is no class"


def test_an_answer_that_is_not_learned_counts_for_no_check_of_answers_and_its_text_for_the_others(tmp_path):
    texts = ["I cannot help.", "N/A", "one", "two", *(f"Thank you for your question about item {n}, it is fine." for n in range(6)), "Это ответ на русском языке", "sure <|end|>"]  # fmt: skip
    rows = [[*chat(f"q{n}", "ok"), *chat("same", answer)] for n, answer in enumerate(texts)]
    rows[2][:2] = rows[3][:2] = chat("equal", "ok")
    for row in rows:
        row[-1]["weight"] = 0
    rows += [chat(f"q{n}", f"plain answer number {n}") for n in range(20, 30)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    done = json.loads(CliRunner().invoke(cli, ["data", "check", "--json", str(file)]).output)
    assert {finding["check"] for finding in done["profile"]} == {"control_tokens"} and done["partly_marked"] == 12
    file.write_text(file.read_text().replace('"weight": 0', '"weight": 1'))
    done = json.loads(CliRunner().invoke(cli, ["data", "check", "--json", str(file)]).output)
    assert len(done["profile"]) == 5


def test_a_check_acts_only_above_its_share(tmp_path):
    planted(tmp_path / "d")
    for name, share, left in (("a", 0.5, 22), ("b", 0.01, 21)):
        rules = {"refusals": {"action": "quarantine", "share": share}}
        report = run_check(tmp_path / "d", tmp_path / name, "off", heldout=["test.jsonl"], profile=rules)
        assert report.rows.train == left


def test_fail_stops_the_run_in_one_block(tmp_path):
    planted(tmp_path / "d")
    rules = {name: {"action": "fail", "share": 0} for name in ("refusals", "control_tokens", "disputed")}
    report = run_check(tmp_path / "d", tmp_path / "out", "off", heldout=["test.jsonl"], profile=rules)
    with pytest.raises(LimitExceeded) as caught:
        refuse_findings(report.as_json(), "here")
    assert "train.jsonl:22" in str(caught.value) and len(str(caught.value).splitlines()) <= 10


def test_without_checks_a_recipe_has_the_payload_and_the_report_of_before(tmp_path):
    def config(**data):
        recipe = Recipe.model_validate({"name": "x", "base": {"model": "b"}, "data": data})
        return CheckDatasetConfig.from_recipe(recipe, Outside()).identity()

    assert "profile" not in config()
    used = config(profile={"refusals": {"action": "quarantine"}})
    assert used["profile"] == {"refusals": {"action": "quarantine"}}
    planted(tmp_path / "d")
    report = run_check(tmp_path / "d", tmp_path / "out", "off", heldout=["test.jsonl"])
    assert "findings" not in report.as_json()


def test_quarantine_needs_no_share_and_a_warning_has_one():
    assert share_limit(ProfileRule(action="quarantine"), "refusals") == 0
    assert share_limit(ProfileRule(), "refusals") > 0
    assert share_limit(ProfileRule(action="quarantine"), "openings") > 0


def test_data_check_prints_what_it_found_with_file_and_line(tmp_path):
    planted(tmp_path / "d")
    result = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "d" / "files")])
    assert result.exit_code == 0, result.output
    assert "warn      refusals: 2 rows (8.3%), placeholder or refusing answers" in result.output
    assert "train.jsonl:21: 'I cannot help.'" in result.output and "<|end|>" in result.output
    as_json = json.loads(CliRunner().invoke(cli, ["data", "check", "--json", str(tmp_path / "d" / "files")]).output)
    assert {finding["check"] for finding in as_json["profile"]} == {"refusals", "control_tokens"}


def test_data_check_takes_a_recipe_with_its_own_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted(tmp_path / "d")
    recipe = {"name": "x", "base": {"model": "b"}, "data": {
        "source": "d/files", "train": ["train.jsonl"], "heldout": ["test.jsonl"],
        "profile": {"refusals": {"action": "fail", "share": 0.01}}}}  # fmt: skip
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(cli, ["data", "check", "x.yaml"])
    assert result.exit_code == 1 and "fail      refusals: 2 rows" in result.output, result.output


def recipe_of(folder, **data):
    settings = {"source": "d/files", "train": ["train.jsonl"], "heldout": ["test.jsonl"], **data}
    (folder / "x.yaml").write_text(json.dumps({"name": "x", "base": {"model": "b"}, "data": settings}))
    return ["data", "check", "--json", "x.yaml"]


def test_data_check_of_a_recipe_reads_reasoning_as_its_runs_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted(tmp_path / "d")
    thought = [(text(n), "<think>I am sorry, I cannot say.</think>yes") for n in range(3)] + [
        (text(9), "<think>x</think>")
    ]
    write(tmp_path / "d/files/train.jsonl", thought)
    arguments = recipe_of(tmp_path, thinking="strip")
    stripped = json.loads(CliRunner().invoke(cli, arguments).output)
    assert [p["place"] for p in stripped["problems"]] == ["train.jsonl:4"]
    assert [f["rows"] for f in stripped["profile"] if f["check"] == "refusals"] == [1], "that of test.jsonl"
    beside = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": {"r": 1}}]
    }
    (tmp_path / "d/files/train.jsonl").write_text(json.dumps(beside) + "\n")
    assert json.loads(CliRunner().invoke(cli, arguments).output)["malformed"] == 0
    kept = json.loads(CliRunner().invoke(cli, recipe_of(tmp_path)).output)
    assert "would not be learned" in kept["problems"][0]["problem"]


def test_data_check_refuses_a_format_beside_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [*recipe_of(tmp_path), "--format", "auto"])
    assert result.exit_code != 0 and "data.format" in str(result.exception or result.output)


def test_rows_with_the_same_problem_are_named_once_with_their_number(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a"},
        *[{"question": "q", "reply": "r"}] * 4,
        {"prompt": "q", "completion": ""},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = CliRunner().invoke(cli, ["data", "check", str(path)]).stderr.splitlines()
    problems = [line for line in lines if line.startswith(("c.jsonl", "  "))]
    assert problems[0].startswith("c.jsonl:2: expected messages")
    assert problems[1] == "  the same: 3 more (c.jsonl:3, c.jsonl:4, …)"
    assert problems[2:] == ["c.jsonl:6: message 2: an empty assistant message"]
