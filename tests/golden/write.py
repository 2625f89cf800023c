"""Write down the code digests of all stages, after the decision whether their versions go up, and the run form.

python tests/golden/write.py
"""

import json
import os
import tempfile
from pathlib import Path

from loraflow.stages import STAGES, code_digest


def form() -> dict:
    """Return the schema of finetune's parameters, in a folder with two recipes."""
    from prefect.utilities.callables import parameter_schema

    from loraflow.flows.finetune import finetune

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("configs").mkdir()
        for name in ("one", "two"):
            Path("configs", f"{name}.yaml").touch()
        return parameter_schema(finetune).model_dump()


if __name__ == "__main__":
    here = Path(__file__).absolute().parent
    found = {name: [stage.version, code_digest(name)] for name, stage in STAGES.items()}
    (here / "code.json").write_text(json.dumps(found, indent=1) + "\n")
    (here / "form.json").write_text(json.dumps(form(), indent=1) + "\n")
