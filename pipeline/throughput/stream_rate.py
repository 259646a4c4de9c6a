"""The whole stream: its rate, what it waits for inside, and which queue is empty or full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

from pipeline.stream.timing import Waits
from pipeline.throughput.clock import FEWEST, Rate, until_steady
from pipeline.throughput.setting import Setting

WARM_UP = 8
"""Batches before the clock starts."""
READY = 0.0005
"""Seconds for which `next` may wait for pixels that count as ready."""


@dataclass(frozen=True)
class Asking:
    """One batch, as its taker saw it."""

    at: float
    """Seconds since the clock was started."""
    read: int
    """Batches that lay read, and not yet decoded, 0..prefetch."""
    waited: Waits
    """Seconds, for this batch."""

    @property
    def decoded(self) -> bool:
        """Whether its pixels were ready."""
        return self.waited.decode < READY


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The stream with nothing behind it that computes."""

    rate: Rate
    """Pictures a second."""
    asked: tuple[Asking, ...]
    """Every batch, in order."""
    prefetch: int
    """Batches that may be ahead at each place."""

    @property
    def waits(self) -> Waits:
        """Seconds waited in all."""
        total = Waits()
        for asking in self.asked:
            for name, value in vars(asking.waited).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def read_full(self) -> float:
        """Share of the batches, 0..1, at which the queue of read ones was full."""
        return sum(one.read >= self.prefetch for one in self.asked) / max(1, len(self.asked))

    @property
    def read_empty(self) -> float:
        """Share of the batches, 0..1, at which it was empty."""
        return sum(one.read == 0 for one in self.asked) / max(1, len(self.asked))


class Run:
    """A stream that is measured a window at a time."""

    def __init__(self, setting: Setting, position: int = 0) -> None:
        """Open it, and leave the warm-up behind."""
        self._stream = setting.stream(position)
        self._size = setting.batch_size
        self._settle: Callable[[], None] = (
            torch.cuda.synchronize if setting.device == "gpu" else lambda: None
        )
        self.asked: list[Asking] = []
        self._begun = 0.0
        try:
            for _ in islice(self._stream, WARM_UP):
                pass
        except BaseException:
            self._stream.close()
            raise
        self._settle()
        self._begun = time.perf_counter()

    def window(self, seconds: float, batches: int = 1) -> float:
        """Take batches for some seconds, and at least so many; return the pictures a second."""
        start, done = time.perf_counter(), 0
        while done < batches or time.perf_counter() - start < seconds:
            before = self._stream.waits.copy()
            next(self._stream)
            done += 1
            self.asked.append(
                Asking(
                    time.perf_counter() - self._begun, self._stream.read_ahead,
                    self._stream.waits.since(before),
                )
            )  # fmt: skip
        self._settle()
        return done * self._size / (time.perf_counter() - start)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


@contextmanager
def running(setting: Setting, position: int = 0) -> Iterator[Run]:
    """A `Run`, closed after the block."""
    run = Run(setting, position)
    try:
        yield run
    finally:
        run.close()


def whole(setting: Setting, seconds: float) -> Whole:
    """Measure the stream, `seconds` in all if its windows agree, longer if they do not."""
    with running(setting) as run:
        rate = until_steady(lambda: run.window(seconds / FEWEST))
        return Whole(rate=rate, asked=tuple(run.asked), prefetch=setting.prefetch)
