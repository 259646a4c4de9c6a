"""Crops, output types and augmentations besides those of the paper."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.remote.local import LocalDataset
from pipeline.stream import operators as dali
from pipeline.stream.augment import Draw, NamedDraw, draw, draw_regions
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import resize_crops, run_to_tensor
from pipeline.stream.ledger.proof import prove
from pipeline.stream.order import FullShuffle
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import UsageError

PLAIN = {"mean": None, "colour": 0, "threads": 1}
COUNT = 20


def first_batch(data, **settings):
    with Stream(data, batch_size=COUNT, seed=4, **settings) as stream:
        return next(stream)


def stored_images(data, ids, split="train") -> list[np.ndarray]:
    return ShardReader(LocalDataset(data), split).decode(ids)  # Pillow's or simplejpeg's pixels


@pytest.mark.parametrize("data", ["tiny_data", "raw_data"])
def test_resized_crops_are_pillows_within_one_level(data, request):
    data = request.getfixturevalue(data)
    options = {"crop": "resized", "size": (96, 160), "scale": (0.05, 1.0), "dtype": "uint8"}
    batch = first_batch(data, **PLAIN | options)
    assert batch.images.shape == (COUNT, 3, 96, 160)
    slots = FullShuffle([48], 4).list_slots(0, COUNT)
    assert batch.ids.tolist() == slots.ids.tolist()
    regions = draw_regions(4, *slots[:2], (256, 256), (0.05, 1.0), (3 / 4, 4 / 3))
    flips = draw(4, *slots[:2]).flip
    assert 0 < flips.sum() < COUNT
    for place, image in enumerate(stored_images(data, batch.ids.tolist())):
        top, left = regions.start[place]
        height, width = regions.shape[place]
        region = image[top : top + height, left : left + width]
        expected = np.asarray(Image.fromarray(region).resize((160, 96), Image.Resampling.BILINEAR))
        if flips[place]:
            expected = expected[:, ::-1]
        found = batch.images[place].permute(1, 2, 0).numpy()
        assert np.abs(found.astype(int) - expected).max() <= 1


def triangle(stored: int, size: int, *, repeat: bool) -> np.ndarray:
    """Return the weights [size, stored] of a linear filter, widened to shrink.

    Beyond the border it repeats the edge, as DALI, or leaves out what is there, as Pillow.
    """
    scale = stored / size
    centers, radius = (np.arange(size) + 0.5) * scale - 0.5, max(1.0, scale)
    places = np.arange(-stored, 2 * stored)
    weights = np.clip(1 - np.abs(places - centers[:, None]) / radius, 0, None)
    kept = np.zeros((size, stored))
    if repeat:
        np.add.at(kept.T, places.clip(0, stored - 1), weights.T)
    else:
        kept += weights[:, stored : 2 * stored]
    return kept / kept.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "stored", [(50, 60), (96, 161), (97, 170), (200, 300), (256, 256), (500, 333)]
)
def test_resizing_is_pillows_up_to_the_edge(stored):
    """Black and white noise, the steepest there is; the bounds are those of `resize_crops`."""
    size = 96, 160
    noise = np.random.default_rng(0).integers(0, 2, (*stored, 3)).astype(np.uint8) * 255
    pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipe:
        image = fn.external_source(
            lambda: [noise], batch=True, dtype=dali.types.UINT8, layout="HWC"
        )
        pipe.set_outputs(resize_crops(StreamConfig(size=size), image))
    pipe.build()
    found = run_to_tensor(pipe)[0].numpy().astype(int)
    pillow = np.asarray(Image.fromarray(noise).resize(size[::-1], Image.Resampling.BILINEAR))
    sums = {}
    for repeat in (True, False):
        rows, columns = (triangle(*pair, repeat=repeat) for pair in zip(stored, size, strict=True))
        sums[repeat] = np.einsum("iwc,jw->ijc", np.tensordot(rows, noise, 1), columns)
    assert np.abs(found - sums[True]).max() < 0.51
    assert np.abs(pillow - sums[False]).max() < 1.01
    differences = np.abs(found - pillow).max(2)
    assert differences[1:-1, 1:-1].max() <= 1
    assert differences.max() <= 255 * 15 / 64 + 1.5
    corners = differences[:: size[0] - 1, :: size[1] - 1].copy()
    differences[:: size[0] - 1, :: size[1] - 1] = 0
    assert differences.max() <= 255 / 8 + 1.5
    if max(stored[0] / size[0], stored[1] / size[1]) <= 1:
        assert max(differences.max(), corners.max()) <= 1


def torchvisions_region(height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.get_params` of torchvision, written from its documentation."""
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("stored", "scale", "ratio"),
    [
        ((256, 256), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((100, 400), (0.5, 1.0), (3 / 4, 4 / 3)),  # most attempts do not fit
        ((400, 100), (0.9, 1.0), (3 / 4, 4 / 3)),  # none does
    ],
)
def test_regions_are_distributed_as_torchvisions(stored, scale, ratio):
    count = 4000
    ids = np.arange(count)
    found = np.hstack(draw_regions(7, np.zeros_like(ids), ids, stored, scale, ratio))
    random.seed(1)
    wanted = np.array([torchvisions_region(*stored, scale, ratio) for _ in range(count)])
    for ours, theirs in zip(found.T, wanted.T, strict=True):
        levels = np.union1d(ours, theirs)
        shares = [np.searchsorted(np.sort(x), levels, side="right") / count for x in (ours, theirs)]
        # Kolmogorov and Smirnov: 0.05 between samples of 4,000 once in 10,000
        assert np.abs(shares[0] - shares[1]).max() < 0.05
    tops, lefts, heights, widths = found.T
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= stored[0]).all()
    assert (lefts + widths <= stored[1]).all()
    assert min(heights.min(), widths.min()) > 0


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("crop", ["random", "center"])
def test_crops_of_other_sizes_are_cut_out_of_the_stored_pixels(raw_data, crop, layout):
    options = PLAIN | {"dtype": "uint8", "layout": layout}
    batch = first_batch(raw_data, **options, crop=crop, size=(100, 256))
    draws = draw(4, *FullShuffle([48], 4).list_slots(0, COUNT)[:2], border=(156, 0))
    assert len(set(draws.y.tolist())) > 5
    for place, image in enumerate(stored_images(raw_data, batch.ids.tolist())):
        top = draws.y[place] if crop == "random" else 78
        expected = image[top : top + 100]
        if crop == "random" and draws.flip[place]:
            expected = expected[:, ::-1]
        assert np.array_equal(batch.images[place].permute(1, 2, 0), expected)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flips_have_the_probability_that_is_asked_for(raw_data, probability):
    options = PLAIN | {"size": 256, "dtype": "uint8", "flip": probability}
    batch = first_batch(raw_data, **options)
    for found, image in zip(batch.images, stored_images(raw_data, batch.ids.tolist()), strict=True):
        expected = image[:, ::-1] if probability else image
        assert np.array_equal(found.permute(1, 2, 0), expected)


