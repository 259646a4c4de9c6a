"""Batches -> images a second; and how much time there is for measuring."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import torch
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]

from parts.lanes import Lane, Setting
from parts.machine import Gauge

Row = dict[str, Any]
"""One measurement, ready for JSON."""

WARM_UP = 1 / 6
"""Part of a window that goes by before it, at least."""


class Budget:
    """A time that is not to be exceeded, spent from the moment this is made."""

    def __init__(self, minutes: float) -> None:
        self._start, self._seconds = time.monotonic(), minutes * 60

    def until(self, share: float) -> Callable[[], bool]:
        """Return a function that says whether less than this share of the time has gone."""
        return lambda: time.monotonic() - self._start < share * self._seconds


def measure_window(
    batches: Iterator[Any], setting: Setting, seconds: float, gauge: Gauge | None
) -> dict[str, float]:
    """Return img/s, the cores that this process kept busy, and what the GPU says of itself.

    Batches that were made beforehand, and those of a warm-up, are taken first. `gauge` is that of
    the GPU on which the batches are made, None on the CPU; all its work is waited for.
    """
    start, ready = time.perf_counter(), 2 * setting.prefetch + 4
    while ready > 0 or time.perf_counter() - start < seconds * WARM_UP:
        next(batches)
        ready -= 1
    _wait(gauge)
    if gauge:
        gauge.reset()
    count, used, start = 0, sum(os.times()[:2]), time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
        if gauge:
            gauge.look()
    _wait(gauge)
    passed = time.perf_counter() - start
    row = {
        "img_s": round(count * setting.batch / passed, 1),
        "cores": round((sum(os.times()[:2]) - used) / passed, 2),
        "seconds": round(passed, 2),
    }
    return row | (gauge.read() if gauge else {})


def measure_once(lane: Lane, setting: Setting, seconds: float, gauge: Gauge | None) -> Row:
    """Open a lane, measure one window and close it. The row holds the error, if there is one."""
    row: Row = asdict(setting)
    try:
        with closing(lane(setting)) as batches:
            row |= measure_window(batches, setting, seconds, gauge)
    except Exception as error:  # out of memory, an unknown option: the other points go on
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    free_memory()
    return row


def measure_turns(
    lanes: Mapping[str, tuple[Lane, Setting]],
    rounds: int,
    seconds: float,
    gauge: Gauge | None,
    more: Callable[[], bool],
) -> dict[str, list[Row]]:
    """Measure lanes in turn, every second round in reverse, and all of them open meanwhile.

    A lane that is not having its turn fills its queues and stands still. At least one round is
    done; no further one begins when `more` says so.
    """
    rows: dict[str, list[Row]] = {name: [] for name in lanes}
    with ExitStack() as stack:
        opened: list[tuple[str, Generator[Any], Setting]] = []
        for name, (lane, setting) in lanes.items():
            batches = stack.enter_context(closing(lane(setting)))
            opened.append((name, batches, setting))
        for number in range(rounds):
            if number and not more():
                break
            for name, batches, setting in opened[:: -1 if number % 2 else 1]:
                found = measure_window(batches, setting, seconds, gauge)
                rows[name].append(asdict(setting) | found)
    free_memory()
    return rows


def median(rows: list[Row], what: str = "img_s") -> float:
    """Return the median of a column."""
    return float(statistics.median(row[what] for row in rows))


def ratio(rows: list[Row], others: list[Row]) -> float:
    """Return the median over the rounds of the ratio of two lanes' rates."""
    ratios = [a["img_s"] / b["img_s"] for a, b in zip(rows, others, strict=True)]
    return float(statistics.median(ratios))


def free_memory() -> None:
    """Free the memory of closed lanes, before the next lane takes its own."""
    gc.collect()
    ReleaseUnusedMemory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(gauge: Gauge | None) -> None:
    if gauge:
        torch.cuda.synchronize()
