"""Signatures of a promotion log with an SSH key, for stores that somebody else can write to. Off by default.

    anchors/<model>/signed.json   number and hash of the last entry that was signed, and the signature

The chain of hashes ties all earlier entries to the signed one. Who changes log, anchor and run records together cannot sign
the result. A signature does not tell that newer signed entries were taken away together with their signature. So the last
entry that was verified is remembered beside the list of signers, where those who can write to the store cannot write:

    allowed_signers.verified.json   {store: {model: number and hash of the last entry that was verified}}
"""

import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from loraflow.failures import BadConfig, DamagedLog
from loraflow.frozen import StoredModel
from loraflow.registry.anchor import FOLDER, Claim
from loraflow.registry.runs import LogHead
from loraflow.store import Store
from loraflow.store.checksum import first_problem
from loraflow.store.files import json_bytes, read_file, write_atomic
from loraflow.store.lock import flock

log = logging.getLogger("loraflow")

KEY = "LORAFLOW_SIGNING_KEY"  # environment: the key's file, with which each promotion is signed
_NAMESPACE = "loraflow-promotion-log"
_FILE = "signed.json"


class _Refused(Exception):
    """ssh-keygen ran, and refuses the key or the signature, for this reason."""


class _Signed(StoredModel):
    seq: int
    hash: str
    signature: str


class Signed(NamedTuple):
    """What a signature covers: who signed, and how many entries from the first one."""

    signer: str
    entries: int


def signing_key() -> str | None:
    """Return the key's file that the environment names; None if promotions are not signed."""
    return os.environ.get(KEY) or None


def signed_models(store: Store) -> set[str]:
    """Return the names of the models whose promotion log was signed, also if the log is gone."""
    names = (name.split("/") for name in store.documents(f"{FOLDER}/"))
    return {parts[1] for parts in names if len(parts) == 3 and parts[2] == _FILE}


def sign(store: Store, model: str, head: LogHead, key: str, hashes: Callable[[], Sequence[str]]) -> None:
    """Sign the last entry of a log, and with it all entries before.

    The signature of a later entry, which another process wrote meanwhile, is kept: it covers this one too.

    Args:
        key: file of a private SSH key, or of the public one if ssh-agent has the private one.
        hashes: a function that reads the hashes of the log's entries, oldest first.

    Raises:
        BadConfig: there is no ssh-keygen, or it cannot sign with the key.
    """
    options = ["-Y", "sign", "-f", str(Path(key).expanduser()), "-n", _NAMESPACE]
    try:
        signature = _ssh_keygen(options, _statement(model, head), key)
    except _Refused as refused:
        raise BadConfig(
            "ssh-keygen refuses the key.",
            where=key,
            got=str(refused),
            next_step="name another key, or correct its permissions",
        ) from refused
    document = _Signed(seq=head.seq, hash=head.hash, signature=signature.decode())
    with store.lock("signature", model):
        present = _read(store, model)
        if present is None or present.seq <= head.seq or hashes()[present.seq - 1 : present.seq] != [present.hash]:
            store.write_document(_name(model), json_bytes(document.model_dump()))


def _read(store: Store, model: str) -> _Signed | None:
    try:
        return _Signed.model_validate_json(store.read_document(_name(model)) or b"")
    except ValueError:  # ValidationError is a subclass
        return None


def check_signature(store: Store, model: str, hashes: Sequence[str], signers: Path) -> Signed:
    """Check that a person on the list signed the log.

    Args:
        signers: a file of allowed signers, as in ssh-keygen's manual: `NAME KEY-TYPE KEY` on each line.

    Raises:
        DamagedLog: the log is not signed, nobody on the list signed it, or an entry that was signed is gone or changed.
        BadConfig: there is no ssh-keygen, or no list of signers.
    """
    if not signers.is_file():
        raise BadConfig(
            "There is no list of signers.",
            where=str(signers),
            expected="a line `NAME KEY-TYPE KEY` each",
            next_step="write the file, or correct --signers",
        )
    data = store.read_document(_name(model))
    try:
        signed = _Signed.model_validate_json(data or b"")
    except ValueError as error:  # ValidationError is a subclass
        raise _not_signed(
            store, model, "no signature" if data is None else "a signature that cannot be read"
        ) from error
    head = LogHead(seq=signed.seq, hash=signed.hash)
    with tempfile.NamedTemporaryFile(prefix="loraflow-signature-") as file:
        file.write(signed.signature.encode())
        file.flush()
        try:
            found = _ssh_keygen(["-Y", "find-principals", "-s", file.name, "-f", str(signers)], b"", str(signers))
            signer = found.decode().splitlines()[0]
            options = ["-Y", "verify", "-f", str(signers), "-I", signer, "-n", _NAMESPACE, "-s", file.name]
            _ssh_keygen(options, _statement(model, head), str(signers))
        except (_Refused, IndexError) as failure:
            raise _not_signed(store, model, str(failure) if isinstance(failure, _Refused) else "no signer") from failure
    if not 0 < head.seq <= len(hashes) or hashes[head.seq - 1] != head.hash:
        raise _not_signed(store, model, f"a log without entry {head.seq}, which {signer} signed")
    return Signed(signer, head.seq)