@pytest.mark.parametrize("colour", [0, 0.1])
@pytest.mark.parametrize("mean", [(123.7, 116.3, 103.5), None, "channel", "image"])
@pytest.mark.parametrize("std", [(58.4, 57.1, 57.4), "channel"])
def test_pixels_are_divided_by_std_after_the_mean(tiny_data, colour, mean, std):
    common = {"colour": colour, "colour_divide": bool(colour), "mean": mean, "threads": 1}
    batch, other = (first_batch(tiny_data, **common, std=one) for one in (std, None))
    channel = np.sqrt(np.diag(Statistics.load(tiny_data).covariance))
    divisor = torch.tensor(channel if std == "channel" else std).view(1, 3, 1, 1)
    torch.testing.assert_close(batch.images, (other.images / divisor).float(), atol=1e-4, rtol=1e-4)


def test_the_mean_is_the_one_that_is_given(tiny_data):
    options = {"colour": 0, "threads": 1, "crop": "center"}
    mean = (120.0, 110.0, 100.0)
    plain = first_batch(tiny_data, **options, mean=None).images
    stored = first_batch(tiny_data, **options, mean=None, dtype="uint8").images
    assert torch.equal(plain, stored.float())
    found = first_batch(tiny_data, **options, mean=mean).images
    torch.testing.assert_close(found, plain - torch.tensor(mean).view(1, 3, 1, 1))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float32, torch.uint8])
