"""Objects of an S3 bucket below a prefix: conditional writes, resumable uploads, and errors that say what to do.

boto3 reads credentials, region and endpoint where it always does: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3,
~/.aws. A write is conditional throughout, since S3 has no rename: `create` succeeds for one of several writers, and
`replace` only for who saw the object as it is.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from loraflow.failures import BadConfig, Failure, MissingExtra, Network, ReadOnlyStore
from loraflow.store.files import BLOCK

log = logging.getLogger(__name__)

PART = 64 * 2**20  # bytes; S3 takes 10,000 parts, so that a file may have 640 GB
AT_ONCE = 8  # requests at the same time
PATIENCE = 300.0  # seconds for which an unreachable store is tried again in the middle of an upload
_SHA = "loraflow-sha256"
_WRITER = "loraflow-writer"
_REFUSED = {"AccessDenied", "403", "Forbidden", "UnauthorizedAccess"}
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_GONE = {"NoSuchKey", "404", "NotFound", "NoSuchUpload"}


@dataclass(frozen=True)
class Object:
    """An object as it was seen: `age` in seconds, by the server's clock alone."""

    data: bytes
    etag: str
    age: float


@dataclass(frozen=True)
class Listed:
    """A line of a listing; `key` is relative to the prefix."""

    key: str
    size: int
    modified: float
    etag: str


