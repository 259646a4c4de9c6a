"""Hugging Face datasets, streamed, in torchdata's StatefulDataLoader (its page "Use with PyTorch",
Checkpoint and resume; `set_epoch` and `split_dataset_by_node` as its page "Stream" has it).

That page says of the shuffle buffer that its samples are lost at a resume and it is filled anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from torture.consumer import Setup, StatefulLoader
from torture.crops import random_crop
from torture.images import shards, write_shards

BUFFER = 32
"""Samples in the shuffle buffer."""
INPUTS = 2
"""Shards that feed the buffer at a time: their groups are what workers and ranks can share."""


def prepare(folder: Path) -> None:
    """Write the tars."""
    write_shards(folder)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {"id": int(sample["__key__"]), "pixels": random_crop(sample["jpg"]["bytes"]).numpy()}


class Images(StatefulLoader):
    """One loader for all epochs."""

    buffer = BUFFER

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        images = load_dataset(
            "webdataset",
            data_files={"train": shards(setup.folder)},
            split="train",
            streaming=True,
            cache_dir=str(setup.scratch),
        ).decode(False)
        shuffled = images
        if self.buffer:
            shuffled = images.shuffle(
                seed=setup.seed, buffer_size=self.buffer, max_buffer_input_shards=INPUTS
            )
        self._images = split_dataset_by_node(shuffled, setup.rank, setup.world).map(
            _sample, remove_columns=images.column_names
        )
        self._loader = StatefulDataLoader(
            self._images,
            setup.local_batch,
            num_workers=setup.workers,
            prefetch_factor=setup.prefetch,
            collate_fn=_collate,
        )
        if states:
            self._loader.load_state_dict(states[setup.rank])

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        self._images.set_epoch(epoch)
        yield from self._loader


def _collate(samples: list[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    pixels = [np.asarray(sample["pixels"], np.uint8) for sample in samples]
    return [sample["id"] for sample in samples], np.stack(pixels)


open_loader = Images
