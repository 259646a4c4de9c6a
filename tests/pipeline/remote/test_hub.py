"""Repositories of the Hugging Face hub as sources and as data sets, on a hub of our own."""

from __future__ import annotations

from contextlib import closing

import huggingface_hub
import pytest
from huggingface_hub import constants

from pipeline import Stream
from pipeline.remote.file import RemoteFile
from pipeline.remote.filesystem import Unreachable, check_address
from pipeline.sources import scan
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import QUICK, complain, remote, shards
from tests.helpers.hub_servers import NAME, serve_hub
from tests.helpers.images import packed
from tests.helpers.webdatasets import IMAGES, write_shards

SET = f"hf://datasets/{NAME}"


def forget() -> None:
    """Drop what the library remembers of a repository: a command begins without."""
    huggingface_hub.HfFileSystem.clear_instance_cache()


def test_a_data_set_is_streamed(tiny_data, tmp_path, monkeypatch):
    settings = {"batch_size": 8, "seed": 3, "threads": 1, "device": "cpu", "shuffle": "block"}
    with serve_hub(monkeypatch, token="secret", main=tiny_data):
        monkeypatch.setenv("HF_TOKEN", "secret")
        with Stream(SET, cache=str(tmp_path), **settings) as stream:
            far = [next(stream) for _ in range(3)]
        with Stream(tiny_data, **settings) as stream:
            near = [next(stream) for _ in range(3)]
        for one, other in zip(far, near, strict=True):
            assert one.ids.tolist() == other.ids.tolist()
            assert (one.images == other.images).all()


def test_a_revision_stays_what_it_was(tiny_data, second_data, tmp_path, monkeypatch):
    """Also the one of a data set's parquet files, whose name has slashes."""
    older = {"v1.0": second_data, "refs/convert/parquet": second_data}
    with serve_hub(monkeypatch, main=tiny_data, **older):
        for address, folder in (
            (SET, tiny_data),
            (f"{SET}@v1.0", second_data),
            (f"{SET}@refs/convert/parquet", second_data),
        ):
            with closing(remote(address, tmp_path / "cache")) as dataset:
                for shard in shards(folder):
                    assert (
                        dataset.fetch_shard(shard).read_bytes()
                        == (folder / shard.name).read_bytes()
                    )


def test_a_folder_with_dots_in_its_name_is_listed(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s/imagenet-1.0", cls=lambda place: place % 4)
    (folder / "notes here.md").write_text("…")
    with serve_hub(monkeypatch, **{"v1.2": folder.parent}) as server:
        listing = scan(f"{SET}@v1.2/imagenet-1.0", tmp_path / "scratch", split="train")
        assert len(listing) == len(IMAGES)
        assert server.kinds["tree"] == 2  # of four files, three are on the first page


def test_packed_from_the_hub(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    with serve_hub(monkeypatch, token="secret", main=folder):
        monkeypatch.setenv("HF_TOKEN", "secret")
        packed(tmp_path / "far", train=SET, workers=1)
    packed(tmp_path / "near", train=folder, workers=1)
    for name in ("train-000000.tar", "train.index.npy", "stats.npz"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()


def test_the_token_of_the_file_is_used(tiny_data, tmp_path, monkeypatch):
    with serve_hub(monkeypatch, token="secret", main=tiny_data):
        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        # Where git keeps its password of the same host.
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        size = (tiny_data / "manifest.json").stat().st_size
        assert len(RemoteFile(f"{SET}/manifest.json", QUICK).read()) == size


@pytest.mark.parametrize(
    ("token", "name", "way"),
    [
        (None, "train-000000.tar", "or it is private: set HF_TOKEN to a token that may read it"),
        ("wrong", "train-000000.tar", "the hub refuses the token: set HF_TOKEN"),
        ("secret", "nothing.tar", "has no such file"),
    ],
)
def test_a_refusal_says_what_to_do(token, name, way, tiny_data, monkeypatch):
    with serve_hub(monkeypatch, token="secret", main=tiny_data):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(Unreachable) as raised:
            RemoteFile(f"{SET}/{name}", QUICK)
    assert way in complain(raised)
    assert "tried 2 times" in complain(raised)


def test_a_refused_listing_says_what_to_do(tiny_data, tmp_path, monkeypatch):
    with serve_hub(monkeypatch, token="secret", main=tiny_data):
        for revision, token, way in (
            ("", None, "or it is private: set HF_TOKEN"),
            ("", "wrong", "the hub refuses the token"),
            ("@gone", "secret", "the repository has no such revision"),
        ):
            if token:
                monkeypatch.setenv("HF_TOKEN", token)
            forget()
            with pytest.raises(Unreachable, match=way) as raised:
                scan(f"{SET}{revision}", tmp_path / "scratch", split="train")
            assert "secret" not in complain(raised)


def test_consent_is_asked_for(tiny_data, monkeypatch):
    with serve_hub(monkeypatch, main=tiny_data) as server:
        server.refusals = [403] * 8
        with pytest.raises(Unreachable, match="its owner asks for consent"):
            RemoteFile(f"{SET}/train-000000.tar", QUICK)


def test_a_rate_limit_is_waited_for(tiny_data, monkeypatch):
    with serve_hub(monkeypatch, main=tiny_data) as server:
        file = RemoteFile(f"{SET}/train-000000.tar", QUICK)
        waits = []
        monkeypatch.setattr("pipeline.remote.filesystem.time.sleep", waits.append)
        server.refusals = [429, 503]
        assert file.read(100) == (tiny_data / "train-000000.tar").read_bytes()[:100]
        assert waits[0] >= 1.0 > waits[1]  # as the first answer asks; the second does not


@pytest.mark.parametrize("address", ["hf://datasets/x", "hf://buckets/x/y", "hf://", "hf://a/b@"])
def test_what_names_no_repository_is_refused(address):
    with pytest.raises(UsageError, match="give hf://datasets/OWNER/NAME") as raised:
        check_address(address, "source")
    assert "source hf:" in complain(raised)
