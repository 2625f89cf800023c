"""The lines of a project's `.gitignore`: the store, and what DVC ignores by itself only inside of a git repository."""

from __future__ import annotations

from pathlib import Path

STORE = "/.loraflow/"
OF_DVC = ("/.dvc/cache", "/.dvc/tmp", "/.dvc/config.local")


def extend_gitignore(target: Path) -> None:
    """Add the store and the dataset to .gitignore: DVC does so only inside of a git repository, which may come later."""
    file = Path(".gitignore")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    inside_git = Path(".git").exists()
    new = with_lines(text, (STORE,) if inside_git else (STORE, *OF_DVC, f"/{target.as_posix()}"))
    if new != text:
        file.write_text(new, encoding="utf-8")


def with_lines(text: str, wanted: tuple[str, ...]) -> str:
    """Return the text with the lines that it lacks at its end. A line with other slashes at its ends counts as there."""
    have = {line.strip().strip("/") for line in text.splitlines()}
    missing = [line for line in wanted if line.strip("/") not in have]
    newline = "\r\n" if "\r\n" in text else "\n"
    if missing and text and not text.endswith("\n"):
        text += newline
    return text + "".join(f"{line}{newline}" for line in missing)
