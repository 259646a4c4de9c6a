"""Images for tests, drawn here so that no test needs anyone's data."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.dataset.index import Index, load_index
from pipeline.dataset.manifest import Manifest
from pipeline.options import BuildConfig
from pipeline.packing.build import build

CLASSES = ("apple", "bird", "cat", "dog")


def pixels(seed: int, width: int = 96, height: int = 80) -> np.ndarray:
    """Return smooth noise in color, uint8 [height, width, 3], that compresses like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(seed: int, width: int = 96, height: int = 80, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def folder_per_class(root: Path, per_class: int, first_seed: int = 0) -> Path:
    """Draw `per_class` JPEGs of differing sizes into root/<class>/."""
    for label, name in enumerate(CLASSES):
        folder = root / name
        folder.mkdir(parents=True)
        for place in range(per_class):
            seed = first_seed + 1000 * label + place
            size = {"width": 60 + 7 * (seed % 9), "height": 50 + 11 * (seed % 7)}
            (folder / f"{place:03d}.jpg").write_bytes(jpeg(seed, **size))
    return root


class InProcess:
    """A `processes.Pool` in this process, for builds that need not wait for others to start."""

    def run(self, task: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        return map(task, jobs)


def options(out: Path, **settings: Any) -> BuildConfig:
    """Return the settings of a build; paths become text."""
    text = {
        key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
    }
    return BuildConfig(out=str(out), **text)


def packed(out: Path, **settings: Any) -> Manifest:
    """Build a data set in this process."""
    return build(options(out, **settings), pool=InProcess())


def flip_bit(data: Path, split: str, *samples: int) -> None:
    """Flip a bit in the middle of the stored bytes of each sample."""
    index = rows_of(data, split)
    for sample in samples:
        row = index[sample]
        with (data / f"{split}-{row['shard']:06d}.tar").open("r+b") as shard:
            shard.seek(int(row["offset"]) + int(row["size"]) // 2)
            (byte,) = shard.read(1)
            shard.seek(-1, os.SEEK_CUR)
            shard.write(bytes([byte ^ 4]))


def rows_of(data: Path, split: str) -> Index:
    """Return the index of a split of a sealed data set."""
    return load_index(data, split, Manifest.load(data))
