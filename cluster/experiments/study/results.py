"""Results of a study: the number of each run, averages of networks, study.json and study.md."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cli.options import EvaluateOptions
from cluster.evaluate import evaluate
from cluster.experiments.ensemble import ERRORS, KINDS, Ensemble, make_table
from cluster.experiments.study.config import Study
from cluster.experiments.study.runner import StudyRun
from cluster.report.records import Floats, read_series
from cluster.run.folder import METRICS, VALIDATION
from cluster.run.jsonl import read_tail
from cluster.run.probabilities import SavedProbabilities, probability_path
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.files import atomic_write
from pipeline.tools.jsonl import parse_json

RESULT, TABLE, PLOT = "study.json", "study.md", "study.png"
VIEWS = 10
"""Views of an ensemble's answers, as in table 2 of the paper."""


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


@dataclass(frozen=True, kw_only=True)
class Result:
    """The number that a study measures of a run."""

    variant: str
    run: StudyRun
    value: float
    """The number measured; NaN if the run did not reach the goal, or diverged."""
    last_error: float
    """Tie-breaker for runs that missed the goal: final training error; NaN if diverged."""
    images: int
    """Number of images seen."""
    img_s: float
    """Images a second, median over the steps."""
    val_error: float
    """Final top-1 error on the validation images; NaN without."""
    train_error: float
    """Final top-1 error on the training images: for `gap` of the whole network in the center view,
    else as trained on, a mean over the last window."""
    at: Any = None
    """Value of the grid's setting; None without a grid."""
    note: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key: the best run has the lowest."""
        if math.isfinite(self.value):
            return 0, self.value
        return (1, self.last_error) if math.isfinite(self.last_error) else (2, 0.0)

    def to_row(self, measure: str) -> dict[str, Any]:
        """Return a row of study.json; null for what is not known."""
        row: dict[str, Any] = {
            "variant": self.variant, "seed": self.run.config.seed, "lr": self.run.config.lr,
            "measure": measure, "value": self.value, "pictures": self.images, "img_s": self.img_s,
            "val_error": self.val_error, "train_error": self.train_error, "run": self.run.name,
            "note": self.note,
        }  # fmt: skip
        numbers = ("value", "img_s", "val_error", "train_error")
        return row | {name: None for name in numbers if not math.isfinite(row[name])}


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
    below = np.flatnonzero(curves.train <= goal)
    return float(curves.train_at[below[0]]) if len(below) else math.nan


def has_reached_goal(study: Study, run: StudyRun) -> bool:
    """True if a run needs no more steps: its training error has reached the goal once."""
    is_counted = study.measure == "pictures"
    return is_counted and math.isfinite(count_images_to(study.goal, read_curves(study, run)))


def is_at_goal(study: Study, run: StudyRun) -> bool:
    """True if the training error is at the goal now; reads only the last rows, as it is polled."""
    if study.measure != "pictures":
        return False
    window = _count_window_steps(study, run)
    errors = [row.get("top1_error", 1.0) for row in read_tail(run.folder / METRICS, window)]
    return len(errors) == window and float(np.mean(errors)) <= study.goal


def read_result(study: Study, variant: str, run: StudyRun) -> Result:
    """Return the number of a run that is complete, at its goal, or diverged."""
    speeds = read_series(run.folder / METRICS, ("img_s",))["img_s"]
    curves = read_curves(study, run)
    value = train = val = train_error = math.nan
    if not run.has_diverged:
        train = float(curves.train[-1]) if len(curves.train) else math.nan
        val = float(curves.val[-1]) if len(curves.val) else math.nan
        train_error = _measure_train_error(run) if study.measure == "gap" else train
        value = {
            "pictures": count_images_to(study.goal, curves), "error": val,
            "gap": val - train_error, "nets": val,
        }[study.measure]  # fmt: skip
    note = "" if math.isfinite(value) else "diverged" if run.has_diverged else "not reached"
    return Result(
        variant=variant,
        run=run,
        value=value,
        last_error=train,
        images=run.position,
        img_s=float(np.median(speeds)) if len(speeds) else math.nan,
        val_error=val,
        train_error=train_error,
        at=run.config.to_settings()[study.grid[0]] if study.grid[1] else None,
        note=note,
    )


def _measure_train_error(run: StudyRun) -> float:
    """Return the top-1 error, 0 to 1, of the whole network on the training images, center view.

    The errors of metrics.jsonl are those of augmented images, and of a network with half of its
    units dropped. It is counted once, and kept in OUT/NAME.train.json.
    """
    path = run.out / f"{run.name}.train.json"
    found: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError, TypeError):
        found = dict(parse_json(path.read_bytes()))
    if found.get("step") != run.steps or "top1_error" not in found:
        found = _evaluate(run, split="train")
        with atomic_write(path) as file:
            file.write((json.dumps(found) + "\n").encode())
    return float(found["top1_error"])


def _evaluate(run: StudyRun, **options: Any) -> dict[str, Any]:
    return evaluate(
        EvaluateOptions(run=run.folder, data=run.data, device=run.config.device, **options)
    )


def measure_averages(study: Study, runs: Sequence[StudyRun]) -> dict[str, Any]:
    """Count the errors of averages of the runs of a study's only variant, in ten views.

    Returns:
        for study.json: "nets", the lines of `ensemble.make_table`, "samples", the number of images
        counted, and "rows" for the averages.

    Raises:
        DataError: as `cluster.evaluate` raises.
    """
    for run in runs:
        exists = probability_path(run.folder, VIEWS).is_file()
        if not exists or SavedProbabilities(run.folder, VIEWS).about.step != run.steps:
            _evaluate(run, views=VIEWS, save_probabilities=True)
    saved = Ensemble([SavedProbabilities(run.folder, VIEWS) for run in runs])
    lines = make_table(saved, study.sizes)["sizes"]
    rows = [
        {
            "variant": f"{line['nets']} networks, {kind.replace('_', ' ')} weights", "seed": None,
            "lr": runs[0].config.lr, "measure": study.measure, "value": line[kind]["top1_error"],
            "top5_error": line[kind]["top5_error"], "pictures": line["nets"] * runs[0].position,
            "img_s": None, "sd": line[kind]["top1_error_sd"],
        }
        for line in lines
        for kind in KINDS
    ]  # fmt: skip
    return {"nets": lines, "views": VIEWS, "samples": saved.about.samples, "rows": rows}


def summarize(study: Study, results: Sequence[Result], others: Sequence[Result]) -> dict[str, Any]:
    """Return the content of study.json without averages of networks; errors are fractions.

    Args:
        study: the study.
        results: results of the runs that count; they say at which scale the study was made.
        others: results of the grid's other runs.
    """
    texts = ("title", "claim", "paper", "source", "measure")
    groups = [[one.value for one in results if one.variant == own.name] for own in study.shown]
    return {
        "study": study.name,
        **{name: getattr(study, name) for name in texts},
        "goal": study.goal if study.measure == "pictures" else None,
        "scale": "; ".join(dict.fromkeys(_describe_scale(one.run) for one in results)),
        "rows": [one.to_row(study.measure) for one in results],
        "grid": [one.to_row(study.measure) for one in others],
        "variants": compare_variants(study, results, others),
        "spread": pool_deviations(groups),
        "plot": PLOT,
    }


def _describe_scale(run: StudyRun) -> str:
    classes = len(Manifest.load(fetch_metadata(run.data)).classes)
    return (
        f"{run.images:,} training images of {classes} classes, width {run.config.design.width:g}, "
        f"at most {run.steps:,} steps of {run.config.batch_size}"
    )


def compare_variants(
    study: Study, results: Sequence[Result], others: Sequence[Result]
) -> list[dict[str, Any]]:
    """Return each variant's mean, spread over seeds, and comparison with the first variant.

    The latter is a factor for images, a difference for errors, and None without both means.
    """
    found: list[dict[str, Any]] = []
    for variant in study.shown:
        mine = [one for one in results if one.variant == variant.name]
        values = _keep_finite([one.value for one in mine])
        mean = _average_finite(values) if len(values) == len(mine) else None
        against = None
        if mean is not None and found and (first := found[0]["mean"]) is not None:
            against = mean / first if study.measure == "pictures" else mean - first
        is_tried = any(one.variant == variant.name for one in others)
        found.append(
            {
                "variant": variant.name,
                "lr": mine[0].run.config.lr,
                "at": mine[0].at,
                "n": len(mine),
                "came_to_it": len(values),
                "mean": mean,
                "sd": statistics.stdev(values) if mean is not None and len(values) > 1 else None,
                "against_first": against,
                "img_s": statistics.fmean(one.img_s for one in mine),
                "val_error": _average_finite([one.val_error for one in mine]),
                "train_error": _average_finite([one.train_error for one in mine]),
                # The best value was the first or last tried: a better one may lie beyond it.
                "edge": is_tried and mine[0].at in (variant.values[0], variant.values[-1]),
            }
        )
    return found


def _keep_finite(values: Sequence[float]) -> list[float]:
    return [one for one in values if math.isfinite(one)]


def _average_finite(values: Sequence[float]) -> float | None:
    known = _keep_finite(values)
    return statistics.fmean(known) if known else None


def pool_deviations(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation over seeds, pooled over variants; None if there is none.

    Numbers that are not finite are left out.
    """
    known = [_keep_finite(one) for one in groups]
    variances = [statistics.variance(one) for one in known if len(one) > 1]
    return statistics.fmean(variances) ** 0.5 if variances else None


