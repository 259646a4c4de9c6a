"""Several datasets read as one: `MixedReader`, whose sample ids count on from one to the next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import Pixels
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.members import choose_sample
from pipeline.remote.dataset import open_dataset
from pipeline.remote.local import Dataset
from pipeline.stream.config import StreamConfig
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import Bytes, Damage, Flags, ShardReader
from pipeline.stream.timing import Spent
from pipeline.tools.errors import UsageError
from pipeline.tools.jsonl import hash_json

DataPath: TypeAlias = str | os.PathLike[str]
Data: TypeAlias = DataPath | Mapping[DataPath, float]


def check_shares(data: Data) -> Mapping[DataPath, float]:
    """Return each dataset with its share in what is delivered.

    Raises:
        ValueError: no dataset, or a share that is no number above 0.
    """
    if isinstance(data, str | os.PathLike):
        return {data: 1.0}
    shares = list(data.values()) if isinstance(data, Mapping) else []
    if not shares or not all(isinstance(x, Real) and 0 < x < math.inf for x in shares):
        raise ValueError(f"data is {data!r:.200}; a mixture takes datasets with shares above 0")
    return data


def open_datasets(data: Sequence[DataPath], config: StreamConfig) -> list[Dataset]:
    """Open the datasets of a mixture, or the version of each segment of one.

    Raises:
        ValueError: a version of a mixture.
        DuetError: as `open_dataset`.
    """
    if len(data) > 1 and config.version is not None:
        raise ValueError(
            f"version is {config.version!r:.80}, and data names {len(data)} sets; in a mixture "
            "name a version by its folder, DATA/versions/000001"
        )
    cached: dict[str, Any] = {"cache": config.cache, "cache_size": config.cache_size}
    if segments := config.segments:
        return [open_dataset(data[0], version=one.version, **cached) for one in segments]
    assert not isinstance(config.version, tuple)
    return [open_dataset(one, version=config.version, **cached) for one in data]


def open_reader(
    datasets: Sequence[Dataset],
    split: str,
    *,
    maps: bool = True,
    fields: Sequence[str] = (),
    kind: str = "mixture",
) -> ShardReader | MixedReader:
    """Open a split of one dataset, or of several as one.

    Args:
        datasets: one or more.
        split: name of the split.
        maps: as in `ShardReader`.
        fields: as in `ShardReader`.
        kind: word for several, in messages: a mixture, or versions of one.

    Raises:
        UsageError: no such split, no table of a field, or datasets that do not fit each other.
        DataError: an index is damaged, or a shard of a local set is missing.
    """
    readers = [ShardReader(dataset, split, maps=maps, fields=fields) for dataset in datasets]
    return readers[0] if len(readers) == 1 else MixedReader(readers, kind)


def fit_config(
    config: StreamConfig, reader: ShardReader | MixedReader, kept: Flags | None = None
) -> StreamConfig:
    """Return the config with the size of what it delivers of the images of a reader.

    `kept` (bool [N]) says which of them take part; None: all do.

    Raises:
        UsageError: the images are too small for it, or must be of one size.
    """
    side, (height, width) = reader.side, config.image_size
    if side is None and (config.crop == "whole" or config.mean == "image"):
        what, other = "mean='image'", "mean='channel'"
        if config.crop == "whole":
            what, other = "crop='whole'", "crop='center'"
        raise UsageError(
            f"{what} needs images of one size, and those of {reader.split} differ; give {other}, "
            "or build the set with --fit square"
        )
    small = None
    if config.crop in ("random", "center") or config.mean == "image":
        small = reader.find_smaller(height, width, kept)
    if small is not None:
        rows, columns = reader.read_sizes(np.array([small]))
        whose = f"stored images of {side}x{side}"
        if side is None:
            whose = f"{reader.split} sample {small} of {rows[0]}x{columns[0]}"
        raise UsageError(
            f"size {height}x{width} does not fit into the {whose}; "
            "give a smaller one, or crop='resized'"
            + ("" if side else ", or leave it out with where={'height': ...}")
        )
    return replace(config, size=side) if config.crop == "whole" and side else config


class MixedReader:
    """Random access to the samples of several datasets, by ids that count on; see `ShardReader`."""

    def __init__(self, readers: Sequence[ShardReader], kind: str = "mixture") -> None:
        """Take open readers of two datasets or more, which the mixture closes.

        Raises:
            UsageError: their classes, encodings or image sizes differ.
        """
        self.parts = readers
        """Reader of each dataset."""
        self._firsts = np.cumsum([0, *map(len, readers)])
        self.shards = [shard for reader in readers for shard in reader.shards]
        """Shards of all datasets, one after the other."""
        digest = hash_json([one.manifest.splits[one.split].index_sha256 for one in readers])
        self.split = f"{readers[0].split} of {kind} {digest[:8]}"
        self.manifest = readers[0].manifest
        """Manifest of the first dataset: classes, encoding and sizes are those of all."""
        self.encoding = self.manifest.encoding
        self.side, self.maps = readers[0].side, readers[0].maps
        for reader in readers[1:]:
            _check_alike(self.manifest, reader.manifest)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def read_labels(self, ids: Ids) -> Ids:
        """Return the labels of samples `ids`, both int64 [b]."""
        return self._gather(ids, lambda reader, own: reader.read_labels(own))

    def read_crcs(self, ids: Ids) -> Ids:
        """Return the CRC-32 of the stored images of samples `ids`, both int64 [b]."""
        return self._gather(ids, lambda reader, own: reader.read_crcs(own))

    def read_sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        """Return heights and widths in pixels of samples `ids`, all int64 [b]."""
        heights = self._gather(ids, lambda reader, own: reader.read_sizes(own)[0])
        return heights, self._gather(ids, lambda reader, own: reader.read_sizes(own)[1])

    def find_smaller(self, height: int, width: int, kept: Flags | None = None) -> int | None:
        """Return the first sample that is less high or wide than this; see `ShardReader`."""
        for first, reader in zip(self._firsts.tolist(), self.parts, strict=False):
            mine = None if kept is None else kept[first : first + len(reader)]
            if (small := reader.find_smaller(height, width, mine)) is not None:
                return int(first) + small
        return None

    def buffer_size(self, ids: Ids) -> int:
        """Return the bytes of the buffer that `read` takes for samples `ids` (int64 [b])."""
        return sum(reader.buffer_size(own) for reader, _, own in self._divide(ids))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch the shards that will be read soon, in this order."""
        first = 0
        for reader in self.parts:
            last = first + len(reader.shards)
            reader.prefetch([number - first for number in numbers if first <= number < last])
            first = last

    def advise(self, ids: Ids) -> None:
        """Tell the kernel to read samples `ids` (int64 [b]) from the disk; does not wait."""
        for reader, _, own in self._divide(ids):
            reader.advise(own)

    def read(self, ids: Ids, buffer: Bytes | None = None) -> tuple[list[Bytes], dict[int, Damage]]:
        """Read and check samples; see `ShardReader.read`."""
        if buffer is None:
            buffer = np.empty(self.buffer_size(ids), np.uint8)
        views: list[Bytes] = [buffer[:0]] * len(ids)
        damaged: dict[int, Damage] = {}
        start = 0
        for reader, places, own in self._divide(ids):
            size = reader.buffer_size(own)
            found, damages = reader.read(own, buffer[start : start + size])
            start += size
            for place, view in zip(places, found, strict=True):
                views[place] = view
            for number, damage in damages.items():
                sample = int(ids[places[number]])
                damaged[places[number]] = damage._replace(sample=sample, split=self.split)
        return views, damaged

    def read_members(self, field: str, ids: Ids) -> tuple[list[bytes], dict[int, str]]:
        """Read and check a member of samples; see `ShardReader.read_members`."""
        contents, faults = [b""] * len(ids), dict[int, str]()
        for reader, places, own in self._divide(ids):
            found, broken = reader.read_members(field, own)
            for place, content in zip(places, found, strict=True):
                contents[place] = content
            faults |= {places[number]: fault for number, fault in broken.items()}
        return contents, faults

    def read_orientations(self, ids: Ids, images: Sequence[Bytes]) -> list[int]:
        """Return the orientations by which images turn their masks; see `ShardReader`."""
        found = [1] * len(ids)
        for reader, places, own in self._divide(ids):
            turns = reader.read_orientations(own, [images[place] for place in places])
            for place, turn in zip(places, turns, strict=True):
                found[place] = turn
        return found

    def read_keys(self, ids: Ids) -> list[str]:
        """Return the WebDataset keys of samples `ids` (int64 [b]), each in its own dataset."""
        keys = [""] * len(ids)
        for reader, places, own in self._divide(ids):
            for place, key in zip(places, reader.read_keys(own), strict=True):
                keys[place] = key
        return keys

    def read_names(self, ids: Ids) -> list[str] | None:
        """Return the original file names of samples `ids`; None if a dataset has none."""
        names = [""] * len(ids)
        for reader, places, own in self._divide(ids):
            if (found := reader.read_names(own)) is None:
                return None
            for place, name in zip(places, found, strict=True):
                names[place] = name
        return names

    def find_sample(self, key: str) -> int:
        """Return the id of the sample with a key or name; see `ShardReader`."""
        firsts = zip(self._firsts.tolist(), self.parts, strict=False)
        return choose_sample(
            key,
            [first + one for first, reader in firsts for one in reader.find_samples(key)],
            self.split,
        )

    def decode(self, ids: Sequence[int]) -> list[Pixels | Damage]:
        """Read, check and decode samples: the pixels of each, or its damage."""
        found: dict[int, Pixels | Damage] = {}
        for reader, places, own in self._divide(np.array(ids, np.int64)):
            found.update(zip(places, reader.decode(own.tolist()), strict=True))
        return [found[place] for place in range(len(ids))]

    def take_spent(self) -> Spent:
        """Return the seconds spent in `read` since the last call; `feed` is 0."""
        columns = zip(*(reader.take_spent() for reader in self.parts), strict=True)
        return Spent(*map(sum, columns))

    def make_damage(self, sample: int, reason: str) -> Damage:
        """Return where a sample is and why it cannot be used."""
        ((reader, _, own),) = self._divide(np.array([sample]))
        return reader.make_damage(int(own[0]), reason)._replace(sample=sample, split=self.split)

    def close(self) -> None:
        """Close all files."""
        for reader in self.parts:
            reader.close()

    def _divide(self, ids: Ids) -> list[tuple[ShardReader, list[int], Ids]]:
        """Return each dataset that has some of `ids`: their places in it, and its own ids."""
        owners = np.searchsorted(self._firsts, ids, side="right") - 1
        found = []
        for number in np.unique(owners).tolist():
            (places,) = np.nonzero(owners == number)
            found.append((self.parts[number], places.tolist(), ids[places] - self._firsts[number]))
        return found

    def _gather(
        self, ids: Ids, read: Callable[[ShardReader, Ids], npt.NDArray[np.int64]]
    ) -> npt.NDArray[np.int64]:
        """Return what `read` says of the samples of each dataset, in the order of `ids`."""
        found = np.empty(len(ids), np.int64)
        for reader, places, own in self._divide(ids):
            found[places] = read(reader, own)
        return found


def _check_alike(first: Manifest, other: Manifest) -> None:
    """Raise `UsageError` where two datasets cannot be mixed."""
    if first.classes != other.classes:
        differ = sorted(set(first.classes) ^ set(other.classes))
        what = f"{differ[0]!r} is a class of one alone" if differ else "they are in another order"
        raise UsageError(
            f"data sets of {len(first.classes)} and {len(other.classes)} classes cannot be mixed: "
            f"{what}; a label must mean the same in both"
        )
    # Images that differ in size within a set may also differ from those of another.
    sizes = {first.side, other.side}
    for name in ("encoding", "fit" if None in sizes else "image_size"):
        mine, others = getattr(first, name), getattr(other, name)
        if mine != others and (name != "fit" or len(sizes) > 1):
            raise UsageError(
                f"data sets with {name} {mine} and {others} cannot be mixed; pack them alike"
            )
