"""Each stage on a disk that is really full: `unshare -Urm python benchmarks/full_disk.py [--stage NAME]`.

The store is on a file system of its own (tmpfs), which a file fills up to a few bytes before a stage starts: to nothing, to
half of what the stage's result takes, and to nearly all of it. The run must end with one sentence that says where and how
much; after the file is removed, the next run must complete with the digests of a quiet run. The model is that of
random_kills.py.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import random_kills
from measure import print_row
from random_kills import Chaos, run_in_fork

from loraflow.store import Ref
from loraflow.store.files import folder_size

DISK = 48 << 20  # bytes
SHARES = (0.0, 0.5, 0.95)  # of a stage's result, that are free


def fill(folder: Path, free: int) -> Path:
    """Write a file that leaves so many bytes free, and return it."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(folder).free - free, 1))
    return ballast


def attempt(chaos: Chaos) -> tuple[int, str]:
    """Run the pipeline; return its exit status and what it printed."""
    output = chaos.folder / "log.txt"
    with output.open("wb") as file:
        code = run_in_fork(chaos.recipe, file).wait()
    return code, output.read_text(errors="replace")


def judge(chaos: Chaos, before: list[Ref], own: Ref, kept: Path, share: float) -> tuple[str, list[str]]:
    """Run with a disk that is full when a stage starts, and again with space. Return the sentence, and what is wrong.

    Args:
        chaos: the project.
        before: artifacts of earlier stages, which are in the store.
        own: what the stage writes.
        kept: a copy of the quiet run's store.
        share: of the stage's result that is free.
    """
    store, problems = chaos.store, []
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(store.root)], check=True)
    try:
        for ref in before:
            shutil.copytree(kept / ref.stage / ref.fingerprint, store.root / ref.stage / ref.fingerprint)
        (store.root / "locks").mkdir()
        size = folder_size(kept / own.stage / own.fingerprint)
        ballast = fill(store.root, int(share * size))
        code, text = attempt(chaos)
        lines = [
            line
            for line in text.splitlines()
            if "DiskFull" in line or line.lstrip().startswith(("where", "got", "exp"))
        ]
        if code == 0 or not any("DiskFull" in line for line in lines) or "Traceback" in text:
            problems.append(f"ended with {code}: {text[-1500:]}")
        where = next((line.split("where:")[1].strip() for line in lines if "where:" in line), "nothing")
        if not where.startswith(str(store.root)) or not any("got:" in line for line in lines):
            problems.append(f"names {where}, or not how much is free: {text[-600:]}")
        problems += [f"committed: {ref}" for ref in store.artifacts() if ref.stage == own.stage and ref not in before
                     and ref.fingerprint == own.fingerprint]  # fmt: skip
        problems += [f"{ref}: {found}" for ref in store.artifacts() if (found := store.verify(ref))]
        ballast.unlink()
        code, again = attempt(chaos)
        if code != 0:
            problems.append(f"with space, the run ended with {code}: {again[-1500:]}")
        found = {(ref.stage, ref.fingerprint): ref.digest for ref in store.artifacts()}
        if found != chaos.quiet:
            problems.append(f"other digests: {sorted(set(found.items()) ^ set(chaos.quiet.items()))}")
        return "; ".join(line.strip() for line in lines), problems
    finally:
        subprocess.run(["umount", "-l", str(store.root)], check=True)


def main() -> int:
    """Fill the disk before each stage, print a line for each, and return 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", action="append", help="only this one; repeat for several")
    stages = parser.parse_args().stage
    random_kills.STEPS_IN_TRAINING = 12
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), random.Random(0))
        chaos.run_quietly()
        kept = chaos.folder / "kept"
        chaos.store.root.rename(kept)
        chaos.store.root.mkdir()
        refs = sorted(
            (Ref(stage=stage, fingerprint=fingerprint, digest=digest, uri=chaos.store.uri)
             for (stage, fingerprint), digest in chaos.quiet.items()),
            key=lambda ref: (kept / ref.stage / ref.fingerprint).stat().st_mtime,  # in the order of the commits
        )  # fmt: skip
        for number, own in enumerate(refs):
            for share in SHARES if not stages or own.stage in stages else ():
                sentence, problems = judge(chaos, refs[:number], own, kept, share)
                wrong += len(problems)
                print_row(own.stage, f"{share:.0%} free", sentence, f"{len(problems)} problems")
                print(*(f"  ! {problem}" for problem in problems), sep="\n", end="\n" if problems else "", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
