"""Upper limit of any packing: libjpeg-turbo's decoding of the originals, on all processes."""

from __future__ import annotations

from pathlib import Path

import simplejpeg
from shares import Share, run_processes


def work(share: Share, folder: Path) -> None:
    """Decode the images of one process, and forget them."""
    for path, _ in share:
        simplejpeg.decode_jpeg(Path(path).read_bytes())


if __name__ == "__main__":
    run_processes(work)