class Bucket:
    """A bucket below a prefix. Keys are relative to it."""

    def __init__(self, uri: str):
        name, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        self.uri = f"s3://{name}/{prefix}".rstrip("/")
        if not name:
            raise BadConfig("The store names no bucket.", where="runtime.store", expected="s3://bucket/prefix", got=uri)
        self.name, self.prefix = name, prefix + "/" if prefix else ""
        self.client = _client()
        self._known: dict[str, tuple[str, bytes]] = {}  # small objects that were read: {key: (etag, content)}
        # A missing bucket and wrong keys are told here, once, not as an odd error of the first write.
        self._call(self.client.list_objects_v2, "", Prefix=self.prefix, MaxKeys=1)

    # reading

    def get(self, key: str) -> Object | None:
        """Return an object, None if there is none."""
        reply = self._call(self.client.get_object, key, Key=self.prefix + key, absent=_GONE)
        if reply is None:
            return None
        data = self._read(reply["Body"], key)
        now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Object(data, reply["ETag"], (now - reply["LastModified"]).total_seconds())

    def blocks(self, key: str) -> Iterator[bytes]:
        """Yield an object's content in blocks.

        Raises:
            FileNotFoundError: there is none.
        """
        reply = self._call(self.client.get_object, key, Key=self.prefix + key, absent=_GONE)
        if reply is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        while block := self._read(reply["Body"], key, BLOCK):
            yield block

    def read(self, listed: Iterable[Listed]) -> dict[str, bytes]:
        """Return {key: content} of small objects as they were listed; those that are gone since are left out.

        One that was read before and has the same ETag still is not asked for again: requests are what takes time.
        """
        objects = list(listed)
        wanted = [one for one in objects if self._known.get(one.key, ("",))[0] != one.etag]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for found, one in zip(pool.map(lambda one: self.get(one.key), wanted), wanted, strict=True):
                self._known.pop(one.key, None)
                if found is not None:
                    self._known[one.key] = (found.etag, found.data)
        return {one.key: self._known[one.key][1] for one in objects if one.key in self._known}

    def _read(self, body: Any, key: str, size: int | None = None) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

        try:
            return body.read(size)
        except (HTTPClientError, IncompleteReadError, ResponseStreamingError, OSError) as error:
            raise _unreachable(f"{self.uri}/{key}", error) from error

    def listing(self, below: str = "") -> Iterator[Listed]:
        """Yield all objects whose key begins with `below`, in the order of their keys."""
        token: dict[str, Any] = {}
        while True:
            page = self._call(self.client.list_objects_v2, below, Prefix=self.prefix + below, **token)
            for one in page.get("Contents", []):
                yield Listed(
                    one["Key"].removeprefix(self.prefix), one["Size"], one["LastModified"].timestamp(), one["ETag"]
                )
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    # writing

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        self._call(self.client.put_object, key, Key=self.prefix + key, Body=data)

    def create(self, key: str, data: bytes) -> str | None:
        """Write an object that is not there and return its ETag; None if it is there."""
        return self._conditional(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace the object that has this ETag and return the new one; None if it has another by now."""
        return self._conditional(key, data, IfMatch=etag)

    def _conditional(self, key: str, data: bytes, **condition: str) -> str | None:
        writer = uuid.uuid4().hex
        for _ in range(8):
            reply = self._call(
                self.client.put_object,
                key,
                Key=self.prefix + key,
                Body=data,
                Metadata={_WRITER: writer},
                absent={"PreconditionFailed", "412", "ConditionalRequestConflict", "409", *_GONE},
                **condition,
            )
            if reply is not None:
                return reply["ETag"]
            # A reply that was lost makes the client send its write again, which then finds its own first one.
            seen = self._call(self.client.head_object, key, Key=self.prefix + key, absent=_GONE)
            if seen is not None:
                return seen["ETag"] if seen["Metadata"].get(_WRITER) == writer else None
            if "IfMatch" in condition:
                return None
            time.sleep(0.05)  # a writer between the two: 409, or one that deleted it again
        raise _unreachable(f"{self.uri}/{key}", "conflicting writes")

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that are not there count as deleted."""
        for start in range(0, len(keys), 1000):
            batch = [{"Key": self.prefix + key} for key in keys[start : start + 1000]]
            reply = self._call(self.client.delete_objects, "", Delete={"Objects": batch, "Quiet": True})
            for error in reply.get("Errors", []):
                raise Failure("An object cannot be deleted.", where=error["Key"], got=error.get("Message", ""))

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the bucket."""
        source = {"Bucket": self.name, "Key": self.prefix + key}
        self._call(self.client.copy, key, CopySource=source, Key=self.prefix + to)  # in parts where it is large

    def upload(self, path: Path, key: str, sha256: str) -> None:
        """Upload a file, or what is missing of it: a file that is there whole is left, parts of a cut-off upload are kept.

        Raises:
            Network: the store did not answer for `PATIENCE` seconds.
        """
        size = path.stat().st_size
        there = self._call(self.client.head_object, key, Key=self.prefix + key, absent=_GONE)
        if there and there["ContentLength"] == size and there["Metadata"].get(_SHA) == sha256:
            return
        if size > PART:
            self._upload_parts(path, key, sha256)
            return
        data = path.read_bytes()
        check = base64.b64encode(bytes.fromhex(sha256)).decode()  # the server refuses what it received otherwise
        patiently(
            lambda: self._call(
                self.client.put_object,
                key,
                Key=self.prefix + key,
                Body=data,
                Metadata={_SHA: sha256},
                ChecksumSHA256=check,
            )
        )

    def _upload_parts(self, path: Path, key: str, sha256: str) -> None:
        full = self.prefix + key
        begun = [one for one in self.uploads(key) if one["Key"] == full]
        if begun:
            upload = max(begun, key=lambda one: one["Initiated"])["UploadId"]
        else:
            new = self._call(self.client.create_multipart_upload, key, Key=full, Metadata={_SHA: sha256})
            upload = new["UploadId"]
        done = {one["PartNumber"]: one["ETag"] for one in self._parts(key, upload)}
        parts = []
        with path.open("rb") as file:
            for number in range(1, -(-path.stat().st_size // PART) + 1):
                data = file.read(PART)
                etag = done.get(number)
                if etag is None or etag.strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                    etag = self._upload_part(key, upload, number, data)
                parts.append({"PartNumber": number, "ETag": etag})
        patiently(
            lambda: self._call(
                self.client.complete_multipart_upload,
                key,
                Key=full,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                absent={"NoSuchUpload"},  # a completion whose reply was lost
            )
        )
        there = self._call(self.client.head_object, key, Key=full, absent=_GONE)
        if there is None or there["ContentLength"] != path.stat().st_size or there["Metadata"].get(_SHA) != sha256:
            if begun:  # for another content, whose hash it carries: a checkpoint of the same step, of other bits
                self._upload_parts(path, key, sha256)
                return
            raise Network("An upload did not arrive whole.", where=f"{self.uri}/{key}", next_step="run again")

    def _upload_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        return patiently(
            lambda: self._call(
                self.client.upload_part, key, Key=self.prefix + key, UploadId=upload, PartNumber=number, Body=data
            )
        )["ETag"]

    def _parts(self, key: str, upload: str) -> Iterator[dict[str, Any]]:
        marker: dict[str, Any] = {}
        while True:
            page = self._call(self.client.list_parts, key, Key=self.prefix + key, UploadId=upload, **marker)
            yield from page.get("Parts", [])
            if not page.get("IsTruncated"):
                return
            marker = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def uploads(self, below: str = "") -> list[dict[str, Any]]:
        """Return the multipart uploads that were begun and not ended."""
        return self._call(self.client.list_multipart_uploads, below, Prefix=self.prefix + below).get("Uploads", [])

    def abort(self, upload: dict[str, Any]) -> None:
        """Give up an upload, so that its parts are no longer kept (and paid)."""
        self._call(self.client.abort_multipart_upload, upload["Key"], Key=upload["Key"], UploadId=upload["UploadId"],
                   absent=_GONE)  # fmt: skip

    def _call(self, do: Callable[..., Any], key: str, *, absent: set[str] | None = None, **arguments: Any) -> Any:
        """Call the client; None where it answers with one of the codes in `absent`."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.uri}/{key}".rstrip("/")
        try:
            return do(Bucket=self.name, **arguments)
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in (absent or ()):
                return None
            raise _refusal(error, where, self.name) from error
        except BotoCoreError as error:
            raise _no_answer(error, where) from error


def _client() -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "A store on S3 needs the package boto3.",
            where="runtime.store",
            got=str(error),
            next_step="pip install 'loraflow[s3]'",
        ) from error
    from botocore.exceptions import BotoCoreError

    retries: Any = {"mode": "standard", "max_attempts": 5}
    try:
        config = Config(retries=retries, connect_timeout=10, read_timeout=60, max_pool_connections=32)
        session = (
            boto3.session.Session()
        )  # the default one keeps the first credentials that it saw, and is for one thread
        client = session.client("s3", config=config)
        if "amazonaws.com" not in client.meta.endpoint_url:  # other servers have no host name for each bucket
            config = config.merge(Config(s3={"addressing_style": "path"}))
            client = session.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise BadConfig(
            "The settings of the S3 client are wrong.",
            where="AWS_* of the environment, ~/.aws/config",
            got=str(error),
            next_step="mend them; `aws s3 ls` reads the same ones",
        ) from error
    return client


