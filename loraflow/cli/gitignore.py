"""The lines of a project's `.gitignore` and `.dvcignore`: the store, and what DVC writes only inside of a git repository."""

from __future__ import annotations

from pathlib import Path

STORE = "/.loraflow/"
FOR_DVCIGNORE = (STORE,)  # DVC would walk through the store at each `dvc status`
OF_DVC = ("/.dvc/cache", "/.dvc/tmp", "/.dvc/config.local")


def extend_gitignore(target: Path) -> None:
    """Add the store and the dataset to .gitignore: DVC does so only inside of a git repository, which may come later."""
    outside_git = () if Path(".git").exists() else (f"/{target.as_posix()}",)
    _extend(Path(".gitignore"), (*gitignore_lines(), *outside_git))


def extend_dvcignore() -> None:
    """Add the store to .dvcignore, where the DVC repository is."""
    if Path(".dvc").is_dir():
        _extend(Path(".dvcignore"), FOR_DVCIGNORE)


def gitignore_lines() -> tuple[str, ...]:
    """Return the lines that the .gitignore of this folder needs. `dvc init` writes those of DVC inside of a repository."""
    own = Path(".dvc", ".gitignore")
    if not Path(".dvc").is_dir() or (own.is_file() and "/cache" in own.read_text(encoding="utf-8").split()):
        return (STORE,)
    return (STORE, *OF_DVC)


def _extend(file: Path, lines: tuple[str, ...]) -> None:
    text = file.read_bytes().decode() if file.exists() else ""  # keeps the file's line endings
    new = with_lines(text, lines)
    if new != text:
        file.write_bytes(new.encode())


def with_lines(text: str, needed: tuple[str, ...]) -> str:
    """Return the text with the lines that it lacks at its end. A line with other slashes at its ends counts as there."""
    have = {line.strip().strip("/") for line in text.splitlines()}
    missing = [line for line in needed if line.strip("/") not in have]
    newline = "\r\n" if "\r\n" in text else "\n"
    if missing and text and not text.endswith("\n"):
        text += newline
    return text + "".join(f"{line}{newline}" for line in missing)
