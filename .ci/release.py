"""Build the wheel and the sdist of the version in pyproject.toml from the last commit, and check them.

Usage: `python .ci/release.py [OUT]` (default: dist). Only committed files are built, in a folder of their own, so neither
untracked files nor an earlier build can get into a release. The wheel is built from the sdist. Fails with one sentence
if the versions in pyproject.toml, loraflow/__init__.py and CHANGELOG.md differ, if tracked files have uncommitted changes,
if a module of the repository is missing in the wheel or the sdist, or if twine refuses the metadata.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = {"loraflow/": "loraflow/", "flows/": "loraflow/flows/", "tasks/": "loraflow/tasks/"}  # folder → its place


def versions(root: Path) -> dict[str, str]:
    """Return the version that each file names."""
    init, changelog = (root / "loraflow" / "__init__.py").read_text(), (root / "CHANGELOG.md").read_text()
    in_code = re.search(r'^__version__ = "(.+)"', init, re.MULTILINE)
    heading = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    return {
        "pyproject.toml": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "loraflow/__init__.py": in_code[1] if in_code else "none",
        "CHANGELOG.md": heading[1] if heading else "none",
    }


def git(*arguments: str) -> str:
    """Run git in the repository; return its output."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def expected(tracked: list[str]) -> set[str]:
    """Return the files that wheel and sdist must have, by their names in the package."""
    links = {"loraflow/flows", "loraflow/tasks"}
    return {
        place + name.removeprefix(folder)
        for name in tracked
        for folder, place in PACKAGE.items()
        if name.startswith(folder) and name not in links
    }


def names(built: Path) -> set[str]:
    """Return the names of the files in a wheel, or in an sdist without its first folder."""
    if built.suffix == ".whl":
        return set(zipfile.ZipFile(built).namelist())
    with tarfile.open(built) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def build(out: Path) -> list[Path]:
    """Build both from the last commit into a new folder `out`; the same commit gives the same wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, "dist")
        git("archive", "--output", f"{scratch}/tree.tar", "HEAD")
        with tarfile.open(f"{scratch}/tree.tar") as archive:
            archive.extractall(tree, filter="data")
        env = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(tree)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the build failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return sorted(out.iterdir())


def main() -> None:
    """Check, build, check what was built, and print the hashes."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").absolute()
    found = versions(ROOT)
    if len(set(found.values())) != 1:
        sys.exit("the versions differ: " + ", ".join(f"{version} in {name}" for name, version in found.items()))
    if changed := git("status", "--porcelain", "--untracked-files=no").strip():
        sys.exit(f"a release is built from the last commit, and these files have other changes:\n{changed}")
    built = build(out)
    expected_files = expected(git("ls-files", *PACKAGE).splitlines())
    for file in built:
        if missing := expected_files - names(file):
            sys.exit(f"{file.name} lacks {len(missing)} files of the repository, for example {min(missing)}")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], check=True)
    for file in built:
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}  {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
