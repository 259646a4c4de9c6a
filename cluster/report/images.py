"""The images of a report: what the network sees, and what its first layer looks for.

Figure 4 (left) of the paper: images, what they are, and the five answers of the network.

The paper shows eight test images of its own choice. Here they are chosen by rule, from the
probabilities that `cluster.evaluate --save-probabilities` leaves: those in which the true class got
the most, those in which it got the least, and some drawn by lot among all.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.checkpoint.format import Checkpoint, column_file
from cluster.checkpoint.format import choose_checkpoint as choose_checkpoint
from cluster.run.events import Warned
from cluster.run.folder import read_store
from cluster.run.kernels import Kernel
from cluster.run.probabilities import SavedProbabilities, probability_path
from pipeline.dataset.images import Pixels, Undecodable, decode_image
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import CACHE_SIZE, fetch_metadata, open_dataset, parse_size
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DuetError

PICTURES = 32
SHOWN_SIDE = 144  # pixels; shown at about half of that, sharp on dense screens
KERNEL_SCALE = 5
KERNEL_GAP = 1  # kernel pixels between neighbours


class Unavailable(Exception):
    """An image cannot be made; the message is what the page says in its place."""


@dataclass(frozen=True)
class Sample:
    """A training image as the network gets it."""

    name: str
    uri: str


def mosaic(data: str, config: dict[str, Any]) -> list[Sample]:
    """The first training images of a run, cropped, flipped and coloured as it had them.

    Raises:
        Unavailable: the data set cannot be read here.
    """
    try:
        # DALI takes seconds to load and may be missing where only a report is wanted.
        from pipeline.batches import Stream

        cached = cache_of(config)
        classes = Manifest.load(fetch_metadata(data, **cached)).classes
        count = min(PICTURES, int(config.get("batch_size", PICTURES)))
        with Stream(
            data,
            batch_size=count,
            seed=int(config.get("seed", 0)),
            colour=float(config.get("colour", 0.1)),
            shuffle=config.get("shuffle", "full"),
            window=int(config.get("window", 16)),
            **cached,
        ) as stream:
            batch = next(stream)
            mean = stream.channel_mean
    except (DuetError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise Unavailable(f"No images: {first_line(error)}.") from error
    restored = batch.images.float().cpu().numpy() + np.asarray(mean).reshape(1, 3, 1, 1)
    pixels = restored.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    labels = batch.labels.cpu().tolist()
    return [
        Sample(classes[label], small_jpeg(picture))
        for label, picture in zip(labels, pixels, strict=True)
    ]


def cache_of(config: dict[str, Any]) -> dict[str, Any]:
    """The cache that a run's RUN/config.toml names, as `Config.cached`: with the run's own limit.

    Raises:
        UsageError: its size cannot be read.
    """
    size = config.get("cache_size")
    return {
        "cache": config.get("cache") or None,
        "cache_size": parse_size(str(size)) if size else CACHE_SIZE,
    }


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest complete checkpoint of RUN, every byte checked.

    Raises:
        Unavailable: there is none.
    """
    damaged: list[str] = []
    try:
        found = choose_checkpoint(
            run,
            read_store(run),
            lambda event: damaged.append(event.text) if isinstance(event, Warned) else None,
        )
    except DuetError as error:
        reason = f" ({damaged[0]})" if damaged else ""
        raise Unavailable(f"No kernels: the run has no complete checkpoint yet{reason}.") from error
    return found


def column_kernels(found: Checkpoint) -> dict[str, Kernel]:
    """conv1 by column, "a" and (unless the network has one) "b": float32 [maps, 3, 11, 11].

    Raises:
        Unavailable: the files hold no such tensors.
    """
    try:
        columns = [c for c in (0, 1) if c == 0 or (found.path / column_file(c)).exists()]
        return {"ab"[column]: _conv1(found.path, column) for column in columns}
    except (SafetensorError, OSError) as error:
        raise Unavailable(f"No kernels: {found.path}: {first_line(error)}.") from error


def _conv1(checkpoint: Path, column: int) -> Kernel:
    with safe_open(checkpoint / column_file(column), framework="numpy") as file:
        kernels: Kernel = file.get_tensor(f"weights/{'ab'[column]}.conv1.weight")
    return kernels


def tile(kernels: Kernel, across: int = 0) -> Pixels:
    """Kernels [n, 3, k, k] side by side, each stretched to full contrast around grey.

    Args:
        kernels: float, in R, G, B.
        across: so many in a row; 0: for a sheet about four wide to three high.

    Returns:
        RGBA image, uint8 [height, width, 4], gaps clear.
    """
    count, side = len(kernels), kernels.shape[-1]
    most = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    shades = np.round(127.5 + 127.5 * kernels / np.maximum(most, 1e-12)).astype(np.uint8)
    across = across or math.ceil(math.sqrt(count * 4 / 3))
    down = math.ceil(count / across)
    pitch = side + KERNEL_GAP
    sheet = np.zeros((down * pitch - KERNEL_GAP, across * pitch - KERNEL_GAP, 4), np.uint8)
    for number, shade in enumerate(shades):
        top, left = number // across * pitch, number % across * pitch
        sheet[top : top + side, left : left + side, :3] = shade.transpose(1, 2, 0)
        sheet[top : top + side, left : left + side, 3] = 255
    return sheet.repeat(KERNEL_SCALE, 0).repeat(KERNEL_SCALE, 1)


def small_jpeg(pixels: Pixels) -> str:
    """An image, uint8 [h, h, 3], as a data URI, `SHOWN_SIDE` wide."""
    image = Image.fromarray(pixels).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return data_uri("image/jpeg", file)


