"""Parts of a data set as data sets of their own: some of the classes, some images of each.

A `Stream` reads whole data sets. So a part is packed like any other source: its images go into a
tar of CLASS/KEY members, and `pipeline.build_shards` makes a data set of it. The images have
their size already and are only encoded again (or stored raw).
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

from cluster.experiments.study.config import DataSubset
from pipeline.dataset.images import SIZE
from pipeline.dataset.manifest import NAME, Manifest, identity
from pipeline.options import BuildConfig
from pipeline.packing.build import build
from pipeline.remote.dataset import fetch_metadata, open_dataset
from pipeline.remote.local import Dataset
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import atomic_write


def make_subset(data: str, subset: DataSubset, out: Path) -> Path:
    """Make a part of a data set, unless it exists, and return its folder.

    Args:
        data: folder or address of a sealed data set with train and val.
        subset: classes and images of the part.
        out: folder of the new data set; beside it are OUT.json, which records what it is a part of,
            and, while it is made, OUT.source.

    Raises:
        UsageError: there are no such images, or OUT is another part, or one of other data.
        DataError: an image of `data` is damaged.
    """
    folder = fetch_metadata(data)
    _check_origin(out, {"data_sha256": identity(folder), **asdict(subset)})
    if (out / NAME).is_file():
        return out
    source = out.with_name(f"{out.name}.source")
    source.mkdir(parents=True, exist_ok=True)
    tars = {split: source / f"{split}.tar" for split in ("train", "val")}
    with closing(open_dataset(data)) as dataset:
        for split, most in (("train", subset.per_class), ("val", subset.val_per_class)):
            if not tars[split].is_file():
                write_tar(dataset, split, subset.classes, most, tars[split])
    train, val = str(tars["train"]), str(tars["val"])
    whole = Manifest.load(folder)
    size = SIZE if whole.image_size is None else whole.image_size
    build(
        BuildConfig(
            out=str(out), train=train, val=val, encoding=subset.encoding, size=size, fit=whole.fit
        )
    )
    shutil.rmtree(source)
    return out


def _check_origin(out: Path, origin: dict[str, Any]) -> None:
    """Record the origin of the part in OUT.json; refuse if another one is recorded there."""
    path = out.with_name(f"{out.name}.json")
    content = (json.dumps(origin) + "\n").encode()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content)
    elif path.read_bytes() != content:
        raise UsageError(f"{out} is another part, or of other data ({path}); name another --out")


def write_tar(
    dataset: Dataset, split: str, shares: tuple[float, float], most: int, path: Path
) -> None:
    """Write the first `most` images (0: all) of some classes of a split as CLASS/KEY.jpg or .png.

    Raises:
        UsageError: fewer than two classes, or no image.
        DataError: an image is damaged.
    """
    with closing(ShardReader(dataset, split)) as reader:
        names = reader.manifest.classes
        first, last = (round(share * len(names)) for share in shares)
        if last - first < 2:
            raise UsageError(
                f"classes {shares} of {len(names)} are {last - first}; a part needs two at least"
            )
        labels = reader.read_labels(np.arange(len(reader)))
        of_classes = [np.flatnonzero(labels == one)[: most or None] for one in range(first, last)]
        chosen = np.sort(np.concatenate(of_classes)).astype(np.int64)
        if not len(chosen):
            raise UsageError(f"split {split!r} has no image of classes {first} to {last - 1}")
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for sample, label, content in read_images(reader, chosen):
                name = quote(names[label], safe=" ,;'()")
                ending = "jpg" if reader.encoding == "jpeg" else "png"
                member = tarfile.TarInfo(f"{name}/{sample:08d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def read_images(reader: ShardReader, chosen: Ids) -> Iterator[tuple[int, int, bytes]]:
    """Yield id, label and encoded image of samples; raises DataError for a damaged one."""
    for start in range(0, len(chosen), 256):
        ids = chosen[start : start + 256]
        views, damaged = reader.read(ids)
        if damaged:
            raise DataError(f"{next(iter(damaged.values()))}; a study wants sound images")
        for sample, label, view in zip(ids, reader.read_labels(ids), views, strict=True):
            content = view.tobytes()
            if reader.encoding == "raw":
                png, side = io.BytesIO(), reader.manifest.mean_side
                Image.frombytes("RGB", (side, side), content).save(png, "PNG", compress_level=1)
                content = png.getvalue()
            yield int(sample), int(label), content
