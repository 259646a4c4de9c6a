"""webdataset with torchdata's StatefulDataLoader: state by fast-forwarding.

webdataset has no state of its own, so the loader reads and drops what was delivered (torchdata's
stateful_dataloader/README.md: it "naively" fast-forwards an iterable without `state_dict`). That
needs an order that can be repeated: shards and samples go through `detshuffle`. Its own counter of
epochs starts anew with every worker, so data set and loader are made anew for each epoch, with
another seed; the state is of the epoch's loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torchdata.stateful_dataloader import StatefulDataLoader

from torture.consumer import Setup, StatefulLoader
from torture.crops import random_crop
from torture.images import shards, write_shards

BUFFER = 32
"""Samples in the shuffle buffer."""


def prepare(folder: Path) -> None:
    """Write the tars."""
    write_shards(folder)


def _sample(sample: dict[str, Any]) -> tuple[int, torch.Tensor]:
    return int(sample["__key__"]), random_crop(sample["jpg"])


class Images(StatefulLoader):
    """A loader for each epoch."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        self._setup, self._states = setup, list(states)

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        setup, seed = self._setup, 1000 * self._setup.seed + epoch
        images = (
            wds.WebDataset(
                shards(setup.folder),
                shardshuffle=100,
                detshuffle=True,
                seed=seed,
                nodesplitter=wds.split_by_node,
            )
            .compose(wds.detshuffle(BUFFER, BUFFER, seed=seed))
            .map(_sample)
        )
        self._loader = StatefulDataLoader(
            images,
            setup.local_batch,
            num_workers=setup.workers,
            prefetch_factor=setup.prefetch,
        )
        if self._states:
            self._loader.load_state_dict(self._states[setup.rank])
            self._states = []
        yield from super().epoch(epoch)


open_loader = Images
