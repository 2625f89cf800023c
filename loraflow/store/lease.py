"""Locks between machines: a lease is an object in the bucket that its holder renews; a dead holder's lease expires.

Only the server's clock measures a lease's age. A worker whose lease expires while it computes (its host slept, or the
network was down) keeps computing. This is safe: commits are idempotent and the first committed digest stays current, so
two workers that compute the same job only waste time.
"""

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from loraflow.failures import Failure, Network, ReadOnlyStore
from loraflow.store.bucket import Bucket, StoredObject
from loraflow.store.lock import LockHeld

log = logging.getLogger(__name__)

SECONDS = 60.0  # after which a lease that was not renewed is free
_CLEANUP = "locks/gc.json"
_READERS = "locks/readers/"
_FREE = b'{"holder": null}'


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
                log.warning(
                    "the lease %s was lost: another worker may compute the same; the first result stays current",
                    self.key,
                )
                return
            self.etag = etag

    def release(self) -> None:
        """Free the lease at once. If the store does not answer, the lease expires later."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with suppress(Failure):
                self.bucket.replace(self.key, _FREE, self.etag)


@contextmanager
def lease(bucket: Bucket, key: str, *, seconds: float = SECONDS, wait: bool = True) -> Iterator[Lease]:
    """Hold a lease.

    Raises:
        LockHeld: with `wait=False`, if another worker has it.
    """
    body = json.dumps({"holder": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid()}).encode()
    is_logged = False
    while (etag := _try_acquire(bucket, key, body, seconds)) is None:
        if not wait:
            raise LockHeld(key)
        if not is_logged:
            log.info("waiting for %s, held by %s", key, _holder(bucket.get(key)))
            is_logged = True
        time.sleep(min(2.0, seconds / 8))
    held = Lease(bucket, key, body, etag, seconds)
    try:
        yield held
    finally:
        held.release()


@contextmanager
def reader_lease(bucket: Bucket, seconds: float) -> Iterator[None]:
    """Block cleanups on other machines; wait until no cleanup is running."""
    key = f"{_READERS}{uuid.uuid4().hex}.json"
    try:
        etag = bucket.create(key, b"{}")
    except ReadOnlyStore:  # read-only credentials cannot block a cleanup
        etag = None
    held = Lease(bucket, key, b"{}", etag, seconds) if etag else None
    try:
        while _is_held(bucket.get(_CLEANUP), seconds):
            time.sleep(0.5)
        yield
    finally:
        if held is not None:
            held.release()
            bucket.delete([key])


@contextmanager
def cleanup_lease(bucket: Bucket, seconds: float) -> Iterator[None]:
    """Block readers on other machines.

    Raises:
        LockHeld: there are readers, or another cleanup is running.
    """
    with lease(bucket, _CLEANUP, seconds=seconds, wait=False):
        for item in bucket.listing(_READERS):
            if _is_held(bucket.get(item.key), seconds):
                raise LockHeld(item.key)
        yield


def _try_acquire(bucket: Bucket, key: str, body: bytes, seconds: float) -> str | None:
    """Acquire a lease if it is free and return its ETag; return None if another worker holds it."""
    seen = bucket.get(key)
    if seen is None:
        return bucket.create(key, body)
    if _is_held(seen, seconds):
        return None
    return bucket.replace(key, body, seen.etag)


def _is_held(seen: StoredObject | None, seconds: float) -> bool:
    """Tell whether a lease has a holder that renews it."""
    return seen is not None and seen.data != _FREE and seen.age <= seconds


def _holder(seen: StoredObject | None) -> str:
    try:
        holder = json.loads(seen.data if seen else b"")
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # damaged: the message names no process then
        return "another worker"
