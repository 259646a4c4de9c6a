"""Weights for an average of networks, searched on the pictures themselves.

As the original's avg-valid.py (`find_coeffs`): all weights start at one half; one after the other
is tried at 0, .05, ... 1 and takes the value with the fewest top-5 errors, if that is better than
what it had; after five passes, or when a whole pass has changed nothing, that is it. Where it
differs: between values with equal top-5 errors the top-1 errors decide; ties count by the rule of
`model.metrics.errors`; and weights of 0 for all networks are no candidate.

A class can stand before the right one in some average only if it does in some network, and wherever
five classes do in every network the picture is lost. So most of what is saved need not be looked
at: the search runs on what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.metrics import errors

PASSES = 5
GRID = tuple(step / 20 for step in range(21))
START = 0.5
KEPT = 1 << 30
"""Bytes of what is left that stay in memory; the rest is read again for each weight."""
_BESIDE = -1.0
"""Probability of a class that is none: behind every other one, whatever the weights."""


class Chunk(NamedTuple):
    """Some pictures, as all networks see them."""

    probabilities: Tensor
    """float32 [networks, n, classes]."""
    labels: Tensor
    """int64 [n]."""
    weights: Tensor
    """float32 [n], 0 for pictures that do not count."""


class Chunks(Protocol):
    """Pictures that can be gone through again and again."""

    networks: int

    def chunks(self, start: int = 0) -> Iterator[tuple[int, Chunk]]:
        """Yield what comes after each chunk, and the chunk, from picture `start` on."""
        ...


def search(pictures: Chunks, kept: int = KEPT) -> tuple[float, ...]:
    """Return the weights of the best average that the search finds, one a network; the sum is 1.

    Args:
        pictures: the probabilities, gone through once, and as far as `kept` does not hold what is
            left of them, again for each weight that is tried.
        kept: bytes.
    """
    contest = Contest(pictures, kept)
    weights = [START] * pictures.networks
    best = contest.errors([weights])[0]
    changed = 0  # the weight that was changed last
    for turn in range(PASSES * len(weights)):
        place = turn % len(weights)
        if changed == place and turn >= len(weights):
            break  # a whole pass ago
        tried = [[*weights[:place], value, *weights[place + 1 :]] for value in GRID]
        tried = [one for one in tried if sum(one) > 0]
        found = contest.errors(tried)
        first = min(range(len(tried)), key=found.__getitem__)
        if found[first] < best:
            best, weights, changed = found[first], tried[first], place
    return tuple(weight / sum(weights) for weight in weights)


class Contest:
    """The pictures that weights decide about, with the classes that can come into question."""

    def __init__(self, pictures: Chunks, kept: int) -> None:
        """Go through all pictures once; `kept` is how many bytes of what is left may stay."""
        self._pictures = pictures
        self._blocks: list[Chunk] = []
        self._rest: int | None = None
        start = size = 0
        for end, chunk in pictures.chunks():
            blocks = list(undecided(chunk))
            size += sum(4 * block.probabilities.numel() for block in blocks)
            if size > kept:
                self._rest = start
                break
            self._blocks += blocks
            start = end

    def errors(self, candidates: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        """Return top-5 and top-1 errors among these pictures with each of some weights."""
        sums = torch.zeros(len(candidates), 2, dtype=torch.float64)
        for block in self._each():
            for row, weights in zip(sums, candidates, strict=True):
                average = weighted(block.probabilities, weights)
                top1, top5 = errors(average, block.labels, block.weights)
                row += torch.stack((top5, top1))
        return [(top5, top1) for top5, top1 in sums.tolist()]

    def _each(self) -> Iterator[Chunk]:
        yield from self._blocks
        if self._rest is not None:
            for _, chunk in self._pictures.chunks(self._rest):
                yield from undecided(chunk)


def weighted(probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the sum over networks of [networks, n, classes], each times its weight.

    What a network of weight 0 says does not matter, not even if it is no number.
    """
    total = torch.zeros_like(probabilities[0])
    for one, weight in zip(probabilities, weights, strict=True):
        if weight:
            total.add_(one, alpha=weight)
    return total


def undecided(chunk: Chunk) -> Iterator[Chunk]:
    """Yield the pictures of a chunk that weights decide about, in blocks of about equal width.

    In a block the right class is the first one; besides it there are those that some network
    puts before it or level with it. A class that every network puts behind could at most be level
    in an average whose rounding hides the difference: nobody would notice in a search.
    """
    places = min(5, chunk.probabilities.shape[2])
    index = chunk.labels[None, :, None].expand(len(chunk.probabilities), -1, 1)
    own = chunk.probabilities.gather(2, index)
    lost = (chunk.probabilities > own).all(0).sum(1) >= places
    near = ((chunk.probabilities >= own) | chunk.probabilities.isnan()).any(0)
    width = near.sum(1)
    open_ = (width > 1) & ~lost & (chunk.weights > 0)
    rank = near.to(torch.int8)
    rank.scatter_(1, chunk.labels[:, None], 2)
    low, widest = 1, int(width[open_].max()) if open_.any() else 0
    while low < widest:
        high = min(2 * low, widest)
        rows = (open_ & (width > low) & (width <= high)).nonzero()[:, 0]
        if len(rows):
            yield _block(chunk, rows, rank[rows], high)
        low = high


def _block(chunk: Chunk, rows: Tensor, rank: Tensor, width: int) -> Chunk:
    """Cut out pictures `rows` and for each the `width` classes of the highest `rank` [n, classes].

    Rank 2 is the right class, 1 one that comes into question, 0 any other.
    """
    ranks, classes = rank.topk(width, dim=1)
    index = classes[None].expand(len(chunk.probabilities), -1, -1)
    found = chunk.probabilities[:, rows].gather(2, index)
    found = found.masked_fill(ranks[None] == 0, _BESIDE)
    return Chunk(found, torch.zeros(len(rows), dtype=torch.int64), chunk.weights[rows])
