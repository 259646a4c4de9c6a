"""`Selection`: the samples that take part, of one dataset or several, and their order.

It is known when a stream is opened, and does not change afterwards: `make_order` is a pure function
of a selection, the seed and the name of the shuffle. A ledger keeps it beside its files.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dataset.segments import Segments
from pipeline.stream.augment import random_uint64
from pipeline.stream.order import (
    AnyOrder,
    BlockShuffle,
    FullShuffle,
    Ids,
    Mixture,
    Order,
    SegmentedOrder,
    StoredOrder,
    WeightedOrder,
    Weights,
)
from pipeline.stream.shard_reader import Flags
from pipeline.tools.errors import DamagedFile
from pipeline.tools.files import atomic_write
from pipeline.tools.jsonl import hash_json


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """The samples that take part, of one dataset or several."""

    identities: tuple[str, ...]
    """`manifest.identity` of each dataset."""
    shards: tuple[tuple[int, ...], ...]
    """Samples in each shard of the split, for each dataset; ids count on from one to the next."""
    shares: tuple[float, ...] = (1.0,)
    """Share of each dataset in what is delivered, above 0."""
    kept: Flags | None = None
    """bool [N] by sample id: whether it takes part; None: all do."""
    weights: Weights | None = None
    """float64 [N] by sample id: weight in draws with replacement, 0 or more; None: no such draws,
    each sample that takes part comes once an epoch."""
    segments: Segments = ()
    """Segments, if the datasets are versions of one, read one after the other."""

    @property
    def stored(self) -> int:
        """Samples in all shards, N."""
        return sum(map(sum, self.shards))

    @property
    def has_replacement(self) -> bool:
        """True if a sample may come several times in an epoch."""
        return self.weights is not None or (len(self.shards) > 1 and not self.segments)

    @property
    def identity(self) -> str:
        """Identity of the dataset, or of its first version; of several, a SHA-256 over all."""
        if len(self.identities) == 1 or self.segments:
            return self.identities[0]
        return hash_json([self.identities, self.shares])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all of it; empty where every sample of one dataset takes part alike."""
        if not self.has_replacement and self.kept is None:
            return ""
        digest = hashlib.sha256(json.dumps([self.identities, self.shards, self.shares]).encode())
        for array in (self.kept, self.weights):
            digest.update(b"none" if array is None else array.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write it into `folder`, where `load` finds it by its digest; twice is no harm."""
        path = folder / _file_name(self.digest)
        if not path.exists():
            table = json.dumps([self.identities, self.shards, self.shares])
            empty = np.zeros(0)
            with atomic_write(path) as file:
                np.savez_compressed(
                    file,
                    table=np.array(table),
                    kept=empty.astype(np.uint8) if self.kept is None else np.packbits(self.kept),
                    weights=empty if self.weights is None else self.weights,
                )

    @classmethod
    def load(cls, folder: Path, digest: str) -> Selection:
        """Read what `save` wrote.

        Raises:
            DamagedFile: it is missing, or not what was saved.
        """
        path = folder / _file_name(digest)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                identities, shards, shares = json.loads(str(arrays["table"]))
                kept, weights = arrays["kept"], arrays["weights"]
            shards = tuple(map(tuple, shards))
            stored = sum(map(sum, shards))
            selection = cls(
                identities=tuple(identities),
                shards=shards,
                shares=tuple(shares),
                kept=np.unpackbits(kept, count=stored).astype(bool) if len(kept) else None,
                weights=weights if len(weights) else None,
            )
        except Exception as error:  # NumPy raises many kinds for a damaged file
            raise DamagedFile(path, f"the selection of a ledger cannot be read: {error}") from error
        if selection.digest != digest:
            raise DamagedFile(path, "it is not the selection that was saved")
        return selection


def _file_name(digest: str) -> str:
    return f"selection-{digest[:16]}.npz"


def make_order(selection: Selection, seed: int, name: str) -> AnyOrder:
    """Return the order of the samples.

    Args:
        selection: the samples.
        seed: 0 or more.
        name: `StreamConfig.order_name`: `full`, `block 16` or `stored`.
    """
    ends = np.cumsum([sum(sizes) for sizes in selection.shards])
    if name == "stored":  # one pass over all, one dataset after the other: shares do not matter
        every = [size for one in selection.shards for size in one]
        return StoredOrder(every, seed, selected=_select_ids(selection.kept))
    orders: list[Order] = []
    for number, sizes in enumerate(selection.shards):
        here = slice(int(ends[number]) - sum(sizes), int(ends[number]))
        selected = _select_ids(None if selection.kept is None else selection.kept[here])
        mine = seed if number == 0 or selection.segments else _derive_seed(seed, number)
        if selection.weights is not None:
            weights = selection.weights[here]
            weights = weights if selected is None else weights[selected]
            orders.append(WeightedOrder(sizes, mine, weights, selected=selected))
        elif name == "full":
            orders.append(FullShuffle(sizes, mine, selected=selected))
        else:
            window = int(name.removeprefix("block "))
            orders.append(BlockShuffle(sizes, mine, window, selected=selected))
    if len(orders) == 1:
        return orders[0]
    if selection.segments:
        return SegmentedOrder(orders, selection.segments)
    return Mixture(orders, selection.shares, np.array([sum(sizes) for sizes in selection.shards]))


def _select_ids(kept: Flags | None) -> Ids | None:
    return None if kept is None else np.flatnonzero(kept)


def _derive_seed(seed: int, number: int) -> int:
    """Return a seed of dataset `number`'s own: the datasets' orders have nothing in common."""
    (word,) = random_uint64(seed, np.array([number]), np.zeros(1, np.int64), 1, name="mixture")
    return int(word[0]) >> 1
