"""A quick script: simplejpeg decodes and encodes, OpenCV resizes by `INTER_AREA`.

Quicker than a bicubic kernel and blurrier; JPEGs that simplejpeg refuses would end it. Otherwise as
`pillow_shards`.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import webdataset
from shares import Share, run_processes


def encode_image(path: str) -> bytes:
    """Return the image at 256x256 as a JPEG."""
    pixels = simplejpeg.decode_jpeg(Path(path).read_bytes())
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    method = cv2.INTER_AREA if side >= 256 else cv2.INTER_CUBIC
    small = np.ascontiguousarray(cv2.resize(square, (256, 256), interpolation=method))
    return simplejpeg.encode_jpeg(small, quality=96, colorspace="RGB", colorsubsampling="420")


def work(share: Share, folder: Path) -> None:
    """Write the shards of one process."""
    cv2.setNumThreads(1)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(share):
            writer.write({"__key__": f"{number:08d}", "jpg": encode_image(path), "cls": label})


if __name__ == "__main__":
    run_processes(work)
