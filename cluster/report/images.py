"""Images of a report: training images as the network gets them, conv1 kernels, and answers.

The answers are figure 4 (left) of the paper: images with the five most probable classes. The paper
chose its eight images by hand. Here they are chosen by rule, from the probabilities saved by
`cluster.evaluate --save-probabilities`: the highest and the lowest probabilities of the true class,
and a random sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.checkpoint.format import Checkpoint, choose_checkpoint, column_file
from cluster.cli.options import CHOICES, Choice, ReportOptions
from cluster.run.events import Warned
from cluster.run.folder import read_store
from cluster.run.kernels import Kernel
from cluster.run.probabilities import SavedProbabilities, probability_path, suggest_evaluation
from pipeline.dataset.images import Pixels
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import choose_versions, locate_dataset, open_dataset
from pipeline.stream.config import CROP
from pipeline.stream.shard_reader import Damage, ShardReader
from pipeline.tools.charts import encode_image
from pipeline.tools.errors import DuetError
from pipeline.tools.units import CACHE_SIZE, parse_size

MOST_IMAGES = 32
SHOWN_SIDE = 144  # pixels; shown at about half of that, sharp on dense screens
QUALITY = 82
KERNEL_SCALE = 5
KERNEL_GAP = 1  # kernel pixels between neighbours


class MissingFigure(Exception):
    """A figure cannot be made; the page shows the message in its place."""


@dataclass(frozen=True)
class TrainingImage:
    """A training image as the network gets it."""

    name: str
    uri: str


def load_training_images(run: Path, data: str, config: dict[str, Any]) -> list[TrainingImage]:
    """Return the first training images of a run, with its crops, flips and color shifts.

    Args:
        run: folder of the run.
        data: its data set; "": the one that it recorded.
        config: content of config.toml.

    Raises:
        MissingFigure: the data set is not known, or cannot be read here.
    """
    try:
        # DALI takes seconds to load and may be missing where only a report is wanted.
        from pipeline.batches import Stream

        cached = read_cache_settings(config)
        data, folder = locate_dataset(run, data, **cached)
        classes = Manifest.load(folder).classes
        count = min(MOST_IMAGES, int(config.get("batch_size", MOST_IMAGES)))
        with Stream(
            data,
            batch_size=count,
            seed=int(config.get("seed", 0)),
            colour=float(config.get("colour", 0.1)),
            shuffle=config.get("shuffle", "full"),
            window=int(config.get("window", 16)),
            version=choose_versions(run, folder),
            **cached,
        ) as stream:
            batch = next(stream)
            mean = stream.channel_mean
    except (DuetError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise MissingFigure(f"No images: {shorten_error(error)}.") from error
    restored = batch.images.float().cpu().numpy() + np.asarray(mean).reshape(1, 3, 1, 1)
    pixels = restored.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    labels = batch.labels.cpu().tolist()
    return [
        TrainingImage(classes[label], encode_image(image, SHOWN_SIDE, QUALITY))
        for label, image in zip(labels, pixels, strict=True)
    ]


def read_cache_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the shard cache that RUN/config.toml names, and its size, as arguments of a data set.

    Raises:
        UsageError: its size cannot be read.
    """
    size = config.get("cache_size")
    return {
        "cache": config.get("cache") or None,
        "cache_size": parse_size(str(size)) if size else CACHE_SIZE,
    }


def find_newest_checkpoint(run: Path) -> Checkpoint:
    """Return the newest complete checkpoint of RUN, every byte checked.

    Raises:
        MissingFigure: there is none.
    """
    damaged: list[str] = []
    try:
        return choose_checkpoint(
            run,
            read_store(run),
            lambda event: damaged.append(event.text) if isinstance(event, Warned) else None,
        )
    except DuetError as error:
        reason = f" ({damaged[0]})" if damaged else ""
        raise MissingFigure(
            f"No kernels: the run has no complete checkpoint yet{reason}."
        ) from error


