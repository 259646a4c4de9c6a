"""Stores on loopback that give parts of files: a web server, and S3."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.http_servers import Handler, Server


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
