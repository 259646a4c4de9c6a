"""Exact nearest neighbours by squared L2 distance, by matrix products in bounded memory.

A first pass in float32 finds a few more candidates than are asked for; their distances are then
computed in float64, difference by difference. The k best of these are the answer if the best
candidate that was dropped is further away by more than the first pass can have been wrong. Where
that cannot be shown (many images at the same distance) a pass in float64 follows, and for what is
left the distance to every image is computed in float64. Ties go to the earlier image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.experiments.neighbors.features import Flags, Ids, Rows
from pipeline.tools.errors import UsageError

Floats = npt.NDArray[np.float64]
Tell = Callable[[int], None]

MARGINS = ((torch.float32, 16), (torch.float64, 256))
"""Passes: what they compute in, and how many candidates more than k they keep."""
LEAST = 1 << 26
"""Bytes that a search needs at least."""


@dataclass(frozen=True)
class Nearest:
    """The k nearest images of Q queries, the nearest first."""

    ids: Ids
    """int64 [Q, k]: rows of the base."""
    distances: Floats
    """float64 [Q, k]: squared L2."""
    again: int = 0
    """Queries for which the first pass did not do."""


@dataclass(frozen=True)
class Base:
    """What is searched."""

    rows: Rows
    """Floats [N, units], in memory or mapped."""
    sound: Flags
    """[N]: rows that may be found."""

    def floats(self, start: int, stop: int, dtype: torch.dtype, device: str) -> Tensor:
        """Some rows as a tensor."""
        return _tensor(self.rows[start:stop]).to(device).to(dtype)


def nearest(
    queries: Rows,
    base: Base,
    k: int,
    *,
    memory: int = 1 << 31,
    device: str = "cpu",
    picked: Ids | None = None,
    itself: bool = False,
    tell: Tell = lambda count: None,
) -> Nearest:
    """Find the k nearest rows of `base` for every query.

    Args:
        queries: floats [n, units], in memory or mapped.
        base: what is searched.
        k: neighbours, at least 1.
        memory: bytes to use, about; `queries` and `base` themselves not counted.
        device: where the products are made.
        picked: int64 [Q], the rows of `queries` to answer; None: all, Q = n.
        itself: `queries` are the rows of `base`, and none is to be its own neighbour.
        tell: called with how many queries have been done, again and again.

    Raises:
        UsageError: fewer rows than k, or too little memory.
    """
    room = int(base.sound.sum()) - itself
    if not 1 <= k <= room:
        raise UsageError(f"{k} neighbours asked for, and there are {room} images; ask for fewer")
    if memory < LEAST:
        raise UsageError(f"a memory of {memory:,} bytes is too little; give {LEAST:,} or more")
    if picked is None:
        picked = np.arange(len(queries))
    ids = np.zeros((len(picked), k), np.int64)
    distances = np.zeros((len(picked), k))
    size = _query_rows(queries.shape[1], len(picked), memory)
    again = 0
    for start in range(0, len(picked), size):
        part = slice(start, start + size)
        own = picked[part] if itself else None
        found, late = _some(queries[picked[part]], base, k, memory, device, own)
        ids[part], distances[part] = found
        again += late
        tell(len(found[0]))
    return Nearest(ids, distances, again)


def squared(queries: Rows, others: Rows) -> Floats:
    """Squared distances in float64, difference by difference: [..., units] twice -> [...]."""
    return np.square(queries.astype(np.float64) - others).sum(-1)


def _query_rows(units: int, queries: int, memory: int) -> int:
    """Queries at a time: a quarter of the memory, in float64."""
    return max(1, min(queries, memory // (4 * 8 * units)))


def _base_rows(units: int, queries: int, memory: int) -> int:
    """Rows of the base at a time: half of the memory for them, their scores and the best ones."""
    return max(1, memory // (2 * (12 * units + 24 * queries)))


def _some(
    queries: Rows, base: Base, k: int, memory: int, device: str, own: Ids | None
) -> tuple[tuple[Ids, Floats], int]:
    """Answer queries that fit into memory; also how many needed more than the first pass."""
    ids = np.zeros((len(queries), k), np.int64)
    distances = np.zeros((len(queries), k))
    left = np.arange(len(queries))
    late = 0
    for number, (dtype, margin) in enumerate(MARGINS):
        rest, mine = queries[left], None if own is None else own[left]
        found, bound = _candidates(rest, base, k + margin, memory, device, mine, dtype)
        best, far = _refined(rest, base, found, k, memory)
        ids[left], distances[left] = best, far
        left = left[far[:, -1] >= bound]
        if number == 0:
            late = len(left)
        if not len(left):
            return (ids, distances), late
    for place in left:
        itself = None if own is None else int(own[place])
        ids[place], distances[place] = _one(queries[place], base, k, memory, itself)
    return (ids, distances), late


def _candidates(
    queries: Rows,
    base: Base,
    count: int,
    memory: int,
    device: str,
    own: Ids | None,
    dtype: torch.dtype,
) -> tuple[Ids, Floats]:
    """The rows that look nearest, and a distance below which none of the others can be.

    Returns:
        int64 [Q, c], -1 where there are none left; float64 [Q], infinite if nothing was dropped.
    """
    units = queries.shape[1]
    asked = _tensor(queries).to(device).to(dtype)
    lengths = np.square(queries.astype(np.float64)).sum(1)
    scores = torch.empty(len(queries), 0, dtype=dtype, device=device)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    rows = _base_rows(units, len(queries), memory)
    most = 0.0
    dropped = False
    for start in range(0, len(base.rows), rows):
        stop = min(start + rows, len(base.rows))
        block = base.floats(start, stop, dtype, device)
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
    bound = worst + lengths - _wrong(units, lengths, most, dtype) if dropped else worst + np.inf
    return ids.cpu().numpy(), bound


def _wrong(units: int, norms: Floats, most: float, dtype: torch.dtype) -> Floats:
    """How far a score can be from the truth, float64 [Q], whatever the order of the sums.

    Sums of n products are wrong by at most n u |x| |y| / (1 - n u), u half the distance from 1 to
    the next number (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

    Args:
        units: n.
        norms: squared norms of the queries.
        most: largest squared norm in the base.
        dtype: what was computed in.
    """
    unit = (units + 8) * torch.finfo(dtype).eps / 2
    grown = unit / (1 - unit)
    return grown * (2 * np.sqrt(norms * most) + most + norms) * 1.01


def _refined(queries: Rows, base: Base, candidates: Ids, k: int, memory: int) -> tuple[Ids, Floats]:
    """The k best candidates by distances in float64; ties go to the smaller id."""
    units = queries.shape[1]
    ids = np.zeros((len(queries), k), np.int64)
    distances = np.zeros((len(queries), k))
    size = max(1, memory // (2 * 24 * units * candidates.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        there = candidates[part]
        places = np.maximum(there, 0)
        far = squared(queries[part][:, None], base.rows[places.reshape(-1)].reshape(
            *places.shape, units
        ))  # fmt: skip
        far[there < 0] = np.inf
        order = np.lexsort((there, far), axis=1)[:, :k]
        ids[part] = np.take_along_axis(there, order, 1)
        distances[part] = np.take_along_axis(far, order, 1)
    return ids, distances


def _one(query: Rows, base: Base, k: int, memory: int, own: int | None) -> tuple[Ids, Floats]:
    """Answer a query by its distance to every row, in float64."""
    rows = max(1, memory // (2 * 24 * base.rows.shape[1]))
    far = np.empty(len(base.rows))
    for start in range(0, len(far), rows):
        far[start : start + rows] = squared(query, base.rows[start : start + rows])
    far[~base.sound] = np.inf
    if own is not None:
        far[own] = np.inf
    limit = np.partition(far, k - 1)[k - 1]
    near = np.flatnonzero(far <= limit)
    ids = near[np.argsort(far[near], kind="stable")][:k]
    return ids, far[ids]


def _tensor(rows: Rows) -> Tensor:
    """Rows as a tensor; a copy where they are mapped for reading only."""
    return torch.from_numpy(np.array(rows) if not rows.flags.writeable else rows)