def read_column_kernels(found: Checkpoint) -> dict[str, Kernel]:
    """Return conv1 of column "a", and of "b" if there is one: float32 [maps, 3, 11, 11] each.

    Raises:
        MissingFigure: the files hold no such tensors.
    """
    kernels = {}
    try:
        for column, name in enumerate("ab"):
            path = found.path / column_file(column)
            if column == 0 or path.exists():
                with safe_open(path, framework="numpy") as file:
                    kernels[name] = file.get_tensor(f"weights/{name}.conv1.weight")
    except (SafetensorError, OSError) as error:
        raise MissingFigure(f"No kernels: {found.path}: {shorten_error(error)}.") from error
    if any(one.ndim != 4 or one.shape[1] != 3 for one in kernels.values()):
        raise MissingFigure("No kernels: conv1 is no convolution of the image.")
    return kernels


def tile_kernels(kernels: Kernel, across: int = 0) -> Pixels:
    """Draw kernels [n, 3, k, k] side by side, each stretched to full contrast around grey.

    Args:
        kernels: float, in R, G, B.
        across: kernels in a row; 0: for a sheet of about 4:3.

    Returns:
        RGBA image, uint8 [height, width, 4], gaps clear.
    """
    most = np.abs(kernels).max(axis=(1, 2, 3), keepdims=True)
    shades = np.round(127.5 + 127.5 * kernels / np.maximum(most, 1e-12)).astype(np.uint8)
    sheet = tile_images(shades.transpose(0, 2, 3, 1), across)
    return sheet.repeat(KERNEL_SCALE, 0).repeat(KERNEL_SCALE, 1)


def tile_images(images: Pixels, across: int = 0) -> Pixels:
    """Place small images side by side.

    Args:
        images: uint8 [n, side, side, 3] in R, G, B, or [n, side, side, 1] in grey.
        across: images in a row; 0: for a sheet of about 4:3.

    Returns:
        Image with an alpha channel, uint8 [height, width, 4 or 2], whose gaps of `KERNEL_GAP`
        pixels are clear.
    """
    count, side, _, channels = images.shape
    across = across or math.ceil(math.sqrt(count * 4 / 3))
    down = math.ceil(count / across)
    pitch = side + KERNEL_GAP
    sheet = np.zeros(
        (down * pitch - KERNEL_GAP, across * pitch - KERNEL_GAP, channels + 1), np.uint8
    )
    for number, image in enumerate(images):
        top, left = number // across * pitch, number % across * pitch
        sheet[top : top + side, left : left + side, :channels] = image
        sheet[top : top + side, left : left + side, channels] = 255
    return sheet


def shorten_error(error: Exception) -> str:
    """Return the first line of an error message, without a full stop."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


ANSWERS = 5
MOST_PAIRS = 12
"""Pairs of confused classes that are listed."""
ROWS = 4096
"""Images whose probabilities are read at a time."""
TITLES = {
    "best": "Best: surest of the truth",
    "worst": "Worst: furthest from the truth",
    "random": "Randomly sampled",
}


@dataclass(frozen=True)
class Guess:
    """One of the most probable classes."""

    name: str
    share: float
    """Its probability, 0..1."""
    true: bool


@dataclass(frozen=True)
class AnsweredImage:
    """An image with the network's answers, the most probable first."""

    uri: str
    sample: int
    """Sample id in the split."""
    truth: str
    share: float
    """Probability of the true class."""
    guesses: tuple[Guess, ...]

    @property
    def verdict(self) -> str:
        """The result: "right", "in the top 5" or "wrong"."""
        if self.guesses[0].true:
            return "right"
        return "in the top 5" if any(guess.true for guess in self.guesses) else "wrong"


@dataclass(frozen=True)
class Confusion:
    """Images of a class that got another answer."""

    truth: str
    answer: str
    count: int
    images: int
    """Images of the class in all."""


@dataclass(frozen=True)
class Answers:
    """Images by choice, and the evaluation that the probabilities are from."""

    groups: tuple[tuple[str, tuple[AnsweredImage, ...]], ...]
    """(title, images) of each choice."""
    views: int
    split: str
    samples: int
    step: int
    confusions: tuple[Confusion, ...] = ()
    """The pairs of classes that are confused most often, the most frequent first."""


