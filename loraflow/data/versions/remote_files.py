"""Files of `data.sources` on the Hugging Face hub, pinned by a commit, and objects of buckets, pinned by their md5.

The md5 of a file of the hub is computed once. loraflow.lock remembers it, so the identity of the dataset needs no network
afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from loraflow.config.data_sources import HUB_FILE, S3_OBJECT, DataSource
from loraflow.config.locations import LOCK, RemoteOrigin, SourcePart, read_lock
from loraflow.data.files.dataset_files import is_hidden
from loraflow.data.files.readers import READABLE
from loraflow.data.versions.dvc_pin import check_names
from loraflow.failures import (
    BadConfig,
    BadData,
    Failure,
    MissingExtra,
    Network,
    ReadOnlyStore,
    first_line,
    from_library_error,
)
from loraflow.store.files import BLOCK, hash_file, write_json

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate_remote(source: DataSource) -> list[SourcePart]:
    """Return the files of a source on the hub or in a bucket, with their md5.

    Files of the hub are downloaded into the hub's cache on this machine, if loraflow.lock does not know them yet.

    Raises:
        BadData: nothing pins the source, it does not exist, or a file of the hub's cache is damaged.
        BadConfig: the server refuses the credentials.
        Network: the server did not answer.
    """
    if source.source.startswith("s3://"):
        return [_pinned_object(source)]
    repo, revision, path = _hub_parts(source.source)
    if not _COMMIT.fullmatch(revision):
        raise _without_commit(source.source, repo, revision, path)
    files = read_lock().get(source.source)
    if not files or isinstance(files, str):
        files = _hub_files(source.source)
        write_json(LOCK, {**read_lock(), source.source: files})
    check_names(list(files), source.source, f"choose other files in source, or remove its entry from {LOCK}")
    base = _folder_of(path, files)
    prefix = f"hf://datasets/{repo}@{revision}/"
    return [
        SourcePart(path=name.removeprefix(base), md5=md5, origin=RemoteOrigin(url=prefix + name))
        for name, md5 in sorted(files.items())
    ]


def fetch_remote(url: str, md5: str, target: Path) -> None:
    """Write a file of the hub, or an object, to a file.

    Raises:
        BadData: it has another md5, or does not exist.
        BadConfig, Network: as `locate_remote`.
    """
    cached = None if url.startswith("s3://") else _download(url)
    if cached is not None:
        shutil.copyfile(cached, target)
    else:
        with target.open("wb") as file:
            file.writelines(_read_object(url))
    if (got := hash_file(target, "md5")) == md5:
        return
    pin, next_step = "the recipe", f"if the new content is wanted, write md5: {got}; else restore the object"
    if cached is not None:
        if re.fullmatch("[0-9a-f]{40,64}", cached.name):  # the cache has links: the name is the file's hash
            _refuse_damaged(cached, cached.name)
        pin, next_step = str(LOCK), f"restore {LOCK} with git, or remove the source's entry; then run again"
    raise BadData(
        f"The content of a source differs from the md5 in {pin}.",
        where=url,
        expected=f"md5 {md5}",
        got=f"md5 {got}",
        next_step=next_step,
    )


def _hub_parts(url: str) -> tuple[str, str, str]:
    found = HUB_FILE.fullmatch(url)
    assert found, url
    return found[1], found[2] or "", (found[3] or "").strip("/")


def _without_commit(url: str, repo: str, revision: str, path: str) -> Failure:
    """Return the failure for a branch, which names the commit to write."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repo, revision=revision or None).sha
    except Exception as error:  # whatever it is, _hub_failure tells or raises it
        return _hub_failure(url, error)
    return BadData(
        "The content of a branch can change.",
        where=url,
        expected="a commit of 40 hex digits",
        got=revision or "no commit",
        next_step=f"write hf://datasets/{repo}@{commit}/{path}".rstrip("/"),
    )


def _hub_files(url: str) -> dict[str, str]:
    """Return the md5 of each file that a source on the hub names, by its path in the repository."""
    from huggingface_hub import HfApi, RepoFile

    repo, commit, path = _hub_parts(url)
    plain = "/".join(_plain_parts("/".join(PurePosixPath(path).parts[:-1])))
    try:
        tree = HfApi().list_repo_tree(repo, plain or None, revision=commit, repo_type="dataset", recursive=True)
        listed = {item.path: item for item in tree if isinstance(item, RepoFile)}
    except Exception as error:
        raise _hub_failure(url, error) from error
    names = _named(path, listed)
    if not names:
        raise BadData(
            "No file of the dataset has this name.",
            where=url,
            expected="a file, a folder, or a pattern such as data/*.parquet",
            got=", ".join(sorted(listed)[:10]) or "no file",
            next_step="correct source",
        )
    check_names(names, url, "choose other files in source")
    size = sum(listed[name].size for name in names)
    log.info("%s: %d files, %.1f MiB, are read from the hub or its cache", url, len(names), size / 2**20)
    return {name: _checked_md5(f"hf://datasets/{repo}@{commit}/{name}", listed[name]) for name in names}


def _plain_parts(path: str) -> tuple[str, ...]:
    """Return the folders that a path begins with, up to the first pattern."""
    parts = PurePosixPath(path).parts
    return parts[: next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts))]


