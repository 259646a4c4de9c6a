"""WebDataset shards of drawn images, and their listings."""

from __future__ import annotations

from pathlib import Path

import webdataset as wds

from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.webdataset import scan_webdataset
from tests.helpers.images import jpeg

IMAGES = [jpeg(seed) for seed in range(20)]


def scan(source: str | Path, scratch: Path, split: str = "train", classes=None) -> Listing:
    return scan_webdataset(str(source), ListingWriter(scratch, str(source)), split, classes)


def write_shards(folder: Path, name: str = "train-%06d.tar", **fields) -> Path:
    """Write `PICTURES` with `ShardWriter`, 8 a shard; `fields` turn a number into a value."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / name)
    with wds.ShardWriter(pattern, maxcount=8, verbose=0) as writer:
        for place, data in enumerate(IMAGES):
            values = {key: make(place) for key, make in fields.items()}
            writer.write({"__key__": f"{place:05d}", "jpg": data, **values})
    return folder
