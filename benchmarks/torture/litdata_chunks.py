"""litData: `StreamingDataset` and `StreamingDataLoader.state_dict`, of one rank (README, "Pause,
resume data streaming"), loaded on every rank.

`drop_last` is on where there are several ranks, as that README demands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from torture.consumer import Setup, StatefulLoader
from torture.crops import random_crop
from torture.images import stored, write_shards


def _same(sample: Any) -> Any:
    return sample


def prepare(folder: Path) -> None:
    """Write chunks of 26 samples."""
    write_shards(folder / "tars")
    samples = [{"id": number, "jpeg": jpeg} for number, jpeg in stored(folder / "tars")]
    optimize(
        fn=_same,
        inputs=samples,
        output_dir=str(folder / "chunks"),
        chunk_size=26,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


class _Crops(StreamingDataset):  # type: ignore[misc]
    def __getitem__(self, place: Any) -> tuple[int, torch.Tensor]:
        sample = super().__getitem__(place)
        return sample["id"], random_crop(sample["jpeg"])


class Images(StatefulLoader):
    """One loader for all epochs, as its README has it."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        images = _Crops(
            str(setup.folder / "chunks"),
            shuffle=True,
            drop_last=setup.world > 1 or setup.elastic,
            seed=setup.seed,
        )
        self._loader = StreamingDataLoader(
            images,
            batch_size=setup.local_batch,
            num_workers=setup.workers,
            prefetch_factor=setup.prefetch,
        )
        if states:
            self._loader.load_state_dict(states[0])


open_loader = Images
