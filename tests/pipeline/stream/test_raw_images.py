"""The raw lane: pixels stored as they are, from the tar to the batch."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.packing.resize import decode_square
from pipeline.stream.augment import draw
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import Decoder
from pipeline.throughput.dali_reader import DaliReader
from pipeline.tools.text import human_bytes
from pipeline.verify import verify
from tests.helpers.images import CLASSES, folder_per_class, packed, rows_of
from tests.helpers.processes import call_command

SHAPE = (256, 256, 3)
JPEG_LOSS = 1.2
"""Mean difference, in grey levels, that a JPEG may make to a drawn image: 0.8 to 1.0 were
seen at quality 90, while a crop that is one pixel off makes 1.45 or more."""


def built(image_folder: Path, out: Path, **settings) -> Path:
    train, val = image_folder / "train", image_folder / "val"
    packed(out, train=train, val=val, samples_per_shard=10, encoding="raw", **settings)
    return out


def stored(data: Path, split: str = "train") -> np.ndarray:
    """All images of a split, read by tarfile and NumPy alone: uint8 [n, 256, 256, 3]."""
    found = []
    for path in sorted(data.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".npy"):
                    member = io.BytesIO(tar.extractfile(name).read())
                    found.append(np.load(member, allow_pickle=False))
    return np.stack(found)


def test_the_tars_hold_the_sources_pixels_under_their_labels(image_folder, raw_data):
    rows = rows_of(raw_data, "train")
    files = sorted((image_folder / "train").glob("*/*.jpg"))
    expected = {decode_square(file.read_bytes()).tobytes(): file.parent.name for file in files}
    found = stored(raw_data)
    assert found.shape == (48, *SHAPE)
    assert found.dtype == np.uint8
    assert [expected[one.tobytes()] for one in found] == [CLASSES[row["label"]] for row in rows]
    assert len({one.tobytes() for one in found}) == 48


def test_index_rows_are_the_pixels_behind_the_header(raw_data):
    shards = [path.read_bytes() for path in sorted(raw_data.glob("train-*.tar"))]
    for row, expected in zip(rows_of(raw_data, "train"), stored(raw_data), strict=True):
        start, size = int(row["offset"]), int(row["size"])
        data = shards[row["shard"]][start : start + size]
        assert data == expected.tobytes()
        assert zlib.crc32(data) == row["crc"]


def test_the_same_bytes_whatever_the_number_of_workers(image_folder, raw_data, tmp_path):
    again = built(image_folder, tmp_path / "data", workers=2)
    names = sorted(path.name for path in raw_data.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (raw_data / name).read_bytes(), name


def test_all_but_the_images_is_as_in_the_jpeg_set(raw_data, tiny_data):
    raw, jpeg = Manifest.load(raw_data), Manifest.load(tiny_data)
    assert (raw.encoding, raw.quality) == ("raw", None)
    assert (jpeg.encoding, jpeg.quality) == ("jpeg", 96)
    assert raw.plan != jpeg.plan
    assert raw.stats_sha256 == jpeg.stats_sha256
    for split in ("train", "val"):
        for field in ("label", "shard"):
            assert np.array_equal(rows_of(raw_data, split)[field], rows_of(tiny_data, split)[field])


def test_unreadable_images_are_left_out_and_the_command_tells(tmp_path):
    source = folder_per_class(tmp_path / "s", 2)
    (source / "cat/bad.jpg").write_bytes(b"no picture at all")
    command = [sys.executable, "-m", "pipeline.build_shards", tmp_path / "d", "--train", source]
    done = call_command(
        [*map(str, command), "--encoding", "raw", "--json", "--max-rejects", "0.2"],
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    size = (tmp_path / "d/train-000000.tar").stat().st_size
    assert (facts["samples"], facts["rejected"]) == ({"train": 8}, 1)
    assert (facts["encoding"], facts["bytes"]) == ("raw", size)
    assert f"{human_bytes(size)} of raw shards" in done.stderr
    assert "bad.jpg" in (tmp_path / "d/rejects.jsonl").read_text()
    assert len(stored(tmp_path / "d")) == 8


def test_verify_names_the_damaged_sample(raw_data, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(raw_data, data)
    assert verify(data) == []
    rows = rows_of(data, "train")
    for shard, offset in (
        ("train-000001.tar", int(rows[13]["offset"]) + 99_999),
        ("train-000002.tar", int(rows[25]["offset"]) - 1),  # the header of a .npy: no pixel
    ):
        content = bytearray((data / shard).read_bytes())
        content[offset] ^= 1
        (data / shard).write_bytes(content)
    found = [(one["file"], one.get("sample")) for one in verify(data)]
    assert found == [("train-000001.tar", 13), ("train-000002.tar", 25)]


def test_batches_are_crops_of_the_stored_pixels(raw_data):
    pixels, mean = stored(raw_data).astype(np.float64), Statistics.load(raw_data).channel_mean
    with Stream(raw_data, batch_size=48, seed=5, colour=0) as stream:
        batch = next(stream)
    ids = batch.ids.numpy()
    assert sorted(ids) == list(range(48))
    assert batch.labels.tolist() == rows_of(raw_data, "train")["label"][ids].tolist()
    draws = draw(5, np.zeros(48, np.int64), ids)
    assert 0 < draws.flip.sum() < 48
    for place, sample in enumerate(ids):
        y, x = draws.y[place], draws.x[place]
        expected = pixels[sample, y : y + 224, x : x + 224]
        expected = expected[:, ::-1] if draws.flip[place] else expected
        got = batch.images[place].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(got, expected - mean, atol=1e-3)


@pytest.mark.parametrize(("crop", "border"), [("center", 16), ("whole", 0)])
def test_evaluation_views_are_the_stored_pixels(raw_data, crop, border):
    pixels, mean = stored(raw_data, "val"), Statistics.load(raw_data).channel_mean
    with Stream(raw_data, split="val", crop=crop, once=True, batch_size=8) as stream:
        batches = list(stream)
    assert [batch.images.shape[2:] for batch in batches] == 3 * [(256 - 2 * border,) * 2]
    for batch in batches:
        images = batch.images.numpy().transpose(0, 2, 3, 1) + mean
        expected = pixels[batch.ids.numpy(), border : 256 - border, border : 256 - border]
        np.testing.assert_allclose(images, expected, atol=1e-3)


def test_the_stream_is_that_of_the_jpegs_but_for_their_loss(raw_data, tiny_data):
    with (
        Stream(raw_data, batch_size=32, seed=3) as raw,
        Stream(tiny_data, batch_size=32, seed=3) as jpeg,
    ):
        for _ in range(3):  # over an epoch's border
            a, b = next(raw), next(jpeg)
            assert a.ids.tolist() == b.ids.tolist()
            assert a.labels.tolist() == b.labels.tolist()
            assert a.position == b.position
            loss = (a.images - b.images).abs().mean((1, 2, 3))
            assert loss.min() > 0
            assert loss.max() < JPEG_LOSS


def test_the_jpegs_are_made_of_the_raw_pixels(raw_data, tiny_data):
    """Pillow's JPEG of what the one stream gives is what the other gives, to the last digit."""
    with (
        Stream(raw_data, split="val", crop="whole", once=True, batch_size=20) as raw,
        Stream(tiny_data, split="val", crop="whole", once=True, batch_size=20) as jpeg,
    ):
        mean = raw.channel_mean
        a, b = (next(one).images.numpy().transpose(0, 2, 3, 1) + mean for one in (raw, jpeg))
    for pixels, got in zip(a.round().astype(np.uint8), b, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=96)
        np.testing.assert_allclose(got, np.asarray(Image.open(file)), atol=1e-3)


