"""A contact sheet: a row for each query with its nearest pictures, as in figure 4 (right)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.experiments.neighbors.features import Ids
from pipeline.dataset.images import Pixels
from pipeline.remote.dataset import DataSet
from pipeline.stored_picture import Undecodable, pixels_of
from pipeline.stream.shard_reader import Storage

SIDE = 128
FRAME = 4
PITCH = SIDE + 2 * FRAME + 8
NAME = 20
"""Height of the line with the class."""
GAP = 20
"""Between a query and its neighbours."""
HEAD = 26
EDGE = 10
PAPER, INK, SOFT = "#fbfaf7", "#1d1c1a", "#6b675f"
RIGHT, WRONG = "#12806a", "#b5441c"


@dataclass(frozen=True)
class Shown:
    """A picture on the sheet; None where it is damaged."""

    pixels: Pixels | None
    label: int


def read(dataset: DataSet, split: str, ids: Sequence[int]) -> list[Shown]:
    """Read pictures of a split.

    Raises:
        DataError, DuetError: a whole shard cannot be had.
    """
    storage = Storage(dataset, split)
    try:
        places = np.array(ids, np.int64)
        views, damaged = storage.read(places, np.empty(storage.room(places), np.uint8))
        labels = storage.labels(places).tolist()
        return [
            Shown(None if place in damaged else _pixels(storage, bytes(view)), label)
            for place, (view, label) in enumerate(zip(views, labels, strict=True))
        ]
    finally:
        storage.close()


def _pixels(storage: Storage, data: bytes) -> Pixels | None:
    try:
        return pixels_of(data, storage.encoding)
    except Undecodable:
        return None


def chosen(labels: Ids, count: int, seed: int) -> Ids:
    """Places of `count` of them: random, but one of every class before the second of any.

    Args:
        labels: int64 [n].
        count: how many.
        seed: of the draw.
    """
    order = np.random.default_rng([seed, 4]).permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)
    seen: dict[int, int] = {}
    for place in order:
        label = int(labels[place])
        turn[place] = seen[label] = seen.get(label, -1) + 1
    return order[np.argsort(turn[order], kind="stable")][:count]


def drawn(queries: Sequence[Shown], found: Sequence[Sequence[Shown]], names: Sequence[str],
          notes: Sequence[str]) -> Image.Image:  # fmt: skip
    """Draw the sheet.

    Args:
        queries: one a row.
        found: the neighbours of each, the nearest first.
        names: of the classes.
        notes: two short texts, above the queries and above the neighbours.
    """
    across = max(len(row) for row in found)
    width = 2 * EDGE + (1 + across) * PITCH + GAP
    height = HEAD + 2 * EDGE + len(queries) * (PITCH + NAME)
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for note, left in zip(notes, (EDGE, EDGE + PITCH + GAP), strict=True):
        pen.text((left, EDGE), note, SOFT, font)
    for row, (query, others) in enumerate(zip(queries, found, strict=True)):
        top = HEAD + EDGE + row * (PITCH + NAME)
        _put(image, (EDGE, top), query, INK, names[query.label])
        for column, other in enumerate(others):
            right = other.label == query.label
            left = EDGE + GAP + (1 + column) * PITCH
            name = names[other.label] if right else f"x {names[other.label]}"
            _put(image, (left, top), other, RIGHT if right else WRONG, name)
    return image


def _put(image: Image.Image, at: tuple[int, int], shown: Shown, colour: str, name: str) -> None:
    left, top = at
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    side = SIDE + 2 * FRAME
    pen.rectangle((left, top, left + side - 1, top + side - 1), fill=colour)
    if shown.pixels is not None:
        small = Image.fromarray(shown.pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(small, (left + FRAME, top + FRAME))
    pen.text((left, top + side + 2), fitted(name, font, side), colour, font)


def fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """A text, cut to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
