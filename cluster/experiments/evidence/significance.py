"""Mean and spread over seeds, and how large a difference chance alone explains (SciPy)."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.run.probabilities import SavedProbabilities
from pipeline.tools.errors import DuetError

NORMAL_975 = statistics.NormalDist().inv_cdf(0.975)
"""Quantile of the normal distribution that a two-sided 95 % interval needs."""
ROWS = 4096
"""Images whose probabilities are compared at a time."""


@dataclass(frozen=True)
class Spread:
    """Errors, as fractions, of runs that differ only in their seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.deviation is None:
            return f"{100 * self.mean:.1f} %"
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f} %"


@dataclass(frozen=True)
class Difference:
    """Mean error of one group of runs minus that of another."""

    value: float
    margin: float | None
    """Half-width of the 95 % interval; None if each group has one seed, so no spread is known."""

    def __str__(self) -> str:
        margin = "" if self.margin is None else f" ± {100 * self.margin:.1f}"
        return f"{format_points(self.value)}{margin} points"

    @property
    def is_significant(self) -> bool:
        """True if the 95 % interval excludes zero."""
        return self.margin is not None and abs(self.value) > self.margin

    def judge(self, expected: float | None) -> str:
        """Words that compare the difference with the paper's, `expected`; None: it has none."""
        if self.margin is None:
            return "no verdict: one seed each"
        if not self.is_significant:
            return "cannot be told from chance"
        if expected is None:
            return "lower error" if self.value < 0 else "higher error"
        return "as the paper says" if self.value * expected > 0 else "contrary to the paper"


def compare_groups(ours: Spread, theirs: Spread, images: float | None) -> Difference:
    """Return the difference of two groups' means with its 95 % margin.

    The margin is the larger of two: over the seeds (t test with pooled variance), and of errors
    over the images counted (binomial, as if the groups had been counted on different images).

    Args:
        ours: errors of one group, or other numbers.
        theirs: the other group's.
        images: number of images that each error was counted on; None: the numbers are no errors.
    """
    margin = None
    if len(ours.values) + len(theirs.values) > 2:
        margin = _compute_t_margin(ours.values, theirs.values, is_paired=False)
        if images is not None:
            margin = max(margin, compute_binomial_margin(ours.mean, theirs.mean, images))
    return Difference(ours.mean - theirs.mean, margin)


def compare_pairs(ours: Sequence[float], theirs: Sequence[float], margin: float) -> Difference:
    """Return the mean difference of paired errors: what each pair has in common cancels.

    Args:
        ours: an error of each network.
        theirs: another error of the same networks, in the same order.
        margin: 95 % margin of a single network's difference over the images. From three networks
            on the margin of the paired t test over the seeds replaces it where that is larger.
    """
    if len(ours) > 2:
        margin = max(margin, _compute_t_margin(ours, theirs, is_paired=True))
    changes = [one - other for one, other in zip(ours, theirs, strict=True)]
    return Difference(statistics.fmean(changes), margin)


def _compute_t_margin(ours: Sequence[float], theirs: Sequence[float], *, is_paired: bool) -> float:
    """Half-width of the 95 % interval of a t test; 0 where the seeds do not differ."""
    from scipy import stats  # here: three seconds of imports, for pages that have more than a seed

    test = stats.ttest_rel if is_paired else stats.ttest_ind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy warns of seeds that are all equal
        interval = test(ours, theirs).confidence_interval(0.95)
    return float(interval.high - interval.low) / 2


def compute_binomial_margin(one: float, other: float, images: float) -> float:
    """Half-width of the 95 % interval of a difference of errors, each counted on `images` images.

    The errors are taken as independent, and as normally distributed.
    """
    return NORMAL_975 * math.sqrt((one * (1 - one) + other * (1 - other)) / max(images, 1))


def format_points(share: float) -> str:
    """Format a difference of fractions in percentage points, always with a sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def compute_view_margins(run: Path) -> tuple[float, ...] | None:
    """Return 95 % margins of (error of ten views) - (error of one view), for top-1 and top-5.

    Only images that one of the two gets wrong and the other right count (McNemar 1947), so the
    saved probabilities of both are needed.

    Returns:
        fractions, or None if the run has not kept both, or they are of different checkpoints.
    """
    try:
        one, ten = SavedProbabilities(run, 1), SavedProbabilities(run, 10)
    except DuetError:
        return None
    same = torch.equal(one.labels, ten.labels) and torch.equal(one.weights, ten.weights)
    if not same or one.about.step != ten.about.step:
        return None
    single, many = (_find_wrong(saved) for saved in (one, ten))
    count = float(one.weights.sum())
    better, worse = (single & ~many).sum(dim=1), (many & ~single).sum(dim=1)
    return tuple(
        NORMAL_975 * math.sqrt(up + down - (up - down) ** 2 / count) / count
        for up, down in zip(better.tolist(), worse.tolist(), strict=True)
    )


def _find_wrong(saved: SavedProbabilities) -> torch.Tensor:
    """Flags of images whose class is not among the first 1 and 5 answers: bool [2, N]."""
    above = []
    for first in range(0, len(saved.labels), ROWS):
        labels = saved.labels[first : first + ROWS, None]
        rows = saved.rows(first, first + len(labels))
        above.append((rows > rows.gather(1, labels)).sum(dim=1))
    return torch.stack([(torch.cat(above) >= rank) & (saved.weights > 0) for rank in (1, 5)])
