"""The chat template that a model is trained with and served with: which one, and what is fixed in it.

A template may print today's date, or put an empty think block before an answer if the server asks for that. Training and
serving must agree, so both are written into the template of the base's artifact, which the merged model inherits.
"""

import json
import re
import time
from importlib.util import find_spec
from pathlib import Path

from loraflow.data.chats import Chat
from loraflow.data.templates.template import MARKERS, TODAY
from loraflow.data.templates.template_process import template_process
from loraflow.data.templates.tokenizer_config import (
    FILE,
    MAX_BYTES,
    MAX_TEMPLATE,
    TEMPLATE,
    TRAINING_TEMPLATE,
    find_template,
    find_tool_template,
    further_templates,
    joined,
)
from loraflow.failures import BadConfig, BadModel

_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*(["'])((?:(?!\1)[^\\{}])*)\1\s*\)""")
_DATE_USE = re.compile(r"\bstrftime_now\b(?!\s+is\b)")
_NOTE = re.compile(r"\A\{#- The date is fixed to (\S+),")
_REASONING = re.compile("(?i)think|thought")
_ENDINGS = ("<think>", "<|START_THINKING|><|END_THINKING|>")
_TEXT = "loraflow_text"  # a variable of a template: what the base's own one writes
_SWITCHES = ("enable_thinking", "thinking")


def read_named_template(name: str) -> str:
    """Return the text of `base.chat_template`: a file, or the name of a template that trl ships.

    Raises:
        BadConfig: there is neither.
    """
    file = Path(name).expanduser()
    shipped = _shipped()
    file = file if file.is_file() else shipped.get(name, file)
    if not file.is_file():
        raise BadConfig(
            "There is no such chat template.",
            where="base.chat_template",
            expected="auto, a file, or a name that trl ships: " + (", ".join(shipped) or "trl is not installed"),
            got=name,
            next_step="correct base.chat_template",
        )
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(
            "The chat template cannot be read.",
            where="base.chat_template",
            got=str(error),
            next_step="correct its permissions, or save it as UTF-8",
        ) from error
    if not text.strip() or len(text) > MAX_TEMPLATE:
        raise BadConfig(
            "The file is not a chat template.",
            where="base.chat_template",
            expected=f"1 to {MAX_TEMPLATE:,} characters",
            got=f"{len(text):,} in {file}",
            next_step="name a file with a Jinja template",
        )
    return text


def _shipped() -> dict[str, Path]:
    """Return the templates of the installed trl by name. trl is not imported, which takes seconds."""
    spec = find_spec("trl")
    folders = (spec.submodule_search_locations if spec else None) or []
    return {file.stem: file for folder in folders for file in sorted(Path(folder, "chat_templates").glob("*.jinja"))}


def write_served_template(folder: Path, chosen: str | None, *, no_thinking: bool) -> str | None:
    """Write the template that a model is served with into its folder, and return the date that is fixed in it.

    Args:
        chosen: the template of the recipe; None uses the model's own. A template with {% generation %} blocks only marks
            the answers, if the model has a template of its own.
        no_thinking: answers come after an empty think block, which a server sends.

    Raises:
        BadModel: the template has no switch for thinking.
    """
    own = find_template(folder)
    marks_only = chosen is not None and own is not None and MARKERS.search(chosen) is not None
    source = own if chosen is None or marks_only else chosen
    if source is None:
        return None
    with_tools = find_tool_template(folder)
    if with_tools is not None and source is own:
        source = joined(with_tools, source)
    served = pinned(source, no_thinking=no_thinking)
    if marks_only and chosen is not None:
        (folder / TRAINING_TEMPLATE).write_text(pinned(chosen, no_thinking=no_thinking), encoding="utf-8")
    if served != own or with_tools is not None or further_templates(folder):
        _write(folder, served)
    return pinned_date(served)


def _write(folder: Path, template: str) -> None:
    """Write a model's template. Others beside it and in tokenizer_config.json, which programs may read, are removed."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    for name in further_templates(folder):
        (folder / name).unlink()
    file = folder / FILE
    with file.open("rb") as opened:
        values = json.loads(opened.read(MAX_BYTES))
    if isinstance(values, dict) and values.pop("chat_template", None) is not None:
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pinned(source: str, *, no_thinking: bool = False) -> str:
    """Return a template in which the date, and thinking if the recipe says so, is fixed.

    Raises:
        BadModel: the template is not valid, cannot be served without thinking, or prints a date in a way that cannot be
            fixed.
    """
    if no_thinking:
        read = template_process(source, {}).variables()
        switch = next((switch for switch in _SWITCHES if switch in read), None)
        if switch is not None:
            off = f"{{%- if {switch} is not defined %}}{{%- set {switch} = false %}}{{%- endif -%}}\n"
            source = source if off in source else off + source  # a merged model can be a base
        block = _only_in_prompts(source)
        if switch is None or block:
            return pinned(_without_block(source, block))
    if _DATE_CALL.search(source) and not _NOTE.match(source):
        source = _DATE_CALL.sub(lambda call: json.dumps(time.strftime(call[2], TODAY)), source)
        source = f"{{#- The date is fixed to {time.strftime('%Y-%m-%d', TODAY)}, as in training. -#}}\n" + source
    if use := _DATE_USE.search(code := re.sub(r"(?s)\{#.*?#\}", "", source)):
        raise BadModel(
            "The chat template prints today's date in a way that cannot be fixed, so each day would serve another prompt "
            "than the trained one.",
            where="chat_template",
            expected="strftime_now with a text, such as strftime_now('%d %b %Y')",
            got=code[use.start() :][:50],
            next_step="name a template with a fixed date: base.chat_template",
        )
    return source


def _only_in_prompts(source: str) -> str:
    """Return the reasoning that a template's prompts end with, and that its answers do not begin with.

    DeepSeek-R1's end with the tag that opens it, Gemma 4's with an empty block. Answers may begin with a block or a tag
    of their own, as in Qwen3-Thinking-2507 and Command R7B; of their prompts, two endings are known.
    """
    template = template_process(source, {"bos_token": "", "eos_token": ""})
    chat: Chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TEXT}]
    try:
        (prompt,), (text,) = template.render([chat[:1]], prompt=True), template.render([chat], prompt=False)
    except BadModel:  # a template that refuses this chat
        return ""
    head = text.partition(_TEXT)[0]
    block, asked = prompt.removeprefix(head).rstrip(), prompt.rstrip()
    if prompt.startswith(head) and _REASONING.search(block):
        return block
    if head.rstrip() == asked:  # reasoning that is opened, and never closed
        return ""
    return next((end for end in _ENDINGS if asked.endswith(end) and head.startswith(asked.removesuffix(end))), "")


def _without_block(source: str, block: str) -> str:
    """Return a template whose prompts do not end with a block."""
    if _TEXT in source:
        return source  # a merged model can be a base
    if not block or MARKERS.search(source):
        raise BadModel(
            "The chat template cannot put an empty think block before an answer.",
            where="data.thinking",
            expected="a template that reads enable_thinking, or prompts that end with <think>",
            next_step="set data.thinking to strip, or name another template: base.chat_template",
        )
    asked = "add_generation_prompt and " if block == "<think>" else ""
    # No white space may be added to what the template writes, or taken from it.
    return (
        f"{{% set {_TEXT} +%}}" + source.removesuffix("\n") + "{%+ endset -%}\n"
        f"{{%- if {asked}{_TEXT}.rstrip().endswith({block!r}) -%}}\n"
        f"{{{{- {_TEXT}.rstrip()[:-{len(block)}] -}}}}\n"
        "{%- else -%}\n"
        f"{{{{- {_TEXT} -}}}}\n"
        "{%- endif -%}"
    )


def pinned_date(template: str | None) -> str | None:
    """Return the date that `pinned` fixed in a template, such as 2024-07-26; None if the template prints no date."""
    note = _NOTE.match(template or "")
    return note[1] if note else None


def served_date(folder: Path) -> str | None:
    """Return the date that is fixed in a model's template; None if there is none."""
    return pinned_date(find_template(folder)) if (folder / FILE).exists() else None
