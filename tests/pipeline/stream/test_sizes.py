"""Sets of other sizes: squares of 32 to 300 pixels, one shorter side, images as they are."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import SIZE
from pipeline.dataset.index import BLOCK, SIZED_DTYPE
from pipeline.dataset.jpeg_header import ImageError
from pipeline.dataset.manifest import Manifest
from pipeline.packing.plan import LONGEST, Sizing
from pipeline.packing.resize import prepare_image, resample
from pipeline.remote.local import LocalDataset
from pipeline.stream.augment import draw, draw_regions
from pipeline.stream.mixture import open_reader
from pipeline.stream.order import FullShuffle
from pipeline.stream.quarantine import TrialDecoder
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DamagedFile, UsageError
from pipeline.verify import check
from tests.helpers.images import jpeg, packed, rows_of
from tests.helpers.resealed_data import reseal

PLAIN = {"mean": None, "colour": 0, "dtype": "uint8", "threads": 1}
COUNT = 30
XMP = (
    b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description "
    b'tiff:Orientation="6"/></x:xmpmeta>'
)


def with_exif(seed: int, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(seed, 100 + 9 * orientation, 70 + 5 * orientation, exif=exif, **options)


def with_segment(data: bytes, segment: bytes) -> bytes:
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


def draw_odd_images() -> dict[str, bytes]:
    """Files by name; those that end in .jpg stay as they are with --fit none."""
    png = io.BytesIO()
    Image.open(io.BytesIO(jpeg(40, 130, 90))).save(png, "PNG")
    return {
        **{f"turned-{one}.jpg": with_exif(one, one, quality=90) for one in range(1, 9)},
        "turned-progressive.jpg": with_exif(20, 6, progressive=True),
        "grey.jpg": jpeg(30, 211, 123, mode="L"),
        "grey-turned.jpg": with_exif(31, 8, mode="L"),
        "progressive.jpg": jpeg(32, 97, 141, progressive=True),
        "full-colour.jpg": jpeg(33, 99, 77, subsampling=0, quality=97),
        "tall.jpg": jpeg(34, 41, 600),
        "wide.jpg": jpeg(35, 701, 43),
        "odd.jpg": jpeg(36, 97, 83),
        "palette.png": png.getvalue(),
        "xmp.jpeg": with_segment(jpeg(37, 120, 80), XMP),
        "damaged-exif.jpeg": with_segment(jpeg(38, 120, 80), b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        "cmyk.jpeg": jpeg(39, 110, 95, mode="CMYK"),
    }


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for place, (name, data) in enumerate(draw_odd_images().items()):
        folder = root / f"class{place % 2}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def untouched(odd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("none") / "data"
    packed(out, train=odd_folder, samples_per_shard=7, fit="none")
    return out


@pytest.fixture(scope="module")
def shorter(odd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shorter") / "data"
    packed(out, train=odd_folder, samples_per_shard=7, fit="shorter", size=48)
    return out


def open_stored(data: Path) -> ShardReader:
    return ShardReader(LocalDataset(data), "train")


def read_by_pillow(data: Path) -> list[np.ndarray]:
    """All images as Pillow decodes and turns them."""
    reader = open_stored(data)
    views, damaged = reader.read(np.arange(len(reader)))
    assert not damaged
    images = (Image.open(io.BytesIO(view.tobytes())) for view in views)
    return [np.asarray(ImageOps.exif_transpose(image).convert("RGB")) for image in images]


@pytest.mark.parametrize("crop", ["random", "center", "resized"])
@pytest.mark.parametrize("data", ["untouched", "shorter"])
def test_crops_of_images_that_differ_are_pillows(data, crop, request):
    data = request.getfixturevalue(data)
    images = read_by_pillow(data)
    size = (40, 32)
    with Stream(data, batch_size=COUNT, seed=4, crop=crop, size=size, **PLAIN) as stream:
        batch = next(stream)
        assert not stream.damaged
    slots = FullShuffle([len(images)], 4).list_slots(0, COUNT)[:2]
    stored = np.array([images[sample].shape[:2] for sample in batch.ids.tolist()])
    draws = draw(4, *slots, border=(stored[:, 0] - size[0], stored[:, 1] - size[1]))
    regions = draw_regions(4, *slots, (stored[:, 0], stored[:, 1]), (0.08, 1), (3 / 4, 4 / 3))
    assert 0 < draws.flip.sum() < COUNT
    for place, sample in enumerate(batch.ids.tolist()):
        image, found = images[sample], batch.images[place].permute(1, 2, 0).numpy()
        (top, left), (height, width) = regions.start[place], regions.shape[place]
        if crop == "random":
            (top, left), (height, width) = (draws.y[place], draws.x[place]), size
        elif crop == "center":
            (top, left), (height, width) = (np.array(image.shape[:2]) - size) // 2, size
        part = image[top : top + height, left : left + width]
        assert part.shape[:2] == (height, width)
        expected = part.astype(float)
        if crop == "resized":  # in floats: Pillow rounds between the passes over rows and columns
            channels = (
                Image.fromarray(one, "F") for one in part.astype(np.float32).transpose(2, 0, 1)
            )
            small = [one.resize(size[::-1], Image.Resampling.BILINEAR) for one in channels]
            expected = np.stack(small, axis=2)
        if crop != "center" and draws.flip[place]:
            expected = expected[:, ::-1]
        difference = np.abs(found - expected).max()
        assert difference <= (3 if crop == "resized" else 0), (difference, image.shape)


def test_crops_reach_every_border_of_a_large_image(tmp_path):
    """The place of a crop goes to DALI as a fraction in float32."""
    row = (np.arange(9001) % 251).astype(np.uint8)
    image = np.repeat(np.repeat(row[None, :, None], 40, 0), 3, 2)
    for name in "ab":
        file = io.BytesIO()
        Image.fromarray(image[:, :: 1 if name == "a" else -1]).save(
            file, "JPEG", quality=100, subsampling=0
        )
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "wide.jpg").write_bytes(file.getvalue())
    packed(tmp_path / "data", train=tmp_path / "src", fit="none")
    images = read_by_pillow(tmp_path / "data")
    with Stream(tmp_path / "data", batch_size=64, size=(32, 16), seed=1, **PLAIN) as stream:
        batch = next(stream)
    draws = draw(1, *FullShuffle([2], 1).list_slots(0, 64)[:2], border=(8, 9001 - 16))
    for place, sample in enumerate(batch.ids.tolist()):
        left, top = draws.x[place], draws.y[place]
        expected = images[sample][top : top + 32, left : left + 16]
        if draws.flip[place]:
            expected = expected[:, ::-1]
        assert np.array_equal(batch.images[place].permute(1, 2, 0), expected)


@pytest.mark.parametrize("crop", ["random", "resized"])
def test_images_that_differ_are_the_same_in_every_world(untouched, crop):
    def read(**settings) -> torch.Tensor:
        with Stream(
            untouched, batch_size=18, seed=2, crop=crop, size=32, **PLAIN | settings
        ) as stream:
            return torch.cat([next(stream).images for _ in range(2)])

    alone = read(threads=2)
    for world in (2, 3):
        parts = [read(rank=rank, world_size=world) for rank in range(world)]
        halves = [torch.cat([part.chunk(2)[number] for part in parts]) for number in (0, 1)]
        assert torch.equal(torch.cat(halves), alone)


def test_plain_jpegs_stay_as_they_are(untouched, odd_folder):
    sources = {path.read_bytes(): path for path in odd_folder.glob("*/*")}
    reader, kept = open_stored(untouched), set()
    views, _ = reader.read(np.arange(len(reader)))
    kept = {sources[one].name for view in views if (one := view.tobytes()) in sources}
    assert kept == {name for name in draw_odd_images() if name.endswith(".jpg")}
    heights, widths = reader.read_sizes(np.arange(len(reader)))
    shapes = [image.shape[:2] for image in read_by_pillow(untouched)]
    assert list(zip(heights.tolist(), widths.tolist(), strict=True)) == shapes
    assert (120, 80) not in shapes[:0]
    assert (120, 80) in shapes  # XMP has said so, which DALI does not read: it was turned
    manifest = json.loads((untouched / "manifest.json").read_text())
    assert (manifest["fit"], manifest["image_size"]) == ("none", None)
    assert np.load(untouched / "train.index.npy").dtype == SIZED_DTYPE


def test_the_shorter_side_is_what_was_asked_for(shorter, odd_folder):
    heights, widths = open_stored(shorter).read_sizes(np.arange(20))
    assert (np.minimum(heights, widths) == 48).all()
    assert (heights.max(), widths.max()) == (round(48 * 600 / 41), round(48 * 701 / 43))
    assert Manifest.load(shorter).image_size == 48
    image = Image.open(odd_folder / "class1" / "odd.jpg")
    expected = np.asarray(image.resize((56, 48), Image.Resampling.BICUBIC)).astype(int)
    found = prepare_image((odd_folder / "class1" / "odd.jpg").read_bytes(), Sizing("shorter", 48))
    assert np.abs(found.pixels.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("data", ["untouched", "shorter"])
def test_statistics_of_images_that_differ_are_those_of_their_central_squares(data, request):
    data = request.getfixturevalue(data)
    found = Statistics.load(data, Manifest.load(data))
    squares = np.stack([resample(image) for image in read_by_pillow(data)]).astype(np.float64)
    assert found.mean_picture.shape == (SIZE, SIZE, 3)
    tolerance = 1.5  # some were measured before they were encoded
    assert np.abs(found.channel_mean - squares.mean((0, 1, 2))).max() < tolerance


@pytest.mark.parametrize("size", [32, 33, 64, 300])
@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_squares_of_any_size(odd_folder, tmp_path, size, encoding):
    data = tmp_path / "data"
    manifest = packed(data, train=odd_folder, size=size, encoding=encoding, samples_per_shard=8)
    assert (manifest.image_size, manifest.fit) == (size, "square")
    assert "fit" not in json.loads((data / "manifest.json").read_text())
    assert not check(data, decode=True).damage
    images = {
        prepare_image(path.read_bytes(), Sizing(size=size)).pixels.tobytes()
        for path in odd_folder.glob("*/*")
    }
    with Stream(data, batch_size=20, crop="whole", once=True, **PLAIN) as stream:
        (batch,) = stream
    assert batch.images.shape == (20, 3, size, size)
    if encoding == "raw":
        found = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
        assert {image.tobytes() for image in found} == images
    values = np.stack([np.frombuffer(one, np.uint8).reshape(size, size, 3) for one in images])
    statistics = Statistics.load(data, manifest)
    np.testing.assert_allclose(statistics.mean_picture, values.mean(0, np.float64), rtol=1e-6)
    rows = values.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(statistics.covariance, np.cov(rows.T, bias=True), rtol=1e-9)
    with Stream(data, batch_size=4, size=32, mean="image", threads=1) as stream:
        assert stream.mean.shape == (3, 32, 32)
        next(stream)


def test_duplicates_are_found_at_any_size(tmp_path):
    for name, width in (("a", 96), ("b", 200)):
        (tmp_path / "src" / name).mkdir(parents=True)
        image = Image.open(io.BytesIO(jpeg(3, 192, 160))).resize((width, width * 5 // 6))
        image.save(tmp_path / "src" / name / "same.jpg", quality=92)
        (tmp_path / "src" / name / "other.jpg").write_bytes(jpeg(50 + width))
    for number, settings in enumerate([{"size": 64}, {"fit": "none"}, {"fit": "shorter"}]):
        assert packed(tmp_path / f"{number}", train=tmp_path / "src", **settings).duplicates == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 64}, r"size 64x64 does not fit into the train sample \d+ of \d+x\d+; give a"),
        ({"crop": "whole"}, "crop='whole' needs images of one size, and those of train differ"),
        ({"mean": "image", "size": 32}, "mean='image' needs images of one size"),
    ],
)
def test_what_images_that_differ_cannot_do_is_refused(shorter, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        Stream(shorter, batch_size=4, threads=1, **settings)
    assert len(str(caught.value).splitlines()) == 1
    with Stream(shorter, batch_size=4, size=(48, 40), threads=1) as stream:  # the smallest fits
        next(stream)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "none", "size": 64}, "--size 64 says nothing about --fit none"),
        ({"fit": "shorter", "encoding": "raw"}, "--encoding raw stores squares"),
        ({"size": 31}, "--size 31 is out of range; give 32 to 4096"),
    ],
)
def test_a_build_that_cannot_be_is_refused(odd_folder, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        packed(tmp_path / "data", train=odd_folder, **settings)


def test_a_build_of_another_size_is_not_taken_for_this_one(odd_folder, tmp_path):
    packed(tmp_path / "data", train=odd_folder, size=40)
    with pytest.raises(UsageError, match="holds a finished data set of size 40, and this one is"):
        packed(tmp_path / "data", train=odd_folder)
    with pytest.raises(UsageError, match="data set of fit square, and this one is of none"):
        packed(tmp_path / "data", train=odd_folder, fit="none")


def test_sizes_of_the_index_are_checked(untouched, tmp_path):
    """Against limits when it is opened; by `verify --decode` and by a stream against the images."""
    data = tmp_path / "data"
    data.mkdir()
    for path in untouched.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    assert not check(data, decode=True).damage
    index = data / "train.index.npy"
    rows = np.load(index)
    right = rows["width"][5]
    for wrong, said in [(0, "sample 5: its image has 0x"), (right + 1, None)]:
        rows["width"][5] = wrong
        np.save(index, rows)
        reseal(data)
        if said:
            with pytest.raises(DamagedFile, match=said):
                rows_of(data, "train")
    (found,) = check(data, decode=True).damage
    assert (found["sample"], "pixels" in found["reason"]) == (5, False)
    assert f"not {right + 1}x" in found["reason"]
    with Stream(data, batch_size=20, once=True, crop="center", size=32, **PLAIN) as stream:
        next(stream)
        assert set(stream.damaged) == {5}


def test_headers_that_differ_in_size_alone_are_tried_once(shorter, untouched, monkeypatch):
    tried: list[int] = []
    monkeypatch.setattr(
        TrialDecoder, "can_decode", lambda self, image, size: tried.append(len(image)) or True
    )
    with Stream(shorter, batch_size=20, once=True, crop="center", size=32, **PLAIN) as stream:
        next(stream)
    assert len(tried) == 1
    tried.clear()
    with Stream(untouched, batch_size=20, once=True, crop="center", size=32, **PLAIN) as stream:
        next(stream)
    assert len(tried) == 5  # in colour, that in full, in grey; the two progressive ones


def test_sets_whose_images_differ_can_be_mixed(shorter, untouched, tiny_data):
    parts = [LocalDataset(shorter), LocalDataset(untouched)]
    mixed = open_reader(parts, "train")
    ids = np.array([25, 3, 21])
    expected = open_stored(untouched).read_sizes(np.array([5, 1]))
    heights, widths = mixed.read_sizes(ids)
    assert (heights[[0, 2]].tolist(), widths[[0, 2]].tolist()) == (
        expected[0].tolist(), expected[1].tolist(),
    )  # fmt: skip
    assert mixed.find_smaller(48, 48) == 20 + open_stored(untouched).find_smaller(48, 48)
    assert mixed.find_smaller(32, 32) is None


def test_the_first_image_that_is_too_small_is_found_in_any_block():
    reader = object.__new__(ShardReader)
    reader.side, reader._index = None, np.zeros(BLOCK + 9, SIZED_DTYPE)
    reader._index["width"], reader._index["height"] = 300, 200
    assert reader.find_smaller(200, 300) is None
    assert reader.find_smaller(201, 1) == 0
    reader._index["width"][BLOCK + 7] = 299
    assert reader.find_smaller(1, 300) == BLOCK + 7


@given(st.integers(8, 60_000), st.integers(8, 60_000), st.integers(32, 4096))
def test_the_aspect_is_kept_to_the_pixel(height, width, size):
    try:
        new = Sizing("shorter", size).resize(height, width)
    except ImageError as error:
        shorter, longer = sorted((height, width))
        if "may differ by 20 times" in str(error):
            assert longer > 20 * shorter
            return
        assert max(size * longer / shorter, size) > min(LONGEST, 100_000_000 / size) - 1
        return
    assert min(new) == size
    assert max(new) <= 20 * size
    assert abs(new[0] * width - new[1] * height) <= max(height, width) / 2 + 1


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20))
def test_regions_and_borders_of_each_sample_are_those_of_its_own_size(sizes):
    ids = np.arange(len(sizes)) + 100
    epochs = np.full_like(ids, 3)
    rows, columns = np.array(sizes).T
    found = draw_regions(9, epochs, ids, (rows, columns), (0.1, 1), (0.5, 2))
    draws = draw(9, epochs, ids, (rows, columns))
    for place, size in enumerate(sizes):
        one = slice(place, place + 1)
        alone = draw_regions(9, epochs[one], ids[one], size, (0.1, 1), (0.5, 2))
        assert np.array_equal(np.hstack(alone)[0], np.hstack(found)[place])
        own = draw(9, epochs[one], ids[one], size)
        assert (own.x[0], own.y[0]) == (draws.x[place], draws.y[place])
        (top, left), (height, width) = found.start[place], found.shape[place]
        assert min(height, width) >= 1
        assert min(top, left) >= 0
        assert (top + height, left + width) <= size or top + height <= size[0]
        assert left + width <= size[1]
