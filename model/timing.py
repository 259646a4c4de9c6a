"""Times and values that a device hands to the host without the host waiting for the work behind it.

A program on a GPU launches work and runs ahead of it: the host's clock then times the launches, and
reading a value waits for all that was launched before. CUDA events time the work itself, and tell
when a copy in pinned memory can be read. On a CPU the same calls give the host's clock, and the
value itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

Instant: TypeAlias = float | torch.cuda.Event
"""Seconds of the host's clock, or the place of an event in the work of a GPU."""
Span: TypeAlias = tuple[Instant, Instant]
MOST_SPANS = 4096
"""Spans that a stopwatch keeps, when nobody takes them."""


def mark_time(device: torch.device) -> Instant:
    """Return the present instant: now on a CPU, after all work launched so far on a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def sum_seconds(spans: Iterable[Span]) -> float:
    """Return the seconds of some spans; the device must have passed their ends."""
    return sum((_subtract(start, end) for start, end in spans), 0.0)


def _subtract(start: Instant, end: Instant) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return 1e-3 * start.elapsed_time(end)  # type: ignore[union-attr, arg-type]


class Stopwatch:
    """Spans of time that a device spent in blocks of a program.

    A span on a GPU begins when it has done the work launched before the block, and ends with the
    work launched in it: time that the host spends in a block while the GPU is busy with earlier
    work does not count.
    """

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=MOST_SPANS)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Add the block as a span."""
        start = mark_time(device)
        yield
        self._spans.append((start, mark_time(device)))

    def take(self) -> list[Span]:
        """Return the spans since the last call."""
        spans = list(self._spans)
        self._spans.clear()
        return spans


class HostCopy:
    """Copy of a small tensor for the host, which `read` waits for, and for nothing launched later.

    Args:
        values: tensor on any device; a CPU tensor must not be changed before it is read.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values.detach(), None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            # The thread sleeps while it waits: a decoding thread can have its core.
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()

    def read(self) -> list[float]:
        """Return the values, waiting until the device has computed and copied them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._values.tolist()
        return found
