"""Upload files to a bucket, with their hash. An interrupted upload continues at the part where it stopped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

from loraflow.failures import Network
from loraflow.store.bucket import Bucket, retry_network
from loraflow.store.s3_client import Part, PartsReply, UploadLine

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


def unfinished_uploads(bucket: Bucket, below: str = "") -> list[UploadLine]:
    """Return the multipart uploads that were begun and neither completed nor aborted."""
    reply = bucket.call(
        below, lambda: bucket.client.list_multipart_uploads(Bucket=bucket.name, Prefix=bucket.prefix + below)
    )
    return list(reply.get("Uploads", []))


def abort_upload(bucket: Bucket, upload: UploadLine) -> None:
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


def _send_parts(bucket: Bucket, path: Path, key: str, upload_id: str) -> list[Part]:
    """Send the parts of a file that the upload does not have yet; return all parts."""
    uploaded = {part["PartNumber"]: part["ETag"] for part in _uploaded_parts(bucket, key, upload_id)}
    parts: list[Part] = []
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


def _uploaded_parts(bucket: Bucket, key: str, upload_id: str) -> Iterator[Part]:
    page = _parts_page(bucket, key, upload_id, None)
    while True:
        yield from page.get("Parts", [])
        if not page.get("IsTruncated"):
            return
        page = _parts_page(bucket, key, upload_id, page["NextPartNumberMarker"])


def _parts_page(bucket: Bucket, key: str, upload_id: str, marker: int | None) -> PartsReply:
    full, client = bucket.prefix + key, bucket.client
    if marker is None:
        return bucket.call(key, lambda: client.list_parts(Bucket=bucket.name, Key=full, UploadId=upload_id))
    return bucket.call(
        key,
        lambda: client.list_parts(Bucket=bucket.name, Key=full, UploadId=upload_id, PartNumberMarker=marker),
    )
