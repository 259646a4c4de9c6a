"""Segments: which version of a data set a run reads, from which position and epoch on.

A run that follows its data set goes on with each new version at the border of an epoch. In a
segment over N samples that begins at position f with epoch g, position p has number (p - f) mod N
in epoch g + (p - f) // N. A segment knows its number of samples: nothing here reads a file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, TypeVar

from pipeline.tools.errors import UsageError

Number = TypeVar("Number", int, float, Fraction)
_IDENTITY = re.compile("[0-9a-f]{64}")


class Segment(NamedTuple):
    """Positions that are read from one version, up to those of the next segment."""

    version: str
    """Identity of the version: the SHA-256 of its manifest."""
    samples: int
    """Samples of an epoch, N."""
    position: int = 0
    """First position."""
    epoch: int = 0
    """Epoch that begins there; epochs count on over all segments."""


Segments = tuple[Segment, ...]
"""Segments of a run: the first begins at position 0, each other at the end of an epoch."""


def as_segments(samples: int | Segments) -> Segments:
    """Return the segments of a run; a number stands for one version of so many samples."""
    return (Segment("", samples),) if isinstance(samples, int) else samples


def parse_segments(rows: object) -> Segments:
    """Return the segments that a file has as lists [version, samples, position, epoch].

    Raises:
        ValueError: they are none; the message says why.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError(f"segments are {rows!r:.80}; they are lists of version and three numbers")
    segments = []
    for row in rows:
        try:
            version, *numbers = row
            segment = Segment(version, *numbers)
        except (TypeError, ValueError):
            raise ValueError(f"a segment is {row!r:.120}, no version and three numbers") from None
        is_version = isinstance(version, str) and _IDENTITY.fullmatch(version)
        if not is_version or any(type(n) is not int or not 0 <= n < 2**62 for n in segment[1:]):
            raise ValueError(f"a segment is {row!r:.120}, no version and three numbers")
        segments.append(segment)
    _check_borders(segments)
    return tuple(segments)


def parse_versions(value: object) -> int | str | Segments | None:
    """Return the version or versions that a setting names, in one spelling.

    Args:
        value: a number, an identity or its first digits, segments (one of them is a version), None.

    Raises:
        ValueError: it is none of them.
    """
    if value is None or type(value) is int:
        return value
    if isinstance(value, str):
        from pipeline.dataset.versions import parse_version  # here: it brings NumPy

        try:
            return parse_version(value, "version")
        except UsageError as error:
            raise ValueError(str(error)) from error
    if not isinstance(value, Sequence):
        raise ValueError(f"version is {value!r:.80}; it takes a number, an identity or segments")
    segments = parse_segments(value)
    return segments if len(segments) > 1 else segments[0].version


def _check_borders(segments: Sequence[Segment]) -> None:
    if segments[0][2:] != (0, 0) or any(segment.samples == 0 for segment in segments):
        raise ValueError(f"segments begin with {segments[0]}; they begin at position 0, epoch 0")
    for one, following in pairwise(segments):
        epochs = following.epoch - one.epoch
        if epochs < 1 or following.position - one.position != epochs * one.samples:
            raise ValueError(
                f"a segment begins at position {following.position}, epoch {following.epoch}, "
                f"which is no border of the epochs of {one.samples} samples before it"
            )


def find_segment(segments: Sequence[Segment], position: Number) -> int:
    """Return the number of the segment that a position lies in."""
    return bisect_right([segment.position for segment in segments], position) - 1


def find_border(segment: Segment, position: int) -> tuple[int, int]:
    """Return where the first epoch of a segment from `position` on begins, and its number.

    It is the second epoch at least: a segment is read once or more.
    """
    epochs = max(1, -(-(position - segment.position) // segment.samples))
    return segment.position + epochs * segment.samples, segment.epoch + epochs


def append_version(segments: Segments, position: int, version: str, samples: int) -> Segments:
    """Return the segments of a run that goes on with a version at the next border of an epoch.

    Args:
        segments: of the run so far; empty for a new one.
        position: samples that it has consumed.
        version: identity of the version.
        samples: its number of samples.

    Returns:
        The segments that have begun, and one of the version; as they were if it was the last
        already. The order before `position` stays what it was.
    """
    if segments and segments[-1].version == version:
        return segments
    begun = tuple(segment for segment in segments if segment.position < position)
    if not begun:
        return (Segment(version, samples),)
    if begun[-1].version == version:
        return begun
    return (*begun, Segment(version, samples, *find_border(begun[-1], position)))


def find_divergence(one: Sequence[Segment], other: Sequence[Segment]) -> int | None:
    """Return the first position that two runs read otherwise; None: there is none."""
    for mine, others in zip(one, other, strict=False):
        if mine != others:
            return min(mine.position, others.position)
    longer = one if len(one) > len(other) else other
    shorter = min(len(one), len(other))
    return longer[shorter].position if len(longer) > shorter else None


def count_epochs(segments: Sequence[Segment], position: int) -> Fraction:
    """Return how many epochs are over at a position, with the part of the one that is not."""
    segment = segments[find_segment(segments, position)]
    return segment.epoch + Fraction(position - segment.position, segment.samples)


def find_epoch(segments: Sequence[Segment], position: int) -> int:
    """Return the epoch that a position lies in."""
    return int(count_epochs(segments, position))


def find_position(segments: Sequence[Segment], epochs: Number) -> Number:
    """Return the position at which so many epochs are over; it need not be whole."""
    number = bisect_right([segment.epoch for segment in segments], epochs) - 1
    segment = segments[max(0, number)]
    return segment.position + (epochs - segment.epoch) * segment.samples
