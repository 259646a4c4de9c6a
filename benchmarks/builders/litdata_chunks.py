"""`litdata.optimize`: its own chunks of 64 MB, of images made by Pillow as in `pillow_shards`."""

from __future__ import annotations

from typing import Any

from litdata import optimize
from pillow_shards import encode_image
from shares import parse_arguments


def sample(row: tuple[str, int]) -> dict[str, Any]:
    """Return the row that litdata stores for an image."""
    path, label = row
    return {"image": encode_image(path), "class": label}


def main() -> None:
    """Pack the list with litdata."""
    images, out, workers = parse_arguments()
    optimize(sample, images, str(out), num_workers=workers, chunk_bytes="64MB")


if __name__ == "__main__":
    main()
