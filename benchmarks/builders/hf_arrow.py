"""Hugging Face `Dataset.from_generator`, of images made by Pillow as in `pillow_shards`.

Its Arrow writer stores the JPEGs as they are, one file a process, and `save_to_disk` makes of them
a data set that `load_from_disk` opens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Image, Value
from pillow_shards import encode_image
from shares import parse_arguments


def samples(rows: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """Yield the row of each image of a process."""
    for path, label in rows:
        yield {"image": {"bytes": encode_image(path), "path": None}, "label": label}


def main() -> None:
    """Pack the list with datasets."""
    images, out, workers = parse_arguments()
    features = Features({"image": Image(), "label": Value("int64")})
    packed = Dataset.from_generator(
        samples,
        features=features,
        gen_kwargs={"rows": images},
        cache_dir=str(out / "cache"),
        num_proc=workers,
    )
    packed.save_to_disk(str(out / "set"), num_proc=workers)


if __name__ == "__main__":
    main()
