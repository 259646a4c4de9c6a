"""Draw a small data set of ten shapes and textures, so that nothing has to be downloaded.

    python -m pipeline.demo_images OUT [--seed 0] [--train-images 2000] [--val-images 400]

OUT/train/<class>/00000.jpg ... and OUT/val/<class>/00000.jpg ..., the layout of ImageNet's
folders. Each image is a pure function of (seed, split, class, number), so the set is the same
for any number of workers; with the same Pillow and NumPy on the same kind of processor also to
the byte. OUT appears whole or not at all, with a `demo.json` of its arguments.

A class is a function of the plane: the signed distance to the figure's edge, negative inside.
Place, size, rotation, aspect, colors, light, clutter, noise and JPEG settings are random and
independent of the class, so a network has to learn the shape. The origin is the center of the
image and half of its shorter side is 1, so the center square that training crops is -1..1.
"""

from __future__ import annotations

import colorsys
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import TimeoutError as MultiprocessingTimeout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.options import DemoOptions
from pipeline.tools.arguments import MOST_PROCESSES, MOST_SEED, parse_options, require_range
from pipeline.tools.errors import DuetError, UsageError, run
from pipeline.tools.jsonl import parse_json
from pipeline.tools.processes import tie_to_parent
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

Plane = npt.NDArray[np.floating[Any]]
Figure = Callable[[Plane, Plane, np.random.Generator], Plane]

SHORT_SIDE = (64, 600)  # pixels; small ones are far more common
ASPECT = 2.5  # longest side ratio, either way up
GREY, CMYK, PROGRESSIVE, TURNED = 0.05, 0.03, 0.12, 0.06  # shares of the files
# Large figures, plain to see: a network an eighth as wide learns them in a minute on two cores.
LEAST_CONTRAST = 0.3  # in luminance 0..1, between figure and background
RADIUS, TEXTURE_RADIUS = (0.6, 0.9), (0.8, 1.0)  # ranges of the figure's size
ROTATION = 0.35  # radians, at most, either way
CLUTTER = 6  # spots and lines in the background are fewer
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

EXIF_ORIENTATION = 0x0112
# EXIF orientation of a camera held askew -> how the upright image lies in such a file.
LIES_IN_FILE = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def disc(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A disc of radius 0.9."""
    return np.hypot(x, y) - np.float32(0.9)


def ring(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A ring of outer radius 1, a fifth to two fifths of it wide."""
    half = np.float32(rng.uniform(0.1, 0.2))
    return np.abs(np.hypot(x, y) - (1 - half)) - half


def square(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A square with sides of 1.6."""
    return _intersect(np.abs(x), np.abs(y)) - np.float32(0.8)


def triangle(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A triangle with equal sides of about 2, around the origin."""
    slant = np.float32(math.sqrt(3) / 2)
    return _intersect(slant * np.abs(x) + y / 2, -y) - np.float32(0.58)


def cross(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Two equal bars of length 2 that cross at their centers."""
    across, along = np.abs(x), np.abs(y)
    half = np.float32(rng.uniform(0.2, 0.32))
    level = _intersect(across - 1, along - half)
    upright = _intersect(across - half, along - 1)
    return -_intersect(-level, -upright)  # either of them: not outside both


def star(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A star of five points: the plane folded onto half of a point leaves one straight edge."""
    fifth = 2 * math.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, y), np.float32(fifth)) - np.float32(fifth / 2))
    angle = np.float32(fifth / 2) - angle  # 0 at a tip, fifth / 2 in a notch
    radius = np.hypot(x, y)
    notch = rng.uniform(0.4, 0.5)
    edge = np.array([notch * math.cos(fifth / 2) - 1, notch * math.sin(fifth / 2)])
    out = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    ahead = radius * np.cos(angle) - 1
    return ahead * np.float32(out[0]) + radius * np.sin(angle) * np.float32(out[1])