def _named(path: str, names: Iterable[str]) -> list[str]:
    """Return the files that a path names: a file, the readable ones of a folder, or those of a pattern."""
    if path in names:
        return [path]
    readable = [name for name in names if name.lower().endswith(READABLE) and not is_hidden(name)]
    within = [name for name in readable if not path or name.startswith(f"{path}/")]
    depth = len(PurePosixPath(path).parts)
    return within or [
        name for name in readable if len(PurePosixPath(name).parts) == depth and PurePosixPath(name).match(path)
    ]


def _folder_of(path: str, names: Iterable[str]) -> str:
    """Return the folder that the names of a source's files are relative to, with its slash; empty at the top."""
    parts = PurePosixPath(path).parts[:-1] if path in names else _plain_parts(path)
    return "".join(f"{part}/" for part in parts)


def _checked_md5(url: str, listed: RepoFile) -> str:
    """Return the md5 of a file, after it was compared with the hash that the hub gives."""
    file = _download(url)
    _refuse_damaged(file, listed.blob_id if listed.lfs is None else listed.lfs.sha256)
    return hash_file(file, "md5")


def _refuse_damaged(file: Path, expected: str) -> None:
    """Hash a file of the cache: the hub's library does not look again at what it has downloaded once."""
    if len(expected) == 64:
        got = hash_file(file)
    else:
        content = file.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if got != expected:
        raise BadData(
            "A file of the dataset is damaged in the hub's cache on this machine.",
            where=str(file),
            expected=f"the hash {expected[:12]}",
            got=got[:12],
            next_step="remove it, then run again: it is downloaded again",
        )


def _download(url: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo, commit, path = _hub_parts(url)
    try:
        return Path(hf_hub_download(repo, path, repo_type="dataset", revision=commit)).resolve()
    except Exception as error:
        raise _hub_failure(url, error) from error


def _hub_failure(url: str, error: Exception) -> Failure:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if known := from_library_error(error, url):
        return known
    got = first_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, LocalEntryNotFoundError) or status == 429 or status >= 500:
        return _not_answered(url, got)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return BadData(
            "The hub has no such dataset, or does not give it to you.",
            where=url,
            got=got,
            next_step="correct source; of a private or gated dataset, accept its terms and set HF_TOKEN (`hf auth login`)",
        )
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        what = "file" if isinstance(error, EntryNotFoundError) else "commit of 40 digits, 0-9 and a-f"
        return BadData(f"The dataset has no such {what}.", where=url, got=got, next_step="correct source")
    if isinstance(error, ValueError | LookupError | TypeError | AttributeError) and not status:
        what = "HF_ENDPOINT did not answer as the hub does."
        return BadConfig(what, where=url, got=got, next_step="check HF_ENDPOINT, and whether a proxy answers")
    if (isinstance(error, OSError) and error.filename) or not isinstance(error, OSError | HTTPError | RuntimeError):
        raise error
    return _not_answered(url, got)


def _not_answered(url: str, got: str) -> Network:
    kept = "" if url.startswith("s3://") else ": what was downloaded is kept"
    return Network(
        "A source could not be read.", where=url, got=got, next_step=f"check the network, then run again{kept}"
    )


def _pinned_object(source: DataSource) -> SourcePart:
    found = S3_OBJECT.fullmatch(source.source)
    assert found, source.source
    if source.md5 is None:
        digest = hashlib.md5(usedforsecurity=False)
        for block in _read_object(source.source):
            digest.update(block)
        raise BadData(
            "The content of an object can change.",
            where=source.source,
            expected="md5, beside source",
            got="none",
            next_step=f"write md5: {digest.hexdigest()}",
        )
    name = found[2].rpartition("/")[2]
    check_names([name], source.source, "correct source")
    return SourcePart(path=name, md5=source.md5, origin=RemoteOrigin(url=source.source))


def _read_object(url: str) -> Iterator[bytes]:
    from loraflow.store.s3_client import NOT_FOUND, client_error_failure, error_code, make_client, request_failure

    try:
        client = make_client()
    except MissingExtra as failure:
        failure.what, failure.where = "A source in a bucket needs the package boto3.", url
        raise
    from botocore.exceptions import BotoCoreError, ClientError

    found = S3_OBJECT.fullmatch(url)
    assert found, url
    try:
        body = client.get_object(Bucket=found[1], Key=found[2])["Body"]
        while block := body.read(BLOCK):
            yield block
    except (BotoCoreError, ClientError, OSError) as error:
        got = first_line(error)
        if not isinstance(error, ClientError):
            refused = request_failure(error, url)
        elif error_code(error) in NOT_FOUND | {"NoSuchBucket"}:
            raise BadData("There is no such object.", where=url, got=got, next_step="correct source") from error
        else:
            refused = client_error_failure(error, url, found[1])
        if isinstance(refused, Network):
            raise _not_answered(url, got) from error
        if isinstance(refused, BadConfig | ReadOnlyStore):
            what = "The credentials do not give access to a source."
            next_step = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise BadConfig(what, where=url, got=got, next_step=next_step) from error
        refused.what = "The bucket refused the request."
        raise refused from error
