"""Build the documents as a site with zensical, into build/site. A broken link is an error.

python docs/site/build.py          zensical is the extra `docs`, which `make docs` installs

The pages of docs/ are copied, and the reference is made from code. Links to files of
the repository that are not pages become their names, because the site has no copy of them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
STAGED = ROOT / "build" / "docs"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def reference() -> ModuleType:
    """Return the module that makes pages from code."""
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).parent / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage(target: Path) -> None:
    """Copy the pages to a new folder and write those that are made from code."""
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(DOCS.rglob("*")):
        inside = file.relative_to(DOCS)
        if inside.parts[0] == "site" or file.name == "text.md" or file.suffix not in {".md", ".png", ".svg", ".cast"}:
            continue
        _put(file, target / inside)
    _put(ROOT / "CHANGELOG.md", target / "changelog.md")
    for name, text in reference().pages().items():
        (target / "reference").mkdir(exist_ok=True)
        (target / "reference" / name).write_text(text, encoding="utf-8")
    for page in target.rglob("*.md"):
        page.write_text(_inside(page, target), encoding="utf-8")


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _inside(page: Path, root: Path) -> str:
    """Return a page's text, where links to what the site does not have are plain text."""

    def replace(found: re.Match[str]) -> str:
        target = found["target"]
        if "://" in target or target.startswith("mailto:") or (page.parent / target).is_file():
            return found[0]
        at_root = target.removeprefix("docs/")  # CHANGELOG.md links from the repository's top
        if page.parent == root and target != at_root and (root / at_root).is_file():
            return f"[{found['text']}]({at_root}{found['anchor'] or ''})"
        if (DOCS / page.relative_to(root).parent / target).exists() or (ROOT / target).exists():
            return found["text"]
        return found[0]  # a mistake, which the build reports

    return LINK.sub(replace, page.read_text(encoding="utf-8"))


def main() -> None:
    """Stage the pages and build the site.

    Raises:
        SystemExit: zensical is not installed, or a link is broken.
    """
    zensical = shutil.which("zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if zensical is None:
        sys.exit("zensical is not installed, so no site was built; `make docs` installs it (the extra `docs`)")
    stage(STAGED)
    sys.exit(subprocess.run([zensical, "build", "--strict", "--clean", "-f", str(ROOT / "zensical.toml")]).returncode)


if __name__ == "__main__":
    main()
