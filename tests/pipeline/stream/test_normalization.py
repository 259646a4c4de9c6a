"""Mean image, colours by epoch and their division: against Pillow and NumPy."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.stream.augment import compute_color_shift, draw
from pipeline.stream.config import ColorPlan
from pipeline.stream.ledger.format import LedgerHeader, scan_ledger
from pipeline.stream.ledger.proof import prove
from pipeline.stream.loader import subtract_image
from pipeline.stream.order import FullShuffle
from tests.helpers.images import packed
from tests.helpers.ledgers import about as facts_of
from tests.helpers.ledgers import attempt, sixty  # noqa: F401 - a fixture
from tests.pipeline.stream.test_stream import SAMPLES, joined, stored, taken

PLAN = ((0, 0.1), (1, 0.0), (3, 0.3))


def expected(data, seed, position, count, *, plan, mean, divide):
    """Training pixels one sample at a time: float64 [count, 224, 224, 3]."""
    stats = Statistics.load(data)
    centre = stats.mean_picture[16:240, 16:240].astype(np.float64)
    deviations = stats.eigenvectors * np.sqrt(stats.eigenvalues)
    slots = FullShuffle([SAMPLES], seed).list_slots(position, count)
    draws = draw(seed, *slots[:2])
    for place, (epoch, sample) in enumerate(zip(*slots[:2], strict=True)):
        y, x = draws.y[place], draws.x[place]
        pixels = stored(data, sample)[y : y + 224, x : x + 224]
        if draws.flip[place]:
            pixels = pixels[:, ::-1]
        pixels = pixels - (centre if mean == "image" else stats.channel_mean)
        colour = next(value for start, value in reversed(plan) if start <= epoch)
        pixels = pixels + compute_color_shift(colour * draws.color, deviations)[place]
        yield pixels / (1 + colour) if divide else pixels


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("mean", ["channel", "image"])
def test_pixels_are_pillows_less_the_mean_tinted_and_divided(tiny_data, mean, divide):
    with Stream(
        tiny_data, batch_size=70, seed=5, position=20, colour=PLAN, mean=mean, colour_divide=divide
    ) as stream:
        batch = next(stream)
    oracle = expected(tiny_data, 5, 20, 70, plan=PLAN, mean=mean, divide=divide)
    for image, pixels in zip(batch.images, oracle, strict=True):
        np.testing.assert_allclose(image.numpy().transpose(1, 2, 0), pixels, atol=1e-3)


def test_raw_images_have_the_same_options(image_folder, tmp_path):
    data = tmp_path / "data"
    packed(data, train=image_folder / "val", encoding="raw")
    stats = Statistics.load(data)
    mean = torch.from_numpy(stats.mean_picture[16:240, 16:240]).permute(2, 0, 1)
    options = {"batch_size": 20, "seed": 1, "colour": 0.1}
    with (
        Stream(data, **options) as plain,
        Stream(data, mean="image", colour_divide=True, **options) as other,
    ):
        images = next(plain).images + torch.from_numpy(stats.channel_mean)[:, None, None]
        torch.testing.assert_close(
            next(other).images, ((images - mean) / 1.1).float(), atol=1e-3, rtol=0
        )


def test_what_is_evaluated_is_neither_tinted_nor_divided(tiny_data):
    stats = Statistics.load(tiny_data)
    centre = stats.mean_picture[16:240, 16:240].astype(np.float64)
    options = {"batch_size": 8, "once": True, "mean": "image", "colour_divide": True}
    with (
        Stream(tiny_data, crop="center", **options) as middle,
        Stream(tiny_data, crop="whole", **options) as whole,
    ):
        cut, all_of_it = next(middle).images, next(whole).images
        assert middle.view_mean is None
        view_mean = whole.view_mean
        np.testing.assert_allclose(middle.mean, view_mean, rtol=1e-6)
        assert not whole.mean.any()
    assert view_mean.dtype == torch.float32
    for place in range(8):
        pixels = stored(tiny_data, place)
        np.testing.assert_array_equal(all_of_it[place].permute(1, 2, 0), pixels)
        expected = pixels[16:240, 16:240] - centre
        np.testing.assert_allclose(cut[place].permute(1, 2, 0), expected, atol=1e-3)
    views = all_of_it[:, :, 16:240, 16:240] - view_mean
    torch.testing.assert_close(views, cut, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mean", ["channel", "image"])
def test_what_was_subtracted_gives_the_image_back(tiny_data, mean):
    with Stream(tiny_data, batch_size=6, crop="center", once=True, mean=mean) as stream:
        images = next(stream).images.numpy() + stream.mean
    for place in range(6):
        np.testing.assert_allclose(
            images[place].transpose(1, 2, 0), stored(tiny_data, place)[16:240, 16:240], atol=1e-3
        )


@pytest.mark.parametrize("divide", [False, True])
def test_each_epoch_has_the_pixels_of_its_own_colour_to_the_bit(tiny_data, divide):
    options = {"seed": 3, "colour_divide": divide, "mean": "image" if divide else "channel"}
    steps = 6  # of 36 over four epochs of 48: borders within batches
    with Stream(tiny_data, batch_size=36, colour=PLAN, **options) as stream:
        got = joined(taken(stream, steps), "images")
    epochs = torch.arange(36 * steps) // SAMPLES
    for (start, value), (end, _) in itertools.pairwise((*PLAN, (99, 0.0))):
        with Stream(tiny_data, batch_size=36, colour=value, **options) as stream:
            alone = joined(taken(stream, steps), "images")
        rows = (epochs >= start) & (epochs < end)
        assert rows.any()
        assert torch.equal(got[rows], alone[rows])
        assert not torch.equal(got[~rows], alone[~rows])


def test_all_options_together_depend_on_neither_world_nor_restart(tiny_data):
    options = {"seed": 2, "colour": PLAN, "colour_divide": True, "mean": "image"}
    with Stream(tiny_data, batch_size=20, threads=1, **options) as stream:
        whole = joined(taken(stream, 4), "images")
    ranks = []
    for rank in range(3):
        with Stream(
            tiny_data, batch_size=20, position=40, rank=rank, world_size=3, threads=2, **options
        ) as stream:
            ranks.append(taken(stream, 2))
    again = [joined([one[step] for one in ranks], "images") for step in range(2)]
    assert torch.equal(torch.cat(again), whole[40:])


@pytest.mark.parametrize(
    ("colour", "message"),
    [
        (-0.1, "out of range: colour=-0.1; it takes finite numbers, 0 or more"),
        (((0, 0.1), (5, float("inf"))), "finite numbers"),
        (((0, 0.1), (5, -1.0)), "finite numbers"),
        (((1, 0.1),), "whole numbers that rise from 0"),
        (((0, 0.1), (5, 0.2), (5, 0.3)), "whole numbers that rise from 0"),
        (((0, 0.1), (5.0, 0.2)), "whole numbers that rise from 0"),
        (((0, 0.1), 67), "it takes a number, or pairs such as"),
        ((), "it takes a number, or pairs such as"),
        ("0.1", "it takes a number, or pairs such as"),
        (None, "it takes a number, or pairs such as"),
    ],
)
def test_colours_that_mean_nothing_are_refused(tiny_data, colour, message):
    with pytest.raises(ValueError, match="colour") as refused:
        Stream(tiny_data, colour=colour)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mean_that_there_is_not_is_refused(tiny_data):
    with pytest.raises(
        ValueError, match="mean is 'pixel'; it takes 'channel' or 'image', three numbers, or None"
    ):
        Stream(tiny_data, mean="pixel")


def test_the_value_of_an_epoch():
    plan = ColorPlan.of(PLAN)
    assert plan.find_stretches(np.array([0, 1, 2, 3, 90])).tolist() == [0, 1, 1, 2, 2]
    assert plan.given == PLAN
    assert ColorPlan.of(((0, 0.5),)).given == ColorPlan.of(0.5).given == 0.5
    assert ColorPlan.of([[0, 1], [2, 0]]).given == ((0, 1.0), (2, 0.0))  # as TOML or JSON has it


def test_the_ledger_says_what_the_pixels_were(tiny_data, tmp_path):
    options = {"colour": PLAN, "colour_divide": True, "mean": "image"}
    with Stream(tiny_data, batch_size=8, ledger=tmp_path, **options) as stream:
        next(stream)
    (path,) = tmp_path.iterdir()
    about = scan_ledger(path).header
    assert (about.colour, about.colour_divide, about.mean) == (PLAN, True, "image")
    assert LedgerHeader.parse(about.to_line()) == about
    assert prove(tiny_data, [tmp_path]).findings == ()


def test_ledgers_of_before_these_options_are_read(data):
    now = facts_of(data, 0, 12, 0, 1)
    old = json.loads(now.to_line())
    for name in ("colour_divide", "mean", "pixels"):
        del old[name]
    old["view"] = old.pop("crop")
    assert LedgerHeader.parse(json.dumps(old).encode()) == now
    words = {"view": "centre", "mean": "picture"}
    found = LedgerHeader.parse(json.dumps(old | words).encode())
    assert (found.crop, found.mean) == ("center", "image")
    del old["view"]
    with pytest.raises(ValueError, match="does not say all: 'crop'"):
        LedgerHeader.parse(json.dumps(old).encode())


@pytest.mark.parametrize("other", [
    {"mean": "image"}, {"colour_divide": True}, {"colour": PLAN}, {"pixels": "std=channel"},
])  # fmt: skip
def test_pixels_of_another_recipe_are_not_compared(data, tmp_path, other, monkeypatch):
    folder = tmp_path / "run" / "ledger"
    attempt(folder, data, 0, 12, 1, 5)
    monkeypatch.setattr(
        "tests.helpers.ledgers.pixels", lambda epochs, ids: torch.ones(len(ids), 3, 2, 2)
    )
    attempt(folder, data, 0, 12, 1, 5, **other)
    assert prove(data, [folder.parent]).findings == ()
    attempt(folder, data, 0, 12, 1, 5)
    assert {finding.kind for finding in prove(data, [folder.parent]).findings} == {"replay"}


@pytest.mark.gpu
@pytest.mark.parametrize("mean", ["channel", "image"])
def test_gpu_pixels_are_the_cpu_graphs(tiny_data, mean):
    options = {"seed": 3, "batch_size": SAMPLES, "colour": PLAN, "colour_divide": True}
    with (
        Stream(tiny_data, mean=mean, **options) as host,
        Stream(tiny_data, mean=mean, device="gpu", **options) as device,
    ):
        a, b = next(host), next(device)
    assert b.images.is_cuda
    assert b.images.dtype == torch.float16
    difference = (a.images - b.images.float().cpu()).abs()
    assert difference.mean() < 0.5  # grey levels: another IDCT, float16
    assert difference.flatten()[::97].quantile(0.999) < 8


@pytest.mark.parametrize("divisor", [None, np.array([1.0, 1.1, 1.3], np.float32)])
def test_float16_pixels_lose_little_by_the_mean_image(divisor):
    """The arithmetic of a GPU, done on the CPU."""
    rng = np.random.default_rng(0)
    centred = rng.integers(0, 256, (3, 3, 224, 224)) - 115.3
    image = rng.normal(0, 12, (3, 224, 224))
    scale = 1 if divisor is None else divisor.astype(np.float64)[:, None, None, None]
    images = torch.from_numpy(centred / scale).half()
    subtract_image(images, torch.from_numpy(image).half(), divisor)
    difference = images.numpy() - (centred - image) / scale
    assert np.abs(difference).max() < 0.15  # grey levels; float16 alone: 0.06
    assert np.abs(difference).mean() < 0.03
