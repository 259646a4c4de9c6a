"""Sources of images for tests: put into stores, and read back by their listings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from pipeline.sources import Listing, open_reader
from tests.helpers import hub_servers
from tests.helpers.http_servers import QUICK
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
def publish_folder(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of a folder in the store `request.param`: memory, http, s3, hf."""
    if request.param == "http":
        with RangeServer(folder) as server:
            yield server.address
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
        for path in folder.iterdir():
            fsspec.filesystem("s3").put_file(str(path), f"{address}/{path.name}")
        yield address
