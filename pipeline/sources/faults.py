"""Damaged sources: the faults that a scan met, and how many images lie behind them.

A tar, a row group of a parquet file or a folder that cannot be read is skipped from the fault on.
How many images that costs is known of rows; of tars it is estimated, so that a limit on rejects
means images, not faults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.dataset.tar import escape
from pipeline.tools.errors import DamagedSource, UsageError
from pipeline.tools.text import hide_credentials

FAULTS_SHOWN = 3
"""Number of damaged sources that notes name; `rejects.jsonl` lists them all."""


class _Fault(NamedTuple):
    """Damage of a container."""

    error: DamagedSource
    address: str
    """Address of the container."""
    images: int
    """Number of its images that were listed before."""
    known: bool
    """True if `error.lost` counts images, not bytes."""


class Faults:
    """The faults of a source, in the order in which they were met."""

    def __init__(self) -> None:
        self._faults: list[_Fault] = []

    def __len__(self) -> int:
        return len(self._faults)

    def add(self, error: DamagedSource, address: str, images: int, known: bool) -> None:
        """Add the fault of a container, of which so many images were listed before."""
        self._faults.append(_Fault(error, address, images, known))

    def refuse(self) -> None:
        """Raise the first damage, if there is any: for where no image is left."""
        if self._faults:
            raise self._faults[0].error

    def refuse_class(self, name: str, marks: Sequence[str]) -> None:
        """Raise the first damage of a class of which no image is left, if there is any.

        Skipping it would take the class from the data set, and its number from those behind it.

        Args:
            name: name of the class.
            marks: the paths of its sources have one of them.
        """
        for error, *_ in self._faults:
            if any(mark in f"{error.source}/" for mark in marks):
                raise UsageError(
                    f"{error}; no image of class {name!r} is left, so it is not skipped: mend it, "
                    "or move it away to pack without the class"
                ) from error

    def estimate_lost(self, counts: Mapping[str, int]) -> list[int]:
        """Return for each fault how many images lie behind it, 1 at least.

        Where no row tells, it is the images before the fault times the bytes behind it over those
        before it, or what a whole container has on average beyond the images before the fault.

        Args:
            counts: number of the listed images of each container, by its address.
        """
        damaged = {fault.address for fault in self._faults}
        whole = [count for address, count in counts.items() if address not in damaged]
        mean = round(sum(whole) / len(whole)) if whole else 0
        lost = []
        for error, _, images, known in self._faults:
            if known and error.lost:
                lost.append(error.lost)
                continue
            rest = 0 if known or not error.offset else round(images * error.lost / error.offset)
            lost.append(max(1, rest, mean - images))
        return lost

    def describe(self, lost: list[int]) -> Iterator[str]:
        """Yield a sentence for each of the first faults, and one for all others."""
        for (error, *_, known), images in zip(self._faults[:FAULTS_SHOWN], lost, strict=False):
            unit = "row" if known else "byte"
            place = f" from {unit} {error.offset:,} on" if error.offset else ""
            yield (
                f"{escape(hide_credentials(error.source))} is damaged and skipped{place} "
                f"({error.reason}), about {images:,} {'image' if images == 1 else 'images'}"
            )
        if (more := len(self._faults) - FAULTS_SHOWN) > 0:
            yield (
                f"{more:,} more {'source is' if more == 1 else 'sources are'} damaged, about "
                f"{sum(lost):,} images in all"
            )
