"""Caches on disks that are full, read-only, in the way, or gone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from pipeline.remote.cache import Cache
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.caches import ROOT, small_size
from tests.helpers.http_servers import HASTY, remote, shards


def in_namespace(options: str, folder: Path, script: str, *arguments: str) -> str:
    """Run Python with a tmpfs of its own on `folder`, which nobody else sees; return its output."""
    inner = f'mount -t tmpfs {options} tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", inner, "sh", str(folder), sys.executable, "-c", script]
    probe = [*command[:6], str(folder), "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no mount in a namespace of its own is allowed here")
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BAD_DISK = (
    "import sys; from pathlib import Path; from tests.helpers.http_servers import *\n"
    "from pipeline.tools.errors import DuetError\n"
    "cache = Path(sys.argv[2])\n"
    "try:\n"
    "    data = remote(sys.argv[1], cache)\n"
    "    for shard in shards(data.folder): data.fetch_shard(shard)\n"
    "except DuetError as error:\n"
    "    print(error.exit_code, error)\n"
    "    print(len(list(cache.rglob('*.partial'))))\n"
)


def test_a_disk_that_is_really_full(server, tiny_data, tmp_path):
    full = (small_size(tiny_data, 2) // 4096 + 20) * 4096
    said = in_namespace(f"-o size={full}", tmp_path, BAD_DISK, server.address, str(tmp_path))
    error, partials = said.splitlines()
    assert error.startswith(f"3 cache {tmp_path}")
    assert "no space left" in error
    assert "--cache-size" in error
    assert partials == "0"
    # Found at once, and not taken for the store's failure.
    assert max(server.counts.values()) == 1


def test_a_disk_that_is_really_read_only(server, tmp_path):
    said = in_namespace("-o ro", tmp_path, BAD_DISK, server.address, str(tmp_path))
    assert said.startswith(f"2 cache {tmp_path} cannot be written (Read-only file system)")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SetupError), (errno.EROFS, UsageError)]
)
def test_a_disk_that_fails_in_the_middle(
    server, tiny_data, tmp_path, monkeypatch: pytest.MonkeyPatch, number, kind
):
    """The same without a mount: the file system of the store fails as the disk would."""
    data = remote(server.address, tmp_path)

    async def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsspec.get_filesystem_class("http"), "_get_file", fail)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    with pytest.raises(kind, match=f"cache {tmp_path}.* --cache") as raised:
        data.fetch_shard(shards(tiny_data)[0])
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    fsspec.get_filesystem_class("http").clear_instance_cache()


def test_a_file_in_the_place_of_the_cache(server, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"cache .*file.* cannot be written .* --cache"):
            Cache(folder, 10**9, 1)


def test_a_cache_that_vanishes(server, tiny_data, tmp_path):
    data = remote(server.address, tmp_path / "cache", policy=HASTY)
    (tmp_path / "cache").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"cache .* cannot be written"):
        data.fetch_shard(shards(tiny_data)[0])
