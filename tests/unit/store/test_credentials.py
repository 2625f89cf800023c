"""Passwords and tokens: hidden in URLs that come in, masked in all text that goes out."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraflow import credentials
from loraflow.cli import parse_overrides
from loraflow.config.load import parse_recipe
from loraflow.credentials import hide_in_url, mask, reveal
from loraflow.data.versions import dvc
from loraflow.data.versions.git import GitError, git
from loraflow.failures import BadConfig, BadData, Crashed, Network, from_dict, mask_errors
from tests.password_server import git_server

CANARY = "c4nary-0f-16-token"
URL = f"https://someone:{CANARY}@127.0.0.1:1/data.git"


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(credentials, "_hidden", {})
    monkeypatch.setattr(credentials, "_secrets", set())
    factory, hook = logging.getLogRecordFactory(), sys.excepthook
    yield
    logging.setLogRecordFactory(factory)
    sys.excepthook = hook


@pytest.mark.parametrize(
    "text",
    [
        f"fatal: unable to access '{URL}': refused",
        f"https://{CANARY}@github.com/a/b",
        f"ssh://git:{CANARY}@host/a",
        f"s3://key:{CANARY}@bucket/prefix",
        f"http://u:p@{CANARY}@host:4200/api",
        f"https://host/a?x=1&access_token={CANARY}&b=2",
        f"https://host/a?X-Amz-Signature={CANARY}",
        f"https://host/a?sig={CANARY}",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"authorization: Basic {CANARY}",
    ],
)
def test_a_credential_is_masked_by_its_place(text: str) -> None:
    assert CANARY not in mask(text) and "***" in mask(text)


@pytest.mark.parametrize(
    "token", ["hf_" + "a1" * 16, "ghp_" + "a1" * 18, "github_pat_" + "a1" * 20, "glpat-" + "a1" * 10, "AKIA" + "Z9" * 8]
)
def test_a_token_of_a_known_service_is_masked_anywhere(token: str) -> None:
    assert token not in mask(f"error at {token}, again")


def test_values_of_secret_variables_are_masked_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_AUTH_STRING", "WANDB_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
        assert CANARY not in mask(f"header {CANARY}"), name
        monkeypatch.delenv(name)
    assert CANARY in mask(CANARY)


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@github.com/a/b",
        "git@github.com:a/b.git",
        "https://github.com/a/b?ref=main",
        "mail a@b.org, or see https://host/@user",
        "key=value&monkey=banana",
        "configs/quickstart.yaml:3: tokens: 512",
    ],
)
def test_text_without_credentials_is_unchanged(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "configs/")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS", "quickstart")
    assert mask(text) == text and hide_in_url(text) == text


def test_a_hidden_url_is_revealed_only_on_demand() -> None:
    hidden = hide_in_url(URL)
    assert hidden == "https://***@127.0.0.1:1/data.git" and reveal(hidden) == URL
    assert hide_in_url(hidden) == hidden and reveal(hidden) == URL
    assert CANARY not in mask(f"the password {CANARY} by itself")


def test_a_recipe_hides_the_url_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    recipe = parse_recipe(f"name: a\nbase: {{model: b}}\ndata:\n  repo: {URL}\n", overrides={})
    assert recipe.data.repo == hide_in_url(URL)
    assert "git credential helper" in caplog.text and CANARY not in caplog.text
    assert parse_overrides((f"data.repo={URL}",)) == {"data.repo": hide_in_url(URL)}


def test_a_problem_of_a_recipe_is_masked() -> None:
    with pytest.raises(BadConfig) as caught:
        parse_recipe(f"name: a\nbase: {{model: b}}\ndata:\n  seed: {URL}\n  repos: {URL}\n")
    assert CANARY not in str(caught.value)


def test_failures_are_masked_in_every_field_and_as_json() -> None:
    failure = Network(URL, where=URL, expected=URL, got=URL, next_step=URL, tried=[{"url": URL}])
    for text in (str(failure), json.dumps(failure.to_dict()), str(from_dict(failure.to_dict()))):
        assert CANARY not in text
    with pytest.raises(Crashed) as caught, mask_errors():
        raise RuntimeError(URL)
    assert CANARY not in str(caught.value) and caught.value.__suppress_context__
    with pytest.raises(RuntimeError, match="ordinary"), mask_errors():
        raise RuntimeError("ordinary")


def test_log_records_and_tracebacks_of_any_library_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    credentials.protect_output()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("some.library")
    log.addHandler(handler)
    log.propagate = False
    try:
        log.warning("GET %s", URL)
        log.warning("%s has %d rows", "a", 3)
        try:
            raise ValueError(URL)
        except ValueError as error:
            log.exception("failed")
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        log.removeHandler(handler)
    written = stream.getvalue()
    assert CANARY not in written and "a has 3 rows" in written and "Traceback" in written
    shown = capsys.readouterr().err
    assert CANARY not in shown and "ValueError" in shown


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A git repository with data.dvc behind HTTP with a password. Yield host:port."""
    pin = f"outs:\n- md5: {'0' * 32}\n  hash: md5\n  path: data\n"
    with git_server(tmp_path / "git", {"data.dvc": pin}, CANARY) as address:
        yield address


def test_what_is_printed_is_masked_line_by_line() -> None:
    written = io.StringIO()
    stream = credentials.MaskedStream(written)
    print("https://someone:", end="", file=stream)
    print(f"{CANARY}@host/a", "and", file=stream)
    stream.write(f"one\nhttps://{CANARY}@host\nrest")
    assert written.getvalue() == "https://***@host/a and\none\nhttps://***@host\n"
    stream.flush()
    assert written.getvalue().endswith("\nrest")


def test_git_gets_the_password_of_a_hidden_url(address: str) -> None:
    hidden = hide_in_url(f"http://someone:{CANARY}@{address}/data.git")
    assert "refs/heads/main" in git(["ls-remote", "--", hidden])
    assert dvc.read_pin(hidden, "data.dvc", "main").path == "data"


def test_a_wrong_password_is_named_and_not_shown(address: str) -> None:
    hidden = hide_in_url(f"http://someone:wrong-{CANARY}@{address}/data.git")
    with pytest.raises(BadData) as caught:
        dvc.read_pin(hidden, "data.dvc", "main")
    assert CANARY not in str(caught.value) and CANARY not in str(caught.value.__cause__)
    with pytest.raises(GitError) as error:
        git(["ls-remote", "--", hidden])
    assert CANARY not in error.value.command
