"""Duet: `Stream.as_iterable` and its `state_dict`, over the tars as they are (`duet index-shards`).

The state of rank 0 is loaded on every rank of any world (docs/stream.md, In a framework).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali  # noqa: F401  # imported once, before the consumers are forked

from pipeline.batches import Stream
from torture.consumer import Setup
from torture.images import CROP, SAMPLES, write_shards


def prepare(folder: Path) -> None:
    """Write the tars, and an index beside them."""
    write_shards(folder)
    names = folder / "names.json"
    names.write_text(json.dumps([f"image {number}" for number in range(SAMPLES)]))
    command = [sys.executable, "-m", "pipeline.index_shards", folder, "--class-names", names]
    subprocess.run([*map(str, command), "--workers", "1"], check=True)


class Images:
    """The stream; identities are labels."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        self._stream = Stream(
            setup.folder,
            batch_size=setup.batch,
            rank=setup.rank,
            world_size=setup.world,
            seed=setup.seed,
            threads=setup.workers,
            prefetch=setup.prefetch,
            size=CROP,
            colour=0,
            mean=None,
            dtype="uint8",
        )
        self._batches = self._stream.as_iterable()
        if states:
            self._batches.load_state_dict(states[0])

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        for batch in self._batches:
            yield [int(key) for key in batch.keys], batch.images.numpy()

    def state(self) -> Any:
        """Return the state of the iterable."""
        return self._batches.state_dict()

    def reported(self) -> int:
        """Return the number of samples that the stream lists as damaged."""
        return len(self._stream.damaged)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


open_loader = Images
