"""A Prefect server that cannot be used is refused with one sentence, before anything runs."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import prefect
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from loraflow.failures import BadConfig, Network
from loraflow.flows.server.connection import require_server, require_server_for_run
from tests.unit.flows.test_recipe_file import recipe  # noqa: F401


class Answer(BaseHTTPRequestHandler):
    status, body = 200, b""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def serve():
    """Start a server that gives one answer to everything; return its address."""
    servers = []

    def start(status: int, body: str) -> HTTPServer:
        handler = type("One", (Answer,), {"status": status, "body": body.encode()})
        server = HTTPServer(("127.0.0.1", 0), handler)
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}/api"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "says", "kind"),
    [
        (401, "", "refuses the credentials", BadConfig),
        (403, "", "refuses the credentials", BadConfig),
        (404, "", "not a Prefect server", Network),
        (200, "<html>Prefect</html>", "not a Prefect server", Network),
        (200, "{}", "not a Prefect server", Network),
        (200, '"hello"', "not a Prefect server", Network),
        (200, '"2.20.1"', "another major version", BadConfig),
        (503, "", "not ready", Network),
        (429, "", "not ready", Network),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_with_one_request(serve, status, body, says, kind):
    server = serve(status, body)
    with temporary_settings({PREFECT_API_URL: server.url}):
        with pytest.raises(kind, match=says) as caught:
            require_server()
        assert len(server.requests) == 1
        with pytest.raises(BadConfig, match=says) as for_run:
            require_server_for_run()
    assert caught.value.where == server.url and caught.value.next_step
    assert for_run.value.exit_code == 2 and len(str(for_run.value).splitlines()) <= 5


def test_a_server_that_answers_is_accepted_and_gets_the_credentials(serve):
    server = serve(200, f'"{prefect.__version__}"')
    with temporary_settings({PREFECT_API_URL: server.url, PREFECT_API_AUTH_STRING: "user:password"}):
        require_server_for_run()
    [(path, authorization)] = server.requests
    assert path == "/api/admin/version" and authorization.startswith("Basic ")


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("http://127.0.0.1:9/api", "refused"),
        ("http://no-such-host.invalid/api", "ConnectError"),
        ("ftp://127.0.0.1/api", "UnsupportedProtocol"),
        ("http://user:hunter2@127.0.0.1:9/api", "refused"),
        ("http://127.0.0.1:99999/api", ""),
    ],
)
def test_an_address_without_a_server_is_refused_within_seconds_and_its_password_is_not_shown(url, got):
    started = time.monotonic()
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(BadConfig) as caught:
        require_server_for_run()
    assert got in caught.value.got and "unset PREFECT_API_URL" in caught.value.next_step
    assert "hunter2" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_https_to_a_server_without_it_is_refused(serve):
    server = serve(200, '"3.8.8"')
    with (
        temporary_settings({PREFECT_API_URL: server.url.replace("http:", "https:")}),
        pytest.raises(BadConfig) as caught,
    ):
        require_server_for_run()
    assert "does not answer" in str(caught.value)


def test_run_refuses_the_server_with_exit_status_2_before_anything_runs(recipe, serve, monkeypatch):  # noqa: F811
    server = serve(401, "")
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("The Prefect server refuses the credentials.") and done.stdout == ""
    assert len(done.stderr.splitlines()) == 5 and len(server.requests) == 1
    assert not Path(recipe.parent, "store", "runs").exists()
