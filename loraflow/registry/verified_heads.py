"""The newest signed entries that were verified with a list of signers, so that an older signed log is noticed.

A signature does not tell that newer entries were taken away together with the newer signature. The list of signers is kept
where those who can write to the store cannot write, so what was verified is remembered beside it:

    allowed_signers.verified.json   {store: {model: number and hash of the last entry that was verified}}
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from loraflow.failures import BadConfig, DamagedLog
from loraflow.registry.anchor import Claim
from loraflow.registry.runs import LogHead
from loraflow.store import Store
from loraflow.store.checksum import first_problem
from loraflow.store.files import json_bytes, write_atomic
from loraflow.store.lock import flock

log = logging.getLogger("loraflow")
_HEADS = TypeAdapter(dict[str, dict[str, LogHead]])


def heads_file(signers: Path) -> Path:
    """Return the file that belongs to a list of signers."""
    return signers.with_name(f"{signers.name}.verified.json")


def verified_models(store: Store, signers: Path) -> set[str]:
    """Return the names of the models of a store whose signed log was verified before, also if nothing is left of it.

    Raises:
        BadConfig: the file cannot be read.
    """
    return set(_read(signers).get(store.uri, {}))


def require_not_older(store: Store, model: str, hashes: Sequence[str], signers: Path) -> None:
    """Check that a log has the entry that was verified last.

    Args:
        store: has the log.
        model: its name.
        hashes: of the log's entries, oldest first.
        signers: the list of signers.

    Raises:
        DamagedLog: it is an older log, or another one.
        BadConfig: the file of verified entries cannot be read.
    """
    head = _read(signers).get(store.uri, {}).get(model)
    claim = Claim(head, str(heads_file(signers))) if head is not None else None
    if claim is not None and not claim.is_met_by(hashes):
        raise DamagedLog(
            "The promotion log is older than the one that was verified before, or another one.",
            where=f"{store.uri}/registry/{model}/log",
            expected=str(claim),
            got=f"{len(hashes)} entries without it",
            next_step="restore the newer log from a backup of the store (docs/backup.md). If entries were given up on "
            f"purpose (`loraflow registry` shows accepted losses), remove {model} from {heads_file(signers)}",
        )


def remember_verified(store: Store, model: str, head: LogHead, signers: Path) -> None:
    """Remember the last entry of a log that was verified, unless a later one is known.

    Another process may have verified a longer log since this one was read. If the file cannot be locked or written, that is
    only a warning.

    Raises:
        BadConfig: the file cannot be read.
    """
    file = heads_file(signers)
    try:
        if _is_known(_read(signers), store, model, head):
            return
        with flock(file.with_name(f".{file.name}.lock")):
            heads = _read(signers)
            if _is_known(heads, store, model, head):
                return
            heads.setdefault(store.uri, {})[model] = head
            values = {uri: {name: one.model_dump() for name, one in found.items()} for uri, found in heads.items()}
            write_atomic(file, json_bytes(values))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): an older log with an older signature will not be noticed", file, error.strerror
        )


def _is_known(heads: Mapping[str, Mapping[str, LogHead]], store: Store, model: str, head: LogHead) -> bool:
    known = heads.get(store.uri, {}).get(model)
    return known is not None and known.seq >= head.seq


def _read(signers: Path) -> dict[str, dict[str, LogHead]]:
    file = heads_file(signers)
    try:
        return _HEADS.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadConfig(
            "The entries that were verified before cannot be read.",
            where=str(file),
            expected="{store: {model: {seq, hash}}}, as `loraflow verify --signers` writes it",
            got=(error.strerror or str(error)) if isinstance(error, OSError) else first_problem(error),
            next_step="restore the file from a copy. Without one, compare `loraflow registry` with a backup or with "
            f"your notes: is the last entry there? Then `rm {shlex.quote(str(file))}`; the next `loraflow verify --signers "
            f"{shlex.quote(str(signers))}` writes it again, and does not notice an older log",
        ) from error
