"""Data sets made of another's images, in folders that are thrown away afterwards."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.dataset.images import Encoding, encode_npy
from pipeline.dataset.index import Index, load_index, save_index
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.dataset.shards import SampleContent, shard_name, to_shard, write_tar
from pipeline.remote.local import LocalDataset
from pipeline.stream.shard_reader import Bytes, ShardReader

RAW_IMAGES = 500
"""Images of a raw set that is made here: 98 MB, more than the caches of a processor hold."""
RAW_SHARD = 100
"""Images in each of its shards."""


def repeat_data(data: Path, folder: Path, samples: int) -> Path:
    """Make a set of at least `samples` that links to the train shards of `data` again and again.

    A set of some hundred images would else be measured by how epochs begin. All of it stays in
    the page cache, as far as that holds `data`. Returns `data` itself if it is large enough.
    """
    manifest = Manifest.load(data)
    split = manifest.split("train", data)
    if split.samples >= samples:
        return data
    folder.mkdir()
    rows = np.array(load_index(data, "train", manifest))
    pieces: list[npt.NDArray[np.void]] = []
    shards: list[Shard] = []
    for _ in range(-(-samples // split.samples)):
        piece = rows.copy()
        piece["shard"] += len(shards)
        pieces.append(piece)
        for shard in split.shards:
            tar, name = data.resolve() / shard.name, shard_name("train", len(shards))
            (folder / name).symlink_to(tar)
            (folder / name).with_suffix(".idx").symlink_to(tar.with_suffix(".idx"))
            shards.append(replace(shard, name=name))
    _seal(manifest, data, folder, shards, np.concatenate(pieces), manifest.encoding)
    return folder


def make_raw(data: Path, folder: Path) -> Path:
    """Make a raw set of the first images of `data`, decoded by Pillow."""
    jpegs = read_samples(data, RAW_IMAGES)
    folder.mkdir()

    def pixels(first: int) -> Iterator[SampleContent]:
        for jpeg in jpegs[first : first + RAW_SHARD]:
            image = np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB"))
            yield SampleContent(encode_npy(image), 0)

    starts = range(0, len(jpegs), RAW_SHARD)
    built = [_write_shard(folder, n, pixels(s), "raw") for n, s in enumerate(starts)]
    rows = np.concatenate([rows for _, rows in built])
    _seal(Manifest.load(data), data, folder, [shard for shard, _ in built], rows, "raw")
    return folder


def damage_sample(
    data: Path, folder: Path, samples: int, place: int, edit: Callable[[bytes], bytes]
) -> Path:
    """Make a set of the first `samples` images of `data`, the one at `place` edited.

    Its CRC-32 is that of the edited bytes, so that nothing stops it on its way to the decoder.
    """
    jpegs = [SampleContent(jpeg.tobytes(), 0) for jpeg in read_samples(data, samples)]
    jpegs[place] = SampleContent(edit(jpegs[place].image), 0)
    folder.mkdir()
    shard, rows = _write_shard(folder, 0, jpegs, "jpeg")
    _seal(Manifest.load(data), data, folder, [shard], rows, "jpeg")
    return folder


def read_samples(data: Path, count: int) -> list[Bytes]:
    """Return what the first `count` train samples (or all there are) hold, uint8 [size] each."""
    storage = ShardReader(LocalDataset(data), "train")
    ids = np.arange(min(count, len(storage)))
    views, _ = storage.read(ids)
    storage.close()
    return views


def _write_shard(
    folder: Path, number: int, samples: Iterable[SampleContent], encoding: Encoding
) -> tuple[Shard, Index]:
    """Write a train shard and its `.idx`; return its manifest entry and index rows."""
    name = shard_name("train", number)
    with (folder / name).open("wb") as file:
        written = write_tar(file, number, samples, encoding)
    (folder / name).with_suffix(".idx").write_bytes(written.listing)
    return to_shard(name, written), written.rows


def _seal(
    manifest: Manifest,
    data: Path,
    folder: Path,
    shards: list[Shard],
    rows: npt.NDArray[np.void],
    encoding: Encoding,
) -> None:
    shutil.copyfile(data / "stats.npz", folder / "stats.npz")
    digest = save_index(folder, "train", rows)
    split = replace(manifest.splits["train"], shards=tuple(shards), index_sha256=digest)
    quality = manifest.quality if encoding == "jpeg" else None
    replace(manifest, splits={"train": split}, encoding=encoding, quality=quality).save(folder)
