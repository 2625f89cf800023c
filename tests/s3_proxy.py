"""A proxy between an S3 client and its server that records requests and injects faults over HTTP.

Faults are injected on the wire, so the tests do not depend on the client library of the store.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.object_server import Server

# (method, query parameter that tells the operation apart, or "") -> name in the S3 API
_OPERATIONS = {
    ("GET", "list-type"): "ListObjectsV2",
    ("GET", "uploads"): "ListMultipartUploads",
    ("GET", "uploadId"): "ListParts",
    ("GET", ""): "GetObject",
    ("HEAD", ""): "HeadObject",
    ("PUT", "partNumber"): "UploadPart",
    ("PUT", ""): "PutObject",
    ("POST", "uploads"): "CreateMultipartUpload",
    ("POST", "uploadId"): "CompleteMultipartUpload",
    ("POST", "delete"): "DeleteObjects",
    ("DELETE", "uploadId"): "AbortMultipartUpload",
    ("DELETE", ""): "DeleteObject",
}


@dataclass(frozen=True)
class Request:
    """One request to the server: the S3 operation, the key in the bucket, and the number of an uploaded part."""

    operation: str
    key: str
    part: int | None


@dataclass(frozen=True)
class Answer:
    """Answer with an S3 error instead of asking the server."""

    status: int
    code: str


class DropConnection(Exception):
    """Close the connection without asking the server and without an answer."""


class LoseReply(Exception):
    """Send the request to the server, but close the connection instead of passing its answer on."""


# Called for each request before it goes to the server: returns an error to answer with, raises one of the exceptions
# above, or waits. None passes the request on.
Fault = Callable[[Request], Answer | None]


class Proxy:
    """A running proxy; `requests` holds what was asked so far, and `fault` decides on each request."""

    def __init__(self, server_url: str):
        self.requests: list[Request] = []
        self.fault: Fault = lambda request: None
        self.upstream = urlsplit(server_url).netloc
        proxy = self

        class Handler(_Handler):
            def handle_request(self) -> None:
                self.pass_on(proxy)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def operations(self) -> list[str]:
        """Return the names of the operations so far, in order."""
        return [request.operation for request in self.requests]

    def stop(self) -> None:
        """Stop to listen; open connections end by themselves."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self, proxy: Proxy) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = _parse(self.command, self.path)
        proxy.requests.append(request)
        lost = False
        try:
            answer = proxy.fault(request)
        except DropConnection:
            self.close_connection = True
            return
        except LoseReply:
            answer, lost = None, True
        if answer is not None:
            text = f"<Error><Code>{answer.code}</Code><Message>injected by the test</Message></Error>".encode()
            self._reply(answer.status, [("Content-Type", "application/xml")], text)
            return
        try:
            status, headers, data = self._ask(proxy.upstream, body)
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # the server is down: so is the proxy
            return
        if lost:
            self.close_connection = True
            return
        self._reply(status, headers, data)

    def _ask(self, upstream: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(upstream, timeout=60)
        # The signature covers the headers, the host among them: they are passed on unchanged.
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        data = response.read()
        headers = response.getheaders()
        connection.close()
        return response.status, headers, data

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection") and not (
                data and name.lower() == "content-length"
            ):
                self.send_header(name, value)
        if data or not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: str) -> None:
        """Print nothing: tests read `Proxy.requests`."""


def _parse(method: str, target: str) -> Request:
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    names = [name for verb, name in _OPERATIONS if verb == method and name in query]
    key = re.sub(r"^/[^/]*/?", "", unquote(parts.path))
    if method in ("GET", "HEAD") and not key and not names:
        return Request("HeadBucket", "", None)
    number = query.get("partNumber")
    return Request(_OPERATIONS[method, names[0] if names else ""], key, int(number[0]) if number else None)


@contextmanager
def running(server_url: str) -> Iterator[Proxy]:
    """Run a proxy in front of a server."""
    proxy = Proxy(server_url)
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(name="proxy")
def s3_proxy(s3_server: Server, bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Run a proxy that every store goes through which is opened from here on."""
    with running(s3_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy
