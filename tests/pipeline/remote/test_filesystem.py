"""HTTP client and addresses: redirects, proxies, settings, Retry-After, hosts, chains, secrets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import aiohttp
import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from pipeline.remote import filesystem
from pipeline.remote.answers import (
    describe_error,
    is_missing,
    is_permanent,
    read_retry_after,
)
from pipeline.remote.file import RemoteFile
from pipeline.remote.filesystem import (
    RetryPolicy,
    StoreError,
    StoreFolder,
    check_address,
    open_filesystem,
    retry,
    split_chain,
)
from pipeline.tools.errors import UsageError, summarize_error
from tests.helpers.http_servers import HASTY, PLENTY, QUICK, Server, remote, shards
from tests.helpers.range_servers import RangeHandler, RangeServer

QUERY = "Signature=ab%2Fcd%2Bef%3D&disposition=inline%3B+filename*%3DUTF-8%27%27a%20b.tar"


class SigningHandler(RangeHandler):
    """Redirects to a signed address, and takes that letter for letter; or answers as a proxy."""

    def do_GET(self) -> None:
        self.server.paths.append((self.path, dict(self.headers)))
        path, _, query = self.path.partition("?")
        if self.server.signs and not query:
            self.send_response(302)
            self.send_header("Location", f"{path}?{self.server.signs}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.server.signs and query != QUERY:
            self.send_error(403, f"no: {self.path}")
            return
        self.path = unquote(path)
        super().do_HEAD() if self.command == "HEAD" else super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def signing(tmp_path: Path) -> Iterator[Server]:
    """A server of a folder with `a b.tar`; `signs` is the query that it redirects to."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a%20b#1.tar").write_bytes(b"0123456789" * 1000)
    with RangeServer(tmp_path / "served") as server:
        server.RequestHandlerClass = SigningHandler
        server.paths, server.signs = [], ""
        fsspec.filesystem("http").clear_instance_cache()
        yield server


def read(address: str, policy: RetryPolicy = QUICK) -> bytes:
    with RemoteFile(address, policy) as file:
        return file.read()


def test_the_signature_of_a_redirect_arrives_letter_for_letter(signing, tmp_path):
    signing.signs = QUERY
    content = b"0123456789" * 1000
    assert read(f"{signing.address}/a%2520b%231.tar") == content
    folder = StoreFolder(signing.address, QUICK)
    assert folder.read("a%20b#1.tar") == content


def test_a_signature_that_is_refused_is_not_told(signing):
    signing.signs = QUERY.replace("ab", "0secret")
    with pytest.raises(StoreError) as raised:
        read(f"{signing.address}/a%2520b%231.tar")
    assert "HTTP 403" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_environments_proxy_is_taken_on_both_roads(signing, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{signing.server_address[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert read("http://data.example.invalid/set/a%2520b%231.tar") == b"0123456789" * 1000
    signing.folder = tiny_data
    data = remote("http://data.example.invalid/set", tmp_path / "cache", size=PLENTY)
    shard = shards(tiny_data)[0]
    assert data.open(shard).read() == (tiny_data / shard.name).read_bytes()
    data.close()
    assert all(path.startswith("http://data.example.invalid/set/") for path, _ in signing.paths)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(f"{signing.address}/{shard.name}") == (tiny_data / shard.name).read_bytes()


def test_settings_of_the_user_are_merged_with_ours(signing, monkeypatch):
    monkeypatch.setitem(
        fsspec.config.conf, "http", {"client_kwargs": {"headers": {"X-Key": "mine"}}}
    )
    signing.signs = QUERY  # ours still hold
    for reports_bytes in (False, True):
        system, _ = open_filesystem(f"{signing.address}/x", QUICK, reports_bytes=reports_bytes)
        assert system.client_kwargs["requote_redirect_url"] is False
        assert isinstance(system.client_kwargs["timeout"], aiohttp.ClientTimeout)
    assert read(f"{signing.address}/a%2520b%231.tar")
    assert {headers.get("X-Key") for _, headers in signing.paths} == {"mine"}
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"trust_env": False}})
    system, _ = open_filesystem("https://host/x", QUICK)
    assert system.client_kwargs["trust_env"] is False
    assert system.client_kwargs["headers"] == {"X-Key": "mine"}


