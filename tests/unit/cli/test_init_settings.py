"""The settings that `loraflow init` chooses by the size of a dataset, and the files that it keeps out of git."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from loraflow.cli.init import (
    LOCK_FILE,
    _held_out_line,
    extend_dvcignore,
    extend_gitignore,
    init,
    print_dataset,
    project_lock,
)
from loraflow.cli.init_dataset import choose_heldout_fraction, choose_settings, estimated_tokens, read_dataset
from loraflow.cli.init_recipe import recipe_text
from loraflow.config import parse_recipe
from loraflow.evaluation.power import margin_of_unchanged
from loraflow.failures import BadConfig
from loraflow.store.lock import flock


@pytest.mark.parametrize("rows", [2, 8, 20, 60, 150, 500, 1999])
def test_a_few_rows_get_enough_steps_and_a_first_step_that_learns(rows):
    settings = choose_settings(rows, choose_heldout_fraction(rows), rows * 50, 2048, may_pack=True)
    train = round(rows * (1 - settings.heldout_fraction))
    assert settings.steps == -(-train // settings.batch) * settings.epochs, "not packed, so a step is a batch of chats"
    assert settings.steps >= min(50, train * 2), "60 packed rows were 2 steps"
    assert settings.warmup_steps == 0 or settings.steps >= 100
    assert settings.steps // settings.logging_steps >= min(10, settings.steps), "a curve, not a point"
    assert settings.epochs <= 10
    assert any("optimizer steps" in line for line in settings.lines())


@pytest.mark.parametrize(("rows", "tokens"), [(20_000, 20_000 * 300), (1_000_000, 10**8)])
def test_many_rows_keep_the_usual_settings(rows, tokens):
    settings = choose_settings(rows, choose_heldout_fraction(rows), tokens, 2048, may_pack=True)
    assert (settings.batch, settings.epochs, settings.packing) == (16, 1, True)
    assert (settings.warmup_steps, settings.logging_steps, settings.heldout_fraction) == (0.1, 10, 0.1)


# What SmolLM2's tokenizer makes of the same sentence in several languages, and of other texts (tokenizers 0.23)
COUNTED = [
    (26, "My parcel has not arrived yet and I would like to know when it will come. Please tell me what I should do now."),
    (49, "Mein Paket ist noch nicht angekommen, und ich möchte wissen, wann es kommt. Können Sie mir bitte sagen, was ich tun muss?"),
    (88, "Моя посылка ещё не пришла, и я хотел бы узнать, когда она будет доставлена. Подскажите, пожалуйста, что мне делать."),
    (82, "Το δέμα μου δεν έχει φτάσει ακόμα και θα ήθελα να μάθω πότε θα έρθει. Πείτε μου τι πρέπει να κάνω."),
    (57, "我的包裹还没有到,我想知道什么时候能到。请告诉我现在应该怎么办。"),
    (69, "荷物がまだ届いていません。いつ届くか教えてください。どうすればよいでしょうか。"),
    (79, "제 소포가 아직 도착하지 않았습니다. 언제 도착하는지 알려 주세요."),
    (119, "मेरा पार्सल अभी तक नहीं आया है और मैं जानना चाहता हूँ कि वह कब आएगा। कृपया बताएं कि मुझे क्या करना चाहिए।"),
    (70, "لم يصل طردي بعد وأود أن أعرف متى سيصل. من فضلك أخبرني ماذا أفعل الآن."),
    (94, "พัสดุของฉันยังไม่มาถึง ฉันอยากทราบว่าจะมาถึงเมื่อไร"),
    (37, '{"intent": "refund", "order": "AB-12345", "items": [1, 2, 3], "ok": true}'),
    (37, "4711 0815 1234567890 2026-11-27 20:15"),
    (15, "😀🎉👍🏽🙏"),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "text"), COUNTED)
def test_the_guess_of_tokens_is_near_in_every_script(tokens, text):
    assert 0.7 * tokens < estimated_tokens(text) < 2 * tokens, (
        "by characters alone, a Chinese chat was 5.7 times as long"
    )


def test_chats_in_chinese_fit_into_the_recipes_max_length_and_new_tokens(tmp_path):
    answer = COUNTED[4][1] * 4
    rows = [{"prompt": f"{COUNTED[4][1]}{n}", "completion": answer} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = read_dataset(tmp_path / "chats.jsonl", None, "bundled:smollm2")
    recipe = parse_recipe(recipe_text("x", Path("x.yaml"), "data.dvc", "bundled:smollm2", dataset))
    assert recipe.training_config.max_length >= 5 * 57 + 20 and recipe.evaluation.max_new_tokens >= 4 * 57


def chat(prompt: str) -> list:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}]


def test_files_that_are_held_out_are_not_explained_by_too_few_rows():
    shares = [choose_settings(60, share, 6000, 512, may_pack=True).lines()[0] for share in (0.0, 0.2)]
    assert "heldout_fraction" not in shares[0] and shares[1].startswith("heldout_fraction: 0.2   a tenth of 60 rows")


@pytest.fixture
def quick_policy(monkeypatch):
    """Do not compare the rows with each other."""
    monkeypatch.setattr("loraflow.cli.init_dataset.near_policy", lambda chats: "drop")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_sizes_are_those_of_the_rows_to_train_on(tmp_path, suffix, quick_policy):
    """Hundreds of held-out rows beside sixty made the recipe train with a larger batch and fewer epochs."""
    for name, count in (("train", 60), ("test", 400), ("validation", 100)):
        rows = pd.DataFrame({"prompt": [f"{name} q{n}" for n in range(count)], "completion": "a short answer"})
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            rows.to_json(file, orient="records", lines=True)
        else:
            getattr(rows, f"to_{suffix}")(file, index=False)
    dataset = read_dataset(tmp_path, None, "x/y")
    alone = choose_settings(60, 0, 60 * 26, 256, may_pack=True)
    assert (dataset.size.epochs, dataset.size.accumulation, dataset.size.steps) == (alone.epochs, 1, alone.steps)
    assert (dataset.size.rows, dataset.heldout_rows, len(dataset.chats)) == (60, 400, 560)
    recipe = recipe_text("x", Path("x.yaml"), "data.dvc", "x/y", dataset)
    assert "# 60 rows: few" in recipe


@pytest.mark.parametrize(("train", "test"), [(60, 0), (120, 0), (6_000, 0), (1000, 20), (20, 300)])
@pytest.mark.parametrize("answer", ['{"a": 1}', "yes", "a longer answer, in words"])
def test_an_unchanged_model_passes_the_guard_of_a_new_recipe(tmp_path, train, test, answer, quick_policy):
    """With 6,000 rows, its margin was that of 600 rows, and the recipe scores 200; with few test rows, that of many."""
    for name, count in (("train", train), ("test", test)):
        answers = [answer if answer != "yes" else ("yes", "no")[n % 2] for n in range(count)]
        rows = ({"prompt": f"{name} {n}", "completion": text} for n, text in enumerate(answers))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not test:
        (tmp_path / "test.jsonl").unlink()
    dataset = read_dataset(tmp_path, None, "x/y")
    recipe = parse_recipe(recipe_text("x", Path("x.yaml"), "data.dvc", "x/y", dataset))
    scored = min(recipe.evaluation.max_rows, test or round(train * recipe.data.heldout_fraction))
    [(guard, margin)] = recipe.gate.guards.items()
    needed = margin_of_unchanged(scored, 0.95, guard)
    assert needed < margin <= max(0.02, margin_of_unchanged(scored, 0.95, "rougeL") + 0.015), (guard, scored)


def test_settings_are_not_said_to_be_chosen_for_no_rows(tmp_path, capsys, quick_policy):
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    print_dataset(read_dataset(tmp_path, None, "x/y"))
    printed = capsys.readouterr()
    assert "malformed  train.jsonl:1" in printed.err and "chosen for" not in printed.out
    (tmp_path / "train.jsonl").write_text('{"prompt": "r", "completion": "a"}\n')
    print_dataset(read_dataset(tmp_path, None, "x/y"))
    assert "chosen for 1 rows" in capsys.readouterr().out


def test_init_says_how_many_rows_are_held_out():
    rows = [chat(f"q{n}") for n in range(300)]
    line = _held_out_line(rows, 0.1, has_clusters=False)
    assert re.fullmatch(r"held out: \d\d of 300 rows", line)
    about = line.replace("held out: ", "held out: about ")
    assert _held_out_line(rows, 0.1, has_clusters=True) == f"{about}; near-duplicates stay on one side"
    assert "held out: 1 of 8 rows, because the seeded split chose none of so few rows" in _held_out_line(
        rows[:8], 0.001, has_clusters=False
    )
    assert "every row has the same prompt" in _held_out_line([chat("q")] * 8, 0.2, has_clusters=True)


@pytest.mark.parametrize("git_first", [True, False])
def test_the_store_and_the_dataset_are_kept_out_of_git_that_comes_before_or_after(tmp_path, monkeypatch, git_first):
    """git itself says what it sees."""
    monkeypatch.chdir(tmp_path)

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout

    if git_first:
        git("init", "-q")
        Path(".gitignore").write_text("/data")  # as DVC writes it inside of git, here without a line break at the end
        Path(".dvc").mkdir()
        Path(".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    for name in (
        "data/x.jsonl",
        ".loraflow/store/a",
        ".loraflow/prefect/b",
        ".dvc/cache/c",
        ".dvc/tmp/d",
        "data.dvc",
        "configs/x.yaml",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    extend_gitignore(Path("data"))
    extend_gitignore(Path("data"))
    if not git_first:
        git("init", "-q")
    seen = set(git("ls-files", "--others", "--exclude-standard").split())
    assert seen - {".dvc/.gitignore"} == {".gitignore", "configs/x.yaml", "data.dvc"}
    assert Path(".gitignore").read_text().splitlines().count("/.loraflow/") == 1


@pytest.mark.parametrize("own", ["/config.local\n/tmp\n/cache\n", None])
def test_a_new_project_needs_no_upgrade(tmp_path, monkeypatch, own):
    from click.testing import CliRunner

    from loraflow.cli.upgrade import upgrade

    monkeypatch.chdir(tmp_path)
    Path(".dvc").mkdir()
    Path("configs").mkdir()
    Path("configs", "x.yaml").write_text("name: x\n")
    Path(".gitignore").write_bytes(b"mine\r\n")
    if own:  # as `dvc init` writes it inside of a git repository
        Path(".dvc", ".gitignore").write_text(own)
    extend_gitignore(Path("data"))
    extend_dvcignore()
    assert "up to date" in CliRunner().invoke(upgrade).output
    assert Path(".gitignore").read_bytes().startswith(b"mine\r\n/.loraflow/\r\n")
    assert Path(".dvcignore").read_text() == "/.loraflow/\n"
    Path(".gitignore").write_bytes(b"\xe9")  # no UTF-8: git takes it as it is
    extend_gitignore(Path("data"))
    assert Path(".gitignore").read_bytes().startswith(b"\xe9\n/.loraflow/\n")


def test_a_project_gets_a_short_readme_once(tmp_path):
    from loraflow.cli.init import write_readme

    folder = tmp_path / "Mein Projekt ü"
    folder.mkdir()
    written = write_readme(folder, Path("configs/chats.yaml"), Path("data"))
    assert written is not None and written.read_text(encoding="utf-8").startswith("# Mein Projekt ü\n")
    commands = [line for line in written.read_text(encoding="utf-8").splitlines() if line.startswith("loraflow ")]
    assert commands[1].startswith("loraflow run configs/chats.yaml ")
    assert len({re.search(r"   (?=\S)", line).end() for line in commands}) == 1, "aligned"
    assert write_readme(folder, Path("configs/b.yaml"), Path("data")) is None
    written.rename(folder / "readme.rst")
    assert write_readme(folder, Path("configs/b.yaml"), Path("data")) is None


def test_an_init_that_waited_for_another_does_not_take_its_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 30)

    @contextmanager
    def another_first(folder):
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "x.yaml").write_text("name: x")
        (tmp_path / "data").mkdir()
        yield

    monkeypatch.setattr("loraflow.cli.init.project_lock", another_first)
    done = CliRunner().invoke(init, ["--data", "x.jsonl", "--base", "bundled:smollm2"])
    assert isinstance(done.exception, BadConfig) and "exists already" in str(done.exception)
    assert not any((tmp_path / "data").iterdir()) and not (tmp_path / "datasets").exists()


def test_a_command_that_waits_for_another_in_the_same_project_says_so(tmp_path, capsys):
    def use() -> str:
        with project_lock(tmp_path):
            return capsys.readouterr().err

    with ThreadPoolExecutor(1) as pool:
        with flock(tmp_path / LOCK_FILE):
            waiting = pool.submit(use)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        assert "waiting for another loraflow command" in waiting.result(timeout=10)