def test_types_and_layouts_hold_the_same_pixels(tiny_data, dtype, layout, tmp_path):
    given = {"mean": None, "colour": 0} if dtype == torch.uint8 else {"std": (60, 60, 60)}
    options = {**given, "threads": 1, "ledger": tmp_path}
    batch = first_batch(tiny_data, **options, dtype=dtype, layout=layout)
    expected = first_batch(tiny_data, **given, threads=1).images
    images = batch.images
    assert images.shape == (COUNT, 3, 224, 224)
    assert str(images.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    order = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    assert images.is_contiguous(memory_format=order)
    torch.testing.assert_close(images.float(), expected, atol=0.02, rtol=0.01)
    assert prove(tiny_data, [tmp_path]).findings == ()


def jitter(images, draw: Draw):
    """Color jitter, a blur for some, and erasing: all kinds of draws, and a condition."""
    images = fn.brightness_contrast(
        images,
        brightness=draw.uniform("brightness", 0.8, 1.2),
        contrast=draw.normal("contrast", 1.0, 0.1),
    )
    images = fn.color_twist(images, hue=draw.normal("hue", 0, 5))
    if draw.boolean("blur", 0.3):
        images = fn.gaussian_blur(images, window_size=5)
    anchor = draw.uniform("corner", 0.0, 0.6, count=2)
    return fn.erase(images, anchor=anchor, shape=(0.2, 0.2), normalized=True, fill_value=7)


def one_of_three(images, draw: Draw):
    """A choice of policies, as AutoAugment's: a rotation, a paler color, or a shear."""
    policy = draw.choice("policy", 3)
    if policy == 0:
        images = fn.rotate(
            images, angle=draw.choice("angle", [-10.0, 10.0]), keep_size=True, fill_value=0
        )
    elif policy == 1:
        images = fn.hsv(images, saturation=draw.uniform("strength", 0, 0.4))
    else:
        images = fn.warp_affine(images, matrix=[1, 0.2, 0, 0, 1, 0], fill_value=0)
    return images


@pytest.mark.parametrize(
    ("data", "augment"),
    [("tiny_data", jitter), ("raw_data", jitter), ("tiny_data", one_of_three)],
)
def test_an_augmentation_gives_the_same_bits_in_every_world(data, augment, request):
    data = request.getfixturevalue(data)
    options = {"seed": 9, "batch_size": 24, "augment": augment, "size": 128}
    with Stream(data, **options, threads=1) as stream:
        batches = list(itertools.islice(stream, 3))
    whole = torch.cat([batch.images for batch in batches])
    with Stream(data, **options, threads=3, position=24) as stream:
        assert torch.equal(next(stream).images, whole[24:48])
    for world in (2, 3):
        parts = []
        for rank in range(world):
            with Stream(data, **options, threads=2, rank=rank, world_size=world) as stream:
                parts.append([batch.images for batch in itertools.islice(stream, 3)])
        again = torch.cat([part[step] for step in range(3) for part in parts])
        assert torch.equal(again, whole)
    with Stream(data, **options | {"augment": None}, threads=1) as stream:
        plain = next(stream).images
    changed = (plain != whole[:24]).flatten(1).any(1)
    assert changed.all()


def test_a_condition_without_its_source_is_refused_in_one_line(tiny_data):
    names: dict = {"fn": fn}
    code = """
def unread(images, draw):
    if draw.boolean("turned", 0.5):
        images = fn.flip(images, vertical=1)
    return images
"""
    exec(code, names)
    with pytest.raises(
        UsageError, match=r"augment unread: its source cannot be read; .* \.py file"
    ):
        Stream(tiny_data, batch_size=8, threads=1, augment=names["unread"])


def test_an_augmentation_does_what_its_draws_say(raw_data):
    def turn(images, draw):
        if draw.boolean("turn", 0.5):
            images = fn.flip(images, horizontal=0, vertical=1)
        return images

    options = PLAIN | {"dtype": "uint8", "flip": 0, "size": 256}
    batch, other = (first_batch(raw_data, **options, augment=one) for one in (turn, None))
    slots = FullShuffle([48], 4).list_slots(0, COUNT)
    turned = NamedDraw("turn", "boolean", (0.5,)).compute(4, *slots[:2])
    assert 0 < turned.sum() < COUNT
    for place in range(COUNT):
        expected = other.images[place].flip(1) if turned[place] else other.images[place]
        assert torch.equal(batch.images[place], expected)


def test_named_draws_have_the_distribution_they_say_and_are_independent():
    ids = np.arange(40_000)
    epochs = np.zeros_like(ids)
    uniform = NamedDraw("a", "uniform", (2.0, 6.0)).compute(1, epochs, ids)
    other = NamedDraw("b", "uniform", (2.0, 6.0)).compute(1, epochs, ids)
    normal = NamedDraw("a", "normal", (1.0, 2.0), 2).compute(1, epochs, ids)
    choice = NamedDraw("c", "index", (3,)).compute(1, epochs, ids)
    flags = NamedDraw("d", "boolean", (0.2,)).compute(1, epochs, ids)
    assert (uniform.dtype, normal.shape, choice.dtype) == (np.float32, (40_000, 2), np.int32)
    assert uniform.min() >= 2
    assert uniform.max() <= 6
    assert abs(uniform.mean() - 4) < 0.03
    assert abs(uniform.std() - 4 / math.sqrt(12)) < 0.02
    assert np.abs(normal.mean(0) - 1).max() < 0.05
    assert np.abs(normal.std(0) - 2).max() < 0.05
    assert np.abs(np.bincount(choice, minlength=3) / 40_000 - 1 / 3).max() < 0.01
    assert flags.dtype == bool
    assert abs(flags.mean() - 0.2) < 0.01
    table = np.corrcoef([uniform, other, *normal.T, choice, flags])
    assert np.abs(table - np.eye(6)).max() < 0.02


def no_image(images, draw):
    return 3


def other_shape(images, draw):
    return fn.resize(images, size=draw.uniform("size", 50, 200, count=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": no_image}, "augment no_image returns int, no DALI node"),
        ({"augment": other_shape}, r"augment other_shape returns an image of 3x\d+x\d+ \(CHW\)"),
        ({"size": 300}, "size 300x300 does not fit into the stored images of 256x256"),
        ({"size": (0, 5)}, r"size is \(0, 5\)"),
        ({"size": 2.5}, "size is 2.5"),
        ({"crop": "resized", "scale": (0.0, 1.0)}, r"scale is \(0.0, 1.0\); it takes two rising"),
        ({"crop": "resized", "ratio": (2.0, 1.0)}, r"ratio is \(2.0, 1.0\)"),
        ({"crop": "resized", "mean": "image"}, "mean is 'image', which does not fit"),
        ({"dtype": "uint8"}, "dtype uint8 holds pixels as they were stored"),
        ({"dtype": "int8"}, "dtype is 'int8'; it takes float32, float16, bfloat16, uint8"),
        ({"layout": "HWC"}, "layout is 'HWC'; it takes NCHW, NHWC"),
        ({"mean": (0.485, 0.456, 0.406)}, r"grey levels 0..255: \(123.67, 116.28, 103.53\)\?"),
        ({"mean": (1, 2)}, r"mean is \(1, 2\); it takes 'channel' or 'image', three numbers"),
        ({"std": (0, 1, 1)}, r"std is \(0, 1, 1\); it takes numbers above 0"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"scale": 0.5}, "scale is 0.5; it takes two rising numbers above 0, up to 1"),
        ({"ratio": (1, 2, 3)}, r"ratio is \(1, 2, 3\); it takes two rising numbers above 0"),
        ({"view": "whole"}, "Stream has no setting 'view' any more; it is called crop"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_data, settings, message):
    with (
        pytest.raises((ValueError, TypeError, UsageError), match=message) as caught,
        Stream(tiny_data, batch_size=8, threads=1, **settings) as stream,
    ):
        next(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda draw: draw.uniform("a", 2, 1), "draw 'a' is from 2 to 1"),
        (lambda draw: draw.normal("a", 0, -1), "std is 0 or more"),
        (lambda draw: draw.choice("a", []), "nothing to choose from"),
        (lambda draw: draw.choice("a", 0), "nothing to choose from"),
        (lambda draw: draw.uniform("a", count=-1), "draw 'a' has count -1"),
        (lambda draw: draw.uniform("a", count=2.0), "draw 'a' has count 2.0"),
        (lambda draw: draw.boolean("a", 2), "probability 2"),
        (lambda draw: (draw.uniform("a"), draw.normal("a")), "asked for twice, and differently"),
    ],
)
def test_a_draw_that_cannot_be_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(Draw(lambda one: one))


