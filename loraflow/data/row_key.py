"""The identity of a held-out row, by which it is known whether models were scored on it."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from loraflow.identity import canonical


def row_key(prompt: str) -> str:
    """Return the identity of a held-out row: 16 hex digits of a hash of its prompt, a JSON list of messages.

    System messages, letter case and white space do not count, nor does the reference: a row with another system message or
    a corrected answer was still seen before.
    """
    try:
        messages = json.loads(prompt)
        texts = [str(message["content"]) for message in messages if message["role"] != "system"]
    except (ValueError, TypeError, KeyError):
        texts = [prompt]
    plain = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    return hashlib.sha256(canonical(plain)).hexdigest()[:16]
