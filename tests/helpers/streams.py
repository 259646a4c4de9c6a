"""Ids that a stream delivers, and the labels of a set, for tests of what is selected."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from pipeline.batches import Stream
from pipeline.dataset.index import load_index
from pipeline.dataset.manifest import Manifest

SMALL = {"batch_size": 12, "seed": 3, "threads": 1, "size": 32}


def labels_of(data: Path, split: str = "train") -> np.ndarray:
    return load_index(data, split, Manifest.load(data))["label"].astype(np.int64)


def read_ids(data, count: int, **settings) -> list[int]:
    """Ids of the first `count` samples."""
    with Stream(data, **SMALL | settings) as stream:
        batches = itertools.islice(stream, -(-count // SMALL["batch_size"]))
        return [i for batch in batches for i in batch.ids.tolist()][:count]
