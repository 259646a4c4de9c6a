"""Parquet files of drawn images, and their listings."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.parquet import scan_parquet
from tests.helpers.images import CLASSES, jpeg

IMAGES = [jpeg(seed) for seed in range(20)]
LABELS = [place % 4 for place in range(20)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def scan(source: str | Path, scratch: Path, split: str = "train", classes=None) -> Listing:
    return scan_parquet(str(source), ListingWriter(scratch, str(source)), split, classes)


def features(names=CLASSES, image: str = "image", label: str = "label") -> dict[bytes, bytes]:
    """Return the metadata that the `datasets` library writes into the schema of an image set."""
    table = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": table}}).encode()}


def write(
    path: Path,
    images=tuple(IMAGES),
    labels=tuple(LABELS),
    *,
    kind: pa.DataType = IMAGE,
    image: str = "image",
    label: str = "label",
    label_kind: pa.DataType | None = None,
    metadata: dict[bytes, bytes] | None = None,
    rows: int = 6,
) -> Path:
    """Write images as `datasets` does: a struct of bytes and path, and a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pa.types.is_struct(kind):
        images = [
            {"bytes": data, "path": f"n{place}.JPEG"} if isinstance(data, bytes) else data
            for place, data in enumerate(images)
        ]
    table = pa.table({image: pa.array(images, kind), label: pa.array(labels, label_kind)})
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


NUMBERED = [(str(label), data) for label, data in zip(LABELS, IMAGES, strict=True)]