def patiently(do: Callable[[], Any]) -> Any:
    """Repeat what fails for want of a network: what was computed for hours is worth some minutes of waiting."""
    deadline, pause = time.monotonic() + PATIENCE, 1.0
    while True:
        try:
            return do()
        except Network as failure:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("%s Again in %.0f s.", failure.what, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _refusal(error: Any, where: str, bucket: str) -> Failure:
    details = error.response.get("Error", {})
    code, status = details.get("Code", ""), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    got = f"{code}: {details.get('Message', '')}".strip(": ")
    if code == "NoSuchBucket":
        return BadConfig(
            "The store's bucket does not exist.",
            where=where,
            got=got,
            next_step=f"`aws s3 mb s3://{bucket}` makes it; or set runtime.store to another",
        )
    if code in _WRONG_KEYS:
        return BadConfig(
            "The store refuses the credentials.",
            where=where,
            got=got,
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if code in _REFUSED:
        return ReadOnlyStore(
            "The credentials may not do this in the store.",
            where=where,
            got=f"{error.operation_name}: {got}",
            next_step="allow s3:ListBucket, GetObject, PutObject, DeleteObject, AbortMultipartUpload on the prefix",
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "RequestTimeTooSkewed", "BadDigest"):
        return Network("The store did not answer.", where=where, got=got, next_step="run again: uploads go on")
    return Failure("The store refused a request.", where=where, got=f"{error.operation_name}: {got}")


def _no_answer(error: Exception, where: str) -> Failure:
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

    if isinstance(error, ParamValidationError):
        return BadConfig(
            "The store's address is no valid one.",
            where="runtime.store",
            expected="s3://bucket/prefix",
            got=str(error)[:200],
        )
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return BadConfig(
            "There are no credentials for the store.",
            where=where,
            got=str(error),
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    return _unreachable(where, error)


def _unreachable(where: str, error: object) -> Network:
    return Network(
        "The store did not answer.",
        where=where,
        got=str(error),
        next_step="check the network and AWS_ENDPOINT_URL_S3, then run again: uploads go on",
    )