def _not_signed(store: Store, model: str, got: str) -> DamagedLog:
    return DamagedLog(
        "The promotion log is not signed by anybody on the list of signers.",
        where=f"{store.uri}/{_name(model)}",
        got=got,
        next_step="compare the log with a backup of the store; if it is right, sign it: `loraflow registry sign --key FILE`",
    )


def _statement(model: str, head: LogHead) -> bytes:
    return f"loraflow promotion log of {model}, entry {head.seq}, {head.hash}\n".encode()


def _name(model: str) -> str:
    return f"{FOLDER}/{model}/{_FILE}"


def _ssh_keygen(options: list[str], text: bytes, where: str) -> bytes:
    try:
        done = subprocess.run(["ssh-keygen", *options], input=text, capture_output=True, timeout=60, check=True)
    except FileNotFoundError as error:
        raise BadConfig(
            "Signing needs OpenSSH's ssh-keygen.", where="PATH", next_step="install OpenSSH 8.1 or newer"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BadConfig(
            "ssh-keygen did not end.", where=where, got="60 s", next_step="use a key in ssh-agent"
        ) from error
    except subprocess.CalledProcessError as error:
        got = (error.stderr or error.stdout).decode(errors="replace").strip().splitlines() or [
            f"status {error.returncode}"
        ]
        raise _Refused(got[-1][:200]) from error
    return done.stdout


_HEADS = TypeAdapter(dict[str, dict[str, LogHead]])


def heads_file(signers: Path) -> Path:
    """Return the file that belongs to a list of signers."""
    return signers.with_name(f"{signers.name}.verified.json")


def verified_models(store: Store, signers: Path) -> set[str]:
    """Return the names of the models of a store whose signed log was verified before, also if nothing is left of it.

    Raises:
        BadConfig: the file cannot be read.
    """
    return set(_read_heads(signers).get(store.uri, {}))


def require_not_older(store: Store, model: str, hashes: Sequence[str], signers: Path) -> None:
    """Check that a log has the entry that was verified last.

    Raises:
        DamagedLog: it is an older log, or another one.
        BadConfig: the file of verified entries cannot be read.
    """
    head = _read_heads(signers).get(store.uri, {}).get(model)
    claim = Claim(head, str(heads_file(signers))) if head is not None else None
    if claim is not None and not claim.is_met_by(hashes):
        raise DamagedLog(
            "The promotion log is older than the one that was verified before, or is a different one.",
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
        if _is_known(_read_heads(signers), store, model, head):
            return
        with flock(file.with_name(f".{file.name}.lock")):
            heads = _read_heads(signers)
            if _is_known(heads, store, model, head):
                return
            heads.setdefault(store.uri, {})[model] = head
            values = {
                uri: {name: log_head.model_dump() for name, log_head in found.items()} for uri, found in heads.items()
            }
            write_atomic(file, json_bytes(values))
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): an older log with an older signature will not be noticed", file, error.strerror
        )


def _is_known(heads: Mapping[str, Mapping[str, LogHead]], store: Store, model: str, head: LogHead) -> bool:
    known = heads.get(store.uri, {}).get(model)
    return known is not None and known.seq >= head.seq


def _read_heads(signers: Path) -> dict[str, dict[str, LogHead]]:
    file = heads_file(signers)
    try:
        return _HEADS.validate_json(read_file(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadConfig(
            "The entries that were verified before cannot be read.",
            where=str(file),
            expected="{store: {model: {seq, hash}}}, as `loraflow verify --signers` writes it",
            got=(error.strerror or str(error)) if isinstance(error, OSError) else first_problem(error),
            next_step="restore the file from a copy. Without a copy, check that `loraflow registry` shows the last entry "
            f"that you know of. Then `rm {shlex.quote(str(file))}`; the next `loraflow verify --signers "
            f"{shlex.quote(str(signers))}` writes it again, but cannot notice an older log",
        ) from error
