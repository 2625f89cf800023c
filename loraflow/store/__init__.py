"""Where artifacts live. `Store` is what the rest of loraflow knows; `LocalStore` is a plain folder.

Layout of a store:

    <stage>/<fingerprint>/<digest>/     an artifact: result files, `telemetry/`, and `manifest.json`, written last
    <stage>/<fingerprint>/current.json  the pointer that says which digest is current; replaced atomically
    work/<stage>/<fingerprint>/         what an unfinished job keeps: job.json, log, checkpoints
    set-aside/                          what turned out to be corrupt
    staging/  locks/  runs/  registry/  the rest
"""

from loraflow.store.base import Manifest, Ref, Store, Summary
from loraflow.store.local import LocalStore

__all__ = ["LocalStore", "Manifest", "Ref", "Store", "Summary", "open_store"]


def open_store(uri: str) -> Store:
    """Open the store at a folder.

    Raises:
        BadConfig: the uri names a kind of store that this version does not have.
    """
    if "://" in uri and not uri.startswith("file://"):
        from loraflow.failures import BadConfig

        raise BadConfig(
            "This version keeps artifacts in a local folder only.",
            where="runtime.store",
            expected="a folder",
            got=uri,
            next_step="set runtime.store to a folder, for example .loraflow/store",
        )
    return LocalStore(uri.removeprefix("file://"))
