"""Results of a study: the number of each run, averages of networks, study.json and study.md."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cli.options import EvaluateOptions
from cluster.evaluate import evaluate
from cluster.experiments.ensemble import ERRORS, KINDS, Ensemble, make_table
from cluster.experiments.study.config import Study, Variant
from cluster.experiments.study.goals import count_images_to, read_curves
from cluster.experiments.study.runner import StudyRun, load_manifest
from cluster.report.records import read_series
from cluster.run.folder import METRICS
from cluster.run.probabilities import SavedProbabilities, probability_path
from pipeline.tools.files import atomic_write
from pipeline.tools.jsonl import parse_json

RESULT, TABLE, PLOT = "study.json", "study.md", "study.png"
VIEWS = 10
"""Views of an ensemble's answers, as in table 2 of the paper."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The number that a study measures of a run."""

    variant: str
    run: StudyRun
    value: float
    """The number measured, at the last goal; NaN if the run did not reach it, or diverged."""
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
    reached: tuple[float, ...] = ()
    """Number of images until each goal of the study; NaN for one that was not reached."""
    at: Any = None
    """Value of the grid's setting; None without a grid."""
    note: str = ""

    def value_at(self, goal: int) -> float:
        """Return the images until a goal, by its place in the study; else the number measured."""
        return self.reached[goal] if self.reached else self.value

    def rank_at(self, goal: int) -> tuple[int, float]:
        """Return a sort key: the best run has the lowest."""
        if math.isfinite(value := self.value_at(goal)):
            return 0, value
        return (1, self.last_error) if math.isfinite(self.last_error) else (2, 0.0)

    def to_row(self, study: Study) -> dict[str, Any]:
        """Return a row of study.json; null for what is not known."""
        row: dict[str, Any] = {
            "variant": self.variant, "seed": self.run.config.seed, "lr": self.run.config.lr,
            "measure": study.measure, "value": self.value, "pictures": self.images,
            "img_s": self.img_s, "val_error": self.val_error, "train_error": self.train_error,
            "run": self.run.name, "at": self.at, "note": self.note,
        }  # fmt: skip
        if self.reached:
            counts = [one if math.isfinite(one) else None for one in self.reached]
            row["reached"] = dict(zip(map(str, study.goals), counts, strict=True))
        numbers = ("value", "img_s", "val_error", "train_error")
        return row | {name: None for name in numbers if not math.isfinite(row[name])}


def pick_best(study: Study, variant: Variant, results: Iterable[Result], goal: int) -> Result:
    """Return the result of a variant's best value of the grid, which its first seed decides.

    Args:
        study: the study.
        variant: the variant.
        results: results, among them those of the first seed with all values.
        goal: place of the goal in the study; there is one for measures without goals.
    """
    first = [one for one in results
             if one.variant == variant.name and one.run.config.seed == study.seeds[0]]  # fmt: skip
    return min(first, key=lambda one: one.rank_at(goal))


