"""Rows of datasets of the hub, with the keys that their pages show: what is asked, learned, left out or refused.

Test_published_shapes and test_public_datasets have other datasets. The expected chats are written by hand.
"""

import json
import re
import shutil
import subprocess

import pytest

from loraflow.data.answers.unread_values import counted, doubtful, questions, told_by
from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat
from tests.unit.data.test_public_datasets import CALL, PASSAGE, PREAMBLE, TWO
from tests.unit.data.test_published_shapes import FUNCTION, OUT, QA, REFUSED, answer, gpt, human, outcome, read, user

CHAT, WORSE = [user("q"), answer("a")], [user("q"), answer("b")]
TOOLS = [{"type": "function", "function": FUNCTION}]
RENDERED = f"{PREAMBLE}### Instruction:\nq\n\n### Response:\na"
LLAMA = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{PASSAGE}<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nIs it one?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt is.<|eot_id|><|end_of_text|>"
)
ALL = f"{PASSAGE}\n\nQuestion: Is it one?\nAnswer: It is."
CONSTRAINT = "The output should be 'yes' or 'no', and nothing else than that. Do not explain the answer."


def qa(**keys):
    return {"prompt": "q", "response": "a", **keys}


SHAPES = {
    # chats
    "Open-Platypus": ([{"input": "", "output": "a", "instruction": "q", "data_source": "MATH/PRM-800K"}], [QA]),
    "WizardLM V2": ([{"idx": "u", "conversations": [human("q"), gpt("a")]}], [QA]),
    "Tulu 3": ([{"id": "t_1", "messages": CHAT, "source": "ai2-adapt-dev/flan_v2"}], [QA]),
    "Magpie": ([{"instruction": "q", "response": "a", "conversations": [human("q"), gpt("a")], "input_quality": given, "instruct_reward": -3.2}
                for given in ("good", "very poor")], [QA, QA]),
    "OpenThoughts3": ([{"difficulty": 8, "domain": "math", "conversations": [human("q"), gpt("<think>t</think>a")]}], [["u: q", "a: <think>t</think>a"]]),
    "NuminaMath-TIR": ([{"problem": "q", "solution": "a", "messages": CHAT}], [QA]),
    "SlimOrca": ([{"conversations": [{"from": "system", "value": "s", "weight": None}, {**human("q"), "weight": 0.0}, {**gpt("a"), "weight": 1.0}]}],
                 [["s: s", *QA]]),
    "AgentInstruct": ([{"conversations": [{**human("q"), "loss": None}, {**gpt("a"), "loss": False}, human("r"), {**gpt("b"), "loss": True}]}],
                      [["u: q", "a-: a", "u: r", "a: b"]]),
    "WildChat-1M": (
        [{"conversation": [{**user("q"), "country": "US", "toxic": False, "turn_identifier": 1}, {**answer("a"), "country": None, "toxic": False}],
          "openai_moderation": [{"flagged": False}], "toxic": False, "model": "gpt-4"}], [QA]),
    "OpenHermes 2.5": ([{"conversations": [human("q"), gpt("a")], "system_prompt": given, "custom_instruction": None, "skip_prompt_formatting": True}
                        for given in (None, "s")], [QA, ["s: s", *QA]]),
    "Llama-Nemotron": ([{"input": [user("q")], "output": "a", "reasoning": "off", "system_prompt": "s", "used_in_training": "Ultra"}], [["s: s", *QA]]),
    "Infinity-Instruct": ([{"conversations": [human("q"), gpt("a")], "label": {"ability_en": ["x"]}, "reward": 7.5}], [QA]),
    "AM-DeepSeek-R1": ([{"messages": [{**user("q"), "info": {"source": "x"}}, {**answer("a"), "info": {"think_content": "t"}}]}], [QA]),
    "Multilingual-Thinking": ([{"developer": "s", "user": "q", "analysis": "t", "final": "a", "messages": CHAT}], [QA]),
    "HelpSteer3's feedback": ([{"context": [*CHAT, user("r")], "response": "b", "feedback": ["Mostly helpful."]}], [TWO]),
    "mental health": ([{"Context": "q", "Response": "a"}], [QA]),
    "channels of gpt-oss": ([{"messages": [user("q"), answer("t", channel=given), answer("a", channel="final")]} for given in ("analysis", "final")],
                            [REFUSED, ["u: q", "a: t", "a: a"]]),
    "channels in another case": ([{"messages": [user("q"), answer("t", channel="Analysis"), answer("a", channel="Final")]}], [REFUSED]),
    "channels that are not gpt-oss's": ([{"messages": [user("q"), answer("a", channel=given)]} for given in ("analysis", "general")], [QA, QA]),
    "a context with retrieved texts": ([{"context": [{"title": "t"}], "response": "a"}], [REFUSED]),
    # texts and their answers
    "MetaMathQA": ([{"type": "MATH_AnsAug", "query": "q", "original_question": "p", "response": "a"}], [QA]),
    "LIMO": ([{"question": "q", "solution": "It is **4**", "answer": given} for given in ("4", "4")], [["u: q", "a: It is **4**"]] * 2),
    "LawInstruct": ([{"instruction": "i", "prompt": "q", "answer": "a", "split": "train"}], [["u: i\n\nq", "a: a"]]),
    "Aya collection": ([{"inputs": "q", "targets": "a", "split": part} for part in ("train", "test")], [QA, OUT]),
    "P3 with scored choices": (
        [{"inputs_pretokenized": "q", "targets_pretokenized": "a", "answer_choices": ["a", "b"], "is_correct": given} for given in (True, False)], [QA, OUT]),
    "OpenMathInstruct-1": ([{"question": "q", "predicted_answer": "4", "is_correct": given, "generated_solution": "a"} for given in (False, True)], [OUT, QA]),
    "rStar-Coder": ([{"question": "q", "starter_code": "", "response": "a", "verified": True, "is_passed": given} for given in (True, False)], [QA, OUT]),
    "SWE-smith": ([{"messages": json.dumps(CHAT), "resolved": given, "patch": "d"} for given in (True, False)], [QA, REFUSED]),
    "BELLE's turns": ([{"instruction": "Human:q\nAssistant:a\nHuman:r\nAssistant:", "input": "", "output": "b"}], [TWO]),
    "CoEdIT": ([{"_id": "1", "task": "gec", "src": "q", "tgt": "a"}], [REFUSED]),
    "tldr": ([{"content": "q", "summary": "a"}], [QA]),
    "Camel, four messages": ([{"message_1": "q", "message_2": "a", "message_3": "r", "message_4": "b"}], [REFUSED]),
    "LeetCodeDataset": ([{"prompt": "import random", "completion": "x = 1", "query": "q", "response": "a"}], [REFUSED]),
    "MT-bench's questions": ([{"question_id": 81, "turns": ["q", "r"]}, {"question_id": 82, "turns": ["q", "r"]}], [REFUSED] * 2),
    # parts of the question
    # a text or abstract may be the rendered chat or tell the answer, so it is never a part
    "a text beside a question": ([{"text": PASSAGE, "question": "q", "answer": "a"}], [QA]),
    "an abstract beside a question": ([{"abstract": PASSAGE, "question": "q", "answer": "a"}], [QA]),
    "a text that some questions have": ([{"text": text, "question": "q", "answer": "a"} for text in (PASSAGE, "t1", "t2")], [QA] * 3),
    "the beginning of the answer as text": ([{"prompt": "q", "completion": f"{PASSAGE} {PASSAGE}", "text": PASSAGE}],
                                            [["u: q", f"a: {PASSAGE} {PASSAGE}"]]),
    "a rendered text": ([{"instruction": "q", "output": "a", "text": RENDERED}, {"prompt": "q", "completion": "a", "text": "<s>[INST] q [/INST] a</s>"}],
                        [QA, QA]),
    "a text rendered by Llama 3's template": (
        [{"system": "s", "instruction": "Is it one?", "output": "It is.", "text": LLAMA}], [["s: s", "u: Is it one?", "a: It is."]]),
    "a question's rendered text": ([{"question": "Is it one?", "answer": "It is.", "text": ALL}], [["u: Is it one?", "a: It is."]]),
    "a rendered text with changed answers": ([{"instruction": "Is it one?", "output": "Yes, it is.", "text": text} for text in (
        f"{PREAMBLE}### Instruction:\nIs it one?\n\n### Response:", f"{PREAMBLE}### Instruction:\nIs it?\n\n### Response:\nIt is.",
        f"User: Is that one, {PASSAGE}\nAssistant: Yes.", f"<p>Is it one?</p><p>{PASSAGE}</p>")], [["u: Is it one?", "a: Yes, it is."]] * 4),
    "messages and their rendered text": (
        [{"prompt": [user("Is it one?")], "completion": [answer("a")], "text": text} for text in (f"Is it one? {PASSAGE}", PASSAGE)],
        [["u: Is it one?", "a: a"]] * 2),
    "a text that has the answer": ([{"prompt": "q", "completion": PASSAGE, "text": f"From a page. {PASSAGE} Its end."}], [["u: q", f"a: {PASSAGE}"]]),
    "contexts and blank rows": (
        [{"question": q, "answer": a, "context": text} for q, a, text in (("Where is it?", "Paris", "It stands in Paris."), ("", "", ""), (None,) * 3)],
        [["u: Where is it?\n\nIt stands in Paris.", "a: Paris"], REFUSED, REFUSED]),
    "texts and blank rows": ([{"question": q, "answer": a, "text": text} for q, a, text in (("q", "a", PASSAGE), ("", "", ""), (None,) * 3)],
                             [QA, REFUSED, REFUSED]),
    "passages that quote the question": (
        [{"question": q, "answer": "three months", key: PASSAGE} for q in ("The contract", "How long?") for key in ("passage",)],
        [[f"u: {q}\n\n{PASSAGE}", "a: three months"] for q in ("The contract", "How long?")]),
    # a passage that is no part of every question is named as not read
    "Unnatural Instructions": ([{"instruction": "Is it?", "input": "q", "constraints": given, "output": "yes"} for given in ("None.", CONSTRAINT)],
                               [["u: Is it?\n\nq", "a: yes"]] * 2),
    "BIRD": ([{"prompt": "q", "evidence": given, "completion": "a", "excerpt": PASSAGE} for given in (PASSAGE, [PASSAGE])], [QA] * 2),
    # judged answers
    "Aegis 2": ([qa(prompt_label="unsafe", response_label=given) for given in ("unsafe", "safe", None, "Unsafe")], [REFUSED, QA, QA, REFUSED]),
    "WildGuardMix": ([qa(response_harm_label=given, response_refusal_label="refusal") for given in ("harmful", "unharmful", None)], [REFUSED, QA, QA]),
    "the safety of a response": ([qa(response_safety=given) for given in ("toxic", "safe", 3, "needs_caution")], [REFUSED, QA, QA, QA]),
    "a moderator's responses": ([{"prompt": "q", "completion": given, "response_label": value} for given, value in (("unsafe\nS1", "unsafe"), ("safe", "safe"))],
                                [["u: q", "a: unsafe\nS1"], ["u: q", "a: safe"]]),
    "a moderator's sentences": (
        [{"prompt": "q", "completion": text, key: value} for text, value in (
            ("The reply is harmful.", "harmful"), ("The reply is harmless.", "harmless"), ('{"response_safety": "unsafe"}', "unsafe"))
         for key in ("response_safety",)],
        [["u: q", "a: The reply is harmful."], ["u: q", "a: The reply is harmless."], ["u: q", 'a: {"response_safety": "unsafe"}']]),
    "a dangerous answer that names danger": (
        [{"prompt": "q", "completion": text, "response_label": value} for text, value in (("It is dangerous.", "unsafe"), ("It is fun.", "safe"))],
        [REFUSED, ["u: q", "a: It is fun."]]),
    "a class of the response": ([qa(response_label=given) for given in ("positive", 0, 1, "spam")], [QA] * 4),
    "an unsafe prompt with a good answer": ([qa(prompt_label=given) for given in ("unsafe", "safe")], [QA] * 2),
    "HaluEval": ([{"question": "q", "answer": "a", "hallucination": given} for given in ("yes", "no")], [OUT, QA]),
    "Capybara-Preferences": ([{"conversation": [{"input": "q", "output": given}], "chosen": CHAT, "rejected": WORSE} for given in "ab"], [QA, REFUSED]),
    # tools
    "Toucan": ([{"tools": json.dumps(TOOLS), "question": "q", "messages": json.dumps(
        [user("q"), {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"role": "function", "content": "1"},
         answer("a")])}], [["u: q", "a: ", "t: 1", "a: a"]]),
    "roles with hyphens": ([{"tools": TOOLS, "conversations": [human("q"), {"from": call, "value": json.dumps(CALL)}, {"from": result, "value": "1"}, gpt("a")]}
                            for call, result in (("function-call", "function-response"), ("Tool Call", "Tool Response"))],
                           [["u: q", "a: ", "t: 1", "a: a"]] * 2),
}  # fmt: skip
# Pairs and other rows that are no chat: nothing of them may be learned by a guess.
NO_CHATS = {
    "UltraFeedback": {"instruction": "q", "models": ["m"], "completions": [{"response": "a", "overall_score": 2.0}]},
    "HelpSteer3": {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2},
    "Orca-DPO": {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
    "distilabel's pairs": {"system": "s", "input": "q", "chosen": "a", "rejected": "b", "status": "tie"},
    "RewardBench": {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "x"},
    "Chatbot Arena, 55k": {
        "prompt": '["q"]',
        "response_a": '["a"]',
        "response_b": '["b"]',
        "winner_model_a": 0,
        "winner_model_b": 1,
    },
    "Nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}],
    },
    "SHP": {"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_A": 1, "score_B": 3},
    "StackExchange": {"question": "q", "response_j": "a", "response_k": "b"},
    "WebGPT": {"question": {"full_text": "q"}, "answer_0": "b", "answer_1": "a", "score_0": -1.0, "score_1": 1.0},
    "PKU-SafeRLHF": {
        "prompt": "q",
        "response_0": "b",
        "response_1": "a",
        "better_response_id": 1,
        "is_response_0_safe": False,
    },
    "TruthfulQA": {"question": "q", "best_answer": "a", "correct_answers": ["a"], "incorrect_answers": ["b"]},
    "HC3": {"question": "q", "human_answers": ["a"], "chatgpt_answers": ["b"]},
    "DeepMath": {"question": "q", "final_answer": "4", "r1_solution_1": "a", "r1_solution_2": "b"},
    "RLVR": {"messages": [user("q")], "ground_truth": "4", "dataset": "gsm8k"},
    "CoQA": {"story": PASSAGE, "questions": ["q"], "answers": {"input_text": ["a"]}},
    "QuAC": {"context": PASSAGE, "questions": ["q"], "answers": {"texts": [["a"]]}},
    "BoolQ": {"question": "q", "answer": True, "passage": PASSAGE},
    "SciQ": {"question": "q", "distractor1": "b", "correct_answer": "a", "support": PASSAGE},
    "HellaSwag": {"ctx": "q", "endings": ["a", "b"], "label": "0"},
    "PIQA": {"goal": "q", "sol1": "a", "sol2": "b", "label": 0},
    "WinoGrande": {"sentence": "q", "option1": "a", "option2": "b", "answer": "2"},
    "AQuA": {"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "A"},
    "Spider": {"db_id": "d", "query": "SELECT 1", "question": "q"},
    "WikiSQL": {"question": "q", "table": {"header": ["x"]}, "sql": {"human_readable": "a"}},
    "FinQA": {"pre_text": [PASSAGE], "table": [["x"]], "qa": {"question": "q", "answer": "a"}},
    "BFCL": {"question": [[user("q")]], "function": [FUNCTION], "ground_truth": [{"f": {"x": [1]}}]},
    "Super-NI": {"Definition": ["d"], "Instances": [{"input": "q", "output": ["a"]}]},
    "Math-Shepherd": {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
    "PersonaChat": {"personality": ["p"], "candidates": ["b", "a"], "history": ["q"]},
    "SWE-agent's trajectories": {
        "target": False,
        "trajectory": [{"role": "user", "text": "q", "mask": False}, {"role": "ai", "text": "a", "mask": True}],
    },
    "FLORES": {"sentence_eng_Latn": "q", "sentence_deu_Latn": "a"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_the_hub_is_read_as_its_authors_meant_it_or_refused(tmp_path, shape):
    rows, expected = SHAPES[shape]
    assert [outcome(row) for row in read(tmp_path, rows)] == expected


CHOSEN = "; for the chosen answers of preference pairs, set data.columns: "
COLUMNS = "; set data.columns: {prompt: the column of the question, completion: that of the answer}"
HINTS = {
    "Orca-DPO": CHOSEN + "{prompt: question, completion: chosen}",
    "distilabel's pairs": CHOSEN + "{prompt: input, completion: chosen}",
    "RewardBench": CHOSEN + "{completion: chosen}",
    **dict.fromkeys(
        (
            "HelpSteer3", "StackExchange", "TruthfulQA", "DeepMath", "BoolQ", "SciQ", "HellaSwag", "WinoGrande", "Spider", "FLORES",
        ),
        COLUMNS,
    ),
    "AQuA": "; options is a part of the question: write a prompt that has it",
    "WikiSQL": "; table is a part of the question: write a prompt that has it",
    "PKU-SafeRLHF": "; jq -c '{prompt, completion: (if .better_response_id == 0 then .response_0 else .response_1 end)}' "
    "IN.jsonl > OUT.jsonl makes chats of such rows",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CHATS)
def test_pairs_and_other_rows_are_refused_with_the_next_step_if_there_is_one(tmp_path, name):
    (row,) = read(tmp_path, [NO_CHATS[name]])
    assert outcome(row) == REFUSED
    keys = ", ".join(list(NO_CHATS[name])[:8])
    problem = f"expected messages, conversations, instruction/output or prompt/completion; got the keys {keys}{HINTS.get(name, '')}"
    assert row.problem == ("the last message has the role user; expected assistant" if name == "RLVR" else problem)


@pytest.mark.parametrize(
    "keys",
    [{"prompt": "q"}, {"instruction": "q"}, {"question": "q"}, {"problem": "q"}, {"prompt": "", "query": "q"},
     {"prompt": [user("q")], "chosen": [answer("a")]}, {"instruction": [user("q")]}, {"prompt": "q", "chosen": CHAT},
     {"prompt": "q", "chosen": json.dumps(CHAT)}, {"question": "q", "choices": ["x", "y"], "chosen": [user("q x y"), answer("x")]},
     {"chosen": "\n\nHuman: q\n\nAssistant: a"}],
)  # fmt: skip
def test_the_columns_that_are_named_read_the_chosen_answer(tmp_path, keys):
    (row,) = read(tmp_path, [{"chosen": "a", "rejected": "b", **keys}])
    columns = dict(pair.split(": ") for pair in row.problem.rpartition("{")[2].removesuffix("}").split(", "))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", columns)
    assert outcome(row) == (["u: q x y", "a: x"] if "choices" in keys else QA)


@pytest.mark.parametrize(
    "keys, hint",
    [
        ({"question": "q", "choices": ["x", "y"]}, "; choices is a part of the question: write a prompt that has it"),
        ({"question": "q", "chosen": {"text": "a", "score": 1}}, ""),
        ({"question": "q", "chosen": ["a", "b"]}, ""),
        ({"question": "q", "chosen": json.dumps([answer("a")])}, ""),
        ({"prompt": "q", "chosen": [answer("a")]}, ""),
        ({"prompt": "q", "chosen": answer("a")}, ""),
        ({"prompt": [user("q")], "chosen": [gpt("a")]}, ""),
    ],
)
def test_pairs_that_no_columns_read_name_none(tmp_path, keys, hint):
    row = {"chosen": "a", "rejected": "b", **keys}
    (refused,) = read(tmp_path, [row])
    assert refused.problem.endswith(f"got the keys {', '.join(row)}{hint}")


@pytest.mark.parametrize("text", ["premise", "text", "sentence"])
def test_a_class_that_is_a_number_is_refused_with_what_to_write(tmp_path, text):
    found = read(tmp_path, [{text: "A man sleeps.", "label": number} for number in (0, 1, 2, -1)])
    assert [outcome(row) for row in found] == [REFUSED] * 4
    step = "label is the number of a class: write its name into a new column, and set data.columns: "
    assert all(
        row.problem.endswith(step + "{prompt: the column of the text, completion: the new column}") for row in found
    )


@pytest.mark.parametrize(
    "row",
    [
        {"text": "A text of a book."},
        {},
        {"sentence": "x", "id": "1"},
        {"context": "Hi", "response": "b", "other_response": "c", "label": 1},
        {"rejected": "\n\nHuman: q\n\nAssistant: b", "prompt_id": 1},
        {"bad": "Human: q\n\nAssistant: b"},
        {"loser": "Human: q\n\nAssistant: b", "winner": 1},
        {"prompt_text": "Human: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "good": 1},
        {"request": {"messages": CHAT}, "response": {"choices": [{"message": answer("a")}]}},
        {"data": {"messages": [user("q")]}},
        {"said": "q", "usage": {"prompt": 3, "completion": 4}},
        {"model_a": {"messages": CHAT}, "model_b": {"messages": WORSE}},
        {"rejected": {"messages": WORSE}},
        {"it's": {"messages": CHAT}},
    ],
)
def test_no_step_is_named_that_would_not_read_the_row_or_would_learn_a_worse_answer(tmp_path, row):
    (read_row,) = read(tmp_path, [row])
    keys = ", ".join(row) or "(none)"
    assert outcome(read_row) == REFUSED and read_row.problem.endswith(f"got the keys {keys}")


@pytest.mark.parametrize("key", ["transcript", "dialogue", "chat_text"])
def test_a_text_with_labels_in_any_column_names_the_columns_that_read_it(tmp_path, key):
    (row,) = read(tmp_path, [{key: "\n\nHuman: q\n\nAssistant: a", "rating": 4.0}])
    assert outcome(row) == REFUSED and f"set data.columns: {{text: {key}}}" in row.problem
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {"text": key})
    assert outcome(row) == QA


def test_of_two_texts_with_labels_none_is_proposed(tmp_path):
    (row,) = read(tmp_path, [{"loser": "Human: q\n\nAssistant: b", "winner_text": "Human: q\n\nAssistant: a"}])
    assert outcome(row) == REFUSED and "text:" not in row.problem


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("key", ["data", "my-data", 'a "b"'])
@pytest.mark.parametrize(
    "inner", [{"messages": CHAT, "is_correct": True}, {"conversations": CHAT}, {"prompt": "q", "completion": "a"}]
)
def test_the_command_for_a_chat_inside_an_object_keeps_the_marks_beside_it(inner, key):
    row = {key: inner, "is_correct": False}
    with pytest.raises(BadRow) as refused:
        read_chat(row)
    command = re.search(r"jq -c '(.*)' IN", str(refused.value))[1]
    made = subprocess.run(["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == {**inner, "is_correct": False}


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_command_for_when2calls_pairs_takes_the_chosen_response():
    row = {"messages": [user("q")], "chosen_response": answer("a"), "rejected_response": answer("b"), "tools": [json.dumps(FUNCTION)]}  # fmt: skip
    with pytest.raises(BadRow) as refused:
        read_chat(row)
    command = re.search(r"jq -c '(.*)' IN", str(refused.value))[1]
    made = subprocess.run(["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True)
    assert read_chat(json.loads(made.stdout)).messages[-1] == answer("a")


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "r", "answer": "b", "context": CHAT, "is_correct": True}, {}),
        ({"prompt": "r", "response": "b", "contexts": CHAT}, {}),
        (
            {"my query": "r", "reply": "b", "Context": [human("q"), gpt("a")]},
            {"prompt": "my query", "completion": "reply"},
        ),
    ],
)
def test_earlier_messages_beside_a_question_are_not_left_out(tmp_path, row, columns):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert columns_of(tmp_path / "t.jsonl", "t") == {}
    (refused,) = read_rows(tmp_path, ["t.jsonl"], "auto", columns)
    command = re.search(r"jq -c '(.*)' IN", refused.problem)[1]
    made = subprocess.run(["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True)
    (joined,) = read(tmp_path, [json.loads(made.stdout)])
    assert outcome(joined) == TWO and joined.unused_keys == ()


def test_earlier_messages_that_the_prompt_has_are_no_loss(tmp_path):
    (row,) = read(tmp_path, [{"prompt": [*CHAT, user("r")], "completion": "b", "context": CHAT}])
    assert outcome(row) == TWO
    letters = [{"from": "x@y.org", "text": "Hello."}]
    (row,) = read(tmp_path, [{"prompt": "q", "completion": "a", "context": letters}])
    assert outcome(row) == QA and row.unused_keys == ("context",)


@pytest.mark.parametrize(
    "other",
    [
        {"user_query": "Where?"}, {"user_input": "Where?"}, {"claim": "It is."}, {"task": "Sum it up."}, {"Question Text": "Where?"},
        {"question": ["Where?"]}, {"rejected_response": "c"}, {"label": 0}, {"tools": []}, {"distractors": ["x"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("asked", [{"context": PASSAGE}, {"context": [user("q")]}])
def test_a_context_beside_another_column_that_may_be_the_question_is_not_learned_alone(tmp_path, asked, other):
    (tmp_path / "t.jsonl").write_text(json.dumps({**asked, "response": "a", **other}))
    assert columns_of(tmp_path / "t.jsonl", "t") == {}
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {})
    assert outcome(row) == REFUSED


@pytest.mark.parametrize("asked", [{"context": "q"}, {"context": [user("q")]}])
def test_a_context_beside_metadata_is_the_question(tmp_path, asked):
    (row,) = read(
        tmp_path, [{"conversation_id": "c", **asked, "response": "a", "feedback": ["x"], "overall_preference": 1}]
    )
    assert outcome(row) == QA


def test_the_class_of_a_content_is_learned_and_not_its_summary(tmp_path):
    rows = [{"content": "q", "summary": "s", "label": given} for given in ("positive", "negative")]
    assert [outcome(row) for row in read(tmp_path, rows)] == [["u: q", "a: positive"], ["u: q", "a: negative"]]
    found = read(tmp_path, [{"content": "q", "summary": "s", "label": given} for given in (0, 1)])
    assert [outcome(row) for row in found] == [REFUSED] * 2


@pytest.mark.parametrize("key", ["score", "reward", "final_reward"])
def test_scores_of_0_and_1_alone_are_a_question(key):
    for values, is_asked in (((0.0, 1.0), True), ((0.0, 1.0, 0.5), False), ((-3.2, 1.0), False), ((1.0, 1.0), False)):
        told = counted([told_by({key: value}, [key]) for value in values])
        assert (key in doubtful(told, {key: len(values)})) is is_asked, values


@pytest.mark.parametrize("key", ["toxicity_score", "sentiment_score", "bm25_score", "reward_model"])
def test_scores_of_something_else_are_no_question(key):
    assert doubtful(counted([told_by({key: value}, [key]) for value in (0, 1)]), {key: 2}) == {}


@pytest.mark.parametrize(("key", "values"), [("topic", ("length", "area")), ("dimension", ("length", "mass")), ("return_reason", ("length", "color")),
                                             ("answer_type", ("length", "speed")), ("feature", ("max tokens", "x"))])  # fmt: skip
def test_a_length_in_another_column_is_no_question(key, values):
    assert doubtful(counted([told_by({key: value}, [key]) for value in values]), {key: 2}) == {}


@pytest.mark.parametrize(("key", "values"), [("finish_reason", ("stop", "length")), ("stop_reason", ("end_turn", "max_tokens")),
                                             ("finishReason", ("STOP", "MAX_TOKENS"))])  # fmt: skip
def test_an_answer_that_was_cut_off_is_a_question(key, values):
    told = counted([told_by({key: value}, [key]) for value in values])
    assert doubtful(told, {key: 2}) == {key: {values[1]: 1}}
    assert f"does {key} say that answers were cut off?" in questions(doubtful(told, {key: 2}))[0]
    assert doubtful(counted([told_by({key: values[0]}, [key])] * 2), {key: 2}) == {}


@pytest.mark.parametrize("key", ["text", "abstract"])
def test_a_text_beside_an_instruction_is_named_as_not_read(tmp_path, key):
    (tmp_path / "t.jsonl").write_text(json.dumps({"instruction": "Sum it up.", key: PASSAGE, "output": "a"}))
    assert columns_of(tmp_path / "t.jsonl", "t") == {}
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {})
    assert outcome(row) == ["u: Sum it up.", "a: a"] and key in row.unused_keys


@pytest.mark.parametrize("key", ["passage", "document", "context"])
def test_a_passage_that_has_question_and_answer_is_a_part_of_the_question(tmp_path, key):
    rows = [{"prompt": "Either party", "completion": "three months.", key: PASSAGE}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {"prompt": "prompt", "completion": "completion"})
    assert outcome(row) == REFUSED and f"{key} has a text that the prompt lacks" in row.problem
    assert outcome(*read(tmp_path, rows)) == [f"u: Either party\n\n{PASSAGE}", "a: three months."]


def test_evidence_excerpts_and_constraints_are_named_as_not_read(tmp_path):
    (row,) = read(
        tmp_path,
        [{"prompt": "q", "completion": "a", "evidence": PASSAGE, "excerpt": PASSAGE, "constraints": CONSTRAINT}],
    )
    assert outcome(row) == QA and row.unused_keys == ("evidence", "excerpt", "constraints")


def test_the_channel_of_an_answer_can_be_ignored_as_the_message_says():
    row = {"messages": [user("q"), answer("t", channel="analysis"), answer("a", channel="final")]}
    with pytest.raises(BadRow, match=r"message 2: .*messages\.channel in data\.ignore"):
        read_chat(row)
    assert len(read_chat(row, ignore=("messages.channel",)).messages) == 3


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>"])
@pytest.mark.parametrize(
    "labels", [("Human: ", "\n\nAssistant: "), ("### Human: ", "### Assistant: "), ("<human>: ", "\n<bot>: ")]
)
def test_the_token_that_ends_a_text_with_labels_is_no_part_of_the_answer(tmp_path, labels, end):
    (row,) = read(tmp_path, [{"text": f"{labels[0]}q{labels[1]}a{end}"}])
    assert [message["content"] for message in row.messages] == ["q", "a"]
    (row,) = read(tmp_path, [{"text": f"{labels[0]}q{labels[1]}strike it: <s>a</s>"}])
    assert row.messages[-1]["content"] == "strike it: <s>a</s>", "HTML"
