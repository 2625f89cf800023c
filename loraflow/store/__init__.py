"""Where artifacts are stored. `Store` is the interface; `LocalStore` is a plain folder, `S3Store` a bucket.

Layout of a store:

    <stage>/<fingerprint>/<digest>/     an artifact: result files, `telemetry/`, and `manifest.json`, written last
    <stage>/<fingerprint>/current.json  the pointer to the current digest, with the manifests' hashes; replaced atomically
    work/<stage>/<fingerprint>/         files of an unfinished job: job.json, log, checkpoints
    set-aside/                          the quarantine: damaged artifacts, each with the reason
    staging/  locks/  runs/  registry/  artifacts being written, locks, records of runs, promotion logs
    anchors/                            the last entry of each promotion log, so that a loss is noticed

A bucket has the same layout, except that each machine has `work/` and `staging/` in its cache folder (`LORAFLOW_CACHE`),
beside copies of the artifacts that it read and of those that it has still to upload (`pending/`). The bucket's `work/`
has only the newest checkpoint, from which another machine can resume.

Modules, from the bottom up:

- values and files: `artifact` (ref, summary, manifest), `files` (hashes, atomic writes), `lock` (flock on one host)
- checkpoints in a work folder: `checkpoints`
- the interface and the local store: `base`, `local`
- requests to a bucket: `s3_client` (client, types, errors), `bucket` (objects, uploads of files), `lease` (locks
  between machines)
- artifacts in a bucket: `s3_artifacts` (keys, known hashes, read and check, copies on this machine),
  `s3_commit` (write, quarantine), `checkpoint_mirror` (the newest checkpoint)
- `s3` combines them into `S3Store`, and removes what interrupted work left
"""

import os
from functools import cache
from pathlib import Path

from loraflow.failures import BadConfig, from_os_error
from loraflow.store.artifact import Manifest, Ref, Summary
from loraflow.store.base import (
    Store,
    hash_memo,
    read_intact,
    read_table,
    require_intact,
    require_intact_in_store,
    require_unchanged,
)
from loraflow.store.local import LocalStore

__all__ = [
    "LocalStore",
    "Manifest",
    "Ref",
    "Store",
    "Summary",
    "hash_memo",
    "open_store",
    "read_intact",
    "read_table",
    "require_intact",
    "require_intact_in_store",
    "require_unchanged",
]


def open_store(uri: str) -> Store:
    """Open the store at a folder, or at `s3://bucket/prefix`.

    Raises:
        BadConfig: the uri has an unknown scheme, or the settings of the bucket are wrong.
    """
    if uri.startswith("s3://"):
        names = [name for name in os.environ if name.startswith("AWS_") or name in _FOLDERS]
        return _open_bucket(uri, tuple((name, os.environ[name]) for name in sorted(names)))
    if "://" in uri and not uri.startswith("file://"):
        raise BadConfig(
            "This kind of store is not supported.",
            where="runtime.store",
            expected="a folder, or s3://bucket/prefix",
            got=uri,
            next_step="set runtime.store to a folder, for example .loraflow/store",
        )
    opened = LocalStore(uri.removeprefix("file://"))
    _refuse_file_in_path(opened.root)
    return opened


def _refuse_file_in_path(folder: Path) -> None:
    """Refuse a store at or below a file, or a link to a disk that is not there: every lookup would be a miss."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        os.stat(f"{existing}/.")  # noqa: PTH116
    except FileNotFoundError as error:
        raise BadConfig(
            "The store is a link to a folder that does not exist.",
            where=str(existing),
            next_step="mount its disk, or correct the link",
        ) from error
    except OSError as error:
        error.filename = str(existing)
        raise from_os_error(error, str(folder)) or error from error


_FOLDERS = ("LORAFLOW_CACHE", "XDG_CACHE_HOME", "HOME")  # environment: where the cache of a bucket is


@cache
def _open_bucket(uri: str, settings: tuple[tuple[str, str], ...]) -> Store:
    """Open a bucket once in a process for the same settings: making a client takes longer than most of its requests."""
    from loraflow.store.s3 import S3Store

    return S3Store(uri)
