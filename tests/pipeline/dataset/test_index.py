"""Shards that other tools made train as they lie: `python -m pipeline.index_shards`."""

from __future__ import annotations

import io
import shutil
import tarfile
from itertools import chain

import numpy as np
import pytest
import torch
import wds2idx  # a module of the DALI wheel
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import read_key_from_idx
from pipeline.dataset.shards import parse_idx
from pipeline.packing.resize import resample
from pipeline.stream.config import StreamConfig
from pipeline.throughput.dali_reader import DaliReader
from pipeline.verify import verify
from tests.helpers.foreign_shards import (  # noqa: F401 - fixtures
    copy_of_made,
    decoded,
    flip,
    index,
    made_by_webdataset,
    make_image,
)
from tests.helpers.http_servers import Server
from tests.helpers.images import jpeg, rows_of
from tests.helpers.tars import tar_of


def test_the_stream_gives_the_images_that_pillow_decodes(made, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = index(folder).manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 20,
        "val": 6,
    }
    assert [shard.name for shard in manifest.splits["train"].shards] == [
        f"in1k-train-{n:02d}.tar" for n in range(3)
    ]
    assert manifest.classes == ("0", "1", "2", "3")
    for split, first, count in (("train", 0, 20), ("val", 100, 6)):
        expected = [decoded(make_image(first + n)) for n in range(count)]
        with Stream(folder, split=split, crop="whole", once=True, batch_size=count) as stream:
            batch = next(stream)
            images = batch.images.numpy().transpose(0, 2, 3, 1) + stream.channel_mean
        assert batch.weights.tolist() == [1] * count
        assert batch.labels.tolist() == [sample % 4 for sample in batch.ids.tolist()]
        for sample, image in zip(batch.ids.tolist(), images, strict=True):
            np.testing.assert_allclose(image, expected[sample], atol=1e-3)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert verify(folder, decode=True) == []


