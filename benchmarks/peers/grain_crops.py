"""Grain's source and transformation, apart from what its spawned workers need not import."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peers.crops import crop_jpeg


class Repeated:
    """Records again and again, until there are as many as asked for."""

    def __init__(self, records: Sequence[bytes], samples: int) -> None:
        self._records, self._samples = records, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, place: int) -> bytes:
        return self._records[place % len(self._records)]


def crop_record(crop: str, record: bytes) -> np.ndarray:
    """Return a random crop of a JPEG file, uint8 [224, 224, 3]."""
    return crop_jpeg(record, crop)
