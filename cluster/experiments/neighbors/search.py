"""Nearest neighbors: exact ones by squared L2 distance, and those of codes by Hamming distance.

The exact search multiplies matrices in bounded memory. A first pass in float32 finds a few more
candidates than k; their distances are then computed in float64, difference by difference. The k
best of these are the answer if the best candidate that was dropped is further away by more than the
rounding error of the first pass. Where that cannot be shown (many images at the same distance) a
pass in float64 follows, and for the queries still left the distance to every image is computed in
float64. Ties go to the earlier image.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.experiments.neighbors.features import Flags, Ids, Rows
from pipeline.tools.errors import UsageError
from pipeline.tools.units import cpu_count

Floats = npt.NDArray[np.float64]
CodeBytes = npt.NDArray[np.uint8]
"""Packed codes, uint8 [n, bits / 8]."""
Advance = Callable[[int], None]
"""Takes a count of what has been done since the last call, for a progress bar."""

MARGINS = ((torch.float32, 16), (torch.float64, 256))
"""Passes: their dtype, and how many candidates more than k they keep."""
LEAST_MEMORY = 1 << 26
"""Smallest memory of a search in bytes."""


@dataclass(frozen=True)
class Nearest:
    """The k nearest images of Q queries, the nearest first."""

    ids: Ids
    """int64 [Q, k]: rows of the base."""
    distances: Floats
    """float64 [Q, k]: squared L2."""
    again: int = 0
    """Number of queries that needed more than the first pass."""


@dataclass(frozen=True)
class SearchBase:
    """The images that are searched."""

    rows: Rows
    """Floats [N, units], in memory or mapped."""
    sound: Flags
    """[N]: rows that may be found."""


def find_nearest(
    queries: Rows,
    base: SearchBase,
    k: int,
    *,
    memory: int = 1 << 31,
    device: str = "cpu",
    picked: Ids | None = None,
    itself: bool = False,
    advance: Advance = lambda count: None,
) -> Nearest:
    """Find the k nearest rows of `base` for every query.

    Args:
        queries: floats [n, units], in memory or mapped.
        base: images that are searched.
        k: number of neighbors, at least 1.
        memory: approximate bytes to use, without `queries` and `base` themselves.
        device: device that multiplies.
        picked: int64 [Q], the rows of `queries` to answer; None: all, Q = n.
        itself: `queries` are the rows of `base`, and none may be its own neighbor.
        advance: called with the number of queries done since its last call.

    Raises:
        UsageError: fewer rows than k, or too little memory.
    """
    room = int(base.sound.sum()) - itself
    if not 1 <= k <= room:
        raise UsageError(f"{k} neighbours asked for, and there are {room} images; ask for fewer")
    if memory < LEAST_MEMORY:
        raise UsageError(
            f"a memory of {memory:,} bytes is too little; give {LEAST_MEMORY:,} or more"
        )
    if picked is None:
        picked = np.arange(len(queries))
    ids = np.zeros((len(picked), k), np.int64)
    distances = np.zeros((len(picked), k))
    # In float64 the queries take a quarter of the memory.
    size = max(1, min(len(picked), memory // (4 * 8 * queries.shape[1])))
    again = 0
    for start in range(0, len(picked), size):
        part = slice(start, start + size)
        own = picked[part] if itself else None
        ids[part], distances[part], late = _search_block(
            queries[picked[part]], base, k, memory, device, own
        )
        again += late
        advance(len(ids[part]))
    return Nearest(ids, distances, again)


def compute_squared_distances(queries: Rows, others: Rows) -> Floats:
    """Return squared distances, float64 [...], of rows [..., units], difference by difference."""
    return np.square(queries.astype(np.float64) - others).sum(-1)


def _search_block(
    queries: Rows, base: SearchBase, k: int, memory: int, device: str, own: Ids | None
) -> tuple[Ids, Floats, int]:
    """Answer queries that fit into memory; also count those that needed more than one pass."""
    ids = np.zeros((len(queries), k), np.int64)
    distances = np.zeros((len(queries), k))
    left = np.arange(len(queries))
    late = 0
    for number, (dtype, margin) in enumerate(MARGINS):
        rest, mine = queries[left], None if own is None else own[left]
        found, bound = _find_candidates(rest, base, k + margin, memory, device, mine, dtype)
        ids[left], distances[left] = _refine(rest, base, found, k, memory)
        left = left[distances[left, -1] >= bound]
        if number == 0:
            late = len(left)
        if not len(left):
            break
    for index in left:
        itself = None if own is None else int(own[index])
        ids[index], distances[index] = _search_one(queries[index], base, k, memory, itself)
    return ids, distances, late


def _find_candidates(
    queries: Rows,
    base: SearchBase,
    count: int,
    memory: int,
    device: str,
    own: Ids | None,
    dtype: torch.dtype,
) -> tuple[Ids, Floats]:
    """Find the rows that seem nearest, and a distance below which none of the others can be.

    Returns:
        int64 [Q, c], -1 where there are none left; float64 [Q], infinite if nothing was dropped.
    """
    units = queries.shape[1]
    asked = _to_tensor(queries).to(device).to(dtype)
    lengths = np.square(queries.astype(np.float64)).sum(1)
    scores = torch.empty(len(queries), 0, dtype=dtype, device=device)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    # The rows, their scores and the best ones take half the memory.
    rows = max(1, memory // (2 * (12 * units + 24 * len(queries))))
    most = 0.0
    dropped = False
    for start in range(0, len(base.rows), rows):
        stop = min(start + rows, len(base.rows))
        block = _to_tensor(base.rows[start:stop]).to(device).to(dtype)
        norms = block.square().sum(1)
        most = max(most, float(norms.max()))
        new = torch.addmm(norms, asked, block.T, alpha=-2)
        new[:, torch.from_numpy(~base.sound[start:stop]).to(device)] = torch.inf
        if own is not None:
            here = np.flatnonzero((own >= start) & (own < stop))
            new[torch.from_numpy(here), torch.from_numpy(own[here] - start)] = torch.inf
        best = new.topk(min(count, stop - start), dim=1, largest=False)
        dropped |= best.values.shape[1] < stop - start
        scores = torch.cat((scores, best.values), 1)
        ids = torch.cat((ids, best.indices + start), 1)
        if scores.shape[1] > count:
            kept = scores.topk(count, dim=1, largest=False)
            scores, ids, dropped = kept.values, ids.gather(1, kept.indices), True
    ids = ids.masked_fill(scores.isinf(), -1)
    worst = scores.max(1).values.double().cpu().numpy()
    bound = (
        worst + lengths - _bound_error(units, lengths, most, dtype) if dropped else worst + np.inf
    )
    return ids.cpu().numpy(), bound


def _bound_error(units: int, norms: Floats, most: float, dtype: torch.dtype) -> Floats:
    """Largest rounding error of a score, float64 [Q], whatever the order of the sums.

    Sums of n products are wrong by at most n u |x| |y| / (1 - n u), u half the distance from 1 to
    the next number (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

    Args:
        units: n.
        norms: squared norms of the queries.
        most: largest squared norm in the base.
        dtype: type that the scores were computed in.
    """
    unit = (units + 8) * torch.finfo(dtype).eps / 2
    grown = unit / (1 - unit)
    return grown * (2 * np.sqrt(norms * most) + most + norms) * 1.01


def _refine(
    queries: Rows, base: SearchBase, candidates: Ids, k: int, memory: int
) -> tuple[Ids, Floats]:
    """Choose the k best candidates by distances in float64; ties go to the smaller id."""
    units = queries.shape[1]
    ids = np.zeros((len(queries), k), np.int64)
    distances = np.zeros((len(queries), k))
    size = max(1, memory // (2 * 24 * units * candidates.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        there = candidates[part]
        rows = base.rows[np.maximum(there, 0).reshape(-1)].reshape(*there.shape, units)
        far = compute_squared_distances(queries[part][:, None], rows)
        far[there < 0] = np.inf
        order = np.lexsort((there, far), axis=1)[:, :k]
        ids[part] = np.take_along_axis(there, order, 1)
        distances[part] = np.take_along_axis(far, order, 1)
    return ids, distances


def _search_one(
    query: Rows, base: SearchBase, k: int, memory: int, own: int | None
) -> tuple[Ids, Floats]:
    """Answer a query by its distance to every row, in float64."""
    rows = max(1, memory // (2 * 24 * base.rows.shape[1]))
    far = np.empty(len(base.rows))
    for start in range(0, len(far), rows):
        far[start : start + rows] = compute_squared_distances(
            query, base.rows[start : start + rows]
        )
    far[~base.sound] = np.inf
    if own is not None:
        far[own] = np.inf
    limit = np.partition(far, k - 1)[k - 1]
    near = np.flatnonzero(far <= limit)
    ids = near[np.argsort(far[near], kind="stable")][:k]
    return ids, far[ids]


def _to_tensor(rows: Rows) -> Tensor:
    """Return rows as a tensor; a copy where they are mapped for reading only."""
    return torch.from_numpy(np.array(rows) if not rows.flags.writeable else rows)


class HammingIndex:
    """Codes that are searched by exclusive or and population count of 64-bit words."""

    def __init__(self, codes: CodeBytes) -> None:
        """Take the codes of N images."""
        self._words = _to_words(codes).T.copy()  # [words, N]: a word of all codes is contiguous

    def find_nearest(self, queries: CodeBytes, k: int) -> tuple[Ids, Ids]:
        """Find the k nearest codes of Q queries, the nearest first; ties go to the earlier one.

        Returns:
            int64 [Q, k] rows of the base, and int64 [Q, k] distances in bits.
        """
        words = _to_words(queries)
        with ThreadPoolExecutor(cpu_count()) as threads:
            found = list(threads.map(lambda query: self._search(query, k), words))
        return np.stack([ids for ids, _ in found]), np.stack([far for _, far in found])

    def _search(self, query: npt.NDArray[np.uint64], k: int) -> tuple[Ids, Ids]:
        far = np.bitwise_count(self._words[0] ^ query[0]).astype(np.uint16)
        for word, own in zip(self._words[1:], query[1:], strict=True):
            far += np.bitwise_count(word ^ own)
        limit = np.searchsorted(np.cumsum(np.bincount(far)), k)
        near = np.flatnonzero(far <= limit)
        ids = near[np.argsort(far[near], kind="stable")][:k]
        return ids, far[ids].astype(np.int64)


def _to_words(codes: CodeBytes) -> npt.NDArray[np.uint64]:
    """Pad codes with zeros to words of 64 bits: uint64 [n, words]."""
    return np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))).view(np.uint64)
