"""Keep passwords and tokens out of everything that is written or shown.

Two functions, at two boundaries:

- `hide_in_url` where a URL comes in (recipe, `--set`): the rest of the program sees `https://***@host/…`. `reveal` gives
  the URL back to the one call that connects. The credentials are only in this process's memory.
- `mask` where text goes out: messages of failures, log records, tracebacks, the recipe's text in a run's record, and what
  libraries print in a worker (`protect_streams`).
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TextIO
from urllib.parse import unquote

if TYPE_CHECKING:
    from pydantic import JsonValue

MASK = "***"
MIN_LENGTH = 8  # characters of a secret that is searched for by itself; a shorter one would mask ordinary words


def _any_case(pattern: str) -> str:
    """Return a pattern without classes of letters that matches in any case: a JSON schema's has no flags."""
    return re.sub(
        r"\\.|[A-Za-z]", lambda found: found[0] if len(found[0]) > 1 else f"[{found[0].upper()}{found[0]}]", pattern
    )


_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
_IN_AUTHORITY = r"[^\s/?#'\"<>]"
# Up to the last @ before a slash: a password may contain an @.
_USERINFO = re.compile(rf"({_SCHEME})({_IN_AUTHORITY}+)@")
_URL = re.compile(rf"({_SCHEME})({_IN_AUTHORITY}+)@(\S+)")
_PARAMETER_NAME = "[?&;](?:[\\w.-]*" + _any_case(
    r"(?:token|secret|passw(?:or)?d|signature|credential|api[_-]?key|access[_-]?key(?:id)?)|sig|key)="
)
_PARAMETER = re.compile(rf"({_PARAMETER_NAME})[^\s&;#'\"<>]+")
_HEADER_START = _any_case(r"(?:authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)\s+|\bbearer\s+)")
_HEADER = re.compile(rf"({_HEADER_START})[^\s'\",;]{{8,}}")
# Tokens of the services that this program talks to, by their published prefixes.
_TOKENS = (
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_TOKEN = re.compile(_TOKENS)
_START, _OF_SCHEME, _SSH = r"(?:^|[^A-Za-z0-9+.-])", "[A-Za-z0-9+.-]", "[Ss][Ss][Hh]"
# What `mask` finds in any text, as a pattern of JSON schema, for Python and browsers. What is masked already is allowed,
# and so is a user of ssh without a password.
HAS_CREDENTIALS = "|".join(
    (
        rf"{_START}(?!{_OF_SCHEME}*{_SSH})(?=[0-9+.-]*[A-Za-z]){_OF_SCHEME}+://"
        rf"(?!\*\*\*@[^\s/?#'\"<>@]*(?:[\s/?#'\"<>]|$)){_IN_AUTHORITY}+@",
        rf"{_START}{_OF_SCHEME}*{_SSH}{_OF_SCHEME}*://{_IN_AUTHORITY}*:{_IN_AUTHORITY}*@",
        rf"{_PARAMETER_NAME}(?!\*\*\*(?:[\s&;#'\"<>]|$))[^\s&;#'\"<>]",
        rf"{_HEADER_START}[^\s'\",;]{{8}}",
        _TOKENS,
    )
)
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH_STRING|CREDENTIAL", re.IGNORECASE
)
_NAMES_A_PATH = re.compile(r"(?:FILE|PATH|DIR|CREDENTIALS|URL|URI)$", re.IGNORECASE)

_hidden: dict[str, str] = {}  # masked URL: the URL
_secrets: set[str] = set()  # the credentials of the hidden URLs


