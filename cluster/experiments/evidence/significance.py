"""Numbers of several seeds: mean, spread, and what a difference between two groups is worth.

How far chance may take the difference of two answers to the same images by one network.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.run.probabilities import Saved
from pipeline.tools.errors import DuetError

T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 95 % by degrees of freedom, from 1 on."""
T_MANY = 2.23
"""For more: on the safe side."""
NORMAL = 1.96


@dataclass(frozen=True)
class Spread:
    """The errors of runs that differ in their seed only, fractions."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{100 * self.mean:.1f} %"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f} %"


@dataclass(frozen=True)
class Difference:
    """One group's error less another's."""

    value: float
    margin: float | None
    """Half of its 95 % interval; None: one seed each, nothing is known of their spread."""

    def __str__(self) -> str:
        margin = "" if self.margin is None else f" ± {100 * self.margin:.1f}"
        return f"{signed(self.value)}{margin} points"

    @property
    def telling(self) -> bool:
        """Whether it is more than chance."""
        return self.margin is not None and abs(self.value) > self.margin

    def verdict(self, expected: float | None) -> str:
        """What it says about a difference that the paper has (or only its sign)."""
        if self.margin is None:
            return "no verdict: one seed each"
        if not self.telling:
            return "cannot be told from chance"
        if expected is None:
            return "lower error" if self.value < 0 else "higher error"
        return "as the paper says" if self.value * expected > 0 else "contrary to the paper"


def difference(ours: Spread, theirs: Spread, pictures: float | None) -> Difference:
    """Return how two groups differ, and how far chance might take it.

    The margin is the larger of two: over seeds (Student's t, pooled variance), and of errors over
    the images counted (binomial, as if the two had been counted on different ones).

    Args:
        ours: errors of the one group, or other numbers.
        theirs: of the other.
        images: that each error was counted on; None: they are no errors.
    """
    counts = len(ours.values), len(theirs.values)
    freedom = sum(counts) - 2
    margin = None
    if freedom > 0:
        squares = sum(
            statistics.variance(one.values) * (len(one.values) - 1)
            for one in (ours, theirs)
            if len(one.values) > 1
        )
        error = math.sqrt(squares / freedom * (1 / counts[0] + 1 / counts[1]))
        margin = student(freedom) * error
        if pictures is not None:
            margin = max(margin, counting(ours.mean, theirs.mean, pictures))
    return Difference(ours.mean - theirs.mean, margin)


def paired(ours: Sequence[float], theirs: Sequence[float], margin: float) -> Difference:
    """As `difference`, of the same networks seen twice: what they have in common cancels.

    Args:
        ours: errors of the networks.
        theirs: the same networks' otherwise.
        margin: of one network's difference, over the images; that over seeds counts from three
            networks on, where it is larger.
    """
    changes = [one - other for one, other in zip(ours, theirs, strict=True)]
    count = len(changes)
    if count > 2:
        margin = max(margin, student(count - 1) * statistics.stdev(changes) / math.sqrt(count))
    return Difference(statistics.fmean(changes), margin)


def student(freedom: int) -> float:
    """Student's t for a 95 % interval."""
    return T_975[freedom - 1] if freedom <= len(T_975) else T_MANY


def counting(one: float, other: float, pictures: float) -> float:
    """Half of the 95 % interval of a difference of errors, each counted on so many images."""
    return NORMAL * math.sqrt((one * (1 - one) + other * (1 - other)) / max(pictures, 1))


def signed(share: float) -> str:
    """A difference of shares in points, always with a sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


ROWS = 4096
RANKS = (1, 5)


def discord(run: Path) -> tuple[float, ...] | None:
    """Half of the 95 % interval of (error of ten views) - (of one view), for top-1 and top-5.

    Only images that one of them gets wrong and the other right count (McNemar 1947), so it needs
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
