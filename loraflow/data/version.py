"""Stage version_dataset: the pinned files, verified, as an artifact. Identity is their md5; the revision is provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraflow.config.recipe import Data
from loraflow.data import dvc
from loraflow.failures import BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.files import HashMemo


def locate(data: Data, memo: HashMemo) -> dict[str, Any]:
    """Return what the outside world says of a dataset: its md5, and where it comes from.

    Raises:
        DirtyData: files in the work tree differ from the pin.
        BadData: there is no dataset.
    """
    if data.source.endswith(".dvc"):
        pin = dvc.read_pin(data.repo, data.source, data.rev)
        if data.rev is None and not dvc.is_url(data.repo):
            dvc.refuse_dirt(data.repo, pin, memo)
        commit = dvc.head_of(data.repo, data.rev) if data.rev else None
        name = Path(pin.path).name
        return {
            "md5": pin.md5,
            "name": name,
            "origin": {**pin.__dict__, "repo": data.repo, "rev": data.rev, "commit": commit, "remote": data.remote},
        }
    place = Path(data.source)
    if not place.exists():
        raise BadData(
            "There is no such dataset.",
            where=data.source,
            expected="a .dvc file, or a folder or file of chats",
            next_step="mend data.source",
        )
    return {"md5": dvc.tree_md5(place, memo), "name": place.name, "origin": {"folder": str(place.absolute())}}


def run(job: Job, inputs: Inputs, out: Path, report: Progress) -> Summary:
    """Write the pinned files to `out/files/`."""
    origin, md5 = job.runtime["origin"], job.config["md5"]
    files = out / "files"
    files.mkdir()
    memo = HashMemo(None)
    if "folder" in origin:
        place = Path(origin["folder"])
        pin = dvc.Pin("", place.name, md5)
        dvc.fetch(str(place.parent), pin, None, files, memo)
    else:
        pin = dvc.Pin(origin["dvc_file"], origin["path"], md5)
        dvc.fetch(origin["repo"], pin, origin["commit"] or origin["rev"], files, memo, origin.get("remote"))
    names = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    size = sum((files / name).stat().st_size for name in names)
    return Summary(figures={"md5": md5, "files": len(names), "bytes": size})
