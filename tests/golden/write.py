"""Write down the code digests of all stages, after the decision whether their versions go up.

python tests/golden/write.py
"""

import json
from pathlib import Path

from loraflow.stages import STAGES, code_digest

if __name__ == "__main__":
    found = {name: [stage.version, code_digest(name)] for name, stage in STAGES.items()}
    Path(__file__).with_name("code.json").write_text(json.dumps(found, indent=1) + "\n")