def collect_answers(
    run: Path,
    data: str,
    config: dict[str, Any],
    choices: Sequence[Choice] = CHOICES,
    each: int = ReportOptions.each,
) -> Answers:
    """Return images of the evaluated split with their five most probable classes.

    Args:
        run: folder of the run, with probabilities of ten views or of one.
        data: the data set that was evaluated; "": the one that the run recorded.
        config: content of config.toml, for the cache.
        choices: rules by which images are chosen.
        each: images of each choice.

    Raises:
        MissingFigure: the probabilities or the images are missing.
    """
    views = next((views for views in (10, 1) if probability_path(run, views).is_file()), 0)
    if not views:
        raise MissingFigure(
            f"No answers: the probabilities were not kept; {suggest_evaluation(run, 10)}."
        )
    try:
        saved, cached = SavedProbabilities(run, views), read_cache_settings(config)
        data, folder = locate_dataset(run, data, **cached)
        if identity(folder) != saved.about.data_sha256:
            raise MissingFigure(f"No answers: {data} is not the data set that was evaluated.")
        truths, answers = read_rows(saved)
        chosen = choose_images(saved, truths, choices, each)
        confusions = count_confusions(saved, answers)
        with (
            closing(open_dataset(data, version=identity(folder), **cached)) as dataset,
            closing(ShardReader(dataset, saved.about.split)) as storage,
        ):
            groups = tuple(
                (TITLES[choice], tuple(_load_answers(saved, storage, ids, views)))
                for choice, ids in chosen.items()
            )
    except (DuetError, OSError, ValueError) as error:
        raise MissingFigure(f"No answers: {shorten_error(error)}.") from error
    about = saved.about
    return Answers(
        groups, views, about.split, int((saved.weights > 0).sum()), about.step, confusions
    )


def read_rows(saved: SavedProbabilities) -> tuple[Tensor, Tensor]:
    """Return each image's probability of its true class, float32 [N], and answer, int64 [N]."""
    truths, answers, first = [], [], 0
    for labels in saved.labels.split(ROWS):
        rows = saved.rows(first, first + len(labels))
        truths.append(rows.gather(1, labels[:, None]).flatten())
        answers.append(rows.argmax(1))
        first += len(labels)
    return torch.cat(truths), torch.cat(answers)


def choose_images(
    saved: SavedProbabilities, truths: Tensor, choices: Sequence[Choice], each: int
) -> dict[Choice, list[int]]:
    """Return the ids of the images of each choice, without damaged ones; `truths`: `read_rows`."""
    sound = torch.nonzero(saved.weights > 0).flatten()
    order = torch.argsort(truths[sound], stable=True)
    lot = np.random.default_rng(0).permutation(len(sound))
    found = {
        "best": sound[order.flip(0)[:each]].tolist(),
        "worst": sound[order[:each]].tolist(),
        "random": sound[torch.from_numpy(lot[:each])].tolist(),
    }
    return {choice: found[choice] for choice in choices}


def count_confusions(saved: SavedProbabilities, answers: Tensor) -> tuple[Confusion, ...]:
    """Return the `MOST_PAIRS` most frequent pairs of a class and a wrong answer (`read_rows`)."""
    names = saved.about.classes
    is_wrong = (answers != saved.labels) & (saved.weights > 0)
    wrong = saved.labels[is_wrong] * len(names) + answers[is_wrong]
    pairs, counts = wrong.unique(return_counts=True)
    images = saved.labels[saved.weights > 0].bincount(minlength=len(names)).tolist()
    order = counts.argsort(descending=True, stable=True)[:MOST_PAIRS]
    rows = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    return tuple(
        Confusion(names[pair // len(names)], names[pair % len(names)], count,
                  images[pair // len(names)])
        for pair, count in rows
    )  # fmt: skip


def _load_answers(
    saved: SavedProbabilities, storage: ShardReader, ids: list[int], views: int
) -> list[AnsweredImage]:
    names, found = saved.about.classes, []
    for sample, pixels in zip(ids, storage.decode(ids), strict=True):
        row, label = saved.rows(sample, sample + 1)[0], int(saved.labels[sample])
        shares, places = row.topk(min(ANSWERS, len(names)))
        guesses = tuple(
            Guess(names[place], share, place == label)
            for place, share in zip(places.tolist(), shares.tolist(), strict=True)
        )
        if isinstance(pixels, Damage):
            pixels = np.full((256, 256, 3), 128, np.uint8)
        height, width = pixels.shape[:2]
        side = min(CROP, height, width)
        top, left = (height - side) // 2, (width - side) // 2
        seen = pixels[top : top + side, left : left + side] if views == 1 else pixels
        uri = encode_image(seen, SHOWN_SIDE, QUALITY)
        found.append(AnsweredImage(uri, sample, names[label], float(row[label]), guesses))
    return found
