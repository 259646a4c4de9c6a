"""The images of the torture table: how they are written, read and damaged."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLES = 203
"""Images: no multiple of any batch, world or shard."""
SHARDS = 8
DAMAGED = 100
"""Number of the image that is damaged."""
SIDE = 64
"""Height and width of a stored image, in pixels."""
CROP = 48
"""Height and width of what is delivered."""


def write_shards(folder: Path) -> None:
    """Write the images as WebDataset tars: KEY.jpg, and in KEY.cls its number, its identity.

    Every image is noise of its own, so that no two crops are alike.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for shard, numbers in enumerate(np.array_split(np.arange(SAMPLES), SHARDS)):
        with tarfile.open(
            folder / f"train-{shard:03}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number in map(int, numbers):
                coarse = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((SIDE, SIDE)).save(file, "JPEG", quality=90)
                for name, content in (("jpg", file.getvalue()), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def shards(folder: Path) -> list[str]:
    """Return the tars of `write_shards`."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def stored(folder: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and JPEG of each image, in stored order."""
    for path in shards(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    yield int(member.name[:6]), file.read()


def damage(folder: Path, jpeg: bytes) -> list[Path]:
    """Overwrite bytes in the middle of an image wherever a file under `folder` holds it."""
    middle = len(jpeg) // 2
    hit = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(jpeg)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + middle)
                file.write(bytes(byte ^ 0x5A for byte in jpeg[middle : middle + 64]))
            hit.append(path)
    return hit
