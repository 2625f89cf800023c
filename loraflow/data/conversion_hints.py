"""How rows of other shapes are converted: the end of the message that refuses them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.question_parts import question_parts
from loraflow.data.transcripts import is_transcript

# Keys of a row, and the filter of jq that makes chats of such rows.
_FILTERS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"context", "question", "answers"}),
        "{instruction: .question, input: .context, output: .answers.text[0]}",
    ),
    (frozenset({"input", "preferred_output"}), "{messages: (.input.messages + .preferred_output)}"),
    (frozenset({"custom_id", "body"}), "{messages: .body.messages}"),
    (
        frozenset({"winner", "conversation_a", "conversation_b"}),
        'if .winner == "model_a" then {messages: .conversation_a} elif .winner == "model_b" then '
        "{messages: .conversation_b} else empty end",
    ),
    (
        frozenset({"response_0", "response_1", "better_response_id"}),
        "{prompt, completion: (if .better_response_id == 0 then .response_0 else .response_1 end)}",
    ),
    (
        frozenset({"problem", "deepseek_reasoning", "deepseek_solution"}),
        r'{prompt: .problem, completion: ("<think>\n" + .deepseek_reasoning + "\n</think>\n\n" + .deepseek_solution)}',
    ),
    (
        frozenset({"question", "solutions"}),
        '{prompt: .question, completion: (.solutions | if type == "string" then fromjson else . end | .[0])}',
    ),
    (frozenset({"instruction", "instances"}), ".instruction as $i | .instances[] | {instruction: $i, input, output}"),
    (
        frozenset({"message", "chat_history", "response"}),
        '{messages: ((.chat_history | map({role, content: .message})) + [{role: "user", content: .message}, '
        '{role: "assistant", content: .response}])}',
    ),
)
# OpenAssistant's rows: all of a file are read (jq -s), and each tree becomes a row.
_TREES = (
    "def tree($all): . + {replies: [.message_id as $id | $all[] | select(.parent_id == $id) | tree($all)]}; "
    "group_by(.message_tree_id)[] | . as $all | .[] | select(.parent_id == null) | tree($all)"
)
_RENDERED = ("[INST]", "### Instruction:", "<|user|>", "<|start_header_id|>", "<start_of_turn>")


def conversion_hint(row: Mapping[str, JsonValue]) -> str:
    """Return how a row is made a chat, for the end of a message; empty if nothing is known about its keys."""
    if row.keys() >= {"message_id", "parent_id", "text"}:
        return "; these are the messages of trees, one in a row" + _by_jq(_TREES, "-cs").replace("chats", "trees")
    if "chosen" in row:
        if is_transcript(row["chosen"]):
            return "; for the chosen answers of preference pairs, set data.columns: {text: chosen}"
        return (
            "; for the chosen answers of preference pairs, set data.columns: {completion: chosen} or {messages: chosen}"
        )
    if (parts := question_parts(row)) and not row.keys().isdisjoint(("question", "problem", "query")):
        return f"; {parts[0]} is a part of the question: write a prompt that has it"
    if isinstance(text := row.get("text"), str) and (token := next((t for t in _RENDERED if t in text), None)):
        return f"; text is a chat that a template has rendered ({token}): write its messages as {{role, content}}"
    translation = row.get("translation")
    if isinstance(translation, dict) and len(translation) > 1:
        source, target = list(translation)[:2]
        made = f'{{instruction: "Translate to {target}.", input: .translation.{source}, output: .translation.{target}}}'
        return _by_jq(made)
    return next((_by_jq(made) for keys, made in _FILTERS if row.keys() >= keys), "")


def hint_to_choose(row: Mapping[str, JsonValue]) -> str:
    """Return how the chosen answer is put behind a chat that ends with a question; empty if the row has none."""
    key, chosen = next((key for key in ("messages", "conversations") if key in row), None), row.get("chosen")
    if key is None or not isinstance(chosen, str | dict) or not chosen:
        return ""
    answer = ".chosen" if isinstance(chosen, dict) else '{role: "assistant", content: .chosen}'
    return _by_jq(f".{key} += [{answer}] | del(.chosen, .rejected)")


def _by_jq(made: str, options: str = "-c") -> str:
    return f"; jq {options} '{made}' IN.jsonl > OUT.jsonl makes chats of such rows"
