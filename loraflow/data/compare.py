"""Read the row ids of one version of a dataset, so that `loraflow data diff` can compare two versions."""

from __future__ import annotations

import tempfile
from pathlib import Path

from loraflow.config.recipe import Data
from loraflow.config.stage_configs import DvcOrigin
from loraflow.data import dvc
from loraflow.data.readers import match_files, read_rows
from loraflow.data.split import row_id
from loraflow.data.version import locate
from loraflow.failures import BadData
from loraflow.store.files import HashMemo


def row_ids(data: Data) -> dict[str, set[str]]:
    """Return {file: ids of its valid rows} of the version of a dataset that the settings name.

    Raises:
        BadData: the dataset has no `.dvc` file, or cannot be read.
    """
    memo = HashMemo(None)
    location = locate(data, memo)
    origin = location.origin
    if not isinstance(origin, DvcOrigin):
        raise BadData(
            "Only datasets with a .dvc file have versions to compare.", where=data.source, expected="a .dvc file"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        pin = dvc.Pin(origin.dvc_file, origin.path, location.md5)
        dvc.fetch(origin.repo, pin, origin.commit or origin.rev, target, memo)
        return {
            name: {row_id(row.messages) for row in read_rows(target, [name], data.format, data.columns) if row.messages}
            for name in match_files(target, ["*"])
        }
