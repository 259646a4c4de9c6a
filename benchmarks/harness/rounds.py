"""Turns of several ways, every second round in reverse; medians and ratios within rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.tools.progress import Progress

T = TypeVar("T")


def order_round(items: Iterable[T], number: int) -> list[T]:
    """Return the items in the order of a round: every second one is reversed."""
    return list(items)[:: -1 if number % 2 else 1]


def take_turns(
    ways: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 0
) -> dict[str, list[T]]:
    """Call every way once in each round, and return what each call gave.

    Args:
        ways: functions that measure.
        rounds: number of turns of each.
        warm_up: rounds before them, whose results are dropped.
    """
    found: dict[str, list[T]] = {name: [] for name in ways}
    total = (warm_up + rounds) * len(ways)
    with Progress("measuring", total=total, unit="turns") as progress:
        for number in range(warm_up + rounds):
            for name in order_round(ways, number):
                progress.note(name)
                one = ways[name]()
                if number >= warm_up:
                    found[name].append(one)
                progress.advance(1)
    return found


def measure_seconds(action: Callable[[], Any]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def list_ratios(ours: Sequence[float], its: Sequence[float]) -> list[float]:
    """Return the ratio of two rates in every round."""
    return [a / b for a, b in zip(ours, its, strict=True)]


def median_ratio(ours: Sequence[float], its: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two rates."""
    return statistics.median(list_ratios(ours, its))
