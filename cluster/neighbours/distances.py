"""How far apart two pictures of one class are, against two of different classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.experiments.neighbors.features import Features, Ids
from cluster.experiments.neighbors.search import Floats, squared

CHUNK = 1 << 24
"""Numbers in a chunk of pairs."""
BINS = 60


@dataclass(frozen=True)
class Pairs:
    """L2 distances (not squared) of random pairs of a query and a picture of the base."""

    same: Floats
    """float64 [n]: of the same class."""
    other: Floats
    """float64 [n]: of different classes."""

    @property
    def auc(self) -> float:
        """Chance that a pair of one class is closer than one of two, ties counted half.

        0.5 is what features give that know nothing of the classes, 1 is perfect.
        """
        others = np.sort(self.other)
        below = np.searchsorted(others, self.same, "left")
        up_to = np.searchsorted(others, self.same, "right")
        return float(1 - (below + up_to).mean() / (2 * len(others)))

    @property
    def auc_error(self) -> float:
        """Standard error of `auc` over draws of pairs (Hanley and McNeil 1982, equation 2)."""
        a, n = self.auc, len(self.same)
        q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
        return math.sqrt((a * (1 - a) + (n - 1) * (q1 + q2 - 2 * a * a)) / (n * n))

    @property
    def ratio(self) -> float:
        """Mean distance within classes over that across them; NaN if both are 0."""
        across = float(self.other.mean())
        return float(self.same.mean()) / across if across else math.nan

    def histogram(self) -> tuple[Floats, Floats, Floats]:
        """Edges float64 [bins + 1]; shares of same-class and of other pairs, float64 [bins]."""
        both = np.concatenate((self.same, self.other))
        low, high = float(both.min()), float(np.quantile(both, 0.999))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        same, other = (
            np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
            for values in (self.same, self.other)
        )
        return edges, same, other


def draw(queries: Features, base: Features, count: int, seed: int) -> Pairs | None:
    """Draw pairs of each kind; a picture is never paired with itself.

    Args:
        queries: one side of the pairs; may be `base`.
        base: the other.
        count: pairs of each kind.
        seed: of the draw.

    Returns:
        None if there is only one class, or no two pictures are of one.
    """
    rng = np.random.default_rng([seed, 8])
    rows = np.flatnonzero(base.sound)
    rows = rows[np.argsort(base.labels[rows], kind="stable")]
    sizes = np.bincount(base.labels[rows], minlength=len(base.about.classes))
    starts = np.concatenate(([0], np.cumsum(sizes)))
    asked = np.flatnonzero(queries.sound)
    itself = queries.about == base.about
    mates = sizes[queries.labels[asked]] - itself
    with_mates, with_others = asked[mates > 0], asked[sizes[queries.labels[asked]] < len(rows)]
    if not len(with_mates) or not len(with_others):
        return None
    one = rng.choice(with_mates, count)
    label = queries.labels[one]
    turn = rng.integers(0, sizes[label] - itself)
    if itself:  # the own place in the class is passed over
        place = np.empty(len(base.labels), np.int64)
        place[rows] = np.arange(len(rows))
        turn += turn >= place[one] - starts[label]
    same = _far(queries, one, base, rows[starts[label] + turn])
    two = rng.choice(with_others, count)
    label = queries.labels[two]
    turn = rng.integers(0, len(rows) - sizes[label])
    turn += np.where(turn >= starts[label], sizes[label], 0)
    return Pairs(same, _far(queries, two, base, rows[turn]))


def _far(queries: Features, ids: Ids, base: Features, others: Ids) -> Floats:
    """L2 distances of pairs; rows are read in order, as files like it."""
    order = np.argsort(others)
    far = np.empty(len(ids))
    size = max(1, CHUNK // base.about.units)
    for start in range(0, len(ids), size):
        part = order[start : start + size]
        far[part] = squared(queries.values[ids[part]], base.values[others[part]])
    return np.sqrt(far)
