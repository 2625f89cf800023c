"""Read a `.dvc` file: which output it pins, by path and md5."""

import hashlib
import json
import posixpath
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote

import yaml

from loraflow.data.versions.git import GitError, folder_in_repository, git, is_url
from loraflow.failures import BadData

MAX_BYTES = 256 * 2**10  # of a .dvc file; DVC writes about 100
MAX_DEPTH = 12  # of its YAML; DVC writes 3
_CONFLICT = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)


@dataclass(frozen=True)
class Pin:
    """What a `.dvc` file pins: one output, by path and md5."""

    dvc_file: str  # path of the .dvc file, relative to the repository
    path: str  # path of the output, relative to the repository
    md5: str  # ends in ".dir" for a folder

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.md5.endswith(".dir")


def read_pin(repo: str, dvc_file: str, rev: str | None, key: str = "data.source") -> Pin:
    """Read a `.dvc` file from the work tree, or from a git revision. `key` is the recipe's, for messages.

    Raises:
        BadData: the file or the revision is missing, or the pin cannot be verified.
    """
    where = f"{dvc_file}{f' at {rev}' if rev else ''} in {repo}"
    if rev is None and not is_url(repo):
        try:
            with Path(repo, dvc_file).open(encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL
            add = f"`loraflow data add FOLDER` versions a folder with DVC; {key} names its .dvc file"
            raise BadData(
                "The dataset's .dvc file cannot be read.",
                where=where if Path(dvc_file).is_absolute() else f"{dvc_file} in {Path(repo).absolute()}",
                got=(error.strerror if isinstance(error, OSError) else None) or str(error),
                next_step=f"go to the project's folder, where paths start; or {add}",
            ) from error
    else:
        text = _git_show(repo, rev or "HEAD", dvc_file, where)
    return parse_pin(text, dvc_file, where, key)


def parse_pin(text: str, dvc_file: str, where: str, key: str = "data.source") -> Pin:
    """Return what the text of a `.dvc` file pins.

    Raises:
        BadData: it does not pin exactly one output by md5, inside its repository.
    """
    if _CONFLICT.search(text):
        raise BadData(
            "The .dvc file has conflict markers of git.",
            where=where,
            expected="one version of the file",
            got="lines such as `<<<<<<<` and `>>>>>>>`",
            next_step=f"choose a side: `git checkout --ours {quote(dvc_file)}` or `--theirs`, then "
            f"`git add {quote(dvc_file)}`",
        )
    md5, path, algorithm, wdir = _only_output(text, dvc_file, where, key)
    if algorithm != "md5":
        raise BadData(
            "The .dvc file was written by DVC 2 or older, whose md5 is not the md5 of the bytes.",
            where=where,
            expected="hash: md5",
            got=f"hash: {algorithm}"[:100],
            next_step=f"loraflow data add {quote(str(path))}   (rewrites the .dvc file)",
        )
    output = _output_path(path, wdir, dvc_file, where)
    if not is_md5(md5):
        raise BadData(
            "The .dvc file does not pin exactly one output by md5.",
            where=where,
            expected="md5: 32 hex digits, and `.dir` for a folder",
            got=f"md5: {md5[:100]!a}",
            next_step="version the folder with `loraflow data add`",
        )
    return Pin(dvc_file, output, md5)


def _only_output(text: str, dvc_file: str, where: str, key: str) -> tuple[str, str, object, object]:
    """Return md5, path, hash algorithm and wdir of the file's single output."""
    try:
        _check_yaml(text)
        document = yaml.load(text, Loader=yaml.BaseLoader)  # all scalars are text: an md5 can be all digits
        if not isinstance(document, dict) or not isinstance(document.get("outs"), list):
            raise ValueError("no list `outs`, which every .dvc file has")
        if len(document["outs"]) != 1:
            raise ValueError(f"{len(document['outs'])} outputs")
        (out,) = document["outs"]
        if "files" in out or "cloud" in out:
            raise _cloud_versioned(where, str(out.get("path")))
        if "md5" not in out and "deps" in document:
            raise _not_downloaded(where, dvc_file)
        md5, path, algorithm, wdir = out["md5"], out["path"], out.get("hash"), document.get("wdir", ".")
        if not isinstance(md5, str) or not isinstance(path, str):
            raise TypeError("md5 and path must be text")
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadData(
            "The .dvc file does not pin exactly one output by md5.",
            where=where,
            expected="one entry under `outs` with `md5`, `hash: md5` and `path`",
            got=(str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}")[:300],
            next_step=f"version the folder with `loraflow data add`; {key} names the .dvc file that it writes",
        ) from error
    return md5, path, algorithm, wdir


def _output_path(path: str, wdir: object, dvc_file: str, where: str) -> str:
    output = (PurePosixPath(dvc_file).parent / path).as_posix()
    reason = wrong_name(output) or (f"wdir is {wdir!a}"[:100] if wdir != "." else None)
    if reason is None and "://" in path:
        reason = "DVC takes a URL as a place outside"
    if reason is not None:
        raise BadData(
            "The .dvc file names a path outside its repository, or one that must not be written.",
            where=where,
            expected="a relative path below the folder of the .dvc file",
            got=f"{output[:200]}: {reason}",
            next_step="`git log` shows who wrote it; version the folder with `loraflow data add`",
        )
    return output


def _check_yaml(text: str) -> None:
    """Refuse text that takes long to read: PyYAML needs 50 s for 40 kB of brackets. Tags and aliases have no use here."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"a .dvc file has at most {MAX_BYTES:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels of YAML")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise ValueError("a .dvc file has no tags and aliases")


def _cloud_versioned(where: str, path: str) -> BadData:
    return BadData(
        "The dataset is on a cloud-versioned remote (version_aware or worktree), which loraflow does not read.",
        where=where,
        expected="one md5 for the whole output, as for a remote without cloud versioning",
        got="a list of `files` or `cloud` versions in the .dvc file",
        next_step=f"dvc remote modify NAME version_aware false; loraflow data add {quote(path[:200])}",
    )


def _not_downloaded(where: str, dvc_file: str) -> BadData:
    return BadData(
        "The dataset was imported with `--no-download`, so its .dvc file does not say yet which bytes it has.",
        where=where,
        expected="an md5 of the output",
        got="an output without md5",
        next_step=f"dvc update {quote(dvc_file)}   (downloads it and writes the md5)",
    )


def _git_show(repo: str, rev: str, name: str, where: str) -> str:
    """Return a file's text at a revision. A repository given by URL is cloned without its files first.

    git takes `REVISION:PATH` from the top of the repository. A project may be a folder below it, where paths start.
    """
    if is_url(repo):
        with tempfile.TemporaryDirectory() as folder:
            show_git(["clone", "--quiet", "--bare", "--filter=blob:none", "--", repo, folder], None, where)
            return show_git(["show", f"{rev}:{name}"], folder, where)
    path = posixpath.normpath(folder_in_repository(repo) + name)
    return show_git(["show", f"{rev}:{path}"], repo, where)


def show_git(arguments: list[str], folder: str | None, where: str) -> str:
    """Run a git command that reads the dataset's `.dvc` file or its commit. Its last argument has the revision.

    Raises:
        BadData: git failed.
    """
    try:
        if arguments[-1].startswith("-"):  # git before 2.30 lacks `--end-of-options`
            raise GitError(arguments, "no revision begins with a hyphen")
        return git(arguments, folder)
    except GitError as error:
        raise BadData(
            "Git cannot show the dataset's .dvc file.",
            where=where,
            got=str(error),
            next_step=error.next_step or _next_step(str(error)),
        ) from error


def _next_step(error: str) -> str:
    """Return what to do after git did not find a revision or its file."""
    add = "`loraflow data add FOLDER --commit` commits the .dvc file"
    if "not a git repository" in error:
        return f"git init; then {add}"
    if "invalid object name 'HEAD'" in error or "exists on disk, but not in" in error:  # before the first commit
        return add
    return "`git log --oneline --all -- data.dvc` lists the revisions that have one"


# Read DVC's list of a folder's files (a `.dir` object), and check it before anything is written.
#
# DVC joins the names of the list to the folder's path without a check. A list with `../../name` writes outside the project.

MAX_LIST_BYTES = 64 * 2**20  # of a list: about 700,000 files
MAX_NAME = 1024  # bytes of a path inside the folder
MAX_PART = 255  # bytes of one file name: the limit of Linux's and macOS's file systems
MAX_FOLDERS = 32  # folders in each other
# git and DVC act on these names. Lower case, because macOS and Windows ignore case. A `.gitignore` is an ordinary file to
# DVC; git reads it, but no file of a dataset is in git anyway.
RESERVED = frozenset({".git", ".dvc", ".hg", ".dvcignore", ".gitattributes", ".gitmodules"})

# Exactly what DVC writes: `json.dumps(rows, sort_keys=True)`. Any other text has another md5 than `dvc_md5` computes
# from the files, so it would be refused after the download. A regular expression needs no memory for nested JSON.
_ROW = re.compile(r'\{"md5": "([0-9a-f]{32})", "relpath": ("(?:[^"\\\x00-\x1f]|\\.)*")\}(, |\]\Z)')
_MD5 = re.compile(r"[0-9a-f]{32}(?:\.dir)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ListedFile:
    """A row of the list."""

    name: str  # posix path relative to the folder
    md5: str


def is_md5(text: str) -> bool:
    """Tell whether a text is an md5 as DVC writes it: 32 lower-case hex digits, and `.dir` for a folder."""
    return _MD5.fullmatch(text) is not None


def wrong_name(name: str) -> str | None:
    """Return why a name from outside must not be joined to a folder; None if it can be.

    Names that differ only in case pass: Linux keeps them apart. Where the file system does not, the files' md5 differs
    from the pin afterwards.
    """
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    parts = name.split("/")
    if not name or name.startswith("/"):
        return "it is empty or absolute"
    if _CONTROL.search(name) or "\\" in name or "://" in name:
        return "it has a control character, a backslash, or a URL's ://"
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty part, `.` or `..`"
    plain = [part.rstrip(". ").lower() for part in parts]  # Windows drops dots and spaces at the end
    if any(part in RESERVED for part in plain):
        return "git or DVC reserves it"
    if len(raw) > MAX_NAME or len(parts) > MAX_FOLDERS or any(len(part.encode()) > MAX_PART for part in parts):
        return f"it has more than {MAX_NAME} bytes, {MAX_FOLDERS} folders, or {MAX_PART} bytes in one name"
    return None


def check_names(names: list[str], where: str, next_step: str) -> None:
    """Refuse names that leave their folder, are reserved, duplicated, or a file and a folder at the same time.

    Raises:
        BadData: for the first such name.
    """
    seen: set[str] = set()
    for name in names:
        reason = "it is duplicated" if name in seen else wrong_name(name)
        if reason is not None:
            raise _unsafe(name, reason, where, next_step)
        seen.add(name)
    for name in names:
        folder, slash, _ = name.rpartition("/")
        while slash:
            if folder in seen:
                raise _unsafe(name, f"{folder} is a file of the list too", where, next_step)
            folder, slash, _ = folder.rpartition("/")


def _unsafe(name: str, reason: str, where: str, next_step: str) -> BadData:
    return BadData(
        "A file of the dataset has a name that must not be written.",
        where=where,
        expected="relative names inside the dataset's folder",
        got=f"{name[:200]!a}: {reason}",
        next_step=next_step,
    )


def parse_listing(raw: bytes, md5: str, where: str, next_step: str) -> list[ListedFile]:
    """Return the files of a `.dir` object.

    Args:
        md5: the name of the object, which is the md5 of its bytes and `.dir`.

    Raises:
        BadData: the bytes have another md5, are not a list as DVC writes it, or name a file that must not be written.
    """
    got = hashlib.md5(raw, usedforsecurity=False).hexdigest() + ".dir"
    if len(raw) > MAX_LIST_BYTES or got != md5:
        raise BadData(
            "DVC's list of the dataset's files is damaged.",
            where=where,
            expected=f"md5 {md5}",
            got=f"more than {MAX_LIST_BYTES // 2**20} MiB" if len(raw) > MAX_LIST_BYTES else f"md5 {got}",
            next_step=next_step,
        )
    files = _rows(raw, where)
    check_names(
        [file.name for file in files],
        where,
        "do not pull it; `git log -- '*.dvc'` shows who added it. Add the dataset again from its source",
    )
    return files


def _rows(raw: bytes, where: str) -> list[ListedFile]:
    text = raw.decode("utf-8", errors="replace")
    if text == "[]":
        return []
    files: list[ListedFile] = []
    position = 1
    while text.startswith("[") and (row := _ROW.match(text, position)):
        try:
            files.append(ListedFile(json.loads(row[2]), row[1]))
        except ValueError:
            break
        position = row.end()
        if row[3] == "]":
            return files
    raise BadData(
        "DVC's list of the dataset's files is malformed.",
        where=f"{where}, character {position}",
        expected='[{"md5": "<32 hex digits>", "relpath": "<name>"}, …], as DVC 3 writes it',
        got=ascii(text[position : position + 80]),
        next_step="add the dataset again from its source with `loraflow data add FOLDER`",
    )
