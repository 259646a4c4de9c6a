"""Sources of images for tests: put into stores, and read back by their listings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import fsspec
import pytest

from pipeline.sources import Listing, open_reader
from tests.helpers import hub_servers
from tests.helpers.http_servers import QUICK, Server
from tests.helpers.hub_servers import serve_hub
from tests.helpers.range_servers import RangeServer


def read_contents(listing: Listing) -> list[tuple[str, bytes]]:
    """Return class and bytes of each image, in the order of the rows."""
    readers = [open_reader(container, QUICK) for container in listing.containers]
    found = []
    for row, name in zip(listing.rows, listing.names, strict=True):
        data = readers[row["container"]].read(name, int(row["place"]), int(row["size"]))
        found.append((listing.classes[row["label"]], data))
    for reader in readers:
        reader.close()
    return found


@contextmanager
def serve_index(folder: Path) -> Iterator[str]:
    """Yield the address of a web server that shows folders as pages of links."""

    class Index(SimpleHTTPRequestHandler):
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

    with Server(folder) as server:
        server.RequestHandlerClass = partial(Index, directory=str(folder))
        yield f"http://127.0.0.1:{server.server_address[1]}"


@contextmanager
def publish_folder(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of a folder in the store `request.param`: memory, http, index, s3, hf.

    `http` gives files by ranges and lists nothing; `index` has pages of links, and no ranges.
    """
    if request.param == "http":
        with RangeServer(folder) as server:
            yield server.address
    elif request.param == "index":
        with serve_index(folder) as address:
            yield address
    elif request.param == "hf":
        with serve_hub(request.getfixturevalue("monkeypatch"), main=folder):
            yield f"hf://datasets/{hub_servers.NAME}"
    elif request.param == "memory":
        system = fsspec.filesystem("memory")
        system.put(str(folder), "/published", recursive=True)
        yield "memory://published"
        system.rm("/published", recursive=True)
    else:
        address = f"{request.getfixturevalue('s3_bucket')}/set"
        for path in filter(Path.is_file, folder.rglob("*")):
            fsspec.filesystem("s3").put_file(str(path), f"{address}/{path.relative_to(folder)}")
        yield address