def write_results(study: Study, found: dict[str, Any], out: Path) -> str:
    """Write the content of study.json, and study.md with its text, which is returned."""
    head = [f"### {study.title}", "", f"{study.claim} ({study.source}). Paper: {study.paper}.", ""]
    body = _format_averages(found) if study.measure == "nets" else _format_variants(study, found)
    noise = _describe_noise(study, found["spread"])
    text = "\n".join([*head, *body, "", f"Here: {found['scale']}. {noise}"]) + "\n"
    for name, content in ((TABLE, text), (RESULT, json.dumps(found) + "\n")):
        with atomic_write(out / name) as file:
            file.write(content.encode(errors="replace"))
    return text


def _format_variants(study: Study, found: dict[str, Any]) -> list[str]:
    first = found["variants"][0]["variant"]
    what, rate = {
        "pictures": (f"images to {study.goal:.0%} training error", f"over {first}"),
        "error": ("top-1 error, validation", f"against {first}"),
        "gap": ("validation less training error, points", f"against {first}"),
    }[study.measure]
    factor, digits = (1, ",.0f") if study.measure == "pictures" else (100, ".1f")
    extra = " top-1 error, validation / training |" if study.measure == "gap" else ""
    grid = f" best {study.grid[0]} |" if study.grid[1] else ""
    lines = [
        f"| variant |{grid} {what} (each seed) | {rate} |{extra} img/s a run |",
        "|---" * (4 + bool(grid) + bool(extra)) + "|",
    ]
    for one in found["variants"]:
        rows = [row for row in found["rows"] if row["variant"] == one["variant"]]
        each = [
            _describe_miss(row) if row["value"] is None else f"{factor * row['value']:{digits}}"
            for row in rows
        ]
        mean = "not by all" if one["mean"] is None else f"{factor * one['mean']:{digits}}"
        middle = f" {one['at']}{' (edge of the grid)' if one['edge'] else ''} |" if grid else ""
        if (against := one["against_first"]) is not None:
            against = f"{against:.2f}×" if study.measure == "pictures" else f"{100 * against:+.1f}"
        errors = [
            "" if error is None else f"{100 * error:.1f} %"
            for error in (one["val_error"], one["train_error"])
        ]
        lines.append(
            f"| `{one['variant']}` |{middle} {mean} ({', '.join(each)}) | {against or ''} |"
            + (f" {' / '.join(errors)} |" if extra else "")
            + f" {one['img_s']:,.0f} |"
        )
    return lines


