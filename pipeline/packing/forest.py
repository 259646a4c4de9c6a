"""Rows joined into clusters: union-find over NumPy arrays."""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.intp]
"""Row numbers."""
Roots = npt.NDArray[np.uint32]


class Forest:
    """Union-find over rows, many at a time; the root of a tree is its lowest row."""

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows, dtype=np.uint32)
        self._lock = Lock()

    def link(self, left: npt.ArrayLike, right: npt.ArrayLike) -> None:
        """Join rows pairwise."""
        a, b = np.broadcast_arrays(np.asarray(left), np.asarray(right))
        with self._lock:
            while len(a):
                a, b = self._roots(a), self._roots(b)
                apart = a != b
                a, b = a[apart], b[apart]
                np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self, rows: Rows) -> Roots:
        """Return the root of each row: equal for rows that are joined."""
        with self._lock:
            return self._roots(rows)

    def _roots(self, rows: npt.NDArray[np.integer]) -> Roots:
        up: Roots = self.parent[rows]
        while True:
            higher: Roots = self.parent[up]
            if np.array_equal(up, higher):
                return up
            self.parent[rows] = higher  # halves the way for the next who comes by
            up = higher

    def clusters(self) -> list[Rows]:
        """Return the trees of two or more rows."""
        roots = self._roots(np.arange(len(self.parent)))
        members = np.flatnonzero(np.bincount(roots, minlength=len(roots))[roots] > 1)
        if not len(members):
            return []
        members = members[np.argsort(roots[members], kind="stable")]
        return np.split(members, np.flatnonzero(np.diff(roots[members])) + 1)
