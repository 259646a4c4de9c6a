"""How far chance may take the difference of two answers to the same pictures by one network."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from cluster.experiments.evidence.significance import NORMAL
from cluster.run.probabilities import Saved
from pipeline.tools.errors import DuetError

ROWS = 4096
RANKS = (1, 5)


def discord(run: Path) -> tuple[float, ...] | None:
    """Half of the 95 % interval of (error of ten views) - (of one view), for top-1 and top-5.

    Only pictures that one of them gets wrong and the other right count (McNemar 1947), so it needs
    the probabilities of both.

    Returns:
        shares, or None where a run has not kept both, or they are not of the same checkpoint.
    """
    try:
        one, ten = Saved(run, 1), Saved(run, 10)
    except DuetError:
        return None
    alike = torch.equal(one.labels, ten.labels) and torch.equal(one.weights, ten.weights)
    if not alike or one.about.step != ten.about.step:
        return None
    count = float(one.weights.sum())
    better = worse = torch.zeros(len(RANKS), dtype=torch.float64)
    for first in range(0, len(one.labels), ROWS):
        last = min(first + ROWS, len(one.labels))
        single, many = (_wrong(saved, first, last) for saved in (one, ten))
        better = better + (single & ~many).sum(dim=1)
        worse = worse + (many & ~single).sum(dim=1)
    return tuple(
        NORMAL * math.sqrt(up + down - (up - down) ** 2 / count) / count
        for up, down in zip(better.tolist(), worse.tolist(), strict=True)
    )


def _wrong(saved: Saved, first: int, last: int) -> torch.Tensor:
    """Whether the truth is not among the first 1 and 5 answers: bool [2, rows]."""
    rows, labels = saved.rows(first, last), saved.labels[first:last]
    above = (rows > rows.gather(1, labels[:, None])).sum(dim=1)
    sound = saved.weights[first:last] > 0
    return torch.stack([(above >= rank) & sound for rank in RANKS])
