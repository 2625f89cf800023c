"""The file `job.json`, through which the launcher gives a worker process its job.

Two folders belong to a job. Both are in the store's scratch folder, on this machine:

- the work folder outlives an attempt. It holds `job.json`, the log, progress, outcome and checkpoints.
- the staging folder is new for each attempt. The stage writes the artifact's files into it, and the launcher commits them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraflow.config.stage_configs import StageConfig
from loraflow.job import Inputs, Job
from loraflow.stages import STAGES, Stage
from loraflow.store.checksum import add_checksum, check_document
from loraflow.store.files import json_bytes, write_atomic


@dataclass(frozen=True)
class JobFile:
    """A job as a worker process sees it.

    Attributes:
        job: the job, its config validated by the stage's class.
        out: the staging folder.
        input_folders: the input artifacts, by input name.
        work: the work folder, which the file itself is in.
    """

    job: Job[StageConfig]
    out: Path
    input_folders: Mapping[str, Path]
    work: Path

    @property
    def stage(self) -> Stage:
        """The job's stage."""
        return STAGES[self.job.stage]

    @property
    def inputs(self) -> Inputs:
        """The input artifacts' folders."""
        return Inputs(self.input_folders)

    @property
    def nodes(self) -> int:
        """How many machines share the job."""
        return self.job.runtime.rendezvous.nodes if self.stage.several_nodes else 1

    def write(self) -> Path:
        """Write the file and return its path."""
        path = self.work / "job.json"
        values = {
            **self.job.model_dump(mode="json"),
            "fingerprint": self.job.fingerprint,
            "out": str(self.out),
            "input_folders": {name: str(folder) for name, folder in self.input_folders.items()},
        }
        write_atomic(path, add_checksum(_name(path), json_bytes(values)))
        return path

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Read a file that `write` wrote.

        Raises:
            ValueError: it was changed, or is the file of another job.
        """
        values = json.loads(check_document(_name(path), path.read_bytes()))
        return cls(
            Job[StageConfig].model_validate({key: values[key] for key in Job.model_fields if key in values}),
            Path(values["out"]),
            {name: Path(folder) for name, folder in values["input_folders"].items()},
            path.parent,
        )


def _name(path: Path) -> str:
    """Return the name that the checksum covers: the work folder is named by the job's fingerprint."""
    return f"{path.parent.name}/{path.name}"
