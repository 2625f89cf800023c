"""Locks between machines: a lease in the bucket, renewed while its holder lives. A dead holder's lease ends by itself.

Ages are told by the server's clock alone. Who loses a lease while it computes (a host that slept, a network that was
away) is not stopped: commits are idempotent and the first committed digest stands, so that time is lost, not truth.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from loraflow.failures import Failure, Network
from loraflow.store.bucket import Bucket, Object
from loraflow.store.lock import Held

log = logging.getLogger(__name__)

SECONDS = 60.0  # after which a lease that nobody renewed is free


class Lease:
    """A held lease: a thread renews it until `release`."""

    def __init__(self, bucket: Bucket, key: str, body: bytes, etag: str, seconds: float):
        self.bucket, self.key, self.body, self.etag, self.seconds = bucket, key, body, etag, seconds
        self.lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {key}", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            try:
                etag = self.bucket.replace(self.key, self.body, self.etag)
            except Network as failure:
                log.warning("the lease %s is not renewed: %s", self.key, failure.got)
                continue
            except Failure as failure:
                log.warning("the lease %s is not renewed: %s", self.key, failure)
                return
            if etag is None:
                self.lost = True
                log.warning("the lease %s was lost: another worker may do the same; the first result stands", self.key)
                return
            self.etag = etag

    def release(self) -> None:
        """Let it go: at once for whoever waits. A store that does not answer frees it later by itself."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with suppress(Failure):
                self.bucket.replace(self.key, _FREE, self.etag)


_FREE = b'{"holder": null}'


@contextmanager
def lease(bucket: Bucket, key: str, *, seconds: float = SECONDS, wait: bool = True) -> Iterator[Lease]:
    """Hold a lease.

    Raises:
        Held: with `wait=False`, if somebody else has it.
    """
    body = json.dumps({"holder": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid()}).encode()
    etag, said = None, False
    while (etag := _take(bucket, key, body, seconds)) is None:
        if not wait:
            raise Held(key)
        if not said:
            log.info("waiting for %s, held by %s", key, _holder(bucket.get(key)))
            said = True
        time.sleep(min(2.0, seconds / 8))
    held = Lease(bucket, key, body, etag, seconds)
    try:
        yield held
    finally:
        held.release()


def _take(bucket: Bucket, key: str, body: bytes, seconds: float) -> str | None:
    seen = bucket.get(key)
    if seen is None:
        return bucket.create(key, body)
    if seen.data == _FREE or seen.age > seconds:
        return bucket.replace(key, body, seen.etag)
    return None


def is_held(seen: Object | None, seconds: float) -> bool:
    """Tell whether a lease is held by a living holder."""
    return seen is not None and seen.data != _FREE and seen.age <= seconds


def _holder(seen: Object | None) -> str:
    try:
        who = json.loads(seen.data if seen else b"")
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError):
        return "another worker"
