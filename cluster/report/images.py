"""The pictures of a report: what the network sees, and what its first layer looks for."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import SafetensorError, safe_open

from cluster.checkpoint.format import Found, column_file
from cluster.checkpoint_choice import choose
from cluster.run.events import Warned
from cluster.run.folder import store_of
from cluster.run.kernels import Kernel
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import CACHE_SIZE, metadata, parse_size
from pipeline.tools.errors import DuetError

PICTURES = 32
SHOWN_SIDE = 144  # pixels; shown at about half of that, sharp on dense screens
KERNEL_SCALE = 5
KERNEL_GAP = 1  # kernel pixels between neighbours

Pixels = npt.NDArray[np.uint8]


class Unavailable(Exception):
    """A picture cannot be made; the message is what the page says in its place."""


@dataclass(frozen=True)
class Sample:
    """A training picture as the network gets it."""

    name: str
    uri: str


def mosaic(data: str, config: dict[str, Any]) -> list[Sample]:
    """The first training pictures of a run, cropped, flipped and coloured as it had them.

    Raises:
        Unavailable: the data set cannot be read here.
    """
    try:
        # DALI takes seconds to load and may be missing where only a report is wanted.
        from pipeline.batches import Stream

        cached = cache_of(config)
        classes = Manifest.load(metadata(data, **cached)).classes
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
        raise Unavailable(f"No pictures: {first_line(error)}.") from error
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


def newest_checkpoint(run: Path) -> Found:
    """The newest complete checkpoint of RUN, every byte checked.

    Raises:
        Unavailable: there is none.
    """
    damaged: list[str] = []
    try:
        found = choose(
            run,
            store_of(run),
            lambda event: damaged.append(event.text) if isinstance(event, Warned) else None,
        )
    except DuetError as error:
        reason = f" ({damaged[0]})" if damaged else ""
        raise Unavailable(f"No kernels: the run has no complete checkpoint yet{reason}.") from error
    return found


def column_kernels(found: Found) -> dict[str, Kernel]:
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
        RGBA picture, uint8 [height, width, 4], gaps clear.
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
    """A picture, uint8 [h, h, 3], as a data URI, `SHOWN_SIDE` wide."""
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
