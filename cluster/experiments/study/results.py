"""What a run came to, from the rows it left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.experiments.study.config import Measure, Study
from cluster.experiments.study.runner import Run
from cluster.report.records import Floats, Series, read_series
from cluster.run.folder import METRICS, VALIDATION
from cluster.run.jsonl import tail


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Of a run: pictures seen and errors, 0 to 1."""

    train_at: Floats
    train: Floats
    """Of the training pictures as they were trained on, a mean over the window before."""
    val_at: Floats
    val: Floats
    """Of the validation pictures, centre view."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run and its number."""

    variant: str
    seed: int
    lr: float
    value: float
    """What is measured; NaN if the run did not come to it."""
    instead: float
    """Decides between runs that did not come to it: their training error at the end."""
    pictures: int
    """Seen in all."""
    img_s: float
    """Median over the steps."""
    val_error: float
    """Top-1 error of the validation pictures at the end; NaN without."""
    train_error: float
    """Top-1 error of the training pictures, as trained on, a mean over the last window."""
    run: str
    at: Any = None
    """Value of the grid's setting; None without a grid."""
    note: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        """The lower the better."""
        if math.isfinite(self.value):
            return 0, self.value
        return (1, self.instead) if math.isfinite(self.instead) else (2, 0.0)

    def row(self, measure: Measure) -> dict[str, Any]:
        """A row of study.json; null for what is not known."""
        numbers = {
            name: value if math.isfinite(value) else None
            for name, value in (
                ("value", self.value), ("img_s", self.img_s), ("val_error", self.val_error),
                ("train_error", self.train_error),
            )
        }  # fmt: skip
        return {
            "variant": self.variant, "seed": self.seed, "lr": self.lr, "measure": measure,
            "value": numbers["value"], "pictures": self.pictures, "img_s": numbers["img_s"],
            "val_error": numbers["val_error"], "train_error": numbers["train_error"],
            "run": self.run, "note": self.note,
        }  # fmt: skip


def window_of(study: Study, run: Run) -> int:
    """Steps that the training error is a mean over."""
    pictures = study.window or run.pictures
    return max(1, math.ceil(pictures / run.config.batch_size))


def curves(study: Study, run: Run) -> Curves:
    """Read the curves of a run; empty where there is nothing yet."""
    train = read_series(run.folder / METRICS, ("top1_error",))
    val = read_series(run.folder / VALIDATION, ("top1_error",))
    window = window_of(study, run)
    return Curves(
        train_at=train["position"][window - 1 :],
        train=running_mean(train["top1_error"], window),
        val_at=val["position"],
        val=val["top1_error"],
    )


def running_mean(values: Floats, window: int) -> Floats:
    """Mean of each `window` values that follow each other; float64 [n - window + 1], or none."""
    if len(values) < window:
        return np.empty(0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[window:] - sums[:-window]) / window)


def pictures_to(goal: float, found: Curves) -> float:
    """Pictures seen when the training error has first come down to `goal`; NaN if it has not."""
    below = np.flatnonzero(found.train <= goal)
    return float(found.train_at[below[0]]) if len(below) else math.nan


def shown(study: Study, run: Run) -> bool:
    """Whether a run has shown what it should before its last step: the goal was reached."""
    return study.measure == "pictures" and math.isfinite(
        pictures_to(study.goal, curves(study, run))
    )


def showing(study: Study, run: Run) -> bool:
    """Whether it does so now; looks at the last rows only, as it is asked every second."""
    if study.measure != "pictures":
        return False
    window = window_of(study, run)
    errors = [row.get("top1_error", 1.0) for row in tail(run.folder / METRICS, window)]
    return len(errors) == window and float(np.mean(errors)) <= study.goal


def result(study: Study, variant: str, run: Run, train_error: float = math.nan) -> Result:
    """Return the number of a run.

    Args:
        study: says what is measured.
        variant: of the run.
        run: made, or diverged.
        train_error: of the whole network on the training pictures, for `gap`.
    """
    train: Series = read_series(run.folder / METRICS, ("top1_error", "img_s"))
    found = curves(study, run)
    val = float(found.val[-1]) if len(found.val) else math.nan
    last = float(found.train[-1]) if len(found.train) else math.nan
    value = {
        "pictures": pictures_to(study.goal, found), "error": val, "gap": val - train_error,
        "nets": val,
    }[study.measure]  # fmt: skip
    if run.diverged:
        value = val = last = math.nan
    note = "diverged" if run.diverged else "" if math.isfinite(value) else "not reached"
    return Result(
        variant=variant,
        seed=run.config.seed,
        lr=run.config.lr,
        value=value,
        instead=last,
        pictures=run.position,
        img_s=float(np.median(train["img_s"])) if len(train) else math.nan,
        val_error=val,
        train_error=train_error if study.measure == "gap" else last,
        run=run.name,
        at=getattr(run.config, study.grid[0]) if study.grid[1] else None,
        note=note,
    )
