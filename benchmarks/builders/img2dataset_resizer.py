"""img2dataset's resizer in each process, and a `webdataset.ShardWriter` instead of its downloads.

`center_crop` at quality 96: OpenCV decodes, shrinks by `INTER_AREA` (its default) and encodes. Its
pins exclude the webdataset that Duet needs, with which the resizer works all the same:
`pip install --no-deps img2dataset`, and beside it what its first lines import.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or its import asks the network for a newer release

import webdataset
from img2dataset.resizer import Resizer
from shares import Share, run_processes


def work(share: Share, folder: Path) -> None:
    """Write the shards of one process.

    Raises:
        RuntimeError: the resizer refuses an image.
    """
    resize = Resizer(256, "center_crop", resize_only_if_bigger=False, encode_quality=96)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=1000, verbose=0) as writer:
        for number, (path, label) in enumerate(share):
            image, *_, error = resize(io.BytesIO(Path(path).read_bytes()))
            if error is not None:
                raise RuntimeError(f"{path}: {error}")
            writer.write({"__key__": f"{number:08d}", "jpg": image, "cls": label})


if __name__ == "__main__":
    run_processes(work)