def test_google_cloud_gets_the_proxy_and_keeps_the_users_settings(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "gs", {"session_kwargs": {"read_bufsize": 9}})
    assert filesystem._client_options("gcs", QUICK, False) == {
        "session_kwargs": {"trust_env": True, "read_bufsize": 9}
    }


def answer(headers: dict[str, str], status: int = 503) -> aiohttp.ClientResponseError:
    request = SimpleNamespace(real_url="http://host/x")
    return aiohttp.ClientResponseError(request, (), status=status, headers=CIMultiDict(headers))


def in_time(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_a_server_that_asks_to_wait_is_waited_for(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fail() -> None:
        raise answer({"retry-after": "7"}, 429)

    with pytest.raises(StoreError, match="try again in 7 s, as it asks"):
        retry(fail, "http://host/x", QUICK)
    assert pauses == [7, 7, 7]

    def fail_for_long() -> None:
        raise answer({"Retry-After": "86400"})

    pauses.clear()
    with pytest.raises(StoreError, match="86400 s"):
        retry(fail_for_long, "http://host/x", HASTY)
    assert pauses == [HASTY.request_timeout()] * 3


def test_the_time_to_wait_is_read_in_all_its_forms():
    assert read_retry_after(answer({"Retry-After": in_time(90)})) == pytest.approx(90, abs=3)
    for text in ("", "soon", "-3", "1e9", in_time(-90), "Mon, 99 Foo 2026"):
        assert read_retry_after(answer({"Retry-After": text})) == 0
    error = OSError("slow down")
    meta = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "5"}}}
    error.__cause__ = type("ClientError", (Exception,), {"response": meta})()
    assert read_retry_after(error) == 5
    assert not is_permanent(error)
    assert read_retry_after(ValueError()) == 0


@given(st.text())
def test_any_time_to_wait_is_a_number(text):
    assert read_retry_after(answer({"Retry-After": text.encode("utf-8", "replace").decode()})) >= 0


@pytest.mark.parametrize(
    ("address", "links"),
    [
        ("http://[::1]:8080/a.tar", 1),
        ("http://[fe80::1%25eth0]/a.tar", 1),
        ("http://[2001:db8::]/a::b.tar", 1),
        ("s3://bucket/a::b/c.tar", 1),
        ("simplecache::http://[::1]:8080/a.tar", 2),
        ("zip://x.csv::simplecache::s3://bucket/a.zip", 3),
        ("memory://a.tar::memory://b.tar", 2),
    ],
)
def test_a_chain_is_told_from_a_host_or_a_name(address, links):
    found = split_chain(address)
    assert len(found) == links
    assert "::".join(found) == address


def test_names_with_signs_are_read(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("a [1].tar", "a%20b.tar", "c#1.tar"):
        memory.pipe_file(f"/signs/{name}", name.encode())
        assert read(f"memory://signs/{name}") == name.encode()
        assert StoreFolder("memory://signs", QUICK).read(name) == name.encode()
    system, path = open_filesystem("simplecache::memory://signs/c#1.tar", QUICK)
    assert system.cat_file(path) == b"c#1.tar"
    _, path = open_filesystem("s3://bucket/a::b/c.tar", QUICK)
    assert path == "bucket/a::b/c.tar"


def test_an_endless_answer_is_one_short_line():
    assert len(describe_error(OSError("x" * 100_000))) < 1000
    assert len(summarize_error(ValueError("x" * 100_000))) < 1000


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://[::1/a", "Invalid IPv6 URL"),
        ("https://host:99999/a", "Port out of range"),
        ("https://host:http/a", "Port could not be cast"),
        ("simplecache::https://host/a?sig=secret", "query"),
        ("simplecache::http://[::1]/a", "takes '::' of a host"),
    ],
)
def test_an_address_that_cannot_be_is_refused_in_a_line(address, says):
    with pytest.raises(UsageError, match=says) as raised:
        check_address(address, "data set")
    assert "secret" not in str(raised.value)


def test_a_timeout_for_which_fsspec_says_that_nothing_is_there_is_a_timeout():
    lost, gone = FileNotFoundError("a.tar"), FileNotFoundError("a.tar")
    lost.__cause__, gone.__cause__ = TimeoutError("reading data"), FileNotFoundError("a.tar")
    assert not is_permanent(lost)
    assert not is_missing(lost)
    assert describe_error(lost) == "TimeoutError: reading data"
    assert is_permanent(gone)
    assert is_missing(gone)
    assert is_missing(FileNotFoundError("a.tar"))
