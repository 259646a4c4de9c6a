"""Folders of images in a store: what is listed, what is read, and what is not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.remote.filesystem import Unreachable
from pipeline.sources import Container, Unreadable, open_reader, readers, scan
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import QUICK, complain
from tests.helpers.images import jpeg, packed
from tests.helpers.sources import publish_folder, read_contents


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two splits of three classes, one of them with folders in it; and bystanders."""
    root = tmp_path / "tree"
    for place, name in enumerate(("a dog", "b#2", "c/x", "c/x/y", "c")):
        for split in ("train", "val"):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                (folder / f"{number} %41.jpg").write_bytes(jpeg(10 * place + number))
    (root / "train/README.md").write_text("bystander")
    (root / "train/c/notes.bin").write_bytes(b"no image")
    (root / "train/c/empty.jpg").write_bytes(b"")
    (root / "train/c/.DS_Store").write_bytes(b"system")
    return root


@pytest.fixture(params=["memory", "index", "s3", "hf"])
def store(request: pytest.FixtureRequest, tree: Path) -> Iterator[str]:
    with publish_folder(tree, request) as address:
        yield address


def test_what_a_store_has_is_what_the_folder_has(store, tree, tmp_path):
    for number, (address, folder) in enumerate(
        ((store, tree), (f"{store}/train", tree / "train"), (f"{store}/train/", tree / "train"))
    ):
        far = scan(address, tmp_path / f"far{number}", split="train")
        near = scan(str(folder), tmp_path / f"near{number}", split="train")
        assert far.classes == near.classes == ("a dog", "b#2", "c")
        assert list(far.names) == list(near.names)
        assert read_contents(far) == read_contents(near)
        ends = [[one.name.removeprefix(str(base).rstrip("/")) for one in listing.rejects()]
                for base, listing in ((address, far), (folder, near))]  # fmt: skip
        assert ends[0] == ends[1]
        assert len(ends[0]) == 1
    far = scan(store, tmp_path / "val", split="val", classes=("a dog", "b#2", "c"))
    assert len(far) == 10


def test_packed_from_a_store_as_from_a_disk(tree, tmp_path, s3_bucket):
    fsspec.filesystem("s3").put(str(tree), f"{s3_bucket}/set", recursive=True)
    packed(tmp_path / "far", train=f"{s3_bucket}/set", val=f"{s3_bucket}/set", max_rejects=0.5)
    packed(tmp_path / "near", train=tree, val=tree, max_rejects=0.5)
    for path in (tmp_path / "near").iterdir():
        if path.name not in ("manifest.json", "rejects.jsonl", "duplicates.jsonl"):
            assert (tmp_path / "far" / path.name).read_bytes() == path.read_bytes(), path.name


def test_images_without_labels(tree, tmp_path, request):
    request.param = "memory"
    with publish_folder(tree / "train", request) as address:
        listing = scan(address, tmp_path / "scratch", split="train", labelled=False)
    assert len(listing) == 11
    assert listing.classes == ()


@pytest.fixture
def remembered(tmp_path: Path) -> Iterator[str]:
    """An empty folder of a store in memory."""
    yield "memory://pictures"
    system = fsspec.filesystem("memory")
    if system.exists("/pictures"):
        system.rm("/pictures", recursive=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("1.jpg", "a/1.jpg"), "pictures/1.jpg lies outside a class"),
        (("a.zip", "a/1.jpg"), "a.zip is an archive that is not looked into"),
        (("README.md",), "has no folders; it needs one of images for each class"),
        (("a/1.jpg",), "has one class, 'a'"),
        (("a/1.jpg", "b/1.bin"), "class 'b' of source .* has no images"),
        (("val/a/1.jpg", "val/b/1.jpg", "test/1.jpg"), "has no train: it holds test, val"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(files, message, remembered, tmp_path):
    for name in files:
        fsspec.filesystem("memory").pipe_file(f"/pictures/{name}", b"x")
    with pytest.raises(UsageError, match=message) as raised:
        scan(remembered, tmp_path / "scratch", split="train")
    complain(raised)


def test_a_web_server_without_index_is_refused(tree, tmp_path, request):
    request.param = "http"
    with (
        publish_folder(tree, request) as address,
        pytest.raises(UsageError, match="nor of a folder that is listed there"),
    ):
        scan(address, tmp_path / "scratch", split="train")


def open_remembered(count: int) -> readers.StoreFolderReader:
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        fsspec.filesystem("memory").pipe_file(f"/pictures/{name}", name.encode() * 10)
    sizes = [(name, 50) for name in names]
    reader = open_reader(Container("folder", "memory://pictures"), QUICK, (), sizes)
    assert isinstance(reader, readers.StoreFolderReader)
    return reader


def test_the_next_images_are_fetched_while_one_is_used(remembered, monkeypatch):
    """A bounded number of them, and of bytes; each is requested once."""
    asked, all_asked = [], threading.Event()
    request = readers.StoreFolderReader._request

    def count(self, name: str) -> bytes:
        asked.append(name)
        if len(asked) == 5:
            all_asked.set()
        return request(self, name)

    monkeypatch.setattr(readers.StoreFolderReader, "_request", count)
    monkeypatch.setattr(readers, "PREFETCHED", 4)
    reader = open_remembered(9)
    assert reader.read("0.jpg", 0, 50) == b"0.jpg" * 10
    assert all_asked.wait(10)  # the first, and four more
    assert len(asked) == 5
    assert reader.read("3.jpg", 0, 50) == b"3.jpg" * 10  # some were skipped
    for number in range(4, 9):
        assert reader.read(f"{number}.jpg", 0, 50) == f"{number}.jpg".encode() * 10
    assert sorted(asked) == [f"{number}.jpg" for number in range(9)]
    monkeypatch.setattr(readers, "PREFETCHED_BYTES", 100)
    asked.clear()
    all_asked.clear()
    reader = open_remembered(9)
    reader.read("0.jpg", 0, 50)
    assert not all_asked.wait(0.2)
    assert len(asked) == 3  # the first, and 100 bytes more


def test_an_image_that_went_away_or_changed_is_a_reject(remembered):
    reader = open_remembered(3)
    fsspec.filesystem("memory").rm_file("/pictures/0.jpg")
    with pytest.raises(Unreadable, match="it is not there any more"):
        reader.read("0.jpg", 0, 50)
    with pytest.raises(Unreadable, match="has 50 bytes, where 49 were listed"):
        reader.read("1.jpg", 0, 49)
    with pytest.raises(Unreadable, match="too large"):
        reader.read("2.jpg", 0, 1 << 40)


def test_a_store_that_fails_is_no_reject(remembered, monkeypatch):
    """Else one outage would empty the set."""
    reader = open_remembered(3)
    left = iter([OSError("down")] * 7)

    def fail(self, name: str) -> bytes:
        for error in left:
            raise error
        return b"x" * 50

    monkeypatch.setattr(readers.StoreFolderReader, "_request", fail)
    with pytest.raises(Unreachable, match=r"0\.jpg could not be read, tried 4 times"):
        reader.read("0.jpg", 0, 50)
    assert reader.read("1.jpg", 0, 50) == b"x" * 50
