"""The newest checkpoint of an unfinished job, kept in the bucket: an attempt on another machine goes on from it.

A checkpoint counts once its seal is there, which is written last; what arrives is hashed against it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from loraflow.failures import Failure, Network
from loraflow.store.bucket import AT_ONCE, Bucket, patiently
from loraflow.store.checkpoints import (
    COMPLETE,
    FOLDER,
    FORCED,
    begin_anew,
    forced_over,
    is_whole,
    read_seal,
    seal_of,
    sealed,
    step_of,
    whole,
)
from loraflow.store.files import write_atomic

log = logging.getLogger(__name__)
LOOK = 2.0  # seconds between two looks for a new checkpoint


class Kept:
    """The part of an unfinished job's work that its bucket has, below a prefix."""

    def __init__(self, bucket: Bucket, prefix: str, work: Path):
        self.bucket, self.prefix, self.work = bucket, prefix, work
        self._done_with: str | None = None  # the newest checkpoint that was looked at
        self._needless = threading.Event()  # the job is done, and nobody will go on from here

    def fetch(self, instead_of: str | None) -> None:
        """Bring the work folder to what the last attempt left, whichever machine it was on."""
        for left in (*self.work.glob(".fetch-*"), *self.work.glob(".upload-*")):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        mark = self.bucket.get(f"{self.prefix}/{FORCED}")
        theirs, names = mark.data.decode() if mark else None, self._sealed()
        if theirs != forced_over(self.work):  # what is here is of an older computation, or was ended elsewhere
            begin_anew(self.work, theirs)
        if instead_of is not None and forced_over(self.work) != instead_of:
            self.forget()
            self.bucket.put(f"{self.prefix}/{FORCED}", instead_of.encode())
            begin_anew(self.work, instead_of)
            return
        ours = next(whole(self.work / FOLDER), None) if names else None
        for name in names:
            if ours is not None and _step(name) <= _step(ours.name):
                return
            if self._download(name):
                log.info("%s came from %s: an attempt on another machine left it", name, self.bucket.uri)
                return
            log.warning("%s/%s/%s is not whole; it is not used", self.bucket.uri, self.prefix, name)

    @contextmanager
    def mirror_checkpoints(self) -> Iterator[None]:
        """Upload each new checkpoint, or the newest where they come faster, and the last one if the job is not done."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(LOOK):
                self._keep_newest()
            self._keep_newest()

        thread = threading.Thread(target=follow, name=f"checkpoints of {self.prefix}", daemon=True)
        thread.start()
        try:
            yield
            self._needless.set()
        finally:
            ended.set()
            thread.join()

    def forget(self) -> None:
        """Remove what the bucket has."""
        self.bucket.delete([one.key for one in self.bucket.listing(f"{self.prefix}/")])

    def _sealed(self) -> list[str]:
        """Return the names of the bucket's checkpoints that have a seal, the newest first."""
        parts = [one.key.removeprefix(f"{self.prefix}/").split("/") for one in self.bucket.listing(f"{self.prefix}/")]
        names = {part[1] for part in parts if len(part) == 3 and part[0] == FOLDER and part[2] == COMPLETE}
        return sorted((name for name in names if step_of(name) is not None), key=_step, reverse=True)

    def _keep_newest(self) -> None:
        newest = next(iter(sealed(self.work / FOLDER)), None)
        if newest is None or newest.name == self._done_with or self._needless.is_set():
            return
        try:
            self._upload(newest)
        except FileNotFoundError:  # the trainer was just removing it, for a newer one
            return
        except Network as failure:  # it may come back, and the next checkpoint may be hours away
            log.warning("%s is not in the bucket yet: %s", newest.name, failure)
            return
        except (Failure, OSError) as error:  # the training goes on; only another machine could not go on from here
            log.warning("%s is not kept in the bucket: %s", newest.name, error)
        self._done_with = newest.name

    def _upload(self, newest: Path) -> None:
        wanted, held = _with_needed(newest), self.work / f".upload-{uuid.uuid4().hex[:8]}"
        try:
            place = _hold(newest.parent, wanted, held)
            for name in wanted:
                sealed_files = (place / name / COMPLETE).read_bytes()
                seal = read_seal(sealed_files)
                if seal is None:
                    raise FileNotFoundError(place / name / COMPLETE)
                for file, sha256 in seal["files"].items():
                    if self._needless.is_set():  # the result must not wait for it
                        return
                    self.bucket.upload(place / name / file, self._key(name, file), sha256)
                self.bucket.put(self._key(name, COMPLETE), sealed_files)
        finally:
            shutil.rmtree(held, ignore_errors=True)
        keys = [one.key for one in self.bucket.listing(f"{self.prefix}/{FOLDER}/")]
        self.bucket.delete(
            [key for key in keys if key.removeprefix(f"{self.prefix}/{FOLDER}/").split("/")[0] not in wanted]
        )

    def _download(self, name: str) -> bool:
        """Get a checkpoint, and the one that it needs, if both are whole."""
        staged = self.work / f".fetch-{uuid.uuid4().hex[:8]}"
        try:
            if not self._get(name, staged / name):
                return False
            names = _with_needed(staged / name)
            if not all(self._get(one, staged / one) for one in names if one != name):
                return False
            (self.work / FOLDER).mkdir(exist_ok=True)
            now = time.time()
            for age, one in reversed(list(enumerate(reversed(names)))):  # the newest last: it is what is looked for
                shutil.rmtree(self.work / FOLDER / one, ignore_errors=True)
                (staged / one).rename(self.work / FOLDER / one)
                os.utime(self.work / FOLDER / one, (now - age, now - age))  # the trainer removes the oldest first
            return True
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _get(self, name: str, folder: Path) -> bool:
        found = self.bucket.get(self._key(name, COMPLETE))
        seal = read_seal(found.data) if found else None
        if found is None or seal is None:
            return False

        def get(file: str) -> None:
            place = folder / file
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as target:
                for block in self.bucket.blocks(self._key(name, file)):
                    target.write(block)

        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda file: patiently(lambda: get(file)), seal["files"]))
        except FileNotFoundError:
            return False
        write_atomic(folder / COMPLETE, found.data)
        return is_whole(folder)

    def _key(self, checkpoint: str, file: str) -> str:
        return f"{self.prefix}/{FOLDER}/{checkpoint}/{file}"


def _hold(folder: Path, names: list[str], held: Path) -> Path:
    """Give checkpoints' files a second name each, and return where: the trainer may remove them before they are up."""
    try:
        for name in names:
            for file in (COMPLETE, *(seal_of(folder / name) or {"files": ()})["files"]):
                (held / name / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / name / file, held / name / file)
    except FileNotFoundError:
        raise
    except OSError as error:  # a file system without hard links
        log.debug("%s is uploaded from where it is: %s", names[-1], error)
        return folder
    return held


def _with_needed(checkpoint: Path) -> list[str]:
    """Return a checkpoint's name and that of the one that a resume from it needs; the needed one comes first."""
    needs = (seal_of(checkpoint) or {}).get("needs")
    return [checkpoint.name] if needs in (None, checkpoint.name) else [needs, checkpoint.name]


def _step(name: str) -> int:
    step = step_of(name)
    assert step is not None
    return step
