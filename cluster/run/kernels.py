"""Snapshots of the first layer's kernels during a run.

RUN/kernels.jsonl has a row after steps 1, 2, 4, 8 ... and the last one: 21 of them in the 900,000
steps of 2012, at 93 kB each. Rows, unlike files of their own, are cut when a run resumes from an
earlier step, synced before the checkpoint of their step, and copied to a store.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.run.jsonl import read_rows
from model.alexnet import AlexNet
from model.architecture import IMAGE_MAPS

LAYER = ".conv1.weight"
"""End of the keys of `AlexNet.column_state` that kernels have."""
Kernel = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KernelSnapshot:
    """Weights of conv1 after a step."""

    step: int
    columns: dict[str, Kernel]
    """float32 [maps, 3, 11, 11] by column, "a" and "b"; relative precision 2^-11."""


def is_snapshot_step(step: int, total: int) -> bool:
    """Return whether `step` has a snapshot: powers of 2 and the last step."""
    return step & (step - 1) == 0 or step == total


def copy_first_kernels(net: AlexNet) -> dict[str, npt.NDArray[np.float16]]:
    """Copy conv1 of this process's columns to the CPU: float16 [maps, 3, 11, 11] by column.

    There are none where a table of layers has no conv1, or one that is no convolution of the image.
    """
    return {
        key.partition(".")[0]: piece.detach().half().cpu().contiguous().numpy()
        for key, piece in net.column_state().items()
        if key.endswith(LAYER) and piece.dim() == 4 and piece.shape[1] == IMAGE_MAPS
    }


def encode_kernels(
    parts: Sequence[Mapping[str, npt.NDArray[np.float16]]],
) -> dict[str, dict[str, Any]]:
    """Encode the kernels of all processes as the field "columns" of a row."""
    return {
        column: {
            "shape": list(weights.shape),
            "float16": base64.b64encode(weights.astype("<f2").tobytes()).decode(),
        }
        for part in parts
        for column, weights in part.items()
    }


def read_kernels(path: Path) -> list[KernelSnapshot]:
    """Read the snapshots of a file in the order of their steps; skips damaged rows.

    Of two rows for the same step the later one counts. No file that can be read: no snapshots.
    """
    found: dict[int, KernelSnapshot] = {}
    try:
        rows = list(read_rows(path))
    except OSError:
        return []
    for row in rows:
        try:
            columns = {str(name): _decode_kernels(part) for name, part in row["columns"].items()}
            snapshot = KernelSnapshot(int(row["step"]), columns)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if columns:
            found = {step: old for step, old in found.items() if step < snapshot.step}
            found[snapshot.step] = snapshot
    return list(found.values())


def _decode_kernels(part: Mapping[str, Any]) -> Kernel:
    flat = np.frombuffer(base64.b64decode(part["float16"], validate=True), "<f2")
    shape = [int(size) for size in part["shape"]]
    if len(shape) != 4 or shape[1] != IMAGE_MAPS or not np.isfinite(flat).all():
        raise ValueError("no kernels")
    return flat.reshape(shape).astype(np.float32)
