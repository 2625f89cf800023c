"""The former name of `loraflow.execution.worker`, which scripts and manifests of running nodes may still call."""

from __future__ import annotations

import sys

from loraflow.execution.worker import main

if __name__ == "__main__":
    print("loraflow.worker is now loraflow.execution.worker", file=sys.stderr)
    sys.exit(main(sys.argv[1:]))
