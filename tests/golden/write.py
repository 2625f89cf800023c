"""Record the code digests of all stages, after the decision whether their versions go up, and the run form.

python tests/golden/write.py
"""

import json
import os
import tempfile
from pathlib import Path

from loraflow.execution.code_digest import PREFIX, parsed_digest, recorded
from loraflow.stage_code import source_hash
from loraflow.stages import STAGES

REPOSITORY = Path(__file__).absolute().parent.parent.parent


def code_digests() -> dict:
    """Return the record of all stages' code.

    A stage whose version did not go up gives the same results as before, by the decision that running this script is:
    its digest of before joins the equivalent ones.
    """
    found = {}
    for name, stage in STAGES.items():
        digest, before = parsed_digest(stage.code), recorded().get(name)
        equivalent = []
        if before is not None and before.version == stage.version:
            olds = dict.fromkeys([*before.equivalent, before.digest[:PREFIX]])
            equivalent = [old for old in olds if not digest.startswith(old)]
        record = {"version": stage.version, "digest": digest, "sources": source_hash(stage.code)[:PREFIX]}
        found[name] = {**record, "equivalent": equivalent}
    return found


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
    (REPOSITORY / "loraflow" / "code_digests.json").write_text(json.dumps(code_digests(), indent=1) + "\n")
    (here / "form.json").write_text(json.dumps(form(), indent=1) + "\n")
