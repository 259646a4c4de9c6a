"""Goals: training errors that runs come to, the images until then, and when a run may end.

A goal is reached when the mean training error over the study's window is first at or below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.experiments.study.config import Study
from cluster.experiments.study.runner import StudyRun
from cluster.report.records import Floats, read_series
from cluster.run.folder import METRICS, VALIDATION
from cluster.run.jsonl import read_tail

ROUNDING = 1e-6
"""Tolerance of the comparison with a goal: rows have errors to six decimals."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Top-1 error rates of a run, 0 to 1, by the number of images seen."""

    train_at: Floats
    """Number of images seen at each of `train`."""
    train: Floats
    """Errors on the training images, augmented as in training: means over the window before."""
    val_at: Floats
    """Number of images seen at each of `val`."""
    val: Floats
    """Errors on the validation images, center view."""


def read_curves(study: Study, run: StudyRun) -> Curves:
    """Read the curves of a run; empty where there are no rows yet."""
    train = read_series(run.folder / METRICS, ("top1_error",))
    val = read_series(run.folder / VALIDATION, ("top1_error",))
    window = _count_window_steps(study, run)
    sums = np.cumsum([0.0, *train["top1_error"]])
    return Curves(
        train_at=train["position"][window - 1 :],
        train=(sums[window:] - sums[:-window]) / window,
        val_at=val["position"],
        val=val["top1_error"],
    )


def _count_window_steps(study: Study, run: StudyRun) -> int:
    """Number of steps that the training error is a mean over."""
    return max(1, math.ceil((study.window or run.images) / run.config.batch_size))


def count_images_to(goal: float, curves: Curves) -> float:
    """Count the images seen until the training error first reaches `goal`; NaN if it does not."""
    below = np.flatnonzero(curves.train <= goal + ROUNDING)
    return float(curves.train_at[below[0]]) if len(below) else math.nan


class StopRule:
    """Says when a run of a study with goals has shown enough.

    A run may end when each of its goals is decided: the run has reached it, or a rival (the same
    variant and seed with another value of the grid) has reached it within the images that this run
    has seen without. Then the run cannot be the best at it any more. So the best value of each
    goal, and its number of images, are those of runs that are all trained to their last step.
    """

    def __init__(
        self, study: Study, groups: Iterable[tuple[Sequence[StudyRun], Sequence[float]]]
    ) -> None:
        """Read what the runs have reached so far.

        Args:
            study: the study; without goals no run ends early.
            groups: rivals, and the goals that they are compared at.
        """
        self._study = study
        self._rivals: dict[str, Sequence[StudyRun]] = {}
        self._goals: dict[str, Sequence[float]] = {}
        self._reached: dict[str, dict[float, float]] = {}
        """Images at which a run was seen to be at a goal: never fewer than it needed."""
        for runs, goals in groups if study.measure == "pictures" else ():
            for run in runs:
                curves = read_curves(study, run)
                counts = {goal: count_images_to(goal, curves) for goal in goals}
                self._rivals[run.name], self._goals[run.name] = runs, goals
                self._reached[run.name] = {
                    goal: count for goal, count in counts.items() if math.isfinite(count)
                }

    def is_enough(self, run: StudyRun) -> bool:
        """True if the run may end; reads only the last rows, as it is asked every second."""
        if run.name not in self._goals:
            return False
        window = _count_window_steps(self._study, run)
        rows = list(read_tail(run.folder / METRICS, window))
        position = int(rows[-1].get("position", 0)) if rows else 0
        if len(rows) == window:
            error = float(np.mean([row.get("top1_error", 1.0) for row in rows]))
            for goal in self._goals[run.name]:
                if error <= goal + ROUNDING:
                    self._reached[run.name].setdefault(goal, position)
        return all(self._is_decided(run, goal, position) for goal in self._goals[run.name])

    def _is_decided(self, run: StudyRun, goal: float, position: int) -> bool:
        if goal in self._reached[run.name]:
            return True
        best = min(self._reached[one.name].get(goal, math.inf) for one in self._rivals[run.name])
        return best <= position
