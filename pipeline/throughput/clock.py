"""Throughput timers: median, spread, CPU time, load from other processes; rows of the report."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.tools.files import read_text

Key = TypeVar("Key", bound=Hashable)

STEADY = 0.05
"""Largest spread (`Rate.spread`) of steady windows: the standard error of the median of 5 such
windows is about 2 %."""
FEWEST, MOST = 5, 15
"""Fewest windows of a measurement, and most windows while they are not steady."""
SURE = 3.0
"""Standard errors beyond which a difference is more than noise."""
OTHERS = 0.1
"""Share of the machine's CPUs used by other processes above which a report warns."""


@dataclass(frozen=True)
class Rate:
    """Items per second (images or bytes), measured in several windows of time."""

    windows: tuple[float, ...]
    """Items per second of each window, in the order of time."""
    cpu: float
    """Cores kept busy by this process."""
    others: float
    """Share of the machine's CPUs, 0..1, kept busy by other processes."""

    @property
    def median(self) -> float:
        """Items per second: the median of the windows."""
        return statistics.median(self.windows)

    @property
    def best(self) -> float:
        """Items per second of the best window: what a limit is, which others can only lower."""
        return max(self.windows)

    @property
    def spread(self) -> float:
        """Half the interquartile range of the windows, over the median."""
        if len(self.windows) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.windows, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def is_steady(self) -> bool:
        """True if the windows agree to within `STEADY`."""
        return self.spread <= STEADY

    @property
    def error(self) -> float:
        """About one standard error of the median, over the median (normal windows)."""
        return float(1.86 * self.spread / max(1, len(self.windows)) ** 0.5)


def measure(
    work: Callable[[], int], seconds: float, settle: Callable[[], None] = lambda: None
) -> Rate:
    """Repeat `work` and return its items per second.

    The first call is a warm-up and not counted. There are `FEWEST` windows of at least
    `seconds / FEWEST` each, and more, up to `MOST`, until they agree.

    Args:
        work: processes some items and returns their number.
        seconds: measuring time of `FEWEST` windows.
        settle: waits for the GPU before the clock is read.
    """
    work()
    settle()
    return measure_until_steady(lambda: _window(work, seconds / FEWEST, settle))


def measure_until_steady(window: Callable[[], float], most: int = MOST) -> Rate:
    """Call `window` for a rate `FEWEST` times, and up to `most` times until the rates agree."""
    rates: list[float] = []
    load = CpuLoad()
    while len(rates) < FEWEST or (len(rates) < most and not Rate(tuple(rates), 0, 0).is_steady):
        rates.append(window())
    return Rate(tuple(rates), load.cores(), load.others())


def count_items(work: Callable[[], object], items: int) -> Callable[[], int]:
    """Return a function that calls `work`, which processes that many items, and returns `items`."""

    def step() -> int:
        work()
        return items

    return step


def _window(work: Callable[[], int], seconds: float, settle: Callable[[], None]) -> float:
    """Repeat `work` for some seconds; return its items per second."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += work()
    settle()
    return done / (time.perf_counter() - start)


def measure_in_turn(
    works: Mapping[Key, Callable[[], int]], seconds: float,
    settle: Callable[[], None] = lambda: None,
) -> dict[Key, Rate]:  # fmt: skip
    """Measure several functions in turn, so that a drift of the machine hits all of them.

    Args:
        works: each as `work` of `measure`.
        seconds: measuring time of each function, all `FEWEST` windows together.
        settle: as in `measure`.
    """
    rates: dict[Key, list[float]] = {key: [] for key in works}
    cpu = dict.fromkeys(works, 0.0)
    load = CpuLoad()
    for turn in range(FEWEST):
        for key in list(works)[:: -1 if turn % 2 else 1]:
            for _ in range(3):  # queued results cost nothing
                works[key]()
            settle()
            own = CpuLoad()
            rates[key].append(_window(works[key], seconds / FEWEST, settle))
            cpu[key] += own.cores() / FEWEST
    others = load.others()
    return {key: Rate(tuple(found), cpu[key], others) for key, found in rates.items()}


class CpuLoad:
    """CPU time of this process and of all others since the object was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own = _own_seconds()
        self._all = _busy_seconds()

    def cores(self) -> float:
        """Return the cores kept busy by this process and its children."""
        return (_own_seconds() - self._own) / max(1e-9, time.perf_counter() - self._start)

    def others(self) -> float:
        """Return the share of the machine's CPUs, 0..1, that others kept busy; 0 if unknown."""
        now, before = _busy_seconds(), self._all
        if now is None or before is None:
            return 0.0
        wall = max(1e-9, time.perf_counter() - self._start) * (os.cpu_count() or 1)
        own = _own_seconds() - self._own
        return min(1.0, max(0.0, now - before - own) / wall)


def find_descendants() -> list[int]:
    """Return the ids of this process and of all that it started, directly or not, and that run."""
    return list(_read_ticks())


def _read_ticks() -> dict[int, int]:
    """Return the CPU ticks of this process, its descendants, and those of them that have ended."""
    parents, ticks = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        # The name of the command, in brackets, may hold anything.
        fields = read_text(path).rpartition(")")[2].split()
        if len(fields) > 14:  # it has not ended meanwhile
            pid = int(path.parent.name)
            parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    found, new = set[int](), {os.getpid()}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new}
    return {pid: ticks.get(pid, 0) for pid in sorted(found)}


def _own_seconds() -> float:
    return max(sum(os.times()[:4]), sum(_read_ticks().values()) / os.sysconf("SC_CLK_TCK"))


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started, and those stolen by its host."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = map(int, first[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """Rate of a stage alone, or of the whole stream, beside its limit."""

    name: str
    img_s: float
    """Images per second."""
    spread: float
    """This and the next four: as the properties and fields of `Rate`."""
    error: float
    steady: bool
    cores: float
    others: float
    bytes_s: float
    """Bytes per second."""
    limit_img_s: float | None = None
    """Images per second that the hardware allows; None where that is unknown."""
    share: float | None = None
    """Fraction of the hardware limit, 0..1."""
    against: str = ""
    """Name of the limit."""
    note: str = ""


def make_row(
    name: str, rate: Rate, size: float, *, limit: float | None = None, against: str = "",
    note: str = "",
) -> StageRow:  # fmt: skip
    """Return a rate as a row; `size` is in bytes per image.

    A rate above its limit shows that the machine was slower when the limit was measured: then the
    rate is the limit, and the row says so.
    """
    if limit and rate.median > limit:
        limit, against = rate.median, f"{against} (slower when it was measured)"
    return StageRow(
        name=name, img_s=rate.median, spread=rate.spread, error=rate.error, steady=rate.is_steady,
        cores=rate.cpu, others=rate.others, bytes_s=rate.median * size, limit_img_s=limit,
        share=rate.median / limit if limit else None, against=against, note=note,
    )  # fmt: skip
