"""Chat: the streamed text is the answer, and only the user ends the conversation."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.failures import Failure
from loraflow.serving.chat import Chat, Sampling, Session, Stream
from loraflow.serving.models import Model, load


@pytest.fixture(scope="module")
def loaded(phi3):
    return load(Model("tiny", phi3), "float32")


def greedy(loaded, messages, n):
    """Answer without anything of ours but the prompt: generate, then decode."""
    ids = loaded.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = loaded.model.generate(**ids, max_new_tokens=n, do_sample=False)
    return loaded.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_streamed_text_equals_generate(loaded):
    pieces = []
    answer = Chat(loaded, None, Sampling(max_new_tokens=40)).answer("what is red", pieces.append)
    assert "".join(pieces) == answer.text == greedy(loaded, [{"role": "user", "content": "what is red"}], 40)
    assert len(pieces) > 1, "it comes bit by bit"
    assert answer.finish == ("length" if answer.tokens == 40 else "stop")
    short = Chat(loaded, None, Sampling(max_new_tokens=3)).answer("what is red")
    assert (short.tokens, short.finish) == (3, "length")


def test_the_streamed_text_of_any_ids_equals_their_decoding(loaded):
    import random

    dice = random.Random(0)
    text = "naïve 你好 👩‍👩‍👧 e\u0301\n\n  indented\ttabs  हिन्दी "
    for trial in range(200):
        ids = loaded.tokenizer(text * 2, add_special_tokens=False)["input_ids"] if trial == 0 else [
            dice.randrange(len(loaded.tokenizer)) for _ in range(dice.randrange(1, 30))
        ]  # fmt: skip
        if trial % 3 == 1:
            ids = ids[:-1] or ids
        pieces = []
        stream = Stream(loaded.tokenizer, [], pieces.append)
        stream.prompt_seen = True
        for token in ids:
            stream.put(torch.tensor([token]))
        stream.end()
        assert "".join(pieces) == loaded.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("text", ["one two red", "one", "one tw", "red", "one two"])
def test_what_the_template_writes_before_an_answer_is_not_shown(loaded, text):
    ids, pieces = loaded.tokenizer(text, add_special_tokens=False)["input_ids"], []
    stream = Stream(loaded.tokenizer, [], pieces.append, "one two")
    stream.prompt_seen = True
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == text.removeprefix("one two")


def test_every_stop_id_ends_an_answer_and_none_is_shown(loaded):
    for stop in loaded.stops:
        pieces = []
        stream = Stream(loaded.tokenizer, loaded.stops, pieces.append)
        stream.put(torch.tensor([[1, 2, 3]]))
        for token in (40, 41, stop):
            stream.put(torch.tensor([token]))
        stream.end()
        assert stream.stopped and stream.ids == [40, 41]
        assert "".join(pieces) == loaded.tokenizer.decode([40, 41])
    assert len(loaded.stops) == 2, "the template's <|end|> and the end of text"


def test_the_history_is_in_the_prompt_and_reset_clears_it(loaded):
    chat = Chat(loaded, "be brief", Sampling(max_new_tokens=6))
    first = chat.answer("one")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    second = chat.answer("two")
    history = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.text}, {"role": "user", "content": "two"},
    ]  # fmt: skip
    assert second.text == greedy(loaded, history, 6)
    chat.reset()
    assert chat.messages == history[:1]


def test_the_oldest_turns_are_dropped_and_the_system_message_stays(loaded):
    chat = Chat(loaded, "be brief", Sampling(max_new_tokens=100))
    forgotten = [chat.answer(f"what is the tree of {n} and the bird of {n} please").forgotten for n in range(8)]
    assert forgotten[0] == 0 and sum(forgotten) > 0 and all(n % 2 == 0 for n in forgotten)
    assert chat.messages[0]["content"] == "be brief" and chat.messages[1]["role"] == "user"
    (ids,) = loaded.template.prompt_ids([chat.messages])
    assert len(ids) <= loaded.positions
    before = list(chat.messages)
    with pytest.raises(Failure, match="too long"):
        chat.answer("tree " * 600)
    assert chat.messages == before, "a message that cannot be answered is not remembered"


def test_sampling_is_reproducible_only_with_the_same_seed(loaded):
    def say(seed, temperature=1.0):
        return Chat(loaded, None, Sampling(temperature=temperature, seed=seed, max_new_tokens=20)).answer("red").text

    assert say(1) == say(1) != say(2)
    assert say(1, 0.0) == say(2, 0.0) == greedy(loaded, [{"role": "user", "content": "red"}], 20)


def test_an_interrupt_ends_the_answer_and_keeps_its_text(loaded):
    chat = Chat(loaded, None, Sampling(max_new_tokens=450))
    pieces = []

    def write(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt  # as the handler of SIGINT does, in the middle of generate

    answer = chat.answer("red", write)
    assert answer.finish == "interrupted" and 0 < answer.tokens < 450
    assert chat.messages[-1]["content"].startswith("".join(pieces[:3]))
    assert chat.answer("green").finish in ("length", "stop")


def session(loaded, **options):
    output, notes = [], []
    chats = options.pop("chats", {"tiny": Chat(loaded, None, Sampling(max_new_tokens=5))})
    return Session(chats, output.append, notes.append, **options), output, notes


def test_commands_change_the_named_settings(loaded):
    talk, _, notes = session(loaded)
    (chat,) = talk.chats.values()
    lines = iter(["/set temperature 0.7", "/set top_p 2", "/set colour red", "/set seed 4", "/set seed none", "hello",
                  "/system be kind", "/nonsense", "/help", "//slash", "", "/quit", "never read"])  # fmt: skip
    talk.run(lambda: next(lines))
    assert chat.sampling == Sampling(temperature=0.7, max_new_tokens=5)
    assert "less than or equal to 1" in notes[1] and "there is no colour" in notes[2]
    assert chat.system == "be kind" and [m["content"] for m in chat.messages[:2]] == ["be kind", "/slash"]
    assert "there is no /nonsense" in "\n".join(notes) and "/reset" in "\n".join(notes)
    assert next(lines) == "never read"


def test_an_error_does_not_end_an_interactive_chat_but_ends_a_pipe(loaded):
    lines = ["tree " * 600, "red"]
    talk, output, notes = session(loaded)
    todo = iter(lines)
    talk.run(lambda: next(todo, "/quit"))
    assert "too long" in notes[0] and output
    talk, output, notes = session(loaded, interactive=False)
    with pytest.raises(Failure):
        talk.run(lambda: lines[0])


def test_base_and_tuned_answer_the_same_questions_each_with_its_own_history(loaded, phi3, tmp_path):
    from tests.conftest import build_phi3

    other = load(Model("other", build_phi3(tmp_path / "other", seed=5)), "float32")
    chats = {
        "base": Chat(loaded, None, Sampling(max_new_tokens=5)),
        "tuned": Chat(other, None, Sampling(max_new_tokens=5)),
    }
    talk, output, _ = session(loaded, chats=chats)
    talk.handle_line("red")
    talk.handle_line("green")
    alone = Chat(other, None, Sampling(max_new_tokens=5))
    expected = [alone.answer("red").text, alone.answer("green").text]
    assert "".join(output).count("base: ") == 2 and f"tuned: {expected[1]}" in "".join(output)
    assert [m["content"] for m in chats["tuned"].messages if m["role"] == "assistant"] == expected


def test_a_control_token_in_a_message_is_reported(loaded):
    talk, _, notes = session(loaded)
    talk.handle_line("what is <|end|>")
    assert "<|end|>" in notes[0] and "control token" in notes[0]


def test_a_pipe_gets_answers_on_stdout_and_the_rest_on_stderr(phi3, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = ["chat", str(phi3), "--dtype", "float32", "--max-new-tokens", "8"]
    expected = greedy(loaded, [{"role": "user", "content": "what is red"}], 8)
    done = CliRunner().invoke(cli, ask, input="what is red\n/reset\nwhat is red\n", catch_exceptions=False)
    assert done.exit_code == 0 and done.stdout == f"{expected}\n" * 2
    assert "cut at 8 tokens" in done.stderr
    done = CliRunner().invoke(cli, [*ask, "--prompt", "-"], input="what is red", catch_exceptions=False)
    assert done.stdout == f"{expected}\n"
    assert not (tmp_path / ".loraflow" / "store" / "runs").exists()


def test_ctrl_c_at_a_terminal_ends_the_answer_and_not_the_program(phi3, tmp_path):
    import pty

    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "chat", str(phi3), "--dtype", "float32"]

    screen, terminal = pty.openpty()
    env = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--max-new-tokens", "480"], cwd=tmp_path, stdin=terminal, stdout=terminal,
                               stderr=terminal, start_new_session=True, env=env)  # fmt: skip
    seen = bytearray()

    def read():
        while True:
            try:
                seen.extend(os.read(screen, 4096))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()

    def wait_for(prompts):
        limit = time.monotonic() + 60
        while seen.count("› ".encode()) < prompts:
            assert time.monotonic() < limit and process.poll() is None, seen.decode(errors="replace")
            time.sleep(0.02)

    try:
        wait_for(1)
        at = len(seen)
        os.write(screen, b"red\n")
        limit = time.monotonic() + 60
        while len(seen) < at + 30 and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        wait_for(2)
        assert b"(interrupted)" in seen
        process.send_signal(signal.SIGINT)  # at the prompt
        wait_for(3)
        os.write(screen, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(terminal)


def test_prompts_equal_those_of_evaluation_and_transformers(loaded):
    chats = [
        [{"role": "system", "content": "s"}, {"role": "user", "content": " red \n"}],
        [{"role": "user", "content": "x"}],
    ]
    found = loaded.template.prompt_ids(chats)
    expected = [
        loaded.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"]
        for c in chats
    ]
    assert found == expected, json.dumps([found, expected])
