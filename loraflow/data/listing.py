"""Read DVC's list of a folder's files (a `.dir` object), and check it before anything is written.

DVC joins the names of the list to the folder's path without a check. A list with `../../name` writes outside the project.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from loraflow.failures import BadData

MAX_BYTES = 64 * 2**20  # of a list: about 700,000 files
MAX_NAME = 1024  # bytes of a path inside the folder
MAX_PART = 255  # bytes of one file name: the limit of Linux's and macOS's file systems
MAX_DEPTH = 32  # folders in each other
# git and DVC act on these names. Lower case, because macOS and Windows ignore case. A `.gitignore` is an ordinary file to
# DVC; git reads it, but no file of a dataset is in git anyway.
RESERVED = frozenset({".git", ".dvc", ".hg", ".dvcignore", ".gitattributes", ".gitmodules"})

# Exactly what DVC writes: `json.dumps(rows, sort_keys=True)`. Any other text has another md5 than `dvc_md5` computes
# from the files, so it would be refused after the download. A regular expression needs no memory for nested JSON.
_ROW = re.compile(r'\{"md5": "([0-9a-f]{32})", "relpath": ("(?:[^"\\\x00-\x1f]|\\.)*")\}(, |\]\Z)')
_MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ListedFile:
    """A row of the list."""

    name: str  # posix path relative to the folder
    md5: str


def is_md5(text: str) -> bool:
    """Tell whether a text is an md5 as DVC writes it: 32 lower-case hex digits, and `.dir` for a folder."""
    return _MD5.fullmatch(text) is not None


def wrong_name(name: str) -> str | None:
    """Return why a name from outside must not be joined to a folder; None if it can be.

    Names that differ only in case pass: Linux keeps them apart. Where the file system does not, the files' md5 differs
    from the pin afterwards.
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    parts = name.split("/")
    if not name or name.startswith("/"):
        return "it is empty or absolute"
    if _CONTROL.search(name) or "\\" in name or "://" in name:
        return "it has a control character, a backslash, or a URL's ://"
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty part, `.` or `..`"
    plain = [part.rstrip(". ").lower() for part in parts]  # Windows drops dots and spaces at the end
    if any(part in RESERVED for part in plain):
        return "git or DVC reserves it"
    if len(raw) > MAX_NAME or len(parts) > MAX_DEPTH or any(len(part.encode()) > MAX_PART for part in parts):
        return f"it has more than {MAX_NAME} bytes, {MAX_DEPTH} folders, or {MAX_PART} bytes in one name"
    return None


def check_names(names: list[str], where: str, next_step: str) -> None:
    """Refuse names that leave their folder, are reserved, duplicated, or a file and a folder at the same time.

    Raises:
        BadData: for the first such name.
    """
    seen: set[str] = set()
    for name in names:
        reason = "it is duplicated" if name in seen else wrong_name(name)
        if reason is not None:
            raise _unsafe(name, reason, where, next_step)
        seen.add(name)
    for name in names:
        folder, slash, _ = name.rpartition("/")
        while slash:
            if folder in seen:
                raise _unsafe(name, f"{folder} is a file of the list too", where, next_step)
            folder, slash, _ = folder.rpartition("/")


def _unsafe(name: str, reason: str, where: str, next_step: str) -> BadData:
    return BadData(
        "A file of the dataset has a name that must not be written.",
        where=where,
        expected="relative names inside the dataset's folder",
        got=f"{name[:200]!a}: {reason}",
        next_step=next_step,
    )


def parse_listing(raw: bytes, md5: str, where: str, next_step: str) -> list[ListedFile]:
    """Return the files of a `.dir` object.

    Args:
        raw: the object's bytes.
        md5: the name of the object, which is the md5 of its bytes and `.dir`.
        where: the object's place, for the message.
        next_step: how to replace a damaged object, for the message.

    Raises:
        BadData: the bytes have another md5, are not a list as DVC writes it, or name a file that must not be written.
    """
    got = hashlib.md5(raw, usedforsecurity=False).hexdigest() + ".dir"
    if len(raw) > MAX_BYTES or got != md5:
        raise BadData(
            "DVC's list of the dataset's files is damaged.",
            where=where,
            expected=f"md5 {md5}",
            got=f"more than {MAX_BYTES // 2**20} MiB" if len(raw) > MAX_BYTES else f"md5 {got}",
            next_step=next_step,
        )
    files = _rows(raw, where)
    check_names(
        [file.name for file in files],
        where,
        "do not pull it; `git log -- '*.dvc'` shows who added it. Add the dataset again from its source",
    )
    return files


def _rows(raw: bytes, where: str) -> list[ListedFile]:
    text = raw.decode("utf-8", errors="replace")
    if text == "[]":
        return []
    files: list[ListedFile] = []
    position = 1
    while text.startswith("[") and (row := _ROW.match(text, position)):
        try:
            files.append(ListedFile(json.loads(row[2]), row[1]))
        except ValueError:
            break
        position = row.end()
        if row[3] == "]":
            return files
    raise BadData(
        "DVC's list of the dataset's files is malformed.",
        where=f"{where}, character {position}",
        expected='[{"md5": "<32 hex digits>", "relpath": "<name>"}, …], as DVC 3 writes it',
        got=ascii(text[position : position + 80]),
        next_step="add the dataset again from its source with `loraflow data add FOLDER`",
    )
