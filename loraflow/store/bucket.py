"""Objects of an S3 bucket below a prefix.

Writes that must not overwrite each other are conditional, since S3 has no rename: `create` succeeds for one of several
writers, and `replace` only if the object has not changed since it was read. An interrupted upload of a file continues at
the part where it stopped.
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
from typing import TYPE_CHECKING, TypeVar

from loraflow.failures import BadConfig, Failure, Network
from loraflow.store.files import BLOCK
from loraflow.store.s3_client import (
    CONFLICT,
    NOT_FOUND,
    client_error_failure,
    error_code,
    make_client,
    request_failure,
    unreachable_failure,
)

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3.type_defs import (
        CompletedPartTypeDef,
        MultipartUploadTypeDef,
        ObjectIdentifierTypeDef,
        PartTypeDef,
        PutObjectOutputTypeDef,
    )

log = logging.getLogger(__name__)
T = TypeVar("T")

CONCURRENCY = 8  # requests at the same time
RETRY_SECONDS = 300.0  # how long `retry_network` repeats requests to a store that cannot be reached
_WRITER = "loraflow-writer"  # metadata that names the write which made an object


@dataclass(frozen=True)
class StoredObject:
    """The content of an object; `age` in seconds, measured by the server's clock."""

    data: bytes
    etag: str
    age: float


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing; `key` is relative to the prefix, `modified` in seconds since 1970."""

    key: str
    size: int
    modified: float
    etag: str


class Bucket:
    """Read and write objects below a prefix. Keys are relative to it."""

    def __init__(self, uri: str):
        name, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        self.uri = f"s3://{name}/{prefix}".rstrip("/")
        if not name:
            raise BadConfig(
                "The store names no bucket.",
                where="runtime.store",
                expected="s3://bucket/prefix",
                got=uri,
                next_step="set runtime.store: s3://bucket/prefix",
            )
        self.name, self.prefix = name, prefix + "/" if prefix else ""
        self.client = make_client()
        self._content: dict[str, tuple[str, bytes]] = {}  # small objects that were read: {key: (etag, content)}
        # Report a missing bucket or wrong credentials now, not at the first write.
        self.call("", lambda: self.client.list_objects_v2(Bucket=self.name, Prefix=self.prefix, MaxKeys=1))

    # reading

    def get(self, key: str) -> StoredObject | None:
        """Return an object, None if it does not exist."""
        reply = self.call_if_found(key, lambda: self.client.get_object(Bucket=self.name, Key=self.prefix + key))
        if reply is None:
            return None
        data = self._read(reply["Body"], key)
        now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
        return StoredObject(data, reply["ETag"], (now - reply["LastModified"]).total_seconds())

    def blocks(self, key: str) -> Iterator[bytes]:
        """Yield an object's content in blocks.

        Raises:
            FileNotFoundError: it does not exist.
        """
        reply = self.call_if_found(key, lambda: self.client.get_object(Bucket=self.name, Key=self.prefix + key))
        if reply is None:
            raise FileNotFoundError(f"{self.uri}/{key}")
        while block := self._read(reply["Body"], key, BLOCK):
            yield block

    def read(self, listed: Iterable[ObjectInfo]) -> dict[str, bytes]:
        """Return {key: content} of small objects from a listing. Objects that were deleted since are left out.

        An object that was read before and still has the same ETag is not requested again: each request costs a round trip.
        """
        objects = list(listed)
        changed = [item for item in objects if self._content.get(item.key, ("",))[0] != item.etag]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for found, item in zip(pool.map(lambda item: self.get(item.key), changed), changed, strict=True):
                self._content.pop(item.key, None)
                if found is not None:
                    self._content[item.key] = (found.etag, found.data)
        return {item.key: self._content[item.key][1] for item in objects if item.key in self._content}

    def _read(self, body: StreamingBody, key: str, size: int | None = None) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

        try:
            return body.read(size)
        except (HTTPClientError, IncompleteReadError, ResponseStreamingError, OSError) as error:
            raise unreachable_failure(f"{self.uri}/{key}", error) from error

    def listing(self, below: str = "") -> Iterator[ObjectInfo]:
        """Yield all objects whose key begins with `below`, ordered by key."""
        listed = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + below)
        for page in self.pages(below, listed):
            for line in page.get("Contents", []):
                key = line["Key"].removeprefix(self.prefix)
                yield ObjectInfo(key, line["Size"], line["LastModified"].timestamp(), line["ETag"])

    # writing

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        self.call(key, lambda: self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=data))

    def create(self, key: str, data: bytes) -> str | None:
        """Write an object that does not exist and return its ETag; return None if it exists."""
        return self._conditional(
            key,
            lambda metadata: self.client.put_object(
                Bucket=self.name, Key=self.prefix + key, Body=data, Metadata=metadata, IfNoneMatch="*"
            ),
            must_exist=False,
        )

    def replace(self, key: str, data: bytes, etag: str) -> str | None:
        """Replace the object that has this ETag and return the new one; return None if it has changed."""
        return self._conditional(
            key,
            lambda metadata: self.client.put_object(
                Bucket=self.name, Key=self.prefix + key, Body=data, Metadata=metadata, IfMatch=etag
            ),
            must_exist=True,
        )

    def _conditional(
        self, key: str, put: Callable[[dict[str, str]], PutObjectOutputTypeDef], *, must_exist: bool
    ) -> str | None:
        writer = uuid.uuid4().hex
        for _ in range(8):
            reply = self.call_unless(CONFLICT | NOT_FOUND, key, lambda: put({_WRITER: writer}))
            if reply is not None:
                return reply["ETag"]
            # If a reply was lost, the client sent its write again and conflicts with its own first write, which succeeded.
            seen = self.call_if_found(key, lambda: self.client.head_object(Bucket=self.name, Key=self.prefix + key))
            if seen is not None:
                return seen["ETag"] if seen["Metadata"].get(_WRITER) == writer else None
            if must_exist:
                return None
            time.sleep(0.05)  # 409 for a write at the same time, or the object was deleted since
        raise unreachable_failure(f"{self.uri}/{key}", "conflicting writes")

    def delete(self, keys: list[str]) -> None:
        """Delete objects; those that do not exist count as deleted."""
        for start in range(0, len(keys), 1000):
            self._delete(keys[start : start + 1000])

    def _delete(self, keys: list[str]) -> None:
        names: list[ObjectIdentifierTypeDef] = [{"Key": self.prefix + key} for key in keys]
        reply = self.call(
            "", lambda: self.client.delete_objects(Bucket=self.name, Delete={"Objects": names, "Quiet": True})
        )
        for error in reply.get("Errors", []):
            raise Failure(
                "An object cannot be deleted.",
                where=error["Key"],
                got=error.get("Message", ""),
                next_step="allow s3:DeleteObject on the prefix, then run again",
            )

    def copy(self, key: str, to: str) -> None:
        """Copy an object within the bucket; boto3 copies large objects in parts."""
        self.call_unless(
            frozenset(),
            key,
            lambda: self.client.copy(
                Bucket=self.name,
                Key=self.prefix + to,
                CopySource={"Bucket": self.name, "Key": self.prefix + key},
            ),
        )

    # requests

    def call(self, key: str, request: Callable[[], T]) -> T:
        """Send a request; `key` is for messages.

        Raises:
            Failure: the server refused it, or did not answer (`Network`).
        """
        reply = self.call_unless(frozenset(), key, request)
        assert reply is not None
        return reply

    def pages(self, key: str, replies: Iterable[T]) -> Iterator[T]:
        """Yield the replies of a paginator of boto3, which sends a request for each of them."""
        left = iter(replies)
        while (page := self.call_unless(frozenset(), key, lambda: next(left, None))) is not None:
            yield page

    def call_if_found(self, key: str, request: Callable[[], T]) -> T | None:
        """Send a request; return None if its object or upload does not exist."""
        return self.call_unless(NOT_FOUND, key, request)

    def call_unless(self, codes: frozenset[str], key: str, request: Callable[[], T]) -> T | None:
        """Send a request; return None if the server answers with one of the error codes."""
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.uri}/{key}".rstrip("/")
        try:
            return request()
        except ClientError as error:
            if error_code(error) in codes:
                return None
            raise client_error_failure(error, where, self.name) from error
        except BotoCoreError as error:
            raise request_failure(error, where) from error


def retry_network(request: Callable[[], T]) -> T:
    """Repeat a request while the network is down: a result of hours of work is worth minutes of waiting.

    Raises:
        Network: the store did not answer for `RETRY_SECONDS`.
    """
    deadline, pause = time.monotonic() + RETRY_SECONDS, 1.0
    while True:
        try:
            return request()
        except Network as failure:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("%s Trying again in %.0f s.", failure.what, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


PART_SIZE = 64 * 2**20  # bytes; S3 takes 10,000 parts, so a file may have 640 GB
_SHA256 = "loraflow-sha256"  # metadata with the hash of an object's content


def upload_file(bucket: Bucket, path: Path, key: str, sha256: str) -> None:
    """Upload a file. An object that is already complete is skipped; an interrupted upload continues at its missing parts.

    Raises:
        Network: the store did not answer for `RETRY_SECONDS`.
    """
    if _is_uploaded(bucket, path, key, sha256):
        return
    if path.stat().st_size > PART_SIZE:
        _upload_in_parts(bucket, path, key, sha256)
        return
    data = path.read_bytes()
    checksum = base64.b64encode(bytes.fromhex(sha256)).decode()  # the server refuses content with another hash
    retry_network(
        lambda: bucket.call(
            key,
            lambda: bucket.client.put_object(
                Bucket=bucket.name,
                Key=bucket.prefix + key,
                Body=data,
                Metadata={_SHA256: sha256},
                ChecksumSHA256=checksum,
            ),
        )
    )


def unfinished_uploads(bucket: Bucket, below: str = "") -> list[MultipartUploadTypeDef]:
    """Return the multipart uploads that were begun and neither completed nor aborted."""
    listed = bucket.client.get_paginator("list_multipart_uploads").paginate(
        Bucket=bucket.name, Prefix=bucket.prefix + below
    )
    return [upload for page in bucket.pages(below, listed) for upload in page.get("Uploads", [])]


def abort_upload(bucket: Bucket, upload: MultipartUploadTypeDef) -> None:
    """Delete an unfinished upload, whose parts would otherwise be stored and billed."""
    bucket.call_if_found(
        upload["Key"],
        lambda: bucket.client.abort_multipart_upload(
            Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"]
        ),
    )


def _is_uploaded(bucket: Bucket, path: Path, key: str, sha256: str) -> bool:
    found = bucket.call_if_found(key, lambda: bucket.client.head_object(Bucket=bucket.name, Key=bucket.prefix + key))
    return (
        found is not None and found["ContentLength"] == path.stat().st_size and found["Metadata"].get(_SHA256) == sha256
    )


def _upload_in_parts(bucket: Bucket, path: Path, key: str, sha256: str) -> None:
    full = bucket.prefix + key
    begun = [upload for upload in unfinished_uploads(bucket, key) if upload["Key"] == full]
    if begun:
        upload_id = max(begun, key=lambda upload: upload["Initiated"])["UploadId"]
    else:
        new = bucket.call(
            key,
            lambda: bucket.client.create_multipart_upload(Bucket=bucket.name, Key=full, Metadata={_SHA256: sha256}),
        )
        upload_id = new["UploadId"]
    parts = _send_parts(bucket, path, key, upload_id)
    retry_network(
        lambda: bucket.call_unless(
            frozenset({"NoSuchUpload"}),  # the reply to an earlier completion was lost
            key,
            lambda: bucket.client.complete_multipart_upload(
                Bucket=bucket.name, Key=full, UploadId=upload_id, MultipartUpload={"Parts": parts}
            ),
        )
    )
    if _is_uploaded(bucket, path, key, sha256):
        return
    if begun:
        # The upload was begun for other content, whose hash it carries: a checkpoint of the same step with other bits.
        _upload_in_parts(bucket, path, key, sha256)
        return
    raise Network("An upload is incomplete.", where=f"{bucket.uri}/{key}", next_step="run again")


def _send_parts(bucket: Bucket, path: Path, key: str, upload_id: str) -> list[CompletedPartTypeDef]:
    uploaded = {part["PartNumber"]: part["ETag"] for part in _uploaded_parts(bucket, key, upload_id)}
    parts: list[CompletedPartTypeDef] = []
    with path.open("rb") as file:
        for number in range(1, -(-path.stat().st_size // PART_SIZE) + 1):
            data = file.read(PART_SIZE)
            etag = uploaded.get(number)
            if etag is None or etag.strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                etag = _send_part(bucket, key, upload_id, number, data)
            parts.append({"PartNumber": number, "ETag": etag})
    return parts


def _send_part(bucket: Bucket, key: str, upload_id: str, number: int, data: bytes) -> str:
    reply = retry_network(
        lambda: bucket.call(
            key,
            lambda: bucket.client.upload_part(
                Bucket=bucket.name, Key=bucket.prefix + key, UploadId=upload_id, PartNumber=number, Body=data
            ),
        )
    )
    return reply["ETag"]


def _uploaded_parts(bucket: Bucket, key: str, upload_id: str) -> Iterator[PartTypeDef]:
    listed = bucket.client.get_paginator("list_parts").paginate(
        Bucket=bucket.name, Key=bucket.prefix + key, UploadId=upload_id
    )
    for page in bucket.pages(key, listed):
        yield from page.get("Parts", [])
