"""Rows of public datasets in formats of their own: what is asked, what is learned, and what is left out or refused.

The keys are those of the datasets' own pages; the expected chats are written by hand.
"""

import contextlib
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat, to_prompt
from tests.unit.data.test_published_shapes import FUNCTION, OUT, QA, REFUSED, answer, human, outcome, read, user

CALL = {"name": "f", "arguments": {"x": 1}}
TWO = ["u: q", "a: a", "u: r", "a: b"]


def reply(text, rank=None, role="assistant", replies=(), **marks):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), "deleted": False, **marks}


def tree(*replies, **keys):
    return {
        "message_tree_id": "t",
        "tree_state": "ready_for_export",
        "prompt": reply("q", None, "prompter", replies),
        **keys,
    }


def numina(problem, solution):
    return {"problem": "q", "solution": "a", "answer": "1", "problem_is_valid": problem, "solution_is_valid": solution}


def r1(answer_number, verified, complete=(True, True), llama=None):
    judged = {"correctness_math_verify": verified, "is_reasoning_complete": list(complete), "correctness_llama": llama}
    return {"problem": "q", "generations": ["a", "b"], **judged, "messages": [user("q"), answer("ab"[answer_number])]}


PASSAGE = "The contract runs for two years. Either party may end it with a notice of three months."
GLAIVE = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(FUNCTION, indent=4)
)
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
VICUNA = "A chat between a curious user and an artificial intelligence assistant."
CLOSED = (
    "<s>[INST] q [/INST] I can't help.</s>", "### Instruction:\nq\n\n### Response:\nThe answer is", "<|user|>\nq</s>\n<|assistant|>\nb</s>",
    "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nb", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|end_of_text|>",
)  # fmt: skip
MENTIONS = (
    "[INST] and [/INST] mark what in Llama 2?", "### Instruction: and ### Response: are from which dataset?",
    "### Instruction: Rewrite.\nx\n### Response: template\nWhat does it mean?", "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]q[/INST]",
)  # fmt: skip
SHAPES = {
    # trees and transcripts
    "OpenAssistant tree": (
        [tree(reply("worse", 1), reply("a", 0, replies=[reply("r", None, "prompter", [reply("b", 0)])]), reply("best", -1, deleted=True)),
         tree(reply("open", 0, replies=[reply("r", 0, "prompter")])), tree(), tree(reply("a", 0), tree_state="aborted_low_grade"),
         {"message_tree_id": "t", "prompt": {**reply("q", role="prompter", replies=[reply("a", 0)]), "review_result": False}}],
        [TWO, ["u: q", "a: open"], REFUSED, OUT, OUT]),
    "OpenAssistant question that nobody answered": (
        [tree(reply("a", 0, replies=[reply("none", 0, "prompter"), reply("r", 1, "prompter", [reply("b", 0)])]))], [TWO]),
    "OpenAssistant flat": ([{"message_id": "m", "parent_id": "n", "text": "a", "role": "assistant"}], [REFUSED]),
    "openassistant-guanaco": ([{"text": "### Human: q### Assistant: a### Human: r### Assistant: b"}], [TWO]),
    "ChatML": ([{"text": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}], [["s: s", *QA]]),
    "HH as text": ([{"text": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"}], [TWO]),
    "HH that ends with a question": ([{"text": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r"}], [REFUSED]),
    "a label in an answer": ([{"text": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b"}], [REFUSED]),
    "a text about labels": ([{"text": "It begins with Human: and Assistant: follows."}], [REFUSED]),
    "Nectar's prompt": ([{"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: ", "response": " b"}], [[*TWO[:3], "a:  b"]]),
    "BELLE": ([{"instruction": "Human:q\nAssistant:a\nHuman:r\nAssistant:", "input": "", "output": "b"}], [TWO]),
    "HelpSteer2 with earlier turns": ([{"prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr", "response": "b"}], [TWO]),
    "HelpSteer2 with the label of the answer": (
        [{"prompt": f"q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr\n<extra_id_1>Assistant{end}", "response": "b"} for end in ("\n", "")], [TWO, TWO]),
    "a prompt about ChatML": ([{"prompt": "<|im_start|> is a token of ChatML. Why?", "completion": "a"}], [["u: <|im_start|> is a token of ChatML. Why?", "a: a"]]),
    "an answer with labels and white space": (
        [{"prompt": f"{begin}Human: q{between}Assistant:", "completion": given}
         for begin, between in (("", "\n\n"), ("### ", "### ")) for given in ("  x:\n\nHuman: h\n\nAssistant: i", "### Human: h### Assistant: i")],
        [["u: q", f"a: {given}"] for _ in range(2) for given in ("  x:\n\nHuman: h\n\nAssistant: i", "### Human: h### Assistant: i")]),
    "an answer of ChatML": (
        [{"prompt": f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant{line}", "completion": given}
         for line in ("\n", "") for given in ("  a<|im_end|>\n", "a<|im_end|>\n<|im_start|>user\nr")],
        [["u: q", "a:   a"], REFUSED] * 2),
    "ChatML with names": ([{"text": text.replace("Q", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n")} for text in (
        "<|im_start|>system name=x\nThe rules.<|im_end|>\nQ", "Q<|im_start|>tool name=x\n1<|im_end|>\n", "<|im_start|>user name=x\nq<|im_end|>\nQ", " \nQ")],
        [REFUSED, REFUSED, REFUSED, QA]),
    "ChatML with line ends of Windows": ([{"text": "<|im_start|>user\r\nq<|im_end|>\r\n<|im_start|>assistant\r\na<|im_end|>\r\n"}], [QA]),
    "a prompt about a dialogue": ([{"prompt": "Human: hi\n\nAssistant: hello\n\nWho spoke first?", "completion": "a"}],
                                  [["u: Human: hi\n\nAssistant: hello\n\nWho spoke first?", "a: a"]]),
    # rendered by a template
    "Llama 2": (
        [{"text": "<s>[INST] q [/INST] a </s><s>[INST] r [/INST] b </s>"}, {"text": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s>"},
         {"prompt": "<s>[INST] q [/INST]", "completion": "a</s>"}, {"prompt": "[INST]q[/INST]", "completion": "a"}, {"text": "[INST] q [/INST]"},
         {"text": "[INST] q [/INST] a </s> x [INST] r [/INST] b"}, {"text": "Why [INST] and [/INST]?"}],
        [TWO, ["s: s", *QA], QA, QA, REFUSED, REFUSED, REFUSED]),
    "Alpaca's template": (
        [{"text": f"{PREAMBLE}### Instruction:\ni\n\n### Input:\nq\n\n### Response:\na{end}"} for end in ("", "</s>", "\n\n### End")]
        + [{"text": "### Instruction:\nq\n\n### Response:\na"}, {"prompt": f"{PREAMBLE}### Instruction:\nq\n\n### Response:\n", "completion": "a"},
           {"prompt": "### Instruction:\nq", "completion": "### Response:\na"}, {"text": "Answer.\n\n### Instruction:\nq\n\n### Response:\na"},
           {"text": "### Instruction:\nq\n\n### Response:\na\n### Input:\nx\n### Response:\nb"}, {"prompt": "### Instruction:\nq", "completion": "a"}],
        [[f"s: {PREAMBLE.strip()}", "u: i\n\nq", "a: a"]] * 3 + [QA, [f"s: {PREAMBLE.strip()}", *QA], QA, REFUSED, REFUSED, ["u: ### Instruction:\nq", "a: a"]]),
    "Vicuna's template": ([{"text": f"{VICUNA} USER: q ASSISTANT: a</s>"}, {"prompt": f"{VICUNA} USER: q ASSISTANT:", "completion": "a"}],
                          [REFUSED, [f"u: {VICUNA} USER: q ASSISTANT:", "a: a"]]),
    "Zephyr": ([{"text": "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n"}, {"text": "<|system|>\n</s>\n<|user|>\nq</s>\n<|assistant|>\na"},
                {"prompt": "<|user|>\nq</s>\n<|assistant|>\n", "completion": "a</s>"}], [["s: s", *QA], ["s: ", *QA], QA]),
    "a prompt whose template opens the reasoning": (
        [{"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n", "completion": "t\n</think>\n\na<|im_end|>"}],
        [["u: q", "a: <think>\nt\n</think>\n\na"]]),
    "a completion that begins with its label": (
        [{"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": "<|im_start|>assistant\na<|im_end|>"}], [QA]),
    "a rendered prompt beside a system column": ([{"prompt": "<|system|>\ns<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n", "completion": "a", "system": system}
                                                  for system in ("s", "t")], [["s: s", *QA], REFUSED]),
    "a judge's prompt that has a whole chat": (
        [{"prompt": text, "completion": "unsafe"} for text in CLOSED], [[f"u: {text}", "a: unsafe"] for text in CLOSED]),
    "a question about a template": (
        [{"prompt": text, "completion": "a"} for text in MENTIONS], [[f"u: {text}", "a: a"] for text in MENTIONS]),
    "</s> as a tag of HTML": (
        [{"prompt": "### Instruction:\nq\n\n### Response:\n", "completion": f"{text}{end}"}
         for end in ("", "</s>") for text in ("<s>a</s>", "Use <s>a</s> here.")]
        + [{"text": f"[INST] Is <s>q</s> HTML? [/INST] <s>a</s>{end}"} for end in ("", "</s>")]
        + [{"prompt": "<|user|>\n<s>q</s></s>\n<|assistant|>\n", "completion": "a</s>"},
           {"prompt": "[INST] q [/INST]", "completion": "a </s><s>[INST] r [/INST] b </s>"}],
        [["u: q", "a: <s>a</s>"], ["u: q", "a: Use <s>a</s> here."]] * 2 + [["u: Is <s>q</s> HTML?", "a: <s>a</s>"]] * 2
        + [["u: <s>q</s>", "a: a"], REFUSED]),
    "a label in a rendered message": (
        [{"text": text} for text in (
            "[INST] q [/INST] It wraps the user in [INST] and [/INST] tags. </s>", "[INST] q [/INST] Between [INST] and [/INST]",
            "### Instruction:\nq\n\n### Response:\nUse:\n### Instruction:\n{q}\n### Response:\n{a}",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nIt is\n<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\ni<|im_end|>",
            "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]q[/INST]a</s>")],
        [REFUSED] * 5),
    "tokens of other roles": (
        [{"text": text} for text in ("[gMASK]<sop><|user|>\nq<|assistant|>f\n{}<|observation|>\nr<|assistant|>\na",
                                     "<|system|>s<|tool|>[{}]<|/tool|><|end|><|user|>q<|end|><|assistant|>a<|end|>")], [REFUSED] * 2),
    "lines of Alpaca's template in a text": (
        [{"text": "### Instruction:\ni\n\n### Input:\nq\n\n### Input:\nx\n\n### Response:\na\n### End of it"}],
        [["u: i\n\nq\n\n### Input:\nx", "a: a\n### End of it"]]),
    # lists of pairs and texts
    "Capybara": ([{"source": "x", "conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]}], [TWO]),
    "xtuner": ([{"conversation": [{"system": "s", "input": "q", "output": "a", "output_with_loss": False}, {"input": "r", "output": "b"}]}],
               [["s: s", "u: q", "a-: a", "u: r", "a: b"]]),
    "LIMA": ([{"conversations": texts, "source": "x"} for texts in (["q", "a"], ["q"])], [QA, REFUSED]),
    "texts with labels": ([{"conversations": texts} for texts in (["human: hi", "gpt: yo"], ["q", "Assistant: a"], ["### User: q", "a"])],
                          [REFUSED] * 3),
    "examples of a task": ([{"instruction": "i", "instances": [{"input": "q", "output": "a"}]}], [REFUSED]),
    "DailyDialog": ([{"dialog": ["hi", "hello"], "act": [1, 2]}], [REFUSED]),
    "answers of a quiz": ([{"question": "q", "candidates": ["w", "x"]}], [REFUSED]),
    # other vendors
    "Gemini": (
        [{"systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
          "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
         {"contents": [{"role": "user", "parts": [{"inlineData": {}}]}, {"role": "model", "parts": [{"text": "a"}]}]}],
        [["s: s", *QA], REFUSED]),
    "Bedrock": ([{"schemaVersion": "v", "system": [{"text": "s"}],
                  "messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}]}], [["s: s", *QA]]),
    "Cohere": ([{"messages": [{"role": "System", "content": "s"}, {"role": "User", "content": "q"}, {"role": "Chatbot", "content": "a"}]}],
               [["s: s", *QA]]),
    "roles in capitals with weights": ([{"messages": [user("q"), {"role": "Assistant", "content": "a", "weight": 0}, user("r"),
                                                      {"role": "ASSISTANT", "content": "b"}]}], [["u: q", "a-: a", "u: r", "a: b"]]),
    "ShareGPT with a bot": ([{"conversations": [human("q"), {"from": "bot", "value": "a"}]}], [QA]),
    "Llama's role of results": ([{"messages": [user("q"), answer("a"), {"role": "ipython", "content": "1"}, answer("b")]}],
                                [["u: q", "a: a", "t: 1", "a: b"]]),
    "Olmo": (
        [{"messages": [{"role": "system", "content": "s", "functions": json.dumps([FUNCTION]), "function_calls": None}, user("q"),
                       {"role": "assistant", "content": given, "function_calls": calls}, {"role": "environment", "content": "1"}, answer("a")]}
         for given, calls in ((None, json.dumps([CALL])), (None, "f(x=1)"), ("b", "f(x=1)"), (None, json.dumps([{"name": "g", "arguments": {}}])))],
        [["s: s", "u: q", "a: ", "t: 1", "a: a"], REFUSED, REFUSED, REFUSED]),
    "GLM": ([{"messages": [{"role": "system", "content": "", "tools": [{"type": "function", "function": FUNCTION}]}, user("q"),
                           {"role": "assistant", "tool_calls": [CALL]}]},
             *({"messages": [{"role": "system", "content": "s", "tools": tools}, user("q"), answer("a")]} for tools in (["f"], "f, g", "[f] and g"))],
            [["s: ", "u: q", "a: "], *[["s: s", *QA]] * 3]),
    "tools in the system message and in the row": (
        [{"messages": [{"role": "system", "content": "s", "tools": [FUNCTION]}, user("q"), answer("a")], "tools": [{**FUNCTION, "name": name}]}
         for name in ("f", "g")], [["s: s", *QA], REFUSED]),
    "turns of speakers": (
        [{"turns": [{"speaker": "customer", "utterance": "q"}, {"speaker": "Agent", "utterance": "a"}], "topic": "t"},
         {"turns": [{"speaker": "user", "utterance": "q"}, {"speaker": "Robo", "utterance": "a"}]}], [QA, REFUSED]),
    "earlier turns with roles": ([{"chat_history": [user("q"), answer("a")], "message": "r", "response": "b"}, {"history": [user("q"), answer("a")]}],
                                 [REFUSED, REFUSED]),
    "Vertex": ([{"messages": [{"author": "user", "content": "q"}, {"author": "bot", "content": "a"}]}], [QA]),
    "turns in a history": ([{"history": [user("q"), answer("a")], "id": 1}], [QA]),
    "turns of senders": ([{"turns": [{"sender": "user", "text": "q", "x": None}, {"sender": "assistant", "text": "a", "x": 1}]}], [QA]),
    "turns with texts": ([{"turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]}], [QA]),
    "messages, one in a row": ([{"conversation_id": 1, "role": "user", "content": "q", "topic": "x"},
                                {"conversation_id": 1, "role": "assistant", "content": "a", "topic": "x"}], [REFUSED] * 2),
    "texts of customers with a class": (
        [{"session_id": n, "sender": "customer", "text": "q", "topic": "a"} for n in (1, 2, 2)], [QA] * 3),
    "conversations of speakers": (
        [{"conversations": [{role: "user", "text": "q"}, {role: "assistant", "text": "a"}]} for role in ("speaker", "sender", "from")], [QA] * 3),
    "utterances with a class": ([{"dialogue_id": 1, "speaker": "Anna", "utterance": "q", "sentiment": "a"}], [QA]),
    "texts with a class and an author": ([{"author": "x", "text": "q", "category": "a"}], [QA]),
    # tools
    "xLAM": ([{"id": 0, "query": "q", "answers": json.dumps([CALL]), "tools": json.dumps([FUNCTION])},
              {"query": "q", "answers": "[]", "tools": json.dumps([FUNCTION])},
              {"query": "q", "answers": json.dumps([{"name": "g", "arguments": {}}]), "tools": json.dumps([FUNCTION])}],
             [["u: q", "a: "], REFUSED, REFUSED]),
    "Glaive v2": (
        [{"system": GLAIVE, "chat": "USER: q\n\n\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{\"x\": 1}'} <|endoftext|>"
                                    "\n\n\nFUNCTION RESPONSE: 1\n\n\nASSISTANT: a <|endoftext|>\n\n\n"},
         {"system": GLAIVE, "chat": "USER: q\n\n\nASSISTANT: <functioncall> {\"name\": \"f\"} <|endoftext|>\n\n\nFUNCTION RESPONSE: 1\n\n\nASSISTANT: a"},
         {"system": "SYSTEM: s", "chat": "USER: q <|endoftext|> is?\n\n\nASSISTANT: a <|endoftext|>\n\n\n"},
         {"system": GLAIVE, "chat": "USER: q\n\n\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{x}'} <|endoftext|>"}],
        [["u: q", "a: ", "t: 1", "a: a"], ["u: q", "a: ", "t: 1", "a: a"], ["s: s", "u: q <|endoftext|> is?", "a: a"], REFUSED]),
    "smoltalk2": ([{"messages": [user("q"), answer("a")], "chat_template_kwargs": {"custom_instructions": given, **more}}
                   for given, more in (("s", {}), ("", {"enable_thinking": True}), ("", {"python_tools": ["def f(): pass"]}))],
                  [["s: s", *QA], QA, REFUSED]),
    # what belongs to the question
    "earlier turns beside a question": ([{"query": "r", "response": "b", "history": [["q", "a"]]}], [TWO]),
    "earlier turns that are no pairs": ([{"prompt": "r", "completion": "b", "history": ["q", "a"]}], [REFUSED]),
    "a task beside a question": ([{"task_name": "t", "definition": given, "inputs": "q", "targets": "a"} for given in (PASSAGE, PASSAGE, "d")],
                                [*[[f"u: {PASSAGE}\n\nq", "a: a"]] * 2, ["u: d\n\nq", "a: a"]]),
    "LegalBench": ([{"index": "0", "contract": PASSAGE, "question": "q", "answer": "Yes"}], [[f"u: q\n\n{PASSAGE}", "a: Yes"]]),
    "HotpotQA": ([{"question": "q", "answer": "a", "context": {"title": ["t"], "sentences": [["s"]]}}], [REFUSED]),
    "a passage in the prompt": ([{"prompt": "The text  it says. q", "context": "the text it says.", "completion": "a"}],
                                [["u: The text  it says. q", "a: a"]]),
    "a passage beside the prompt": ([{"prompt": "q", "context": PASSAGE, "completion": "a"}], [[f"u: q\n\n{PASSAGE}", "a: a"]]),
    "a passage that some rows have": ([{"prompt": "q", "context": text, "completion": "a"} for text in (PASSAGE, "x", "y")],
                                      [REFUSED, QA, QA]),
    "an empty input beside a passage": ([{"instruction": "q", "input": "", "document": PASSAGE, "output": "a"}], [REFUSED]),
    "an input beside a context": ([{"input": "q", "output": "a", "context": PASSAGE}], [[f"u: q\n\n{PASSAGE}", "a: a"]]),
    "a question beside input and context": ([{"query": "q", "response": "a", "context": PASSAGE, "input": "7"}], [[f"u: q\n\n{PASSAGE}", "a: a"]]),
    "SQL": ([{"question": "q", "context": "CREATE TABLE head (age INTEGER)", "answer": "a"}], [["u: q\n\nCREATE TABLE head (age INTEGER)", "a: a"]]),
    "a copy of the answer": ([{"prompt": "q", "completion": PASSAGE, "story": PASSAGE}], [["u: q", f"a: {PASSAGE}"]]),
    "solutions beside results": ([{"question": "q", "solution": "2 + 2 is 4.", "answer": "4"}], [["u: q", "a: 2 + 2 is 4."]]),
    "two answers": ([{"question": "q", "solution": "three", "answer": "4"}], [REFUSED]),
    "a guess beside a corrected answer": ([{"question": "q", "answer": "a", "corrected_answer": "b"}], [REFUSED]),
    # names of question and answer
    **{f"{question}, {given}": ([{question: "q", given: "a"}], [QA]) for question, given in (
        ("inputs", "targets"), ("input", "target"), ("input_text", "output_text"), ("text_input", "output"), ("document", "summary"),
        ("article", "highlights"), ("dialogue", "summary"), ("problem", "generated_solution"), ("Human", "Assistant"))},
    # judgements
    "OpenR1-Math": ([r1(0, [True, False]), r1(1, [True, False]), r1(1, [True, False], llama=[False, True]), r1(1, [True, True], (True, False)),
                     r1(0, [None, None])], [QA, OUT, ["u: q", "a: b"], OUT, QA]),
    "NuminaMath 1.5": ([numina(*valid) for valid in (("Yes", "Yes"), ("Incomplete", "Yes"), ("Yes", "No"), ("Yes", "Incomplete"), ("No", "Yes"))],
                       [QA, REFUSED, OUT, REFUSED, OUT]),
    "a third value of a judgement": ([{"prompt": "q", "completion": "a", "is_correct": value} for value in (True, "falsch", "unsure")],
                                     [QA, REFUSED, QA]),
    "SST2 of SetFit": ([{"text": f"t{n}", "label": n % 2, "label_text": ("negative", "positive")[n % 2]} for n in range(4)],
                       [[f"u: t{n}", f"a: {('negative', 'positive')[n % 2]}"] for n in range(4)]),
    "numbers of the answers": ([{"prompt": f"t{n}", "completion": ("bad", "good")[n % 2], "label": n % 2} for n in range(4)],
                               [[f"u: t{n}", f"a: {('bad', 'good')[n % 2]}"] for n in range(4)]),
    "KTO with other answers": ([{"prompt": "q", "completion": f"a{n}", "label": n % 2} for n in range(4)], [OUT, ["u: q", "a: a1"], OUT, ["u: q", "a: a3"]]),
    "a label in metadata": ([{"prompt": f"q{n}", "completion": "a", "metadata": {"label": n}} for n in (0, 1)], [REFUSED, ["u: q1", "a: a"]]),
    "a class in metadata": ([{"prompt": f"q{n}", "completion": "a", "metadata": {"label": n}} for n in (0, 1, 2)], [[f"u: q{n}", "a: a"] for n in (0, 1, 2)]),
    "a corrected answer in metadata": ([{"prompt": "q", "completion": "a", "metadata": {"corrected_answer": text}} for text in ("b", "a", None)],
                                       [REFUSED, QA, QA]),
    "a corrected message": ([{"messages": [user("q"), answer("a", corrected_content=text)]} for text in ("b", "a", "")], [REFUSED, QA, QA]),
    "corrected": ([{"instruction": "q", "output": "a", "corrected": text} for text in ("a better text", True, "Ann")], [REFUSED, QA, QA]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_public_dataset_is_read_as_its_authors_meant_it_or_refused(tmp_path, shape):
    rows, expected = SHAPES[shape]
    assert [outcome(row) for row in read(tmp_path, rows)] == expected


LOST = ["context", "input", "passage", "article", "document", "question", "premise", "contract", "schema"]


@pytest.mark.parametrize("key", LOST)
@pytest.mark.parametrize("keys", [("prompt", "completion"), ("prompt", "response"), ("instruction", "output")])
def test_a_text_that_the_prompt_lacks_is_refused_with_the_columns_that_read_it(tmp_path, key, keys):
    row = {keys[0]: "q", keys[1]: "a", key: PASSAGE}
    if keys[0] == "instruction" and key in ("context", "input"):
        return  # Alpaca's own
    read(tmp_path, [row])
    (refused,) = read_rows(tmp_path, ["t.jsonl"], "auto")
    assert refused.problem.startswith(f"{key} has a text that the prompt lacks")
    columns = dict(re.findall(r"(\w+): (\w+)", refused.problem.partition("{")[2].partition("}")[0]))
    (found,) = read_rows(tmp_path, ["t.jsonl"], "auto", columns)
    assert outcome(found) == [f"u: q\n\n{PASSAGE}", "a: a"]
    (found,) = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=[key])
    assert outcome(found) == QA
    for prompt, given, is_read in (
        (f"q: {PASSAGE.upper()}?", "a", True),
        ("q", f"It says: {PASSAGE}", False),  # an answer that quotes it needs it
    ):
        (tmp_path / "t.jsonl").write_text(json.dumps({**row, keys[0]: prompt, keys[1]: given}))
        (found,) = read_rows(tmp_path, ["t.jsonl"], "auto")
        assert (found.messages is not None) is is_read


METADATA = [
    ("document", "169e7c22-0f1b-4a6e-9a51-4f0f8a3b7c11"), ("document", "annual_report_1.pdf"), ("document", "Annual Report 2023.pdf"),
    ("context", "customer-support"), ("context", "sad"), ("table", "user_accounts"), ("schema", "chat_v2"), ("definition", "gen-2"),
    ("story", "ABC-1"), ("story", "Chapter 1"), ("article", "https://en.wikipedia.org/wiki/A_1"), ("documents", ["doc1.pdf", "doc2.pdf"]),
    ("contexts", ["https://x.y/z"]), ("passages", {"id": "17"}), ("problem", "word problem"), ("transcript", "calls/2024/call_0.wav"),
    ("background", "Software engineer, 5 years"), ("body", "mail-0"), ("facts", "politics, economy, europe, elections, parliament, budget, taxes, law,"),
    ("input", "<noinput>"), ("contexts", []), ("table", None), ("documents", [f"report {n} of 2023.pdf" for n in range(20)]),
    ("document", " ".join(f"/data/2024/report_{n}.pdf" for n in range(20))), ("document", "d41d8cd9 8f00b204 e9800998 ecf8427e " * 5),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), METADATA, ids=lambda value: str(value)[:30])
def test_ids_names_and_categories_are_no_part_of_a_question(tmp_path, key, value):
    for asked, given in (("prompt", "completion"), ("instruction", "output"), ("question", "answer")):
        if isinstance(value, list | dict) and value and asked == "question":
            continue  # nothing is guessed beside them
        if (asked, key) in (("instruction", "context"), ("instruction", "input"), ("question", "input")):
            continue  # Alpaca's own
        (row,) = read(tmp_path, [{asked: "q", given: "a", key: value}])
        assert outcome(row) == QA and row.unused_keys == ((key,) if value else ())


def test_an_input_that_is_a_number_and_a_question_in_other_words_are_named_as_not_read(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion,input\nq,a,1000\n")
    (row,) = read_rows(tmp_path, ["t.csv"], "auto")
    assert outcome(row) == QA and row.unused_keys == ("input",)
    question = "Which city is the capital of France, the country that has a flag of blue, white and red?"
    prompt = "Tell me the capital of the country France, whose flag has three colours."
    (row,) = read(tmp_path, [{"prompt": prompt, "completion": "a", "question": question}])
    assert row.messages and row.unused_keys == ("question",)


def test_passages_in_a_list_must_be_in_the_prompt(tmp_path):
    other = "Nobody knows whether the old lighthouse still stands on that island."
    passages = (
        [PASSAGE, other],
        [{"title": "notice", "text": PASSAGE}],
        {"title": ["notice"], "sentences": [[PASSAGE]]},
    )
    for contexts in passages:
        rows = [{"prompt": given, "completion": "a", "contexts": contexts} for given in ("a notice?", f"q: {PASSAGE}")]
        assert [outcome(row) for row in read(tmp_path, rows)] == [REFUSED, [f"u: q: {PASSAGE}", "a: a"]]


def test_the_columns_of_a_passage_are_named_only_if_each_row_can_be_read_by_them(tmp_path):
    rows = [{"prompt": "q", "contract": PASSAGE, "completion": "a"}] * 3
    assert [outcome(row)[0] for row in read(tmp_path, rows)] == [f"u: q\n\n{PASSAGE}"] * 3
    assert [outcome(row) for row in read(tmp_path, [*rows, {"prompt": "q", "completion": "a"}])] == [REFUSED] * 3 + [QA]


def test_a_column_that_the_recipe_reads_as_the_input_does_not_hide_the_column_input(tmp_path):
    row = {"instruction": "q", "input": PASSAGE, "document": "another text", "output": "a"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    columns = {"instruction": "instruction", "input": "document", "output": "output"}
    (found,) = read_rows(tmp_path, ["t.jsonl"], "auto", columns)
    assert found.problem.startswith("input has a text that the prompt lacks: write it there")


def test_the_parameters_of_xlam_become_a_json_schema(tmp_path):
    kinds = {"a": "str", "b": "int, optional", "c": "List[int]", "d": "Union[int, str]", "e": "float"}
    bare = {name: {"description": name, "type": kind} for name, kind in kinds.items()}
    bare["e"]["default"] = 1.5
    call = {"name": "f", "arguments": {"a": "x", "c": [1], "d": 2}}
    row = {"query": "q", "answers": json.dumps([call]), "tools": json.dumps([{"name": "f", "parameters": bare}])}
    wrong = {**row, "answers": json.dumps([{"name": "f", "arguments": {"a": 1, "c": [], "d": 1}}])}
    found, refused = read(tmp_path, [row, wrong])
    schema = found.messages[0]["tools"][0]["function"]["parameters"]
    types = {name: value.get("type") for name, value in schema["properties"].items()}
    assert types == {"a": "string", "b": "integer", "c": "array", "d": None, "e": "number"}
    assert schema["required"] == ["a", "c", "d"] and schema["properties"]["e"]["default"] == 1.5
    assert found.messages[-1]["tool_calls"][0]["function"] == call
    assert "arguments.a: 1 is not of type 'string'" in refused.problem


@pytest.mark.parametrize("key", ["tools", "available_tools"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_read_as_a_list_of_json_texts_and_with_an_input_schema(tmp_path, key, as_text):
    anthropic = {"name": "f", "input_schema": FUNCTION["parameters"]}
    for tool in (FUNCTION, anthropic):
        value = [json.dumps(tool)] if as_text else [tool]
        (row,) = read(tmp_path, [{key: value, "messages": [user("q"), answer("a")]}])
        (found,) = row.messages[0]["tools"]
        assert found["function"]["parameters"] == FUNCTION["parameters"] and row.unused_keys == ()


def test_quotes_in_the_arguments_of_a_glaive_call_are_read(tmp_path):
    for written, given in (
        (r"""'{"t": "it\'s"}'""", "it's"), (r"""'{"t": "a\nb"}'""", "a\nb"), (r"""'{"t": "\\'"}'""", "\\'"), ('{"t": "it\'s"}', "it's"),
    ):  # fmt: skip
        chat = f'USER: q\n\n\nASSISTANT: <functioncall> {{"name": "f", "arguments": {written}}} <|endoftext|>'
        (row,) = read(tmp_path, [{"system": "s", "chat": chat}])
        assert row.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"t": given}


LONG = 100_000
SLOW = [
    {"text": f"Human: hi\n\nAssistant: a{chr(10) * LONG}b"}, {"text": f"### Human: hi### Assistant: a{' ' * LONG}b"},
    {"text": f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na{chr(10) * LONG}b<|im_end|>"}, {"text": f"Human: q{chr(10) * LONG}"},
    {"text": f"<s>[INST] q [/INST] a{' ' * LONG}b{'</s> ' * LONG}"}, {"text": f"{PREAMBLE}{' ' * LONG}### Instruction: q ### Response: a"},
    {"prompt": f"### Human: hi{chr(10) * LONG}x", "completion": "a"}, {"system": "s", "chat": f"USER: q{chr(10) * LONG}x"},
    {"system": "s", "chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": ' + " " * LONG + "x"},
    {"system": "{}" * LONG, "chat": "USER: q\n\n\nASSISTANT: a"}, {"prompt": "q", "completion": "a", "context": "a." * LONG},
    {"prompt": "q", "completion": "a", "context": ". " * LONG}, {"prompt": "q", "completion": "a", "context": "." * LONG},
    {"prompt": "q", "completion": "a", "contexts": [["x"] * LONG]},
]  # fmt: skip


@pytest.mark.parametrize("row", SLOW, ids=lambda row: str(row)[:40])
def test_long_runs_of_white_space_and_signs_are_read_in_linear_time(row):
    begin = time.process_time()
    with contextlib.suppress(BadRow):
        read_chat(row)
    assert time.process_time() - begin < 2, "quadratic: more than a minute"


@pytest.mark.parametrize(
    "name", ["gemma", "gemma4", "glm4moe", "lfm2", "llama3", "phi3", "phi3_5", "qwen3_5_think", "qwen3_instruct_2507", "qwen3_vl"]
)  # fmt: skip
def test_a_chat_that_a_template_of_trl_rendered_is_read_as_its_messages(name):
    import trl
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    options = {"chat_template": template, "bos_token": "<s>" if name == "phi3" else "<bos>", "eos_token": "</s>"}
    system = [] if name == "gemma" else [{"role": "system", "content": "Be [INST] brief."}]
    chat = [*system, user("Is it\n\n### Response:?"), answer("It is:\n* 4"), user("USER: r"), answer("Human: b")]
    reasoning = (
        "<think>\n\n</think>\n\n" if name == "qwen3_5_think" else "<think></think>\n" if name == "glm4moe" else ""
    )
    expected = [*chat[:-1], answer(reasoning + chat[-1]["content"])]
    (text,), _ = render_jinja_template([chat], **options)
    assert read_chat({"text": text}).messages[-1] == expected[-1]
    for cut in (len(text), len(text.rstrip())):
        assert read_chat({"text": text[:cut]}).messages[:-1] == read_chat({"text": text}).messages[:-1]
    (prompt,), _ = render_jinja_template([chat[:-1]], add_generation_prompt=True, **options)
    if not reasoning:
        assert read_chat({"text": text}).messages == chat
        assert read_chat({"prompt": prompt, "completion": text.removeprefix(prompt)}).messages == chat
    assert read_chat({"prompt": prompt, "completion": "b"}).messages[:-1] == read_chat({"text": text}).messages[:-1]


def test_tools_and_calls_in_messages_are_those_of_the_chat(tmp_path):
    for rows in (SHAPES["Olmo"][0][:1], SHAPES["GLM"][0][:1]):
        (row,) = read(tmp_path, rows)
        assert row.messages[0]["tools"] == [{"type": "function", "function": FUNCTION}]
        assert row.messages[2]["tool_calls"][0]["function"] == CALL
        assert row.unused_keys == ()
    assert [row.unused_keys for row in read(tmp_path, SHAPES["GLM"][0][1:])] == [("messages.tools",)] * 3


@pytest.mark.parametrize(("key", "value"), [("functions", '{"theme": "dark"}'), ("tools", [{"tool": "hammer"}])])
def test_other_values_of_a_system_message_are_no_tools(tmp_path, key, value):
    (row,) = read(tmp_path, [{"messages": [{"role": "system", "content": "s", key: value}, user("q"), answer("a")]}])
    assert outcome(row) == ["s: s", *QA] and row.unused_keys == (f"messages.{key}",)
    (row,) = read(
        tmp_path, [{"messages": [{"role": "system", "content": "s", key: '[{"name": 1}]'}, user("q"), answer("a")]}]
    )
    assert row.problem.startswith(f"message 1: {key}[0]")


def test_one_column_may_be_named_for_the_messages_and_conversations(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"conversations": [user("q"), answer("a")]}))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {"messages": "conversations"})
    assert outcome(row) == QA and row.unused_keys == ()


def test_only_a_text_that_begins_with_a_mark_is_called_rendered(tmp_path):
    texts = "An essay on [INST] and ### Instruction: marks.", "<s>[INST] q"
    found = [row.problem for row in read(tmp_path, [{"text": text} for text in texts])]
    assert ["rendered" in problem for problem in found] == [False, True]


def test_a_text_beside_the_content_of_a_message_is_named(tmp_path):
    (row,) = read(tmp_path, [{"messages": [user("q"), {**answer("a"), "text": "another", "sender": "x"}]}])
    assert outcome(row) == QA
    assert row.unused_keys == ("messages.text", "messages.sender")


@pytest.mark.parametrize(
    "messages", [SHAPES[name][0][0]["turns"] for name in ("turns of speakers", "turns of senders", "turns with texts")]
)
def test_a_prompt_of_turns_has_no_answer(messages):
    assert to_prompt({"messages": messages}) == [user("q")]
    assert to_prompt({"messages": messages[:1]}) == [user("q")]


@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_not_read_of_template_arguments_is_named(tmp_path, as_text):
    arguments = {
        "custom_instructions": "s",
        "xml_tools": [json.dumps(FUNCTION)],
        "enable_thinking": True,
        "python_tools": None,
    }
    for chat, is_read in (
        ([], True),
        ([{"role": "system", "content": "s"}], True),
        ([{"role": "system", "content": "t"}], False),
    ):
        row = {
            "messages": [*chat, user("q"), answer("a")],
            "chat_template_kwargs": json.dumps(arguments) if as_text else arguments,
        }
        (found,) = read(tmp_path, [row])
        assert outcome(found) == (["s: s", *QA] if is_read else REFUSED)
        if is_read:
            assert found.unused_keys == ("chat_template_kwargs.enable_thinking",)
            assert found.messages[0]["tools"] == [{"type": "function", "function": FUNCTION}]
    (found,) = read(tmp_path, [{"messages": [user("q"), answer("a")], "chat_template_kwargs": "{thinking}"}])
    assert outcome(found) == QA and found.unused_keys == ("chat_template_kwargs",)


def test_glaives_tools_are_the_rows_tools(tmp_path):
    (row,) = read(tmp_path, SHAPES["Glaive v2"][0][:1])
    assert row.messages[0]["tools"] == [{"type": "function", "function": FUNCTION}]
    assert row.messages[1]["tool_calls"][0]["function"] == CALL and row.unused_keys == ()


@pytest.mark.parametrize("name", ["Capybara", "LIMA", "Gemini", "OpenAssistant tree", "HH as text", "Glaive v2"])
def test_the_prompt_of_a_row_is_its_chat_without_the_last_answer(tmp_path, name):
    rows, (expected, *_) = SHAPES[name]
    read(tmp_path, rows[:1])
    columns = columns_of(tmp_path / "t.jsonl", "t.jsonl")
    row = {**rows[0], **{key: rows[0][column] for key, column in columns.items()}}
    assert [f"{message['role'][0]}: {message['content']}" for message in to_prompt(row)] == expected[:-1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "instruction": "i", "context": "c"},
        {"text": "Human: q\n\nAssistant: a", "instruction": "i"},
        {"text": "Human: q\n\nAssistant: a", "prompt": "i"},
        {"prompt": "<|im_start|>user\nq<|im_end|>\n", "completion": "<|im_start|>assistant\na<|im_end|>"},
        {"prompt": "q", "completion": "", "instruction": "i"},
        {"instruction": "q", "output": None, "prompt": "i"},
    ],
)
def test_the_prompt_is_the_question_that_is_learned_not_another_column(row):
    assert to_prompt(row) == [user("q")]


def test_two_questions_without_an_answer_are_refused():
    row = {"prompt": "q", "instruction": "i"}
    with pytest.raises(BadRow, match="instruction and prompt may both be the question"):
        to_prompt(row)
    assert to_prompt(row, "prompt_completion") == [user("q")] and to_prompt(row, "alpaca") == [user("i")]


def test_the_chosen_text_of_a_preference_pair_is_read_by_the_columns_that_its_refusal_names(tmp_path):
    pair = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    (refused,) = read(tmp_path, [pair])
    assert "set data.columns: {text: chosen}" in refused.problem
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", {"text": "chosen"})
    assert outcome(row) == QA


CONVERTED = [
    ({"translation": {"en": "Hi", "de": "Hallo"}}, ["u: Translate to de.\n\nHi", "a: Hallo"]),
    ({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}}, ["u: q\n\nc", "a: a"]),
    ({"input": {"messages": [user("q")]}, "preferred_output": [answer("a")], "non_preferred_output": [answer("b")]}, QA),
    ({"custom_id": "x", "body": {"messages": [user("q"), answer("a")]}}, QA),
    ({"winner": "model_b", "conversation_a": [user("q"), answer("b")], "conversation_b": [user("q"), answer("a")]}, QA),
    ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1}, QA),
    ({"problem": "q", "deepseek_reasoning": "r", "deepseek_solution": "a"}, ["u: q", "a: <think>\nr\n</think>\n\na"]),
    ({"question": "q", "solutions": json.dumps(["a", "b"])}, QA),
    ({"question": "q", "solutions": ["a", "b"]}, QA),
    ({"instruction": "i", "instances": [{"input": "q", "output": "a"}]}, ["u: i\n\nq", "a: a"]),
    ({"message": "r", "chat_history": [{"role": "USER", "message": "q"}, {"role": "CHATBOT", "message": "a"}], "response": "b"}, TWO),
]  # fmt: skip


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(("row", "expected"), CONVERTED, ids=lambda value: str(value)[:40])
def test_the_command_that_a_refusal_names_makes_a_chat(tmp_path, row, expected):
    (refused,) = read(tmp_path, [row])
    command = re.search(r"jq -c '(.*)' IN", refused.problem)[1]
    made = subprocess.run(
        ["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "made.jsonl").write_text(made)
    assert [outcome(found) for found in read_rows(tmp_path, ["made.jsonl"], "auto")] == [expected]
