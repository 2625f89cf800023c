"""Where artifacts live. `Store` is what the rest of loraflow knows; `LocalStore` is a plain folder, `S3Store` a bucket.

Layout of a store:

    <stage>/<fingerprint>/<digest>/     an artifact: result files, `telemetry/`, and `manifest.json`, written last
    <stage>/<fingerprint>/current.json  the pointer that says which digest is current; replaced atomically
    work/<stage>/<fingerprint>/         what an unfinished job keeps: job.json, log, checkpoints
    set-aside/                          what turned out to be corrupt
    staging/  locks/  runs/  registry/  the rest

A bucket has the same layout, but for `work/` and `staging/`, which each machine keeps in its cache folder
(`LORAFLOW_CACHE`), beside the artifacts that it downloaded and what it has still to upload (`pending/`). Of `work/` the
bucket has the newest checkpoint, from which another machine goes on.
"""

import os
from functools import cache

from loraflow.store.base import Manifest, Ref, Store, Summary, require_intact
from loraflow.store.local import LocalStore

__all__ = ["LocalStore", "Manifest", "Ref", "Store", "Summary", "open_store", "require_intact"]


def open_store(uri: str) -> Store:
    """Open the store at a folder, or at `s3://bucket/prefix`.

    Raises:
        BadConfig: the uri names a kind of store that there is not, or the bucket cannot be reached as it is set up.
    """
    if uri.startswith("s3://"):
        return _open_bucket(uri, tuple(sorted(item for item in os.environ.items() if _concerns_buckets(item[0]))))
    if "://" in uri and not uri.startswith("file://"):
        from loraflow.failures import BadConfig

        raise BadConfig(
            "There is no such kind of store.",
            where="runtime.store",
            expected="a folder, or s3://bucket/prefix",
            got=uri,
            next_step="set runtime.store to a folder, for example .loraflow/store",
        )
    return LocalStore(uri.removeprefix("file://"))


def _concerns_buckets(variable: str) -> bool:
    return variable.startswith("AWS_") or variable in ("LORAFLOW_CACHE", "XDG_CACHE_HOME", "HOME")


@cache
def _open_bucket(uri: str, settings: tuple[tuple[str, str], ...]) -> Store:
    """Open a bucket once in a process, for each of its settings: a client takes longer to make than most of its calls."""
    from loraflow.store.s3 import S3Store

    return S3Store(uri)
