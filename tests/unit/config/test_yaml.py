"""Hostile and broken YAML: one sentence with its line, within a second, whatever the text is."""

import time

import pytest

from loraflow.config import load_recipe, parse_recipe, yaml
from loraflow.config.project import project_name
from loraflow.failures import BadConfig
from tests.unit.config.test_config import MINIMAL


def laughs(levels: int) -> str:
    """Return a few hundred bytes of aliases that expand to 10 ** levels values."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


# name → (text, line of the problem, words of the message)
BROKEN = {
    "40 kB of [": ("name: x\na: " + "[" * 40_000, 2, "nested more than"),
    "40 kB of {a:": ("a: " + "{a: " * 10_000, 1, "nested more than"),
    "40 kB of -": ("- " * 20_000, 1, "nested more than"),
    "40 kB of ?": ("? " * 20_000, 1, "nested more than"),
    "[ on lines of their own": ("[\n" * 20_000, 41, "nested more than"),
    "sections": ("".join("  " * i + "a:\n" for i in range(200)), 40, "nested more than"),
    "an alias in itself": ("a: &a [*a]", 1, "alias"),
    "aliases that expand to 10^9 values": (laughs(9), 2, ""),
    "an integer of 5,000 digits": ("a: 1\nb: " + "9" * 5_000, 2, "a number has at most"),
    "an integer in base 60": ("a: " + "1:" * 90_000 + "1", 1, "a number has at most"),
    "a tab": ("a:\n\tb: 1", 2, "a tab"),
    "a NUL byte": ("a: 1\nb: x\0y\n", 2, "U+0000"),
    "a character that YAML forbids": ('a: 1\nb: "\x07"', 2, "U+0007"),
    "an escape beyond Unicode": ('a: "\\UFFFFFFFF"', 1, ""),
    "an impossible date": ("a: 1\nb: 2024-99-99", 2, "month"),
    "an object": ("a: !!python/object/apply:os.system [ls]", 1, ""),
    "two documents": ("a: 1\n---\nb: 2", 2, "single document"),
    "too long": ("a: " + "b" * 300_000, 1, "characters are read"),
    "too many values": ("a:\n" + "- b\n" * 30_000, 4_999, "more than 5,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("read", [yaml.parse, yaml.load_plain])
def test_a_broken_or_hostile_text_gives_one_sentence_within_a_second(read, name):
    text, line, words = BROKEN[name]
    started = time.process_time()
    with pytest.raises(yaml.Syntax) as caught:
        read(text)
    assert time.process_time() - started < 1
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 300
    assert caught.value.line == line or "alias" in message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_conflict_markers_of_git_are_named_with_their_line(end, tmp_path):
    text = end.join(["name: x", "<<<<<<< HEAD", "a: 1", "=======", "a: 2", ">>>>>>> theirs", ""])
    for read in (yaml.parse, yaml.load_plain):
        with pytest.raises(yaml.Syntax, match="conflict markers of git") as caught:
            read(text)
        assert caught.value.line == 2
    (tmp_path / "prefect.yaml").write_bytes(text.encode())
    with pytest.raises(BadConfig) as refused:
        project_name(tmp_path)
    assert refused.value.where.endswith("prefect.yaml:2") and "conflict markers" in refused.value.got
    assert yaml.load_plain("text: |\n  <<<<<<< no marker\n") == {"text": "<<<<<<< no marker\n"}


def test_a_duplicated_key_and_a_number_beyond_a_double_are_refused_in_a_recipe():
    with pytest.raises(BadConfig, match=r"(?s)r.yaml:3.*key 'a' is duplicated"):
        parse_recipe("name: x\na: 1\na: 2", "r.yaml")
    with pytest.raises(BadConfig, match=r"(?s)r.yaml:2.*1e999 is too large"):
        parse_recipe("name: x\na: 1e999", "r.yaml")


def test_another_tools_file_may_use_aliases_and_merge_keys():
    assert yaml.load_plain("x: &x {a: 1}\ny:\n  <<: *x\n  b: no")["y"] == {"a": 1, "b": False}
    both = yaml.load_plain("x: &x {a: 1}\nz: &z {b: 2, 1: c, '1': d}\ny:\n  <<: *x\n  <<: *z\n  a: 3")
    assert both["y"] == {"a": 3, "b": 2, 1: "c", "1": "d"}


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (MINIMAL.encode("utf-16"), 1, "not UTF-8"),
        (b"name: x\n# caf\xe9\n", 2, "not UTF-8"),
        (b"name: x\n\0", 2, "U\\+0000"),
        (b"a" * 10_000_000, 1, "characters are read"),
        (b"", 1, "empty"),
        (b"- a", 1, "not a mapping"),
    ],
)
def test_a_file_that_is_no_text_names_file_and_line(tmp_path, data, line, words):
    file = tmp_path / "r.yaml"
    file.write_bytes(data)
    with pytest.raises(BadConfig, match=words) as caught:
        load_recipe(file)
    assert caught.value.where == f"{file}:{line}" and "\n" not in caught.value.got


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(tmp_path / "r.yaml") == parse_recipe(MINIMAL)


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("x" * 5_000, "File name too long"),
        ("loop.yaml", "Too many levels of symbolic links"),
        ("folder", "a folder"),
        ("/dev/null", "not a regular file"),
        ("a\0b", "a name with a null character"),
        ("file/inside", "Not a directory"),
        ("", "a folder"),
        ("nowhere", ""),
    ],
)
def test_a_path_that_is_no_recipe_says_what_it_is(tmp_path, monkeypatch, path, got):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match="no such recipe") as caught:
        load_recipe(path)
    assert caught.value.got == got and len(caught.value.where) < 200


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"training_config.max_step": 3}, "did you mean max_steps"),
        ({"foo.bar": 1}, "foo is not a key"),
        ({"a." * 3_000 + "b": 1}, "nested more than"),
        ({"": 1}, "expected a key of the recipe"),
        ({"data..source": 1}, "expected a key of the recipe"),
        ({"data.columns": nested(3_000)}, "nested more than"),
        ({"training_config.learning_rate": float("nan")}, "nan is not a number"),
        ({"training_config.learning_rate": 10**400}, "valid number"),
        ({"name": "\ud800"}, "surrogate"),
        ({"name": "x" * 100_000, "data.source": [1] * 100_000}, "valid string"),
        ({"na[me": 1}, "na\\[me is not a key"),
        ({"na\x1b[31mme": 1}, "is not a key"),
    ],
)
def test_a_problem_of_an_override_names_the_override_and_not_the_file(overrides, words):
    """They come from --set, or as JSON from Prefect's form."""
    with pytest.raises(BadConfig, match=words) as caught:
        parse_recipe(MINIMAL, "r.yaml", overrides)
    message = str(caught.value)
    assert "--set" in message and "correct r.yaml" not in message and "r.yaml:" not in message
    assert len(message) < 1_000 and "\x1b" not in message


def test_thousands_of_unknown_keys_are_counted_and_not_listed():
    started = time.process_time()
    with pytest.raises(BadConfig, match="and 1,980 more") as caught:
        parse_recipe(MINIMAL + "".join(f"k{i}: 1\n" for i in range(2_000)))
    assert len(str(caught.value).splitlines()) < 25
    assert time.process_time() - started < 2


def test_a_recipes_name_may_have_a_dot(tmp_path, monkeypatch):
    from loraflow.config.recipe_text import find_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("v1.yaml", "v1.2.yaml"):
        (tmp_path / "configs" / name).write_text("")
    for given in ("v1.2", "v1.2.yaml", "configs/v1.2.yaml"):
        assert find_recipe(given).name == "v1.2.yaml"
    assert find_recipe("v1").name == find_recipe("v1.yml").name == "v1.yaml"
    with pytest.raises(BadConfig):
        find_recipe("v1.3")
