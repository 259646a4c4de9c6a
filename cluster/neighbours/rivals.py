"""What short codes are measured against: two that are not learned by descent, and faiss's PQ."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.experiments.neighbors.features import Flags, Ids, Rows

SAMPLE = 20_000
"""Rows that these are fitted to, at most."""
TURNS = 50
"""Of the alternation in `itq` (Gong and Lazebnik 2011 take 50)."""
CHUNK = 8192
"""Rows that are coded at a time."""


@dataclass(frozen=True)
class Linear:
    """A code whose bits are signs of projections."""

    mean: Tensor
    """float32 [units]."""
    axes: Tensor
    """float32 [units, bits]."""

    def bits(self, rows: Rows) -> Flags:
        """The code of rows [n, units], bool [n, bits]."""
        x = torch.from_numpy(rows.astype(np.float32)) - self.mean
        return (x @ self.axes > 0).numpy()


def sample(rows: Rows, sound: Flags, seed: int) -> Tensor:
    """Some sound rows, float32 [n, units]."""
    there = np.flatnonzero(sound)
    rng = np.random.default_rng([seed, 2])
    picked = np.sort(rng.permutation(there)[:SAMPLE])
    return torch.from_numpy(rows[picked].astype(np.float32))


def pca(x: Tensor, bits: int, seed: int) -> Linear:
    """Signs of the first principal components.

    Args:
        x: float32 [n, units].
        bits: how many components, at most min(n, units).
        seed: of the randomised decomposition (Halko, Martinsson and Tropp 2011).
    """
    mean = x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        more = min(bits + 32, *x.shape)
        axes = torch.pca_lowrank(x - mean, q=more, center=False, niter=6)[2]
    return Linear(mean, axes[:, :bits].contiguous())


def itq(x: Tensor, start: Linear, seed: int) -> Linear:
    """Iterative quantisation: the same components, turned until signs lose least.

    Gong and Lazebnik, Iterative Quantization: A Procrustean Approach to Learning Binary Codes
    (CVPR 2011).
    """
    v = (x - start.mean) @ start.axes
    generator = torch.Generator().manual_seed(seed)
    bits = v.shape[1]
    turn = torch.linalg.qr(torch.randn(bits, bits, generator=generator))[0]
    for _ in range(TURNS):
        signs = (v @ turn).sign()
        left, _, right = torch.linalg.svd(signs.T @ v)
        turn = (left @ right).T
    return Linear(start.mean, start.axes @ turn)


def faiss() -> Any:
    """The library, or None where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


@dataclass(frozen=True)
class Quantised:
    """What product quantisation finds."""

    ids: Ids
    """int64 [Q, k]: places among the rows it was given."""
    train_seconds: float
    search_seconds: float


def product_quantisation(
    library: Any, x: Tensor, rows: Rows, sound: Flags, queries: Rows, bits: int, k: int
) -> Quantised:
    """Search by faiss's IndexPQ: bits / 8 parts of the features, 256 centres each.

    Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search (PAMI 2011); the
    distance is asymmetric, so the query itself is not rounded.

    Args:
        library: `faiss()`.
        x: float32 [n, units], what the centres are fitted to.
        rows: the base, floats [N, units].
        sound: [N], rows that are searched.
        queries: floats [Q, units].
        bits: of a code; units must be a multiple of bits / 8.
        k: neighbours.
    """
    index = library.IndexPQ(x.shape[1], bits // 8, 8)
    index.pq.cp.min_points_per_centroid = 1  # a small base is no reason for a warning a part
    started = time.perf_counter()
    index.train(x.numpy())
    trained = time.perf_counter() - started
    there = np.flatnonzero(sound)
    for start in range(0, len(there), CHUNK):
        index.add(rows[there[start : start + CHUNK]].astype(np.float32))
    asked: npt.NDArray[np.float32] = queries.astype(np.float32)
    started = time.perf_counter()
    _, found = index.search(asked, k)
    return Quantised(there[found], trained, time.perf_counter() - started)