def test_dalis_own_reader_gives_crops_of_the_stored_pixels(raw_data):
    pixels, mean = stored(raw_data), Statistics.load(raw_data).channel_mean
    crops: dict[bytes, list[np.ndarray]] = {}  # every crop, straight and mirrored, by its corner
    for image in (*pixels, *pixels[:, :, ::-1]):
        for y in range(33):
            for x in range(33):
                corner = image[y, x : x + 16].tobytes()
                crops.setdefault(corner, []).append(image[y : y + 224, x : x + 224])
    reader = DaliReader(raw_data, StreamConfig(batch_size=16, threads=1))
    for image in next(reader).numpy():
        exact = image.transpose(1, 2, 0) + mean
        rounded = exact.round().astype(np.uint8)
        np.testing.assert_allclose(exact, rounded, atol=1e-3)
        assert any(np.array_equal(rounded, one) for one in crops[rounded[0, :16].tobytes()])


@pytest.mark.gpu
def test_gpu_pixels_are_the_cpu_graphs(raw_data):
    with (
        Stream(raw_data, batch_size=48, seed=3) as host,
        Stream(raw_data, batch_size=48, seed=3, device="gpu") as device,
    ):
        a, b = next(host), next(device)
    assert b.images.is_cuda
    assert (a.images - b.images.float().cpu()).abs().max() < 0.13  # float16 at 128 to 256


def test_an_error_that_is_not_the_images_fault_puts_none_in_quarantine(raw_data, monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA allocation failed")

    with Stream(raw_data, batch_size=4) as stream:
        monkeypatch.setattr(Decoder, "run", fail)
        with pytest.raises(RuntimeError, match="allocation"):
            next(stream)
        assert not stream.damaged
