"""The S3 client: its settings, the calls that the store makes, and the failures that its errors become.

boto3 reads credentials, region and endpoint from the usual sources: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL_S3,
~/.aws. It has no types of its own: they are those of mypy-boto3-s3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.failures import BadConfig, Failure, MissingExtra, Network, ReadOnlyStore

if TYPE_CHECKING:
    from botocore.exceptions import BotoCoreError, ClientError
    from mypy_boto3_s3 import S3Client

NOT_FOUND = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchUpload"})
CONFLICT = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
_ACCESS_DENIED = {"AccessDenied", "403", "Forbidden", "UnauthorizedAccess"}
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "RequestTimeTooSkewed", "BadDigest"}


def make_client() -> S3Client:
    """Make a client from the environment's settings.

    Raises:
        MissingExtra: boto3 is not installed.
        BadConfig: the settings are wrong.
    """
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

    try:
        config = Config(
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
        )
        # boto3's default session keeps the first credentials that it saw, and is not safe among threads.
        session = boto3.session.Session()
        client: S3Client = session.client("s3", config=config)
        if "amazonaws.com" not in client.meta.endpoint_url:  # other servers have no host name for each bucket
            client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    except (BotoCoreError, ValueError) as error:
        raise BadConfig(
            "The settings of the S3 client are wrong.",
            where="AWS_* of the environment, ~/.aws/config",
            got=str(error),
            next_step="correct them; `aws s3 ls` reads the same settings",
        ) from error
    return client


def error_code(error: ClientError) -> str:
    """Return the error code of S3, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def client_error_failure(error: ClientError, where: str, bucket: str) -> Failure:
    """Return the failure for a request that the server answered with an error."""
    code = error_code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    got = f"{code}: {error.response.get('Error', {}).get('Message', '')}".strip(": ")
    if code == "NoSuchBucket":
        return BadConfig(
            "The store's bucket does not exist.",
            where=where,
            got=got,
            next_step=f"create it with `aws s3 mb s3://{bucket}`, or set runtime.store to another bucket",
        )
    if code in _WRONG_CREDENTIALS:
        return BadConfig(
            "The store refuses the credentials.",
            where=where,
            got=got,
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    if code in _ACCESS_DENIED:
        return ReadOnlyStore(
            "The credentials do not allow this request to the store.",
            where=where,
            got=f"{error.operation_name}: {got}",
            next_step="allow s3:ListBucket, GetObject, PutObject, DeleteObject, AbortMultipartUpload on the prefix",
        )
    if status >= 500 or code in _BUSY:
        return Network("The store did not answer.", where=where, got=got, next_step="run again: uploads resume")
    return Failure(
        "The store refused a request.",
        where=where,
        got=f"{error.operation_name}: {got}",
        next_step="check the bucket's settings; `aws s3 ls` sends a similar request",
    )


def request_failure(error: BotoCoreError | OSError, where: str) -> Failure:
    """Return the failure for a request that the client could not send, or that got no answer."""
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

    if isinstance(error, ParamValidationError):
        return BadConfig(
            "The store's address is not valid.",
            where="runtime.store",
            expected="s3://bucket/prefix",
            got=str(error)[:200],
            next_step="correct runtime.store",
        )
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return BadConfig(
            "There are no credentials for the store.",
            where=where,
            got=str(error),
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    return unreachable_failure(where, error)


def unreachable_failure(where: str, error: Exception | str) -> Network:
    """Return the failure for a store that cannot be reached."""
    return Network(
        "The store did not answer.",
        where=where,
        got=str(error),
        next_step="check the network and AWS_ENDPOINT_URL_S3, then run again: uploads resume",
    )
