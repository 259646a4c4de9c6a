"""The probabilities of several runs, picture by picture, and the errors of their averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cluster.run.probabilities import About, Saved
from cluster.weights import Chunk, weighted
from model.metrics import sums
from pipeline.tools.errors import UsageError

CHUNK = 1 << 24
"""Probabilities, of all networks together, in memory at a time (64 MB)."""


class Together:
    """The probabilities of several runs, picture by picture.

    A picture counts if it was sound for all of them.
    """

    def __init__(self, saved: Sequence[Saved], weights: Tensor | None = None) -> None:
        """Make sure that they are of the same pictures.

        Args:
            saved: of each run.
            weights: float32 [N], 0 for pictures that are not to count, if others are not, either.

        Raises:
            UsageError: they are not; names the runs and what differs.
        """
        self.saved = saved
        self.networks = len(saved)
        self.weights = saved[0].weights * (1.0 if weights is None else weights)
        """float32 [N], 0 for pictures that do not count."""
        for other in saved[1:]:
            _same(saved[0], other)
            self.weights *= other.weights
        if not self.weights.any():
            raise UsageError("no picture was sound for all runs; evaluate them anew")

    def chunks(self, start: int = 0) -> Iterator[tuple[int, Chunk]]:
        """Yield what comes after each chunk, and the chunk, from picture `start` on."""
        about = self.saved[0].about
        rows = max(1, CHUNK // (self.networks * len(about.classes)))
        for first in range(start, about.samples, rows):
            last = min(first + rows, about.samples)
            probabilities = torch.stack([one.rows(first, last) for one in self.saved])
            labels, weights = self.saved[0].labels[first:last], self.weights[first:last]
            yield last, Chunk(probabilities, labels, weights)


def counted(nets: Together, weights: Sequence[float]) -> list[dict[str, float]]:
    """Return errors and loss of each network alone, then of their average."""
    totals = torch.zeros(nets.networks + 1, 4, dtype=torch.float64)
    for _, (probabilities, labels, counts) in nets.chunks():
        answers: list[Tensor] = [*probabilities, weighted(probabilities, weights)]
        totals += torch.stack([sums(answer, labels, counts) for answer in answers])
    return [
        {"top1_error": top1 / samples, "top5_error": top5 / samples, "loss": loss / samples}
        for loss, top1, top5, samples in totals.tolist()
    ]


def _same(first: Saved, other: Saved) -> None:
    """Refuse probabilities of other pictures or classes."""
    one, two = first.about, other.about
    if two.split != one.split:
        found = f"of split {two.split!r}, those of {first.run} of {one.split!r}"
    elif two.classes != one.classes:
        found = f"of other classes ({_difference(one, two)}) than those of {first.run}"
    elif two.data_sha256 != one.data_sha256 or not torch.equal(first.labels, other.labels):
        found = (
            f"of another data set (manifest {two.data_sha256[:12]}) than those of {first.run} "
            f"({one.data_sha256[:12]})"
        )
    else:
        return
    raise UsageError(
        f"the probabilities of {other.run} are {found}; evaluate both on one with cluster.evaluate "
        "--save-probabilities"
    )


def _difference(one: About, two: About) -> str:
    if len(one.classes) != len(two.classes):
        return f"{len(two.classes)}, not {len(one.classes)}"
    names = zip(one.classes, two.classes, strict=True)
    place, (a, b) = next((i, pair) for i, pair in enumerate(names) if pair[0] != pair[1])
    return f"number {place} is {b!r}, not {a!r}"
