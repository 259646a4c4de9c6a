"""The first layer's kernels at some moments of a run: what they look for, and since when.

RUN/kernels.jsonl has a row after steps 1, 2, 4, 8 ... and the last one: 21 of them in the 900,000
steps of 2012, at 93 kB each. They are rows, not files of their own, so that they are cut when a
run goes back, on the disk before the checkpoint that knows of them, and copied to a store.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.alexnet import AlexNet

LAYER = "conv1.weight"
Kernel = npt.NDArray[np.float32]


@dataclass(frozen=True)
class KernelSnapshot:
    """conv1 as it was after a step."""

    step: int
    columns: dict[str, Kernel]
    """By column, "a" and "b": float32 [maps, 3, 11, 11], of 2^-11 relative precision."""


def is_snapshot_step(step: int, total: int) -> bool:
    """Whether the kernels after `step` are kept; it does not depend on how a run is cut up."""
    return step & (step - 1) == 0 or step == total


def copy_first_kernels(net: AlexNet) -> dict[str, npt.NDArray[np.float16]]:
    """conv1 of the columns here, by column: float16 [maps, 3, 11, 11]."""
    return {
        key.partition(".")[0]: piece.detach().half().cpu().contiguous().numpy()
        for key, piece in net.column_state().items()
        if key.endswith(LAYER)
    }


def encode_kernels(
    parts: Sequence[Mapping[str, npt.NDArray[np.float16]]],
) -> dict[str, dict[str, Any]]:
    """What processes hold (`copy_first_kernels`), as a row has it under "columns"."""
    return {
        column: {
            "shape": list(weights.shape),
            "float16": base64.b64encode(weights.astype("<f2").tobytes()).decode(),
        }
        for part in parts
        for column, weights in part.items()
    }


def read_kernels(path: Path) -> list[KernelSnapshot]:
    """The moments in a file, in the order of their steps; rows that are none are left out.

    Where a step was made twice the later row counts. No file: no moments.
    """
    found: dict[int, KernelSnapshot] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            columns = {str(name): _decoded(part) for name, part in row["columns"].items()}
            moment = KernelSnapshot(int(row["step"]), columns)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            continue
        if columns:
            found = {step: old for step, old in found.items() if step < moment.step}
            found[moment.step] = moment
    return list(found.values())


def _decoded(part: Mapping[str, Any]) -> Kernel:
    flat = np.frombuffer(base64.b64decode(part["float16"], validate=True), "<f2")
    shape = [int(size) for size in part["shape"]]
    if len(shape) != 4 or shape[1] != 3 or not np.isfinite(flat).all():
        raise ValueError("no kernels")
    return flat.reshape(shape).astype(np.float32)
