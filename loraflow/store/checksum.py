"""Checksums of small JSON documents, such as run records: what is damaged, or belongs to another run, is not believed.

The checksum is the first line of the object; in a manifest, of its object `provenance`. It covers the document's name and
all other bytes, so a document that was edited, damaged, formatted in another way, or copied over another one is refused.
It does not protect against a person who computes it again. A document of an earlier version has none, and is taken as it is.
"""

import hashlib
import json
import re
from collections.abc import Mapping

from pydantic import ValidationError

from loraflow.store.files import Json, json_bytes

_START = b"{\n"
_LINE = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')


class ChangedDocument(ValueError):
    """A document has other bytes, or another name, than those that were written."""


def with_checksum(name: str, values: Mapping[str, Json]) -> bytes:
    """Return JSON values, at least one, as the bytes of a document with its checksum.

    Args:
        name: where the document belongs, such as its name in the store.
    """
    assert values, name
    rest = json_bytes(values).removeprefix(_START)
    return b'{\n "checksum": "%s",\n%s' % (checksum(name, rest).encode(), rest)


def check_document(name: str, document: bytes) -> bytes:
    """Return a document without its checksum.

    Raises:
        ChangedDocument: the checksum is not that of this name and content.
    """
    found = _LINE.match(document)
    if found is None:
        if _has_checksum(document):
            raise ChangedDocument(
                "its checksum is not in the first line: the document was written again by another program"
            )
        return document
    rest = document[found.end() :]
    if checksum(name, rest).encode() != found[1]:
        raise ChangedDocument("its checksum is wrong: the document was changed, or is a copy of another one")
    return _START + rest


MANIFEST = "manifest.json"
_PROVENANCE = b'\n "provenance": {'


def add_manifest_checksum(document: bytes) -> bytes:
    """Return a manifest with its checksum, as the first key of `provenance`: earlier versions refuse new keys elsewhere."""
    line = b'\n  "checksum": "%s"' % checksum(MANIFEST, document).encode()
    assert document.count(_PROVENANCE) == 1  # a text in JSON has no line feed
    before, _, after = document.partition(_PROVENANCE)
    return before + _PROVENANCE + line + (b"\n " if after.startswith(b"}") else b",") + after


def check_manifest_checksum(document: bytes) -> bytes:
    """Return a manifest without the checksum that `add_manifest_checksum` has put into it.

    Raises:
        ChangedDocument: the checksum is not that of this content.
    """
    found = re.search(re.escape(_PROVENANCE) + rb'\n  "checksum": "([0-9a-f]{64})"(?:,|\n (?=\}))', document)
    if found is None:
        if re.search(re.escape(_PROVENANCE) + rb'\s*"checksum"', document):
            raise ChangedDocument("its checksum cannot be read: the document was changed")
        return document
    plain = document[: found.start()] + _PROVENANCE + document[found.end() :]
    if checksum(MANIFEST, plain).encode() != found[1]:
        raise ChangedDocument("its checksum is wrong: the document was changed, or is a copy of another one")
    return plain


def _has_checksum(document: bytes) -> bool:
    """Tell whether a document is an object with a checksum that is not where `with_checksum` writes it."""
    if b"checksum" not in document:
        return False
    try:
        value = json.loads(document)
    except (ValueError, RecursionError):  # its reader says what is wrong
        return False
    return isinstance(value, dict) and "checksum" in value


def first_problem(error: ValueError) -> str:
    """Return what is wrong with a document, in a line: of pydantic's problems the first, with its path."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"
    return str(error)


def lost_checksum(name: str, before: bytes, now: bytes) -> bool:
    """Tell whether a document is damaged that was intact before."""
    return _is_intact(name, before) and not _is_intact(name, now)


def _is_intact(name: str, document: bytes) -> bool:
    """Tell whether a document has a checksum, and the right one."""
    try:
        return check_document(name, document) != document
    except ChangedDocument:
        return False


def checksum(name: str, content: bytes) -> str:
    """Return the sha256 of a name and a content, 64 hex digits."""
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
