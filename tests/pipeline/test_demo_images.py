"""The demo images are what they claim: determined by the seed, varied, whole or absent."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline import demo_images
from pipeline.demo_images import (
    ASPECT,
    EXIF_ORIENTATION,
    FIGURES,
    LIES_IN_FILE,
    SHORT_SIDE,
    DemoOptions,
    draw_image,
    draw_jpeg,
    draw_set,
)
from pipeline.tools.errors import UsageError


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a fifth of the pixels, where their size is nothing to the test."""
    monkeypatch.setattr(demo_images, "SHORT_SIDE", (100, 180))


def test_layout_counts_and_record(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert draw_set(DemoOptions(out, train=23, val=11, workers=1))
    train = sorted((out / "train").rglob("*.jpg"))
    assert len(train) == 23
    assert len(list((out / "val").rglob("*.jpg"))) == 11
    assert {path.parent.name for path in train} == set(FIGURES)
    assert (out / "train" / "checks" / "00002.jpg").exists()  # the first classes get the rest
    assert json.loads((out / "demo.json").read_text())["classes"] == sorted(FIGURES)
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing partial left behind"


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    draw_set(DemoOptions(alone, train=20, val=10, workers=1))
    draw_set(DemoOptions(together, train=20, val=10, workers=2))
    assert contents(alone) == contents(together)


@pytest.mark.usefixtures("small")
def test_a_larger_set_starts_with_the_smaller_one(tmp_path: Path) -> None:
    draw_set(DemoOptions(tmp_path / "small", train=20, val=0, workers=1))
    draw_set(DemoOptions(tmp_path / "large", train=40, val=10, workers=1))
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    small.pop("demo.json")
    assert small.items() <= large.items()


@pytest.mark.usefixtures("small")
def test_no_image_twice_and_seed_matters(tmp_path: Path) -> None:
    draw_set(DemoOptions(tmp_path / "zero", train=60, val=60, workers=1))
    draw_set(DemoOptions(tmp_path / "one", seed=1, train=60, val=60, workers=1))
    images = [*contents(tmp_path / "zero").values(), *contents(tmp_path / "one").values()]
    assert len(set(images)) == len(images)


def test_the_files_are_as_various_as_real_ones() -> None:
    """A few hundred files hold every kind that a packer has to cope with."""
    modes, orientations, shorts, progressive, subsampling = set(), set(), [], 0, set()
    for number in range(300):
        jpeg = draw_jpeg(list(FIGURES)[number % 10], np.random.default_rng([7, number]))
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.format == "JPEG"
            image.load()
            modes.add(image.mode)
            orientations.add(image.getexif().get(EXIF_ORIENTATION))
            progressive += "progressive" in image.info
            subsampling.add(tuple(layer[1:3] for layer in image.layer))  # type: ignore[attr-defined]
            long, short = max(image.size), min(image.size)
            assert SHORT_SIDE[0] <= short <= SHORT_SIDE[1]
            assert long <= ASPECT * short + 2
            shorts.append(short)
    assert modes == {"RGB", "L", "CMYK"}
    assert orientations == {None, *LIES_IN_FILE}
    assert 10 < progressive < 100
    assert len(subsampling) >= 4  # three of colour, one of grey
    assert max(shorts) > 400
    assert np.median(shorts) < 160, "mostly small, so that drawing is quick"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FIGURES)
def test_orientation_makes_the_image_upright_again(name: str) -> None:
    """A viewer that follows the EXIF tag sees the image as drawn."""
    turned = 0
    for number in range(40):
        upright = draw_image(name, np.random.default_rng(number))
        with Image.open(io.BytesIO(draw_jpeg(name, np.random.default_rng(number)))) as file:
            turned += EXIF_ORIENTATION in file.getexif()
            seen = ImageOps.exif_transpose(file).convert("L")
        assert seen.size == upright.size
        error = np.abs(np.asarray(seen, float) - np.asarray(upright.convert("L"), float))
        assert error.mean() < 12, f"image {number} of {name}"
    assert turned, "no turned file among forty: the test saw nothing"


@pytest.mark.usefixtures("small")
def test_figure_is_seen_in_the_centre_square() -> None:
    """Two luminances stand apart in the centre square: the figure survives the packer's crop."""
    for number in range(100):
        name = list(FIGURES)[number % 10]
        image = draw_image(name, np.random.default_rng([3, number])).convert("L")
        square = np.asarray(ImageOps.fit(image, (64, 64)), float)
        assert np.percentile(square, 96) - np.percentile(square, 4) > 25, f"{name} {number}"


@pytest.mark.usefixtures("small")
def test_mean_colour_does_not_tell_the_class() -> None:
    """A nearest-mean-colour classifier stays near chance (0.9 wrong for ten classes)."""
    count = 40
    colours = np.array(
        [
            [
                np.asarray(draw_image(name, np.random.default_rng([5, label, number])))
                .reshape(-1, 3)
                .mean(0)
                for number in range(count)
            ]
            for label, name in enumerate(FIGURES)
        ]
    )
    centres = colours[:, : count // 2].mean(1)
    held_out = colours[:, count // 2 :]
    guess = np.linalg.norm(held_out[:, :, None] - centres, axis=-1).argmin(-1)
    assert (guess != np.arange(len(FIGURES))[:, None]).mean() > 0.7


def test_figures_have_the_area_geometry_says() -> None:
    """Areas of the plain figures against their formulas, for a size of one and no turning."""
    ticks = np.linspace(-2, 2, 801, dtype=np.float32)
    x, y = np.meshgrid(ticks, ticks)

    def area(name: str) -> float:
        inside = FIGURES[name](x, y, np.random.default_rng(0)) < 0
        return float(inside.mean()) * 4.005**2

    assert area("disc") == pytest.approx(math.pi * 0.81, rel=0.01)
    assert area("square") == pytest.approx(1.6**2, rel=0.01)
    assert area("triangle") == pytest.approx(3 * math.sqrt(3) * 0.58**2, rel=0.01)
    notch = np.random.default_rng(0).uniform(0.4, 0.5)
    assert area("star") == pytest.approx(5 * notch * math.sin(math.pi / 5), rel=0.01)
    half = np.random.default_rng(0).uniform(0.2, 0.32)
    assert area("cross") == pytest.approx(8 * half - 4 * half**2, rel=0.02)


def test_again_with_the_same_arguments_changes_nothing(tmp_path: Path) -> None:
    options = DemoOptions(tmp_path / "set", train=10, val=0, workers=1)
    assert draw_set(options)
    before = {path: path.stat().st_mtime_ns for path in options.out.rglob("*")}
    assert not draw_set(options)
    assert before == {path: path.stat().st_mtime_ns for path in options.out.rglob("*")}


def test_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UsageError, match="something else"):
        draw_set(DemoOptions(out, train=10, val=0, workers=1))
    assert contents(out) == {"thesis.txt": b"ten years of work"}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert draw_set(DemoOptions(tmp_path, train=10, val=0, workers=1))
    assert len(contents(tmp_path)) == 11


def test_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def fail_late(name: str, rng: np.random.Generator) -> bytes:
        drawn.append(name)
        if len(drawn) > 7:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(demo_images, "draw_jpeg", fail_late)
    with pytest.raises(KeyboardInterrupt):
        draw_set(DemoOptions(tmp_path / "set", train=30, val=0, workers=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"seed": -1}, "--seed -1"), ({"train": 9}, "--train 9"), ({"workers": -2}, "--workers -2")],
)
def test_impossible_arguments(tmp_path: Path, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_set(DemoOptions(tmp_path / "set", **wrong))


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        draw_set(DemoOptions(tmp_path / "set"))