def test_the_same_name_gives_the_same_draw():
    draw = Draw(lambda one: object())
    assert draw.uniform("a") is draw.uniform("a")
    assert draw.uniform("a") is not draw.uniform("b")


def test_a_state_is_taken_up_by_any_world(tiny_data, tmp_path):
    with Stream(tiny_data, batch_size=10, seed=1) as stream:
        assert repr(stream) == (
            f"Stream(train: 48 samples of {len(stream.classes)} classes, random 224x224 float32 "
            "on cpu, batch 10, rank 0 of 1, position 0)"
        )
        assert stream.classes == Manifest.load(tiny_data).classes
        assert (len(stream), stream.steps_per_epoch) == (5, 5)
        next(stream), next(stream)
        state = stream.state_dict()
        after = next(stream)
    assert state["position"] == 20
    with Stream(tiny_data, batch_size=5, seed=1, ledger=tmp_path) as stream:
        next(stream)
        stream.load_state_dict(state)
        assert stream.state_dict() == state
        halves = [next(stream), next(stream)]
    assert torch.equal(torch.cat([half.images for half in halves]), after.images)
    assert halves[-1].position == 30
    assert sorted(file.stat().st_size > 300 for file in tmp_path.iterdir()) == [True, True]
    assert {finding.kind for finding in prove(tiny_data, [tmp_path]).findings} == {"missing"}
    with Stream(tiny_data, batch_size=5, seed=2) as stream:
        with pytest.raises(ValueError, match="a state of another stream: seed was 1, is 2"):
            stream.load_state_dict(state)
        with pytest.raises(ValueError, match="data_sha256 was None"):
            stream.load_state_dict({"position": 3})
    for name, other in (("shuffle", {"shuffle": "block"}), ("split", {"split": "val"})):
        with (
            Stream(tiny_data, batch_size=5, seed=1, **other) as stream,
            pytest.raises(ValueError, match=f"another stream: {name} was"),
        ):
            stream.load_state_dict(state)
    with pytest.raises(ValueError, match="this stream was closed"):
        stream.load_state_dict(state)


