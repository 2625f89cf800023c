"""Parts of the GPU training benchmarks: cases, model and rows, ways to run them, gradient check, profile, report."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for the helpers in tests/
