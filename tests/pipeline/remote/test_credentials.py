"""Credentials that expire in mid-transfer are read again from where they come; Retry-After."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from pipeline.remote.answers import is_expired, is_permanent
from pipeline.remote.file import RemoteFile
from pipeline.remote.filesystem import (
    StoreError,
    StoreFolder,
    retry,
)
from tests.helpers.http_servers import QUICK, complain, remote, shards
from tests.helpers.range_servers import RangeHandler, RangeServer

EXPIRED = "<Error><Code>{}</Code><Message>The provided token has expired.</Message></Error>"


class GuardedHandler(RangeHandler):
    """Takes one token; after `limit` requests it is another, which `renew` is told."""

    def do_GET(self) -> None:
        server = self.server
        given = self.headers.get("x-amz-security-token") or self.headers.get("Authorization")
        if given != server.token:
            server.refusals += 1
            body = EXPIRED.format(server.code).encode() if self.command == "GET" else b""
            self.send_response(server.status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        server.limit -= 1
        if server.limit == 0:
            server.token = "fresh"
            server.renew("fresh")
        super().do_HEAD() if self.command == "HEAD" else super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def guarded(tiny_data: Path) -> Iterator[RangeServer]:
    """A server of `tiny_data` that asks for the token `stale`, later for another."""
    with RangeServer(tiny_data) as server:
        server.RequestHandlerClass = GuardedHandler
        server.token, server.limit, server.refusals = "stale", 0, 0
        server.status, server.code, server.renew = 400, "ExpiredToken", lambda token: None
        yield server
        fsspec.get_filesystem_class("http").clear_instance_cache()


@pytest.fixture
def s3_credentials(
    guarded: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Credentials in a file, as a job's agent renews them; what writes a token there."""
    pytest.importorskip("s3fs")
    path = tmp_path / "credentials"

    def write(token: str) -> None:
        keys = "aws_access_key_id = key\naws_secret_access_key = secret\n"
        path.write_text(f"[default]\n{keys}aws_session_token = {token}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", guarded.address.removesuffix("/set"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    write("stale")
    return write


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "RequestExpired")])
def test_a_token_that_expires_in_mid_transfer_is_renewed(
    guarded, s3_credentials, tiny_data, status, code
):
    guarded.status, guarded.code = status, code
    guarded.limit, guarded.renew = 2, s3_credentials  # the size and a block, no more
    shard = shards(tiny_data)[0]
    with RemoteFile(f"s3://set/{shard.name}", QUICK) as file:
        assert file.read() == (tiny_data / shard.name).read_bytes()
    assert guarded.refusals >= 1


def test_the_cache_goes_on_after_a_token_has_expired(guarded, s3_credentials, tiny_data, tmp_path):
    data = remote("s3://set", tmp_path / "cache")
    known = shards(tiny_data)
    for number, shard in enumerate(known[:2]):
        if number:  # expired between two shards, and written by the agent at the same time
            guarded.token = "fresh"
            s3_credentials("fresh")
        with data.open(shard) as file:
            assert file.read() == (tiny_data / shard.name).read_bytes()
    data.close()
    assert guarded.refusals >= 1


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "RequestExpired", "InvalidToken", "TokenRefreshRequired", "400"]
)
def test_a_token_that_nobody_renews_ends_in_a_line(code):
    refusal = PermissionError("The provided token has expired.")
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    refusal.__cause__ = type("ClientError", (Exception,), {"response": answer})()

    def fail() -> None:
        raise refusal

    with pytest.raises(StoreError, match=r"tried 4 times in .*HTTP 400.*expired") as raised:
        retry(fail, "s3://key:secret@set/a.tar", QUICK)
    assert complain(raised).endswith(
        "; renew the credentials where they are kept, which was read again for each try"
    )
    assert "secret" not in str(raised.value)


def test_a_bearer_token_of_fsspecs_configuration_is_read_again(guarded, tmp_path, monkeypatch):
    """A status of 401 without a code, as the Hub, Google and servers of one's own give it."""
    folder = tmp_path / "config"
    folder.mkdir()

    def write(token: str) -> None:
        settings = {"http": {"client_kwargs": {"headers": {"Authorization": token}}}}
        (folder / "conf.json").write_text(json.dumps(settings))

    monkeypatch.setattr(fsspec.config, "conf_dir", str(folder))
    monkeypatch.setattr(fsspec.config, "conf", dict[str, object]())
    monkeypatch.setattr("fsspec.spec.apply_config.__defaults__", (fsspec.config.conf,))
    write("stale")
    fsspec.config.set_conf_files(str(folder), fsspec.config.conf)
    guarded.status, guarded.limit, guarded.renew = 401, 2, write
    folder_of = StoreFolder(guarded.address, QUICK)
    first = folder_of.read("manifest.json")
    assert [folder_of.read("manifest.json") for _ in range(3)] == [first] * 3
    assert guarded.refusals == 1


def test_codes_of_other_stores_are_known():
    azure = type("HttpResponseError", (Exception,), {"error_code": "ExpiredAuthenticationToken"})()
    azure.status_code = 401
    assert is_expired(azure)
    assert not is_permanent(azure)
    hub = type("HfHubHTTPError", (Exception,), {})()
    hub.response = SimpleNamespace(status_code=401, headers={})
    assert is_permanent(hub)  # it may be a name that is not there: two tries
    assert not is_expired(hub)


class BusyHandler(RangeHandler):
    """Answers the first request of each file with 429, and when to come again."""

    def do_GET(self) -> None:
        self.server.asked.append(time.monotonic())
        if len(self.server.asked) == 1:
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        super().do_GET()


def test_a_store_that_asks_to_wait_is_asked_again_then(tiny_data):
    with RangeServer(tiny_data) as server:
        server.RequestHandlerClass, server.asked = BusyHandler, list[float]()
        assert StoreFolder(server.address, QUICK).read("manifest.json")
    first, second = server.asked
    assert 1.0 <= second - first < 5.0


def test_the_hubs_way_to_ask_for_a_pause_is_read(monkeypatch):
    pauses = list[float]()
    monkeypatch.setattr(time, "sleep", pauses.append)
    error = type("HfHubHTTPError", (Exception,), {})()
    error.response = SimpleNamespace(status_code=429, headers={"Retry-After": "9"})

    def fail() -> None:
        raise error

    with pytest.raises(StoreError, match="try again in 9 s, as it asks"):
        retry(fail, "hf://datasets/a/b", QUICK, watched=False)
    assert pauses == [9, 9, 9]
