"""Stores on loopback that misbehave on demand, and what other processes do with them."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.dataset.manifest import Manifest, Shard
from pipeline.remote.cache import Cache
from pipeline.remote.dataset import RemoteDataset
from pipeline.remote.download import Store
from pipeline.remote.filesystem import RetryPolicy
from pipeline.tools.errors import DuetError

QUICK = RetryPolicy(attempts=4, first_delay=0.02, stall=5)
HASTY = RetryPolicy(attempts=4, first_delay=0.02, stall=0.25)
"""Tries and timeouts for servers that are stuck; on a busy machine a good one may be retried."""
STUCK = ("stall", "trickle", "mute")
PLENTY = 10**9
ALWAYS = itertools.repeat


class Server(ThreadingHTTPServer):
    """Serves the files of a folder over HTTP, without ranges, and counts the requests.

    `faults[name]` says what happens to the next requests of a file, one item each: see `Handler`.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, Iterator[str]] = {}
        self.counts: Counter[str] = Counter()
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set"

    def fail(self, name: str, faults: Iterable[str]) -> None:
        self.faults[name] = iter(faults)

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients that go away are part of the tests."""

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request. A fault is a status such as `503`, or one of those in `do_GET`."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        _, inside, name = self.path.rpartition("/set/")
        name = name if inside else self.path.rsplit("/", 1)[-1]
        self.server.counts[name] += 1
        fault = next(self.server.faults.get(name, iter(())), "")
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        body = path.read_bytes()
        half = len(body) // 2
        damaged = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        promised, sent = {
            "": (len(body), body),
            "flip": (len(body), damaged),
            "short": (half, body[:half]),  # truncated in the store: the length is that of it
            "cut": (len(body), body[:half]),  # the connection ends early
            "cut-unnoticed": (None, body[:half]),  # ... and no length was promised
            "no-length": (None, body),
            "lie-short": (half, body),
            "lie-long": (len(body) + 1000, body),
            "too-long": (len(body) + 1000, body + bytes(1000)),
            "empty": (0, b""),
            "stall": (len(body), body[:half]),
            "trickle": (len(body), body),
            "mute": (len(body), b""),
            "reset": (len(body), body[:half]),
            "slow": (len(body), body),
        }[fault]
        if fault == "mute":
            self.server.released.wait()
            return
        self._head(promised)
        self._send(fault, sent)

    def _head(self, promised: int | None) -> None:
        self.send_response(200)
        if promised is not None:
            self.send_header("Content-Length", str(promised))
        self.send_header("Connection", "close")
        self.end_headers()

    def _send(self, fault: str, sent: bytes) -> None:
        self.close_connection = True
        if fault == "trickle":
            for place in range(len(sent)):
                self.wfile.write(sent[place : place + 1])
                if self.server.released.wait(0.05):
                    return
        if fault == "slow":
            time.sleep(0.15)
        self.wfile.write(sent)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def remote(
    address: str,
    cache: Path,
    *,
    size: int = PLENTY,
    policy: RetryPolicy = QUICK,
    threads: int = 2,
    timeout: float | None = None,
) -> RemoteDataset:
    """Open a data set as `open_dataset` does, with timeouts that suit tests."""
    wait = policy.lock_timeout if timeout is None else timeout
    return RemoteDataset(Store(address, policy), Cache(cache, size, wait), threads)


def shards(data: Path, split: str = "train") -> tuple[Shard, ...]:
    return Manifest.load(data).splits[split].shards


def wait_for(what, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def complain(raised: pytest.ExceptionInfo[DuetError]) -> str:
    """Return the message of an error, which must be one line."""
    text = str(raised.value)
    assert "\n" not in text
    return text


def fetch_all(address: str, cache: str, order: Iterable[int] = ()) -> None:
    """Fetch the shards of the training split in this order; runs in a process of its own."""
    data = remote(address, Path(cache))
    known = shards(data.folder)
    for place in order or range(len(known)):
        with data.open(known[place]) as file:
            assert len(file.read()) == known[place].bytes
    data.close()