def test_statistics_are_those_of_the_training_images(folder):
    index(folder, workers=2)
    values = np.stack([decoded(make_image(n)) for n in range(20)]).astype(np.float64)
    stats = Statistics.load(folder)
    np.testing.assert_allclose(stats.mean_picture, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.channel_mean, values.reshape(-1, 3).mean(0), rtol=1e-12)
    covariance = np.cov(values.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(stats.covariance, covariance, rtol=1e-9)


def test_dalis_own_reader_gives_the_same_images(tmp_path):
    """Each image is of one colour: what comes out of a crop says which image it was."""
    colours = [(20 * n, 255 - 20 * n, 10 * n) for n in range(12)]
    endings = ["jpg", "jpeg", "JPG", "JPEG"]
    shown = []
    for n in range(3):
        files = []
        for place in range(4):
            file = io.BytesIO()
            Image.new("RGB", (256, 256), colours[4 * n + place]).save(file, "JPEG", quality=100)
            shown.append(decoded(file.getvalue())[0, 0])
            key, ending = f"{n}-{place}", endings[place]
            files += [(f"{key}.{ending}", file.getvalue()), (f"{key}.json", b'{"label": %d}' % n)]
        tar_of(tmp_path / f"train.{n}.tar", files)
    index(tmp_path)
    with Stream(tmp_path, batch_size=12, colour=0) as stream:
        ours = {tuple(one) for one in _colours(next(stream).images, stream.channel_mean)}
    reader = DaliReader(tmp_path, StreamConfig(batch_size=12, threads=1))
    mean = Statistics.load(tmp_path).channel_mean
    theirs = {tuple(one) for one in _colours(next(reader), mean)}
    assert ours == theirs == {tuple(one.tolist()) for one in shown}


def _colours(images, mean) -> list[list[int]]:
    flat = images.numpy().transpose(0, 2, 3, 1) + mean
    assert np.ptp(flat, axis=(1, 2)).max() < 1e-3
    return flat[:, 0, 0].round().astype(int).tolist()


def test_members_of_any_order_ending_and_name(tmp_path):
    long = "folder/" + "k" * 150
    files = [
        ("README", b"nothing"),
        (".DS_Store.jpg", b"hidden"),
        ("a.jpg", make_image(0)),  # before its label
        ("a.cls", b"1\n"),
        ("b.txt", b"a caption"),  # more than is needed
        ("b.cls", b" 2 "),
        ("b.json", b'{"label": 0}'),  # .cls is believed first
        ("b.JPEG", make_image(1)),
        ("c.mask.png", b""),
        ("c.image.jpeg", make_image(2)),
        ("c.meta.json", b'{"class_id": 3, "caption": "x"}'),
        ("a.jpg", make_image(3)),  # a key once more
        ("a.cls", b"0"),
        ("a.jpg", make_image(4)),  # and again at once
        ("a.cls", b"3"),
        (f"{long}.jpg", make_image(5)),
        (f"{long}.cls", b"2"),
        ("f/g.h/i.jpg", make_image(6)),
        ("f/g.h/i.json", b'{"target": "1"}'),
        ("j.thumb.jpg", b"small"),
        ("j.jpg", make_image(7)),
        ("j.json", b'{"label": 3}'),
        ("k.jpg", make_image(8)),
        ("k.json", b'{"cls": 1, "target": 7}'),
    ]
    tar_of(tmp_path / "some train.tar", files, format=tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "some train.tar", "a") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    outcome = index(tmp_path, train="some*.tar")
    assert outcome.bad == []
    rows = rows_of(tmp_path, "train")
    content = (tmp_path / "some train.tar").read_bytes()
    stored = [content[row["offset"] :][: row["size"]] for row in rows]
    assert stored == [make_image(n) for n in range(9)]
    assert rows["label"].tolist() == [1, 2, 3, 0, 3, 2, 1, 3, 1]
    assert verify(tmp_path, decode=True) == []
    with Stream(tmp_path, batch_size=9) as stream:
        assert sorted(next(stream).ids.tolist()) == list(range(9))
    idx = tmp_path / "some train.idx"
    assert len(parse_idx(idx.read_bytes())) == 9
    assert read_key_from_idx(idx, 5) == long
    assert read_key_from_idx(idx, 9) is None


def test_the_idx_is_wds2idxs_and_one_that_is_there_is_kept(made, folder):
    theirs = {}
    for tar in sorted(made.glob("*.tar")):
        idx = (folder / tar.name).with_suffix(".idx")
        with wds2idx.IndexCreator(str(tar), str(idx), verbose=False) as creator:
            creator.create_index()
        theirs[idx.name] = idx.read_bytes()
    (folder / "in1k-train-01.idx").unlink()
    inode = (folder / "in1k-train-00.idx").stat().st_ino
    assert index(folder).bad == []
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert (folder / "in1k-train-00.idx").stat().st_ino == inode


def test_our_own_shards_can_be_indexed_anew(tiny_data, tmp_path):
    for path in tiny_data.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index(tmp_path)
    for split in ("train", "val"):
        ours, theirs = (data / f"{split}.index.npy" for data in (tiny_data, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes()
    for path in tiny_data.glob("*.idx"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_set_of_a_store_may_have_any_names(folder, tmp_path):
    index(folder)
    with (
        Server(folder) as server,
        Stream(folder, batch_size=20) as local,
        Stream(server.address, cache=tmp_path / "cache", batch_size=20) as remote,
    ):
        assert torch.equal(next(local).images, next(remote).images)
    flip(folder, 11)
    with (
        Server(folder) as server,
        Stream(server.address, cache=tmp_path / "other", batch_size=20) as remote,
    ):
        next(remote)
        assert remote.damaged[11].key == "train/n00011"


def square_of(n: int, size: int) -> bytes:
    return jpeg(n, size, size, quality=95)


def test_squares_of_another_size_are_a_set_of_that_size(tmp_path):
    """Statistics are of the whole images, summed over shards."""
    images = [square_of(n, 64) for n in range(10)]
    for shard in (0, 1):
        some = range(5 * shard, 5 * shard + 5)
        pairs = [[(f"{n}.jpg", images[n]), (f"{n}.cls", str(n % 2).encode())] for n in some]
        tar_of(tmp_path / f"train-{shard}.tar", chain(*pairs))
    manifest = index(tmp_path).manifest
    assert (manifest.image_size, manifest.fit) == (64, "square")
    assert verify(tmp_path, decode=True) == []
    values = np.stack([decoded(image) for image in images]).astype(np.float64)
    found = Statistics.load(tmp_path, manifest)
    np.testing.assert_allclose(found.mean_picture, values.mean(0), rtol=1e-6)
    with Stream(tmp_path, crop="whole", once=True, batch_size=10, mean=None) as stream:
        assert next(stream).images.shape == (10, 3, 64, 64)


@pytest.mark.parametrize("odd", [0, 7])
def test_images_of_many_sizes_are_a_set_of_many_sizes(tmp_path, odd):
    """Whichever shard the first other size is in."""
    images = [jpeg(n, 90, 70) if n == odd else square_of(n, 64) for n in range(10)]
    for shard in (0, 1):
        some = range(5 * shard, 5 * shard + 5)
        pairs = [[(f"{n}.jpg", images[n]), (f"{n}.cls", str(n % 2).encode())] for n in some]
        tar_of(tmp_path / f"train-{shard}.tar", chain(*pairs))
    manifest = index(tmp_path).manifest
    assert (manifest.image_size, manifest.fit) == (None, "none")
    assert verify(tmp_path, decode=True) == []
    rows = rows_of(tmp_path, "train")
    assert (rows["width"][odd], rows["height"][odd]) == (90, 70)
    squares = np.stack([resample(decoded(image).copy()) for image in images]).astype(np.float64)
    found = Statistics.load(tmp_path, manifest)
    np.testing.assert_allclose(found.mean_picture, squares.mean(0), rtol=1e-6)
    with Stream(tmp_path, crop="resized", size=48, batch_size=20, threads=1) as stream:
        assert next(stream).images.shape == (20, 3, 48, 48)
        assert not stream.damaged
    reader = DaliReader(tmp_path, StreamConfig(batch_size=4, threads=1, size=64))
    assert next(reader).shape == (4, 3, 64, 64)


def test_an_index_of_headers_is_that_of_decoded_images(made, folder, tmp_path):
    every = shutil.copytree(folder, tmp_path / "every")
    tables = [index(one, decode_every=n).manifest for one, n in ((every, 1), (folder, 4))]
    assert tables[0].splits == tables[1].splits
    assert tables[0].stats_sha256 != tables[1].stats_sha256
    assert verify(folder, decode=True) == []
