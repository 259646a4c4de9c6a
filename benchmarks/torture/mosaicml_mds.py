"""mosaicml streaming: `StreamingDataLoader.state_dict` (fast_resumption.md), loaded on every rank.

Shards lie in a folder that stands for the store, with hashes that are asked for
(shard_retrieval.md, Hash validation), and each attempt has an empty cache. Memory that killed
processes left is cleaned first, as its FAQ advises (`clean_stale_shared_memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import mosaicml_mds as _  # noqa: F401  # stands in for torchvision where it must
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from torture.consumer import Setup, StatefulLoader
from torture.crops import random_crop
from torture.images import stored, write_shards

HASH = "xxh64"


def prepare(folder: Path) -> None:
    """Write shards of some 26 samples."""
    write_shards(folder / "tars")
    with MDSWriter(
        out=str(folder / "mds"),
        columns={"id": "int", "jpeg": "bytes"},
        hashes=[HASH],
        size_limit=1 << 15,
    ) as writer:
        for number, jpeg in stored(folder / "tars"):
            writer.write({"id": number, "jpeg": jpeg})


class _Crops(StreamingDataset):  # type: ignore[misc, unused-ignore]
    def __getitem__(self, place: Any) -> tuple[int, torch.Tensor]:
        sample = super().__getitem__(place)
        return sample["id"], random_crop(sample["jpeg"])


class Images(StatefulLoader):
    """One loader for all epochs."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        clean_stale_shared_memory()  # on every rank: it waits for the others
        dataset = _Crops(
            remote=str(setup.folder / "mds"),
            local=str(setup.scratch / "cache"),
            shuffle=True,
            shuffle_seed=setup.seed,
            batch_size=setup.local_batch,
            validate_hash=HASH,
        )
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=setup.local_batch,
            num_workers=setup.workers,
            prefetch_factor=setup.prefetch,
        )
        if states:
            self._loader.load_state_dict(states[0])


open_loader = Images