def data_uri(kind: str, file: io.BytesIO) -> str:
    """The bytes of a file as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def first_line(error: Exception) -> str:
    """What an error says, in one line without a full stop."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


Choice = Literal["best", "worst", "random"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
EACH = 8
"""Images of a choice."""
ANSWERS = 5
BORDER = 16
"""Pixels around the centre view, 224x224 of 256x256."""
ROWS = 4096
"""Images whose probabilities are in memory at a time."""
TITLES = {
    "best": "Surest of the truth",
    "worst": "Furthest from the truth",
    "random": "Drawn by lot",
}


@dataclass(frozen=True)
class Guess:
    """One of the most probable classes."""

    name: str
    share: float
    """Its probability, 0..1."""
    true: bool


@dataclass(frozen=True)
class Answer:
    """An image with the network's answers, the most probable first."""

    uri: str
    sample: int
    """Place in the split's stored order."""
    truth: str
    share: float
    """Probability of the true class."""
    guesses: tuple[Guess, ...]

    @property
    def verdict(self) -> str:
        """How it counts: "right", "in the top 5" or "wrong"."""
        if self.guesses[0].true:
            return "right"
        return "in the top 5" if any(guess.true for guess in self.guesses) else "wrong"


@dataclass(frozen=True)
class Answers:
    """Images by choice, and what the probabilities are of."""

    groups: tuple[tuple[str, tuple[Answer, ...]], ...]
    """(title, images)."""
    views: int
    split: str
    samples: int
    step: int


def answers(
    run: Path,
    data: str | None,
    config: dict[str, Any],
    choices: Sequence[Choice] = CHOICES,
    each: int = EACH,
) -> Answers:
    """Images of the evaluated split with the five most probable classes.

    Args:
        run: folder of the run; its probabilities of ten views if there are, else of one.
        data: the data set that they are of.
        config: of the run, for its cache.
        choices: which images.
        each: how many of each choice.

    Raises:
        Unavailable: there are no probabilities, or no such images.
    """
    views = next((views for views in (10, 1) if probability_path(run, views).is_file()), 0)
    if not views:
        raise Unavailable(
            "No answers: the probabilities were not kept (cluster.evaluate --save-probabilities)."
        )
    if data is None:
        raise Unavailable("No answers: no data folder was given (--data).")
    try:
        saved = SavedProbabilities(run, views)
        _check(saved, data, config)
        chosen = choose(saved, choices, each)
        with (
            closing(open_dataset(data, **cache_of(config))) as dataset,
            closing(ShardReader(dataset, saved.about.split)) as storage,
        ):
            groups = tuple(
                (TITLES[choice], tuple(_answers(saved, storage, ids, views)))
                for choice, ids in chosen.items()
            )
    except (DuetError, OSError, ValueError) as error:
        raise Unavailable(f"No answers: {first_line(error)}.") from error
    about = saved.about
    return Answers(groups, views, about.split, int((saved.weights > 0).sum()), about.step)


def _check(saved: SavedProbabilities, data: str, config: dict[str, Any]) -> None:
    """Refuse another data set than the probabilities are of.

    Raises:
        Unavailable: it is another.
    """
    if identity(fetch_metadata(data, **cache_of(config))) != saved.about.data_sha256:
        raise Unavailable(f"No answers: {data} is not the data set that was evaluated.")


def choose(
    saved: SavedProbabilities, choices: Sequence[Choice], each: int
) -> dict[Choice, list[int]]:
    """Which images each choice shows, by their ids; damaged ones are never shown."""
    sound = torch.nonzero(saved.weights > 0).flatten()
    true = torch.cat(
        [
            _true(saved.rows(first, min(first + ROWS, len(saved.labels))), saved.labels[first:])
            for first in range(0, len(saved.labels), ROWS)
        ]
    )[sound]
    order = torch.argsort(true, stable=True)
    lot = np.random.default_rng(0).permutation(len(sound))
    found = {
        "best": sound[order.flip(0)[:each]].tolist(),
        "worst": sound[order[:each]].tolist(),
        "random": sound[torch.from_numpy(lot[:each])].tolist(),
    }
    return {choice: found[choice] for choice in choices}


def _true(probabilities: Tensor, labels: Tensor) -> Tensor:
    """What the true class of each row got."""
    return probabilities.gather(1, labels[: len(probabilities), None]).flatten()


def _answers(
    saved: SavedProbabilities, storage: ShardReader, ids: list[int], views: int
) -> list[Answer]:
    names, found = saved.about.classes, []
    for sample, pixels in zip(ids, _pixels(storage, ids), strict=True):
        row, label = saved.rows(sample, sample + 1)[0], int(saved.labels[sample])
        shares, places = row.topk(min(ANSWERS, len(names)))
        guesses = tuple(
            Guess(names[place], share, place == label)
            for place, share in zip(places.tolist(), shares.tolist(), strict=True)
        )
        seen = pixels[BORDER:-BORDER, BORDER:-BORDER] if views == 1 else pixels
        found.append(Answer(small_jpeg(seen), sample, names[label], float(row[label]), guesses))
    return found


def _pixels(storage: ShardReader, ids: list[int]) -> list[Pixels]:
    """The images; grey where one was damaged since it was evaluated."""
    places = np.array(ids, np.int64)
    views, damages = storage.read(places)
    found = []
    for place, view in enumerate(views):
        try:
            if place in damages:
                raise Undecodable(str(damages[place]))
            found.append(decode_image(view.data, storage.encoding))
        except Undecodable:
            found.append(np.full((256, 256, 3), 128, np.uint8))
    return found