def read_result(study: Study, variant: str, run: StudyRun) -> Result:
    """Return the number of a run that is complete, has shown enough, or diverged."""
    speeds = read_series(run.folder / METRICS, ("img_s",))["img_s"]
    curves = read_curves(study, run)
    value = train = val = train_error = math.nan
    reached: tuple[float, ...] = ()
    if study.measure == "pictures":
        reached = tuple(count_images_to(goal, curves) for goal in study.goals)
        value = reached[-1]
    if not run.has_diverged:
        train = float(curves.train[-1]) if len(curves.train) else math.nan
        val = float(curves.val[-1]) if len(curves.val) else math.nan
        train_error = _measure_train_error(run) if study.measure == "gap" else train
        value = {
            "pictures": value, "error": val, "gap": val - train_error, "nets": val
        }[study.measure]  # fmt: skip
    note = "" if math.isfinite(value) else "not reached"
    if note and run.has_diverged:
        note = "diverged"
    elif note and run.images_left:
        note = "ended early"  # it had no goal left that it could be the best at: see `StopRule`
    return Result(
        variant=variant,
        run=run,
        value=value,
        last_error=train,
        images=run.position,
        img_s=float(np.median(speeds)) if len(speeds) else math.nan,
        val_error=val,
        train_error=train_error,
        reached=reached,
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
    numbers = range(len(study.goals) if study.measure == "pictures" else 1)
    tables = [compare_variants(study, results, others, goal) for goal in numbers]
    groups = [[one.value for one in results if one.variant == own["variant"]
               and one.at == own["at"]] for own in tables[-1]]  # fmt: skip
    return {
        "study": study.name,
        **{name: getattr(study, name) for name in texts},
        "goal": study.goals[-1] if study.measure == "pictures" else None,
        "scale": "; ".join(dict.fromkeys(_describe_scale(one.run) for one in results)),
        "rows": [one.to_row(study) for one in results],
        "grid": [one.to_row(study) for one in others],
        "goals": [
            {"goal": goal, "variants": table}
            for goal, table in zip(study.goals, tables, strict=False)
            if study.measure == "pictures"
        ],
        "variants": tables[-1],
        "spread": pool_deviations(groups),
        "plot": PLOT,
    }


def _describe_scale(run: StudyRun) -> str:
    classes = len(load_manifest(run.data).classes)
    return (
        f"{run.images:,} training images of {classes} classes, width {run.config.design.width:g}, "
        f"at most {run.steps:,} steps of {run.config.batch_size}"
    )


def compare_variants(
    study: Study, results: Sequence[Result], others: Sequence[Result], goal: int = -1
) -> list[dict[str, Any]]:
    """Return each variant's mean, spread over seeds, and comparison with the first variant.

    Args:
        study: the study.
        results: results of the runs that count.
        others: results of the grid's other runs.
        goal: place of the goal in the study; each variant has its best value of the grid there.
    """
    found: list[dict[str, Any]] = []
    first: list[Result] = []
    for variant in study.shown:
        at = pick_best(study, variant, [*results, *others], goal).at
        mine = [one for one in results if one.variant == variant.name and one.at == at]
        values = _keep_finite([one.value_at(goal) for one in mine])
        is_whole = len(values) == len(mine)
        found.append(
            {
                "variant": variant.name,
                "lr": mine[0].run.config.lr,
                "at": at,
                "n": len(mine),
                "came_to_it": len(values),
                "each": [one if math.isfinite(one) else None
                         for one in (result.value_at(goal) for result in mine)],
                "mean": _average_finite(values) if is_whole else None,
                "sd": statistics.stdev(values) if is_whole and len(values) > 1 else None,
                **_compare_with_first(study.measure, mine, first, goal),
                "img_s": statistics.fmean(one.img_s for one in mine),
                "val_error": _average_finite([one.val_error for one in mine]),
                "train_error": _average_finite([one.train_error for one in mine]),
                # The best value was the first or last tried: a better one may lie beyond it.
                "edge": len(variant.values) > 1 and at in (variant.values[0], variant.values[-1]),
            }
        )  # fmt: skip
        first = first or mine
    return found


def _compare_with_first(
    measure: str, mine: Sequence[Result], first: Sequence[Result], goal: int
) -> dict[str, Any]:
    """Compare a variant with the first one.

    Returns:
        "against_first": the factor for images, the difference for errors, of both means;
        "factors": the factor of each seed; "above": where runs missed the goal, what the factor
        would be had they reached it with their last image. Each is None where it is not known.
    """
    found: dict[str, Any] = {"against_first": None, "factors": None, "above": None}
    theirs = [one.value_at(goal) for one in first]
    if not theirs or len(_keep_finite(theirs)) < len(theirs):
        return found
    ours = [one.value_at(goal) for one in mine]
    mean, other = _average_finite(ours), statistics.fmean(theirs)
    if len(_keep_finite(ours)) == len(ours) and mean is not None:
        if measure != "pictures":
            return found | {"against_first": mean - other}
        each = [one / by for one, by in zip(ours, theirs, strict=True)]
        return found | {"against_first": mean / other, "factors": each}
    if measure == "pictures" and not any(one.note == "diverged" for one in mine):
        least = [value if math.isfinite(value) else one.images
                 for value, one in zip(ours, mine, strict=True)]  # fmt: skip
        found["above"] = statistics.fmean(least) / other
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
    if study.measure == "nets":
        body = _format_averages(found)
    else:
        body = (_format_goals if found["goals"] else _format_variants)(study, found)
    noise = _describe_noise(study, found["spread"])
    text = "\n".join([*head, *body, "", f"Here: {found['scale']}. {noise}"]) + "\n"
    for name, content in ((TABLE, text), (RESULT, json.dumps(found) + "\n")):
        with atomic_write(out / name) as file:
            file.write(content.encode(errors="replace"))
    return text


def _format_variants(study: Study, found: dict[str, Any]) -> list[str]:
    first = found["variants"][0]["variant"]
    what = {
        "error": "top-1 error, validation",
        "gap": "validation less training error, points",
    }[study.measure]
    extra = " top-1 error, validation / training |" if study.measure == "gap" else ""
    grid = f" best {study.grid[0]} |" if study.grid[1] else ""
    lines = [
        f"| variant |{grid} {what} (each seed) | against {first} |{extra} img/s a run |",
        "|---" * (4 + bool(grid) + bool(extra)) + "|",
    ]
    for one in found["variants"]:
        rows = [row for row in found["rows"] if row["variant"] == one["variant"]]
        each = [
            _describe_miss(row) if row["value"] is None else f"{100 * row['value']:.1f}"
            for row in rows
        ]
        mean = "not by all" if one["mean"] is None else f"{100 * one['mean']:.1f}"
        if (against := one["against_first"]) is not None:
            against = f"{100 * against:+.1f}"
        errors = [
            "" if error is None else f"{100 * error:.1f} %"
            for error in (one["val_error"], one["train_error"])
        ]
        lines.append(
            f"| `{one['variant']}` |{_format_best(study, one)} {mean} ({', '.join(each)}) "
            f"| {against or ''} |"
            + (f" {' / '.join(errors)} |" if extra else "")
            + f" {one['img_s']:,.0f} |"
        )
    return lines


def _format_best(study: Study, one: Mapping[str, Any]) -> str:
    """Return the cell with a variant's best value of the grid; empty without a grid."""
    edge = " (edge of the grid)" if one["edge"] else ""
    return f" {one['at']}{edge} |" if study.grid[1] else ""


def _format_goals(study: Study, found: dict[str, Any]) -> list[str]:
    """Return the table of images to each goal, and with a grid that of all its values."""
    first, grid = found["variants"][0]["variant"], study.grid[0] if study.grid[1] else ""
    best = f" best {grid} |" if grid else ""
    lines = [
        f"| training error | variant |{best} images (each seed) | over {first} (each seed) "
        "| img/s a run |",
        "|---" * (5 + bool(grid)) + "|",
    ]
    for table in found["goals"]:
        for one in table["variants"]:
            rows = [row for row in found["rows"] if row["variant"] == one["variant"]
                    and (not grid or row["at"] == one["at"])]  # fmt: skip
            each = [
                _describe_miss(row) if count is None else f"{count:,.0f}"
                for row, count in zip(rows, one["each"], strict=True)
            ]
            mean = "not by all" if one["mean"] is None else f"{one['mean']:,.0f}"
            lines.append(
                f"| {100 * table['goal']:g}% | `{one['variant']}` |{_format_best(study, one)} "
                f"{mean} ({', '.join(each)}) | {format_factor(one)} | {one['img_s']:,.0f} |"
            )
    if not grid:
        return lines
    goals = [table["goal"] for table in found["goals"]]
    lines += [
        "", f"Images to each goal with each {grid}, seed {study.seeds[0]}; a run ends when another "
        "value has been faster at every goal that it has left:", "",
        f"| variant | {grid} | {' | '.join(f'{100 * goal:g}%' for goal in goals)} | images seen |",
        "|---" * (3 + len(goals)) + "|",
    ]  # fmt: skip
    tried = [row for row in (*found["rows"], *found["grid"]) if row["seed"] == study.seeds[0]]
    for variant in study.shown:
        mine = {row["at"]: row for row in tried if row["variant"] == variant.name}
        for value in variant.values:
            counts = mine[value]["reached"].values()
            cells = ["–" if one is None else f"{one:,.0f}" for one in counts]
            seen = f"{mine[value]['pictures']:,}"
            lines.append(f"| `{variant.name}` | {value} | {' | '.join(cells)} | {seen} |")
    return lines


def format_factor(one: Mapping[str, Any]) -> str:
    """Format how many times the first variant's images another one needed, with each seed's."""
    if one["against_first"] is not None:
        each = ", ".join(f"{factor:.2f}" for factor in one["factors"])
        return f"{one['against_first']:.2f}× ({each})"
    return "" if one["above"] is None else f"above {one['above']:.1f}×"


def _describe_miss(row: dict[str, Any]) -> str:
    error, note = row["train_error"], row["note"]
    if row["measure"] == "pictures" and note != "diverged":
        note = f"not within {row['pictures']:,} images"
    return f"{note}{'' if error is None else f' ({error:.1%} at the end)'}"


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
        chosen = " The best value is the first seed's." if study.grid[1] else ""
        return f"Standard deviation over seeds {deviation:,.0f} images (pooled).{chosen}"
    gap = deviation * (2 / len(study.seeds)) ** 0.5
    return (
        f"Standard deviation over seeds {100 * deviation:.1f} points (pooled), of a difference "
        f"{100 * gap:.1f}: below {200 * gap:.1f} it may be chance."
    )