def _describe_miss(row: dict[str, Any]) -> str:
    error = row["train_error"]
    return f"{row['note']}{'' if error is None else f' ({error:.0%} at the end)'}"


def _format_averages(found: dict[str, Any]) -> list[str]:
    lines = [
        "| networks | top-1, equal weights | top-5 | searched on these images | top-5 "
        "| searched on the other half | top-5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["nets"]:
        cells = []
        for kind in KINDS:
            for name in ERRORS:
                deviation = one[kind][f"{name}_sd"]
                margin = f" ± {100 * deviation:.1f}" if deviation else ""
                cells.append(f"{100 * one[kind][name]:.1f}{margin} %")
        ways = f" ({one['combinations']} combinations)" if one["combinations"] > 1 else ""
        lines.append(f"| {one['nets']}{ways} | {' | '.join(cells)} |")
    return lines


def _describe_noise(study: Study, deviation: float | None) -> str:
    if study.measure == "nets":
        return "± is the standard deviation over the combinations."
    if deviation is None:
        return "One seed each: nothing is known of the noise."
    if study.measure == "pictures":
        return f"Standard deviation over seeds {deviation:,.0f} images (pooled)."
    gap = deviation * (2 / len(study.seeds)) ** 0.5
    return (
        f"Standard deviation over seeds {100 * deviation:.1f} points (pooled), of a difference "
        f"{100 * gap:.1f}: below {200 * gap:.1f} it may be chance."
    )
