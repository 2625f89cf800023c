"""Fuzz the readers for some time: `make fuzz`, or `python -m tests.fuzz --minutes 5 --reader parquet`.

A file on which a reader does anything but return or raise a Failure is saved to `build/fuzz/`. Put it into
`tests/fuzz/corpus/<reader>/` with the correction: the tests read every file there first.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import sys
import time
import traceback
from pathlib import Path

from tests.fuzz.fuzz import allowance, corpus, finding
from tests.fuzz.mutate import mutated
from tests.fuzz.readers import READERS


def main() -> int:
    """Fuzz, print a line for each reader, and return 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    logging.disable()
    names = options.reader or list(READERS)
    found, saved = 0, Path("build", "fuzz")
    with allowance():
        for name in names:
            chance, files = random.Random(f"{options.seed} {name}"), corpus(name)
            end, runs, seen = time.monotonic() + options.minutes * 60 / len(names), 0, set[str]()
            while time.monotonic() < end:
                data = mutated(files, chance)
                runs += 1
                error = finding(name, data)
                if error is None:
                    continue
                trace = traceback.extract_tb(error.__traceback__)  # empty if the reader was only too slow
                place = f" at {Path(trace[-1].filename).name}:{trace[-1].lineno}" if trace else ""
                kind = type(error).__name__ + place
                if kind not in seen:
                    seen.add(kind)
                    file = saved / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                    saved.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
                    print(f"{name}: {kind}: {str(error)[:120]!a}, saved as {file}", flush=True)
            found += len(seen)
            print(f"{name}: {runs} files, {len(seen)} findings (seed {options.seed})", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
