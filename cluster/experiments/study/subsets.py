"""Parts of a data set as sealed sets of their own: some of the classes, some images of each.

The stream reads whole sets. So a part is packed like any other source: its images go into a tar
of CLASS/KEY members, and `pipeline.build_shards` makes the set of it. The images are 256x256
already and only encoded anew (or stored raw).
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from cluster.experiments.study.config import Part
from pipeline.dataset.manifest import NAME, identity
from pipeline.packing.build import build
from pipeline.packing.plan import Build
from pipeline.remote.dataset import Dataset, fetch_metadata, open_dataset
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import atomic_write

CHUNK = 256
"""Images read at a time."""


def cut_out(data: str, part: Part, out: Path) -> Path:
    """Make a part of a data set, unless it is there already, and return its folder.

    Args:
        data: folder or address of a sealed set with train and val.
        part: which part.
        out: folder of the new set; beside it are OUT.json, what it is a part of, and while it is
            made OUT.source.

    Raises:
        UsageError: there are no such images, or OUT is another part, or one of other data.
        DataError: an image of `data` is damaged.
    """
    _same(out, {"data_sha256": identity(fetch_metadata(data)), **asdict(part)})
    if (out / NAME).is_file():
        return out
    source = out.with_name(f"{out.name}.source")
    source.mkdir(parents=True, exist_ok=True)
    with closing(open_dataset(data)) as dataset:
        for split, most in (("train", part.per_class), ("val", part.val_per_class)):
            if not (path := source / f"{split}.tar").is_file():
                write_tar(dataset, split, part.classes, most, path)
    build(
        Build(
            out=str(out),
            train=str(source / "train.tar"),
            val=str(source / "val.tar"),
            encoding=part.encoding,
        )
    )
    shutil.rmtree(source)
    return out


def _same(out: Path, origin: dict[str, Any]) -> None:
    """Note in OUT.json what the part is of, or refuse when something else is noted there."""
    path = out.with_name(f"{out.name}.json")
    text = json.dumps(origin) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{out} is another part, or of other data ({path}); name another --out"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def write_tar(
    dataset: Dataset, split: str, shares: tuple[float, float], most: int, path: Path
) -> None:
    """Write the images of a part of a split as members CLASS/KEY.jpg (raw ones as .png)."""
    storage = ShardReader(dataset, split)
    names = storage.manifest.classes
    first, last = (round(share * len(names)) for share in shares)
    if last - first < 2:
        raise UsageError(
            f"classes {shares} of {len(names)} are {last - first}; a part needs two at least"
        )
    chosen = choose(storage.read_labels(np.arange(len(storage))), first, last, most)
    if not len(chosen):
        raise UsageError(f"split {split!r} has no image of classes {first} to {last - 1}")
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for sample, label, content in pictures(storage, chosen):
            name = quote(names[label], safe=" ,;'()")
            ending = "jpg" if storage.encoding == "jpeg" else "png"
            member = tarfile.TarInfo(f"{name}/{sample:08d}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    storage.close()


def choose(labels: Ids, first: int, last: int, most: int) -> Ids:
    """Return the samples of classes first..last-1, at most `most` of each (0: all), ascending.

    Args:
        labels: int64 [N], in stored order.
        first, last, most: as above.

    Returns:
        int64 [n], places in `labels`.
    """
    chosen = [np.flatnonzero(labels == label)[: most or None] for label in range(first, last)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def pictures(storage: ShardReader, chosen: Ids) -> Iterator[tuple[int, int, bytes]]:
    """Yield id, label and file of samples; raises DataError for a damaged one."""
    for start in range(0, len(chosen), CHUNK):
        ids = chosen[start : start + CHUNK]
        views, damaged = storage.read(ids)
        if damaged:
            raise DataError(f"{next(iter(damaged.values()))}; a study wants sound images")
        for sample, label, view in zip(ids, storage.read_labels(ids), views, strict=True):
            content = view.tobytes()
            if storage.encoding == "raw":
                side = storage.manifest.image_size
                content = as_png(np.frombuffer(content, np.uint8).reshape(side, side, 3))
            yield int(sample), int(label), content


def as_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [height, width, 3] as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
