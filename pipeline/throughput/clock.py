"""Honest clocks: rates with their spread, CPU time, and what else keeps the machine busy.

What was measured of one stage, or of the whole stream: plain values, beside a limit.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

STEADY = 0.05
"""Half the spread of the middle half of the windows, over their median: below it, they are steady.
(The standard error of the median of 5 such windows is then about 2 %.)"""
FEWEST, MOST = 5, 15
"""Windows of a measurement: at least, and until they are steady at most."""
OTHERS = 0.1
"""Share of the machine's CPUs that others may use before it is said."""


@dataclass(frozen=True)
class Rate:
    """Something a second, measured in several windows of time."""

    windows: tuple[float, ...]
    """In the order they were taken."""
    cpu: float
    """Cores that this process kept busy meanwhile."""
    others: float
    """Share of the machine's CPUs, 0..1, that other processes kept busy meanwhile."""

    @property
    def median(self) -> float:
        """The result."""
        return statistics.median(self.windows)

    @property
    def spread(self) -> float:
        """Half of what the middle half of the windows spans, over the median."""
        if len(self.windows) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.windows, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def steady(self) -> bool:
        """Whether the windows agree."""
        return self.spread <= STEADY

    @property
    def error(self) -> float:
        """About one standard error of the median, over the median (normal windows)."""
        return float(1.86 * self.spread / max(1, len(self.windows)) ** 0.5)


def measured(
    work: Callable[[], int], seconds: float, *, fewest: int = FEWEST, most: int = MOST,
    settle: Callable[[], None] = lambda: None,
) -> Rate:  # fmt: skip
    """Repeat `work` and return how many of its items a second get done.

    The first call is a warm-up and not counted. There are `fewest` windows of at least
    `seconds / fewest` each, and more, up to `most`, until they agree.

    Args:
        work: does some items and says how many.
        seconds: for `fewest` windows.
        fewest: windows, at least.
        most: windows, at most.
        settle: waits until what was started is done (a GPU), before the clock is read.
    """
    work()
    settle()
    return until_steady(lambda: _window(work, seconds / fewest, settle), fewest, most)


def until_steady(window: Callable[[], float], fewest: int = FEWEST, most: int = MOST) -> Rate:
    """Take windows, each of which gives a rate: `fewest`, and up to `most` until they agree."""
    rates: list[float] = []
    load = Load()
    while len(rates) < fewest or (len(rates) < most and not Rate(tuple(rates), 0, 0).steady):
        rates.append(window())
    return Rate(tuple(rates), load.cores(), load.others())


def _window(work: Callable[[], int], seconds: float, settle: Callable[[], None]) -> float:
    """Repeat `work` for some seconds; return its items a second."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += work()
    settle()
    return done / (time.perf_counter() - start)


def in_turn(
    works: Mapping[Key, Callable[[], int]], seconds: float, *, turns: int = FEWEST,
    settle: Callable[[], None] = lambda: None, drain: int = 3,
) -> dict[Key, Rate]:  # fmt: skip
    """Measure several things in turn, so that what drifts on the machine hits all of them.

    Args:
        works: as `measured` takes one.
        seconds: for each of them, in all its windows.
        turns: windows of each.
        settle: as `measured` has it.
        drain: calls before each window that are not counted: what lay ready cost nothing.
    """
    rates: dict[Key, list[float]] = {key: [] for key in works}
    cpu = dict.fromkeys(works, 0.0)
    load = Load()
    for turn in range(turns):
        for key in list(works)[:: -1 if turn % 2 else 1]:
            for _ in range(drain):
                works[key]()
            settle()
            own = Load()
            rates[key].append(_window(works[key], seconds / turns, settle))
            cpu[key] += own.cores() / turns
    others = load.others()
    return {key: Rate(tuple(found), cpu[key], others) for key, found in rates.items()}


class Load:
    """What kept the CPUs busy since this was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own = _own_seconds()
        self._all = _busy_seconds()

    def cores(self) -> float:
        """Cores that this process and its children kept busy."""
        return (_own_seconds() - self._own) / max(1e-9, time.perf_counter() - self._start)

    def others(self) -> float:
        """Share of the machine's CPUs, 0..1, that others kept busy; 0 where nobody can tell."""
        now, before = _busy_seconds(), self._all
        if now is None or before is None:
            return 0.0
        wall = max(1e-9, time.perf_counter() - self._start) * (os.cpu_count() or 1)
        own = _own_seconds() - self._own
        return min(1.0, max(0.0, now - before - own) / wall)


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started, and those stolen by its host."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = (int(part) for part in first[1:9])
    ticks = user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage alone, or the whole."""

    name: str
    img_s: float
    spread: float
    """Half of what the middle half of the windows spans, over the median."""
    error: float
    """Standard error of the median, over the median."""
    steady: bool
    cores: float
    """Cores kept busy."""
    others: float
    """Share of the machine that others kept busy, 0..1."""
    bytes_s: float
    limit_img_s: float | None = None
    share: float | None = None
    """Of the limit, 0..1."""
    against: str = ""
    note: str = ""


def row(
    name: str, rate: Rate, size: float, *, limit: float | None = None, against: str = "",
    note: str = "",
) -> Row:  # fmt: skip
    """A rate as a row; `size` is in bytes an image."""
    return Row(
        name=name, img_s=rate.median, spread=rate.spread, error=rate.error, steady=rate.steady,
        cores=rate.cpu, others=rate.others, bytes_s=rate.median * size, limit_img_s=limit,
        share=rate.median / limit if limit else None, against=against, note=note,
    )  # fmt: skip
