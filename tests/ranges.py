"""Stores on loopback that give parts of files: a web server, and S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.servers import Handler, Server


class RangeServer(Server):
    """Serves the files of a folder with ranges; `requests` are those that brought bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = RangeHandler
        self.requests: list[tuple[str, int, int]] = []


class RangeHandler(Handler):
    """One request. Of the faults, it knows a status, `cut` and `short`."""

    server: RangeServer

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.rsplit("/", 1)[-1]
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.counts[name] += 1
        path = self.server.folder / name
        fault = next(self.server.faults.get(name, iter(())), "")
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        body = path.read_bytes()
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(start) : int(end or len(body)) + 1]
        self.server.requests.append((name, int(start), int(start) + len(part)))
        self.send_response(206 if "Range" in self.headers else 200)
        sent = part[: len(part) // 2] if fault else part
        self.send_header("Content-Length", str(len(sent if fault == "short" else part)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}")
        if fault:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(sent)


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of an S3 server; the client is told by the environment."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    pytest.importorskip("boto3").client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/set"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()
