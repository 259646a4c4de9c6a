"""Search for the best threads, prefetch depth and decoder load, on the stream itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.throughput.clock import Rate
from pipeline.throughput.diagnosis import list_thread_counts
from pipeline.throughput.stages import Setting
from pipeline.throughput.stream_rate import open_measured_stream
from pipeline.tools.files import atomic_write

BUDGET = 100.0
"""Most seconds of a search."""
TURNS = 5
"""Windows of each setting, in turn with those of the best so far."""
SECONDS = 0.6
"""Seconds of a window."""
LOADS = (0.0, 1.0)
"""Decoder loads to try: between them, pixels of an image depend on its batch."""


@dataclass(frozen=True, kw_only=True)
class TuningTrial:
    """A setting, measured in turn with the best so far."""

    change: dict[str, Any]
    """Settings that differ from the default."""
    img_s: Rate
    best: Rate
    """Images per second of the best so far, in the same turns."""

    @property
    def ratio(self) -> float:
        """Median of the ratios of the turns."""
        pairs = zip(self.img_s.windows, self.best.windows, strict=True)
        return statistics.median(new / old for new, old in pairs)

    @property
    def is_better(self) -> bool:
        """True if it is faster in all turns but one, and by more than 2 % in the median."""
        pairs = list(zip(self.img_s.windows, self.best.windows, strict=True))
        return self.ratio > 1.02 and sum(new > old for new, old in pairs) >= len(pairs) - 1


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """The outcome of a search."""

    change: dict[str, Any]
    """Settings that are better than the default; empty if none are."""
    gain: float
    """Rate over that of the default, the median of a last round of turns."""
    trials: tuple[TuningTrial, ...]
    seconds: float


def tune(setting: Setting, report_trial: Callable[[TuningTrial], None] = lambda _: None,
         budget: float = BUDGET) -> TuningResult:  # fmt: skip
    """Search one thing after the other: decoder load, threads, then prefetch.

    A setting replaces the best so far only if it is better beyond noise, and the result is measured
    against the default once more.

    Args:
        setting: the default, where the search begins.
        report_trial: called with every trial.
        budget: most seconds.

    Raises:
        DuetError: as `Stream` does.
    """
    start, best, trials = time.monotonic(), dict[str, Any](), list[TuningTrial]()

    def has_time() -> bool:
        return time.monotonic() - start < budget - 2 * TURNS * SECONDS - 4

    for name, values in _list_candidates(setting):
        for value in values:
            if value == best.get(name, getattr(setting, name)) or not has_time():
                continue
            trial = _measure_against(setting, best, {**best, name: value})
            trials.append(trial)
            report_trial(trial)
            if trial.is_better:
                best = trial.change
            elif name == "threads" and trial.ratio < 0.95:
                break  # the others are farther from the best
    gain = 1.0
    if best:
        last = _measure_against(setting, {}, best)
        report_trial(last)
        trials.append(last)
        best, gain = (best, last.ratio) if last.is_better else ({}, 1.0)
    return TuningResult(
        change=best, gain=gain, trials=tuple(trials), seconds=time.monotonic() - start
    )


def _list_candidates(setting: Setting) -> Iterator[tuple[str, Sequence[Any]]]:
    if setting.device == "gpu":
        yield "hw_decoder_load", LOADS
    counts = list_thread_counts(setting)
    yield "threads", [count for count in counts if count > setting.threads]
    yield "threads", [count for count in reversed(counts) if count < setting.threads]
    # Never fewer than the default: a trainer's steps vary, and this clock has no trainer.
    yield "prefetch", [depth for depth in (3, 4, 6) if depth > setting.prefetch]


def _measure_against(setting: Setting, best: dict[str, Any], change: dict[str, Any]) -> TuningTrial:
    """Measure two settings in turn; both streams are open, one at a time is read."""
    old, new = list[float](), list[float]()
    with (
        open_measured_stream(replace(setting, **best)) as first,
        open_measured_stream(replace(setting, **change)) as second,
    ):
        for turn in range(TURNS):
            pairs = [(first, old), (second, new)]
            for run, rates in pairs if turn % 2 else reversed(pairs):
                run.measure_window(0, 2 * setting.prefetch + 2)  # queued batches cost nothing
                rates.append(run.measure_window(SECONDS))
    return TuningTrial(change=change, img_s=Rate(tuple(new), 0, 0), best=Rate(tuple(old), 0, 0))


def write_tuning(path: Path, setting: Setting, tuned: TuningResult) -> None:
    """Write the file for `cluster.train --tuning`: settings, and where they come from."""
    best = replace(setting, **tuned.change)
    gpu_only = ["hw_decoder_load"] if setting.device == "gpu" else []
    lines = [
        f"# duet throughput {setting.data} --tune",
        f"# {setting.device}, batch {setting.batch_size}: {tuned.gain:.2f} times the default "
        f"({len(tuned.trials)} trials, {tuned.seconds:.0f} s)",
        *(f"{name} = {getattr(best, name)}" for name in ("threads", "prefetch", *gpu_only)),
    ]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
