"""The short README.md of a new project: what each file is for, and the everyday commands."""

from __future__ import annotations

from pathlib import Path

README = "README.md"
TEXT = """\
# {title}

A model that is fine-tuned with loraflow on the chats in `{data}`.

```
{commands}
```

| file | content | in git |
|---|---|---|
| `{recipe}` | all settings, with a reason on every line | yes |
| `{data}.dvc` | the version of the data: its hash | yes |
| `{data}/` | the data itself; DVC keeps and fetches its versions (`dvc remote add -d NAME URL` once, for a team) | no |
| `prefect.yaml` | deployments and schedules for Prefect's UI | yes |
| `.loraflow/` | the store: models, scores, the promotion log | no |
"""
COMMANDS = {
    "loraflow plan {recipe}": "what a run computes, and why",
    "loraflow run {recipe}": "check the data, train, score, promote the model if it is better",
    "loraflow chat champion": "talk to the model in use",
    "loraflow data add {data}": "after you changed the data: pin the new version",
    "loraflow up": "a server with a form for runs, and a nightly schedule that you can switch on",
}


def write_readme(folder: Path, recipe: Path, data: Path) -> Path | None:
    """Write README.md into a project's folder and return its path; None if there is one already."""
    file = folder / README
    if any(path.name.lower().startswith("readme") for path in folder.iterdir()):
        return None
    names = {"recipe": recipe.as_posix(), "data": data.as_posix()}
    lines = [(command.format(**names), meaning) for command, meaning in COMMANDS.items()]
    width = max(len(command) for command, _ in lines)
    commands = "\n".join(f"{command:<{width}}   {meaning}" for command, meaning in lines)
    text = TEXT.format(title=folder.absolute().name, commands=commands, **names)
    file.write_text(text, encoding="utf-8")
    return file
