"""The script most people write: Pillow, and a `webdataset.ShardWriter` in each process.

Shorter side to 256 by antialiased bicubic, central 256x256, JPEG q96 (4:2:0, Pillow's default).
Colour profiles and orientation are left as they are; nothing is checked, hashed or counted.
"""

from __future__ import annotations

import io
from pathlib import Path

import webdataset
from PIL import Image
from shares import Share, run_processes


def encode_image(path: str) -> bytes:
    """Return the image at 256x256 as a JPEG."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    size = (max(256, round(image.width * scale)), max(256, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    image = image.crop((left, top, left + 256, top + 256))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=96)
    return file.getvalue()


def work(share: Share, folder: Path) -> None:
    """Write the shards of one process."""
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(share):
            writer.write({"__key__": f"{number:08d}", "jpg": encode_image(path), "cls": label})


if __name__ == "__main__":
    run_processes(work)
