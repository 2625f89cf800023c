"""A fake of the Hugging Face Hub's API on this machine. It stores uploads and records requests."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Repositories of one hub: {name: {"private": …, "files": {path: bytes}, "commits": [{"message", "changed"}]}}."""

    def __init__(self, token: str):
        self.token = token
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse_commits = 0  # the next commits to answer with 500
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def reply(self, value, status=200):
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def handle_any(self):
                path = self.path.split("?")[0]
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, path))
                if path.startswith("/blobs/"):
                    hub.blobs[path.removeprefix("/blobs/")] = body
                    return self.reply({})
                if self.headers.get("Authorization") not in (f"Bearer {hub.token}", None):
                    return self.reply({"error": "Invalid credentials"}, 401)
                if self.headers.get("Authorization") is None and self.command != "GET":
                    return self.reply({"error": "no token"}, 401)
                return self.reply(*hub.answer(self.command, path, body))

            do_GET = do_POST = do_PUT = handle_any

        return Handler

    def answer(self, command, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.endpoint}/{name}"}
            if name in self.repos:
                return {**url, "error": "exists"}, 409
            private = asked.get("private", False) or asked.get("visibility") == "private"  # before and since 2.0
            self.repos[name] = {"private": private, "files": {}, "commits": []}
            return (url,)
        if path == "/api/validate-yaml":
            return ({"errors": [], "warnings": []},)
        if path.endswith("/info/lfs/objects/batch"):
            return ({"transfer": "basic", "objects": [self._lfs(item) for item in json.loads(body)["objects"]]},)
        if not path.startswith("/api/models/"):
            return {"error": path}, 404
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return {"error": "Repository not found"}, 404
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            return ({"files": [{"path": f["path"], "shouldIgnore": False, "oid": self._oid(repo, f["path"]),
                                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]},)  # fmt: skip
        if rest[:1] == ["commit"]:
            return self._commit(f"{owner}/{name}", repo, [json.loads(line) for line in body.splitlines()])
        if rest[:1] == ["tree"]:
            return (
                [
                    {"type": "file", "path": p, "size": len(d), "oid": self._oid(repo, p)}
                    for p, d in repo["files"].items()
                ],
            )
        head = f"{len(repo['commits']):040x}"
        siblings = [{"rfilename": path} for path in repo["files"]]
        return ({"id": f"{owner}/{name}", "private": repo["private"], "sha": head, "siblings": siblings, "tags": []},)

    def _oid(self, repo, path):
        """Return git's id of a file, or the sha256 of a large one, as the hub does."""
        data = repo["files"].get(path)
        if data is None:
            return None
        if path.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _lfs(self, item):
        found = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.blobs:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.endpoint}/blobs/{item['oid']}"}}}

    def _commit(self, name, repo, lines):
        if self.refuse_commits:
            self.refuse_commits -= 1
            return {"error": "try later"}, 500
        changed = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.blobs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                repo["files"][value["path"]] = data
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
            changed += [value["path"]] if "path" in value else []
        repo["commits"].append({"message": lines[0]["value"]["summary"], "changed": changed})
        commit = f"{len(repo['commits']):040x}"
        return ({"commitUrl": f"{self.endpoint}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None},)
