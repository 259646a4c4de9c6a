"""Threads, prefetch depth and decoder load by search: settings tried in turn, on the stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.throughput.clock import Rate
from pipeline.throughput.diagnosis import thread_counts
from pipeline.throughput.stages import Setting
from pipeline.throughput.stream_rate import running
from pipeline.tools.files import atomic_write

BUDGET = 100.0
"""Seconds that the search may take."""
TURNS = 5
"""Times that each setting is measured, in turn with the default."""
SECONDS = 0.6
"""Of a measurement."""
LOADS = (0.0, 1.0)
"""Decoder loads tried: between them, an image's pixels depend on its batch."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting, measured in turn with the best so far."""

    change: dict[str, Any]
    """What differs from the default."""
    img_s: Rate
    best: Rate
    """Of the best so far, in the same turns."""

    @property
    def ratio(self) -> float:
        """Median of the ratios of the turns."""
        pairs = zip(self.img_s.windows, self.best.windows, strict=True)
        return statistics.median(new / old for new, old in pairs)

    @property
    def better(self) -> bool:
        """In all turns but one at most, and by more than 2 % in the median."""
        pairs = list(zip(self.img_s.windows, self.best.windows, strict=True))
        return self.ratio > 1.02 and sum(new > old for new, old in pairs) >= len(pairs) - 1


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The outcome of a search."""

    change: dict[str, Any]
    """What is better than the default; empty: nothing is."""
    gain: float
    """Of it over the default: the median of turns at the end."""
    trials: tuple[Trial, ...]
    seconds: float


def tune(setting: Setting, tell: Callable[[Trial], None] = lambda _: None,
         budget: float = BUDGET) -> Tuned:  # fmt: skip
    """Search one thing after the other: decoder load, threads, then prefetch.

    A setting replaces the best so far only if it is better beyond noise, and what is found in the
    end is measured against the default once more: it is never worse but for chance.

    Args:
        setting: the default; where the search begins.
        tell: gets every trial.
        budget: seconds.

    Raises:
        DuetError: as `Stream` does.
    """
    start, best, trials = time.monotonic(), dict[str, Any](), list[Trial]()

    def left() -> bool:
        return time.monotonic() - start < budget - 2 * TURNS * SECONDS - 4

    for name, values in _candidates(setting):
        for value in values:
            if value == (best.get(name, getattr(setting, name))) or not left():
                continue
            trial = _against(setting, best, {**best, name: value})
            trials.append(trial)
            tell(trial)
            if trial.better:
                best = trial.change
            elif name == "threads" and trial.ratio < 0.95:
                break  # the others are further away
    gain = 1.0
    if best:
        last = _against(setting, {}, best)
        tell(last)
        trials.append(last)
        gain = last.ratio
        if not last.better:
            best, gain = {}, 1.0
    return Tuned(change=best, gain=gain, trials=tuple(trials), seconds=time.monotonic() - start)


def _candidates(setting: Setting) -> Iterator[tuple[str, Sequence[Any]]]:
    if setting.device == "gpu":
        yield "hw_decoder_load", LOADS
    counts = thread_counts(setting)
    yield "threads", [count for count in counts if count > setting.threads]
    yield "threads", [count for count in reversed(counts) if count < setting.threads]
    # Never fewer than the default: a trainer's steps vary, and this clock has no trainer.
    yield "prefetch", [depth for depth in (3, 4, 6) if depth > setting.prefetch]


def _against(setting: Setting, best: dict[str, Any], change: dict[str, Any]) -> Trial:
    """Measure two settings in turn; both streams are open, one at a time is asked."""
    old, new = list[float](), list[float]()
    with running(setting.but(**best)) as first, running(setting.but(**change)) as second:
        for turn in range(TURNS):
            pairs = [(first, old), (second, new)]
            for run, rates in pairs if turn % 2 else reversed(pairs):
                run.window(0, 2 * setting.prefetch + 2)  # what lay ready has cost nothing now
                rates.append(run.window(SECONDS))
    return Trial(change=change, img_s=Rate(tuple(new), 0, 0), best=Rate(tuple(old), 0, 0))


def write(path: Path, setting: Setting, tuned: Tuned) -> None:
    """Write what `cluster.train --tuning` takes: settings of a run, and where they come from."""
    values = {name: getattr(setting.but(**tuned.change), name) for name in ("threads", "prefetch")}
    if setting.device == "gpu":
        values["hw_decoder_load"] = setting.but(**tuned.change).hw_decoder_load
    lines = [
        f"# python -m pipeline.throughput {setting.data} --tune",
        f"# {setting.device}, batch {setting.batch_size}: {tuned.gain:.2f} times the default "
        f"({len(tuned.trials)} trials, {tuned.seconds:.0f} s)",
        *(f"{name} = {value}" for name, value in values.items()),
    ]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