def test_devices_have_one_spelling():
    names = ["cpu", "gpu", "cuda", torch.device("cuda"), torch.device("cuda", 1), "cuda:0"]
    found = [StreamConfig(device=name) for name in names]
    assert StreamConfig(device=torch.device("cpu", 0)).device == "cpu"  # accelerate's
    assert [one.device for one in found] == ["cpu", "gpu", "gpu", "gpu", "cuda:1", "cuda:0"]
    assert [one.pixel_dtype for one in found] == ["float32", *["float16"] * 5]
    assert replace(found[1], device="cpu").pixel_dtype == "float32"
    for name in ("1", "cuda:", "cuda:²"):
        with pytest.raises(ValueError, match="device is"):
            StreamConfig(device=name)


def test_settings_that_change_pixels_are_told_in_one_spelling():
    same = {"size": (224, 224), "dtype": torch.float32, "flip": 0.5, "scale": [0.08, 1.0]}
    assert StreamConfig(**same).pixels == StreamConfig().pixels == ""
    changes = {
        "size": 100, "scale": (0.1, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "augment": jitter,
        "std": np.array([1.0, 2.0, 3.0]), "dtype": "float16", "layout": "NHWC",
    }  # fmt: skip
    for name, value in changes.items():
        assert StreamConfig(**{name: value}).pixels.startswith(f"{name}=")
    assert StreamConfig(augment=jitter).pixels == "augment=jitter"
    assert StreamConfig(std=changes["std"]).pixels == "std=(1.0, 2.0, 3.0)"


def test_a_stream_ends_where_an_augmentation_has_failed(tiny_data):
    def shrink_some(images, draw):
        if draw.boolean("shrunk", 0.02):
            images = fn.resize(images, size=[50, 60])
        return images

    with Stream(tiny_data, batch_size=8, seed=0, threads=1, augment=shrink_some) as stream:
        with pytest.raises(UsageError, match="returns an image of"):
            deque(itertools.islice(stream, 50), maxlen=0)
        with pytest.raises(ValueError, match="this stream was closed"):
            next(stream)
