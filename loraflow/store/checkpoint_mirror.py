"""Mirror an unfinished job's newest checkpoint in the bucket, so that an attempt on another machine resumes from it.

A checkpoint in the bucket is valid once its manifest is there, which is written last; downloads are hashed against it.
"""

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
from loraflow.store.bucket import CONCURRENCY, Bucket, retry_network, upload_file
from loraflow.store.checkpoints import (
    COMPLETE,
    FOLDER,
    RECOMPUTE_MARK,
    finalized_checkpoints,
    intact_checkpoints,
    is_intact,
    needed_names,
    parse_checkpoint_manifest,
    read_checkpoint_manifest,
    recompute_digest,
    required_step,
    reset_work_folder,
    step_of,
)
from loraflow.store.files import write_atomic

log = logging.getLogger(__name__)
POLL_SECONDS = 2.0  # between two looks for a new checkpoint


class CheckpointMirror:
    """The checkpoints of one job: `work` is its folder on this machine, `prefix` the place in the bucket."""

    def __init__(self, bucket: Bucket, prefix: str, work: Path):
        self.bucket, self.prefix, self.work = bucket, prefix, work
        self._last_handled: str | None = None  # the newest checkpoint that was uploaded, or cannot be
        self._is_job_done = threading.Event()  # the job has its result: no other attempt will resume

    def fetch(self, recompute_of: str | None) -> None:
        """Download the newest checkpoint of earlier attempts, if it is newer than the local ones.

        With `recompute_of`, the digest of the artifact to recompute, checkpoints of other computations are removed.
        """
        for folder in (*self.work.glob(".fetch-*"), *self.work.glob(".upload-*")):  # of an attempt that was killed
            shutil.rmtree(folder, ignore_errors=True)
        mark = self.bucket.get(f"{self.prefix}/{RECOMPUTE_MARK}")
        digest_in_bucket, names = mark.data.decode(errors="replace") if mark else None, self._finalized_names()
        if digest_in_bucket != recompute_digest(self.work):
            # The local files belong to an older computation, or another machine finished this one.
            reset_work_folder(self.work, digest_in_bucket)
        if recompute_of is not None and recompute_digest(self.work) != recompute_of:
            self.remove()
            self.bucket.put(f"{self.prefix}/{RECOMPUTE_MARK}", recompute_of.encode())
            reset_work_folder(self.work, recompute_of)
            return
        local = next(intact_checkpoints(self.work / FOLDER), None) if names else None
        for name in names:
            if local is not None and required_step(name) <= required_step(local.name):
                return
            if self._download(name):
                log.info("%s was downloaded from %s: an attempt on another machine saved it", name, self.bucket.uri)
                return
            log.warning("%s/%s/%s is incomplete and not used", self.bucket.uri, self.prefix, name)

    @contextmanager
    def mirror_checkpoints(self) -> Iterator[None]:
        """Upload new checkpoints while the block runs.

        If they are saved faster than they are uploaded, only the newest is. The last one is uploaded if the job fails.
        """
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(POLL_SECONDS):
                self._mirror_newest()
            self._mirror_newest()

        thread = threading.Thread(target=follow, name=f"checkpoints of {self.prefix}", daemon=True)
        thread.start()
        try:
            yield
            self._is_job_done.set()
        finally:
            ended.set()
            thread.join()

    def remove(self) -> None:
        """Remove the job's checkpoints from the bucket."""
        self.bucket.delete([item.key for item in self.bucket.listing(f"{self.prefix}/")])

    def _finalized_names(self) -> list[str]:
        """Return the names of the bucket's checkpoints that have a manifest, newest first."""
        prefix = f"{self.prefix}/"
        paths = [item.key.removeprefix(prefix).split("/") for item in self.bucket.listing(prefix)]
        names = {path[1] for path in paths if len(path) == 3 and path[0] == FOLDER and path[2] == COMPLETE}
        return sorted((name for name in names if step_of(name) is not None), key=required_step, reverse=True)

    def _mirror_newest(self) -> None:
        newest = next(iter(finalized_checkpoints(self.work / FOLDER)), None)
        if newest is None or newest.name == self._last_handled or self._is_job_done.is_set():
            return
        try:
            self._upload(newest)
        except FileNotFoundError:  # the trainer is removing it, because there is a newer one
            return
        except Network as failure:  # the network may come back, and the next checkpoint may be hours away
            log.warning("%s is not in the bucket yet: %s", newest.name, failure)
            return
        except (Failure, OSError) as error:  # the training continues; only other machines cannot resume from it
            log.warning("%s is not uploaded to the bucket: %s", newest.name, error)
        self._last_handled = newest.name

    def _upload(self, newest: Path) -> None:
        names, links = needed_names(newest), self.work / f".upload-{uuid.uuid4().hex[:8]}"
        try:
            folder = _hard_link(newest.parent, names, links)
            for name in names:
                content = (folder / name / COMPLETE).read_bytes()
                manifest = parse_checkpoint_manifest(content)
                if manifest is None:
                    raise FileNotFoundError(folder / name / COMPLETE)
                for file, sha256 in manifest["files"].items():
                    if self._is_job_done.is_set():  # the result must not wait for this upload
                        return
                    upload_file(self.bucket, folder / name / file, self._key(name, file), sha256)
                self.bucket.put(self._key(name, COMPLETE), content)
        finally:
            shutil.rmtree(links, ignore_errors=True)
        prefix = f"{self.prefix}/{FOLDER}/"
        keys = [item.key for item in self.bucket.listing(prefix)]
        self.bucket.delete([key for key in keys if key.removeprefix(prefix).split("/")[0] not in names])

    def _download(self, name: str) -> bool:
        """Download a checkpoint and the one that it needs; return whether both are intact."""
        staged = self.work / f".fetch-{uuid.uuid4().hex[:8]}"
        try:
            if not self._download_files(name, staged / name):
                return False
            names = needed_names(staged / name)
            if not all(self._download_files(needed, staged / needed) for needed in names if needed != name):
                return False
            (self.work / FOLDER).mkdir(exist_ok=True)
            now = time.time()
            for number, moved in enumerate(names):  # the newest last: a reader looks for the newest
                target = self.work / FOLDER / moved
                shutil.rmtree(target, ignore_errors=True)
                (staged / moved).rename(target)
                age = len(names) - 1 - number
                os.utime(target, (now - age, now - age))  # the trainer removes the oldest first
            return True
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _download_files(self, name: str, folder: Path) -> bool:
        found = self.bucket.get(self._key(name, COMPLETE))
        manifest = parse_checkpoint_manifest(found.data) if found else None
        if found is None or manifest is None:
            return False

        def download(file: str) -> None:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as opened:
                for block in self.bucket.blocks(self._key(name, file)):
                    opened.write(block)

        try:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(lambda file: retry_network(lambda: download(file)), manifest["files"]))
        except FileNotFoundError:
            return False
        write_atomic(folder / COMPLETE, found.data)
        return is_intact(folder)

    def _key(self, checkpoint: str, file: str) -> str:
        return f"{self.prefix}/{FOLDER}/{checkpoint}/{file}"


def _hard_link(folder: Path, names: list[str], links: Path) -> Path:
    """Link checkpoints' files below `links`, since the trainer may remove them before they are uploaded.

    Return the folder to upload from: `folder` itself on a file system without hard links.
    """
    try:
        for name in names:
            manifest = read_checkpoint_manifest(folder / name)
            for file in (COMPLETE, *(manifest["files"] if manifest else ())):
                (links / name / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / name / file, links / name / file)
    except FileNotFoundError:
        raise
    except OSError as error:
        log.debug("%s is uploaded without hard links: %s", names[-1], error)
        return folder
    return links
