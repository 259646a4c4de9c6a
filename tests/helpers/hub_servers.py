"""The Hugging Face hub on loopback, so far as Duet asks it: trees by pages, files by redirects."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.helpers.http_servers import Handler, Server

NAME = "duet/shapes"
PAGE = 3
"""Entries in a page of a listing; the hub's own have a thousand."""


class HubServer(Server):
    """Serves one data set, `revisions` of which are folders; large files from `cdn`.

    With a token, nobody else may read. `refusals` are the next answers to requests for files: a
    status each, of which 429 asks to wait for a second.
    """

    def __init__(self, revisions: Mapping[str, Path], token: str | None = None) -> None:
        super().__init__(Path())
        self.RequestHandlerClass = HubHandler
        self.revisions, self.token = dict(revisions), token
        self.cdn = Server(Path())
        self.cdn.RequestHandlerClass = CdnHandler
        self.cdn.files = {}
        self.refusals: list[int] = []
        self.kinds: Counter[str] = Counter()
        """Number of requests of each kind: info, tree, resolve."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        self.cdn.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.cdn.__exit__(*error)


class HubHandler(Handler):
    """One request to the hub."""

    server: HubServer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        for kind in ("tree", "resolve", "revision"):
            head, found, rest = path.partition(f"/{kind}/")
            if found:
                break
        else:
            head, kind, rest = path, "revision", "main"
        self.server.kinds[kind] += 1
        if head.removeprefix("/api") != f"/datasets/{NAME}" or not self._is_allowed():
            return
        revision, _, inside = rest.partition("/")
        folder = self.server.revisions.get(unquote(revision))
        if folder is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif kind == "revision":
            self._answer(json.dumps({"id": NAME, "sha": "0" * 40, "siblings": []}).encode())
        elif not (folder / unquote(inside)).exists():
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif kind == "tree":
            self._list(folder, folder / unquote(inside), parse_qs(query), path)
        else:
            self._redirect(folder / unquote(inside))

    do_HEAD = do_GET

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.server.token or 'any'}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif given is None and self.server.token is not None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def _list(self, root: Path, folder: Path, query: dict[str, list[str]], path: str) -> None:
        inside = sorted(folder.rglob("*") if query["recursive"] == ["true"] else folder.iterdir())
        first = int(query.get("cursor", ["0"])[0])
        page = [
            {
                "type": "directory" if one.is_dir() else "file",
                "oid": hashlib.sha1(one.name.encode()).hexdigest(),
                "size": 0 if one.is_dir() else one.stat().st_size,
                "path": str(one.relative_to(root)),
            }
            for one in inside[first : first + PAGE]
        ]
        link = {}
        if first + PAGE < len(inside):
            after = f"recursive={query['recursive'][0]}&expand=false&cursor={first + PAGE}"
            link = {"Link": f'<{self.server.endpoint}{path}?{after}>; rel="next"'}
        self._answer(json.dumps(page).encode(), link)

    def _redirect(self, file: Path) -> None:
        if self.server.refusals:
            status = self.server.refusals.pop(0)
            self._refuse(status, "GatedRepo" if status == 403 else "", "no", "1")
            return
        digest = hashlib.sha256(str(file).encode()).hexdigest()
        self.server.cdn.files[digest] = file
        self.send_response(302)
        host = f"http://127.0.0.1:{self.server.cdn.server_address[1]}"
        self.send_header("Location", f"{host}/{digest}?X-Amz-Signature={quote('a+b/c=')}")
        self.send_header("X-Linked-Size", str(file.stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str, wait: str = "") -> None:
        self.send_response(status)
        for name, value in {
            "X-Error-Code": code, "X-Error-Message": message,
            "Retry-After": wait if status == 429 else "", "Content-Length": "0",
        }.items():  # fmt: skip
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _answer(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class CdnHandler(Handler):
    """One request for the bytes of a file, which must be signed and have no token."""

    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        file = self.server.files.get(path[1:])
        if file is None or query != f"X-Amz-Signature={quote('a+b/c=')}":
            self.send_error(403)
            return
        if "Authorization" in self.headers:  # as S3 answers two ways to prove oneself
            self.send_error(400)
            return
        body = file.read_bytes()
        start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(start) : int(end or len(body)) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if "Range" in self.headers:
            last = int(start) + len(part) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(body)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    do_HEAD = do_GET


@contextmanager
def serve_hub(
    monkeypatch: pytest.MonkeyPatch, token: str | None = None, **revisions: Path
) -> Iterator[HubServer]:
    """Serve folders as revisions of a data set, and lead `hf://` there."""
    with HubServer(revisions, token) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield server
        huggingface_hub.HfFileSystem.clear_instance_cache()
