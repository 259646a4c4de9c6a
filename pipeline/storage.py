"""Sample id -> JPEG bytes and label, from the shards of one split, each checked as it is read."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.errors import REBUILD, DataError
from pipeline.manifest import Manifest
from pipeline.shards import load_index

Bytes = npt.NDArray[np.uint8]


class Storage:
    """Random access to the samples of one split on a local disk.

    Shards are mapped into memory when first touched; nothing is copied until DALI takes it.
    """

    def __init__(self, data: Path, split: str) -> None:
        """Open the index of `split`.

        Raises:
            UsageError: no data set, or no such split.
            DataError: the index is damaged, or a shard is missing or has another size.
        """
        manifest = Manifest.load(data)
        found = manifest.split(split, data)
        self._data = data
        self._shards = found.shards
        self._index = load_index(data, split, found)
        self._maps: dict[int, Bytes] = {}
        for shard in self._shards:
            path = data / shard.name
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DataError(f"shard {path} {state}; restore it, or {REBUILD}")

    def __len__(self) -> int:
        return len(self._index)

    def labels(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the labels of samples `ids`, int64 [b]."""
        return self._index["label"][ids].astype(np.int64)

    def read(self, ids: npt.NDArray[np.int64]) -> list[Bytes]:
        """Return the JPEG bytes of samples `ids` (int64 [b]) as read-only views, uint8 [size].

        Raises:
            DataError: the CRC-32 of a sample is not the one it was packed with.
        """
        return [self._read(int(sample)) for sample in ids]

    def name(self, sample: int) -> str:
        """Return what to call a sample in a message: its id, shard and byte offset."""
        row = self._index[sample]
        shard = self._data / self._shards[row["shard"]].name
        return f"sample {sample} ({shard}, offset {row['offset']})"

    def _read(self, sample: int) -> Bytes:
        row = self._index[sample]
        start, number = int(row["offset"]), int(row["shard"])
        jpeg = self._map(number)[start : start + int(row["size"])]
        if zlib.crc32(jpeg.data) != row["crc"]:
            raise DataError(
                f"{self.name(sample)} is damaged (CRC-32 differs); "
                f"python -m pipeline.verify {self._data} lists all damage"
            )
        return jpeg

    def _map(self, number: int) -> Bytes:
        if number not in self._maps:
            path = self._data / self._shards[number].name
            # A plain array over the map: slicing np.memmap itself is five times slower.
            self._maps[number] = np.asarray(np.memmap(path, np.uint8, "r"))
        return self._maps[number]
