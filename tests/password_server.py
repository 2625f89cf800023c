"""A git repository behind HTTP with a password, on this machine."""

from __future__ import annotations

import base64
import http.server
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


@contextmanager
def git_server(folder: Path, files: dict[str, str], password: str) -> Iterator[str]:
    """Commit files to a repository, serve it as data.git to the user `someone`, and yield host:port."""
    expected = "Basic " + base64.b64encode(f"someone:{password}".encode()).decode()

    class WithPassword(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != expected:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="data"')
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, format: str, *args: str) -> None:
            pass

    work, served = folder / "work", folder / "www"
    work.mkdir(parents=True)
    for name, text in files.items():
        (work / name).write_text(text)
    who = ["-c", "user.email=a@b", "-c", "user.name=a"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=work, check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(served / "data.git")], check=True)
    subprocess.run(["git", "update-server-info"], cwd=served / "data.git", check=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(WithPassword, directory=str(served))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