def mask(text: str) -> str:
    """Return a text without credentials: those in URLs and headers, known tokens, and values of secret variables."""
    if "@" in text:
        text = _USERINFO.sub(_mask_userinfo, text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\1{MASK}", text)
    text = _TOKEN.sub(MASK, _HEADER.sub(rf"\1{MASK}", text))
    for secret in (*_secrets, *_secret_variables(os.environ)):
        text = text.replace(secret, MASK)
    return text


def mask_json(value: JsonValue) -> JsonValue:
    """Return a JSON value whose texts are masked."""
    return _with_texts(value, mask)


def _with_texts(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    """Return a JSON value with changed texts. Keys stay as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return value


def hide_in_url(value: str) -> str:
    """Return a URL without its credentials, and remember them for `reveal`. Any other text is returned unchanged."""
    found = _URL.fullmatch(value)
    if found is None or _is_user_of_ssh(found[1], found[2]) or found[2] == MASK:
        return value
    masked = f"{found[1]}{MASK}@{found[3]}"
    _hidden[masked] = value
    user, colon, password = found[2].partition(":")
    for secret in (password if colon else user,):
        _secrets.update(text for text in (secret, unquote(secret)) if len(text) >= MIN_LENGTH)
    return masked


def hide_in_json(value: JsonValue) -> JsonValue:
    """Return a JSON value in which each text that is a URL is hidden (`hide_in_url`)."""
    return _with_texts(value, hide_in_url)


def reveal(url: str) -> str:
    """Return the URL with its credentials, for the call that connects."""
    return _hidden.get(url, url)


def git_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that let git use the hidden URLs.

    git replaces the masked URL itself, so that the credentials are not in its arguments, which every user can list.
    """
    added: dict[str, str] = {}
    count = int(environment.get("GIT_CONFIG_COUNT") or 0)
    for masked, url in _hidden.items():
        added |= {f"GIT_CONFIG_KEY_{count}": f"url.{url}.insteadOf", f"GIT_CONFIG_VALUE_{count}": masked}
        count += 1
    return {**environment, **added, "GIT_CONFIG_COUNT": str(count)} if added else dict(environment)


class MaskedRecord(logging.LogRecord):
    """A log record whose message and traceback are masked."""

    _exc_text: str | None

    def getMessage(self) -> str:
        """Return the message without credentials."""
        text = super().getMessage()
        if (masked := mask(text)) != text:
            self.msg, self.args = masked, ()  # a handler that fails prints them
        return masked

    @property
    def exc_text(self) -> str | None:
        """The traceback, which logging's Formatter sets and prints."""
        return self._exc_text

    @exc_text.setter
    def exc_text(self, text: str | None) -> None:
        self._exc_text = mask(text) if text else text


def protect_output() -> None:
    """Mask log records of all libraries, and tracebacks of uncaught exceptions, from now on in this process."""
    if logging.getLogRecordFactory() is not MaskedRecord:
        logging.setLogRecordFactory(MaskedRecord)
        sys.excepthook = _print_masked


class MaskedStream(io.TextIOBase):
    """A text stream that masks credentials in each line it passes on. A line that is flushed early is masked in parts."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._line = ""  # the beginning of a line
        self._lock = threading.RLock()  # a signal's handler may write too

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that is written to."""
        return self._stream.encoding

    @property
    def buffer(self) -> BinaryIO:
        """The bytes of the stream that is written to, which are not masked here."""
        return self._stream.buffer

    def fileno(self) -> int:
        """Return the file descriptor, to which child processes write."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return whether a person reads it."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Write the complete lines, masked."""
        with self._lock:
            lines, end, rest = (self._line + text).rpartition("\n")
            self._line = rest
            if end:
                self._stream.write(mask(lines) + end)
        return len(text)

    def flush(self) -> None:
        """Write the beginning of a line too."""
        with self._lock:
            line, self._line = self._line, ""
            if line:
                self._stream.write(mask(line))
            self._stream.flush()


def protect_streams() -> None:
    """Mask what this process prints, from now on."""
    if not isinstance(sys.stdout, MaskedStream):
        sys.stdout = MaskedStream(sys.stdout)
    if not isinstance(sys.stderr, MaskedStream):
        sys.stderr = MaskedStream(sys.stderr)


def format_masked(error: BaseException) -> str:
    """Return the traceback of an exception, masked."""
    return mask("".join(traceback.format_exception(error)))


def _print_masked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(mask("".join(traceback.format_exception(kind, error, trace))))


def _mask_userinfo(found: re.Match[str]) -> str:
    return found[0] if _is_user_of_ssh(found[1], found[2]) else f"{found[1]}{MASK}@"


def _is_user_of_ssh(scheme: str, userinfo: str) -> bool:
    """Tell whether it is only a user's name, as in ssh://git@host. With https, a name by itself is often a token."""
    return "ssh" in scheme.lower() and ":" not in userinfo


def _secret_variables(environment: Mapping[str, str]) -> list[str]:
    return [
        value
        for name, value in environment.items()
        if _SECRET_NAME.search(name)
        and not _NAMES_A_PATH.search(name)
        and len(value) >= MIN_LENGTH
        and not (value.isalpha() and len(value) < 2 * MIN_LENGTH)
    ]