def stripes(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Straight stripes that cover half of the plane."""
    return _intersect(_bands(x, rng.uniform(0.3, 0.55)), _patch(x, y, rng))


def waves(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Wavy stripes with an amplitude of at least a fifth of a wave, so never nearly straight."""
    length = rng.uniform(0.7, 1.1)
    swing = np.float32(length * rng.uniform(0.2, 0.3))
    bent = x + swing * np.sin(y * np.float32(2 * math.pi / length))
    return _intersect(_bands(bent, rng.uniform(0.4, 0.6)) * np.float32(0.6), _patch(x, y, rng))


def checks(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A checkerboard with squares of 0.25 to 0.45."""
    turn = np.float32(math.pi / rng.uniform(0.25, 0.45))
    product = np.sin(x * turn) * np.sin(y * turn)
    return _intersect(product / turn, _patch(x, y, rng))


def dots(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Round dots on a square grid."""
    period = np.float32(rng.uniform(0.34, 0.55))
    half = period / 2
    from_dot = np.hypot(np.mod(x, period) - half, np.mod(y, period) - half)
    return _intersect(from_dot - period * np.float32(rng.uniform(0.26, 0.36)), _patch(x, y, rng))


# Sorted by name, like the folders; the position is part of each image's seed, so only append.
FIGURES: dict[str, Figure] = {
    figure.__name__: figure
    for figure in (checks, cross, disc, dots, ring, square, star, stripes, triangle, waves)
}
TEXTURES = ("checks", "dots", "stripes", "waves")


def _intersect(one: Plane, other: Plane) -> Plane:
    """Return the intersection of two figures."""
    overlap: Plane = np.maximum(one, other)
    return overlap


def _bands(x: Plane, period: float) -> Plane:
    turn = np.float32(2 * math.pi / period)
    distance: Plane = np.sin(x * turn) / turn
    return distance


def _patch(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A blob with a wobbling edge, the outline of a texture."""
    angle = np.arctan2(y, x)
    wobble = np.full_like(x, 1.1)
    for waves_round in (2, 3, 5):
        phase = np.float32(rng.uniform(0, 2 * math.pi))
        wobble += np.float32(rng.uniform(0, 0.1)) * np.sin(waves_round * angle + phase)
    return np.hypot(x, y) - wobble


def draw_image(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw an upright RGB image of class `name`, of random size, the figure near its center."""
    width, height = _size(rng)
    half = min(width, height) / 2
    x, y = np.meshgrid(
        ((np.arange(width) + 0.5 - width / 2) / half).astype(np.float32),
        ((np.arange(height) + 0.5 - height / 2) / half).astype(np.float32),
    )
    behind, before = _two_colours(rng)
    image = _background(width, height, behind, rng)
    cover = _cover(name, x, y, 1 / half, rng)
    paint = before[:, None, None] + _slope(x, y, 0.12, rng)
    paint -= image
    paint *= cover
    image += paint
    image *= 1 + _slope(x, y, 0.25, rng)  # light from one side
    grain = rng.standard_normal((height, width), dtype=np.float32)
    grain *= np.float32(rng.uniform(0, 0.08))
    image += grain
    image.clip(0, 1, out=image)
    image *= 255
    pixels = np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))
    return Image.fromarray(pixels, "RGB")


def draw_jpeg(name: str, rng: np.random.Generator) -> bytes:
    """Draw an image as a JPEG file; some are grey, CMYK, progressive or rotated by EXIF."""
    image = draw_image(name, rng)
    kind, turned, progressive = rng.random(3)
    if kind < GREY:
        image = image.convert("L")
    elif kind < GREY + CMYK:
        image = image.convert("CMYK")
    exif = Image.Exif()
    if turned < TURNED:
        exif[EXIF_ORIENTATION] = orientation = int(rng.choice(list(LIES_IN_FILE)))
        image = image.transpose(LIES_IN_FILE[orientation])
    file = io.BytesIO()
    image.save(
        file,
        "JPEG",
        quality=int(rng.integers(60, 97)),
        subsampling=int(rng.integers(0, 3)),  # 4:4:4, 4:2:2, 4:2:0
        progressive=bool(progressive < PROGRESSIVE),
        exif=exif,
    )
    return file.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    least, most = SHORT_SIDE
    short = least * (most / least) ** (rng.random() ** 2.2)
    aspect = math.exp(np.clip(rng.normal(0, 0.35), -math.log(ASPECT), math.log(ASPECT)))
    long = short * max(aspect, 1 / aspect)
    return (round(long), round(short)) if aspect > 1 else (round(short), round(long))


def _cover(name: str, x: Plane, y: Plane, pixel: float, rng: np.random.Generator) -> Plane:
    """Return the fraction 0..1 of each pixel that the figure covers (edges soft over one pixel)."""
    radius = rng.uniform(*(TEXTURE_RADIUS if name in TEXTURES else RADIUS))
    room = 0.25 if name in TEXTURES else min(0.3, 1 - radius)
    along, across = rng.uniform(-room, room, 2).astype(np.float32)
    turn, squash = rng.uniform(-ROTATION, ROTATION), rng.uniform(0.8, 1.25)
    cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
    x, y = x - along, y - across
    x, y = (
        (x * np.float32(cos) + y * np.float32(sin)) * np.float32(squash),
        (y * np.float32(cos) - x * np.float32(sin)) / np.float32(squash),
    )
    distance = FIGURES[name](x, y, rng)
    return (np.float32(0.5) - distance * np.float32(radius / pixel)).clip(0, 1)


def _two_colours(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Return the colors of background and figure, of any hue, with enough contrast in grey."""
    while True:
        pair = [
            np.array(colorsys.hsv_to_rgb(*(rng.random(), rng.random(), rng.uniform(0.1, 1))))
            for _ in range(2)
        ]
        behind, before = (colour.astype(np.float32) for colour in pair)
        if abs(float((behind - before) @ LUMINANCE)) > LEAST_CONTRAST:
            return behind, before


def _slope(x: Plane, y: Plane, most: float, rng: np.random.Generator) -> Plane:
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, most)
    return x * np.float32(strength * math.cos(angle)) + y * np.float32(strength * math.sin(angle))


def _background(width: int, height: int, colour: Plane, rng: np.random.Generator) -> Plane:
    """Return float32 [3, height, width], 0..1: clouds around a color, with small clutter.

    Planes, as arithmetic on [height, width, 3] with a mask takes NumPy several times as long.
    """
    clouds = colour + rng.normal(0, rng.uniform(0.02, 0.12), (*rng.integers(2, 7, 2), 3))
    tiny = Image.fromarray((clouds.clip(0, 1) * 255).astype(np.uint8), "RGB")
    image = tiny.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    short = min(width, height)
    for _ in range(rng.integers(0, CLUTTER)):
        x, y = rng.random(2) * (width, height)
        ink = tuple(int(value) for value in (colour + rng.normal(0, 0.25, 3)).clip(0, 1) * 255)
        size, turn = short * rng.uniform(0.03, 0.11), rng.uniform(0, 2 * math.pi)
        far = (x + 3 * size * math.cos(turn), y + 3 * size * math.sin(turn))
        match rng.integers(0, 3):
            case 0:
                pen.line((x, y, *far), fill=ink, width=max(1, short // 60))
            case 1:
                pen.ellipse((x - size, y - size, x + size, y + size), fill=ink)
            case _:
                pen.rectangle((x, y, x + size, y + size * 1.5), fill=ink)
    planes = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    planes /= 255
    return planes


VERSION = 2
"""Version of the drawings: raise it when the same arguments give other images."""
RECORD = "demo.json"
SPLITS = ("train", "val")  # the position is part of each image's seed
TASK_IMAGES = 40
"""Images of a task of the pool: about a quarter of a second."""
TIMEOUT = 120
"""Seconds without a finished task after which a process is taken for dead."""


MOST_IMAGES = 10_000_000
"""Most images of a split: a day of work for a hundred cores."""
DrawingTask = tuple[str, str, range]
"""Split, class, and numbers of the images to draw."""


def list_tasks(split: str, images: int) -> Iterator[DrawingTask]:
    """Cut a split into tasks; the first classes get what does not divide evenly."""
    for label, name in enumerate(FIGURES):
        count = images // len(FIGURES) + (label < images % len(FIGURES))
        for start in range(0, count, TASK_IMAGES):
            yield split, name, range(count)[start : start + TASK_IMAGES]


def draw_task(folder: Path, seed: int, task: DrawingTask) -> int:
    """Write the JPEG files of a task below `folder`; return their number."""
    split, name, numbers = task
    target = folder / split / name
    target.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        place = [seed, SPLITS.index(split), list(FIGURES).index(name), number]
        image = draw_jpeg(name, np.random.default_rng(np.random.SeedSequence(place)))
        (target / f"{number:05d}.jpg").write_bytes(image)
    return len(numbers)


def draw_set(options: DemoOptions) -> bool:
    """Draw the data set; return False if it was there already, made with the same arguments.

    Raises:
        UsageError: the arguments cannot work, or OUT holds anything else.
    """
    _check(options)
    out = options.out.resolve()  # "." has no name to put a partial folder beside
    arguments = {name: getattr(options, name) for name in ("seed", "train", "val")}
    record = {"version": VERSION, **arguments, "classes": list(FIGURES)}
    if out.is_dir() and any(out.iterdir()):
        with suppress(OSError, ValueError):
            if parse_json((out / RECORD).read_text()) == record:
                return False
        raise UsageError(
            f"{options.out} holds something else than this demo set: "
            "name another folder or remove it"
        )
    unfinished = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        with Progress("drawing", total=options.train + options.val, unit="img") as progress:
            for drawn in _run_tasks(unfinished, options):
                progress.advance(drawn)
        (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        unfinished.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{options.out} cannot be written ({reason}): name another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _run_tasks(folder: Path, options: DemoOptions) -> Iterator[int]:
    """Yield the number of images of each task as it ends, in this process or in a pool.

    Processes are spawned, not forked, as a progress line runs a thread here; being daemons they
    end with this process, however it ends.
    """
    draw = partial(draw_task, folder, options.seed)
    jobs = [*list_tasks("train", options.train), *list_tasks("val", options.val)]
    workers = options.workers or cpu_count()
    if workers == 1:
        yield from map(draw, jobs)
        return
    with get_context("spawn").Pool(workers, initializer=tie_to_parent) as pool:
        done = pool.imap_unordered(draw, jobs)
        for _ in jobs:
            try:
                yield done.next(timeout=TIMEOUT)
            except MultiprocessingTimeout:
                raise DuetError(
                    f"no image drawn in {TIMEOUT} s (a process died, out of memory?); "
                    "run the same command again with fewer --workers"
                ) from None


def _check(options: DemoOptions) -> None:
    require_range("seed", options.seed, 0, MOST_SEED)
    require_range("train", options.train, len(FIGURES), MOST_IMAGES)  # one a class
    require_range("val", options.val, 0, MOST_IMAGES)
    require_range("workers", options.workers, 0, MOST_PROCESSES)
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"{options.out} is a file: name a folder")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_options(DemoOptions, argv, "python -m pipeline.demo_images")
    state = "drawn" if draw_set(options) else "already complete"
    sys.stderr.write(
        f"{options.train:,} training and {options.val:,} validation images of "
        f"{len(FIGURES)} classes {state} in {options.out}\n"
    )


if __name__ == "__main__":
    run(main)
