"""What a run came to, from the rows it left behind.

Averages of the networks of a study: every run's probabilities, then the table of the paper.

The error of a run on the images that it was trained on, as a test would count it.

What a study has found, as study.json and as a Markdown table with mean and spread over seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.evaluate import Evaluate, evaluate
from cluster.experiments.ensemble import KINDS, table_of
from cluster.experiments.study.config import Measure, Study, Variant
from cluster.experiments.study.runner import Run
from cluster.report.records import Floats, Series, read_series
from cluster.run.folder import METRICS, VALIDATION
from cluster.run.jsonl import read_tail
from cluster.run.probabilities import SavedProbabilities, probability_path
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.files import atomic_write

VIEWS: Literal[10] = 10
"""As the paper's table counts."""


def measured(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Count averages of the runs of a study's variant, in ten views.

    Returns:
        for study.json: "nets", the lines of `ensemble_table.table_of`, "samples", the images they
        were counted on, and "rows" for the averages.

    Raises:
        DuetError: as `cluster.evaluate` raises.
    """
    for run in runs:
        _save(run)
    saved = [SavedProbabilities(run.folder, VIEWS) for run in runs]
    found = table_of(saved, study.sizes)
    rows = [
        {
            "variant": f"{line['nets']} networks, {kind.replace('_', ' ')} weights", "seed": None,
            "lr": runs[0].config.lr, "measure": study.measure, "value": line[kind]["top1_error"],
            "top5_error": line[kind]["top5_error"], "pictures": line["nets"] * runs[0].position,
            "img_s": None, "sd": line[kind]["top1_error_sd"],
        }
        for line in found["sizes"]
        for kind in KINDS
    ]  # fmt: skip
    samples = saved[0].about.samples
    return {"nets": found["sizes"], "views": VIEWS, "samples": samples, "rows": rows}


def _save(run: Run) -> None:
    """Have the probabilities of a run, of its last step."""
    if probability_path(run.folder, VIEWS).is_file():
        saved = SavedProbabilities(run.folder, VIEWS)
        if saved.about.step == run.config.total_steps(run.pictures):
            return
    evaluate(
        Evaluate(
            run=run.folder,
            data=run.data,
            views=VIEWS,
            device=run.config.device,
            save_probabilities=True,
        )
    )


def train_error(run: Run) -> float:
    """Return the top-1 error, 0 to 1, of the whole network in the centre view.

    The errors of metrics.jsonl are of images with crops and colours, and of a network with half
    of its units dropped. It is counted once, and kept in OUT/NAME.train.json.
    """
    path = run.out / f"{run.name}.train.json"
    step = run.config.total_steps(run.pictures)
    if path.is_file():
        found = json.loads(path.read_bytes())
        if found["step"] == step:
            return float(found["top1_error"])
    found = evaluate(
        Evaluate(run=run.folder, data=run.data, split="train", device=run.config.device)
    )
    with atomic_write(path) as file:
        file.write((json.dumps(found) + "\n").encode())
    return float(found["top1_error"])


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Of a run: images seen and errors, 0 to 1."""

    train_at: Floats
    train: Floats
    """Of the training images as they were trained on, a mean over the window before."""
    val_at: Floats
    val: Floats
    """Of the validation images, centre view."""


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
    """Top-1 error of the validation images at the end; NaN without."""
    train_error: float
    """Top-1 error of the training images, as trained on, a mean over the last window."""
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


def images_to(goal: float, found: Curves) -> float:
    """Images seen when the training error has first come down to `goal`; NaN if it has not."""
    below = np.flatnonzero(found.train <= goal)
    return float(found.train_at[below[0]]) if len(below) else math.nan


def shown(study: Study, run: Run) -> bool:
    """Whether a run has shown what it should before its last step: the goal was reached."""
    return study.measure == "pictures" and math.isfinite(images_to(study.goal, curves(study, run)))


def showing(study: Study, run: Run) -> bool:
    """Whether it does so now; looks at the last rows only, as it is asked every second."""
    if study.measure != "pictures":
        return False
    window = window_of(study, run)
    errors = [row.get("top1_error", 1.0) for row in read_tail(run.folder / METRICS, window)]
    return len(errors) == window and float(np.mean(errors)) <= study.goal


def result(study: Study, variant: str, run: Run, train_error: float = math.nan) -> Result:
    """Return the number of a run.

    Args:
        study: says what is measured.
        variant: of the run.
        run: made, or diverged.
        train_error: of the whole network on the training images, for `gap`.
    """
    train: Series = read_series(run.folder / METRICS, ("top1_error", "img_s"))
    found = curves(study, run)
    val = float(found.val[-1]) if len(found.val) else math.nan
    last = float(found.train[-1]) if len(found.train) else math.nan
    value = {
        "pictures": images_to(study.goal, found), "error": val, "gap": val - train_error,
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
        at=run.config.to_settings()[study.grid[0]] if study.grid[1] else None,
        note=note,
    )


RESULT, TABLE, PLOT = "study.json", "study.md", "study.png"


def summary(
    study: Study, results: Sequence[Result], others: Sequence[Result], runs: Sequence[Run]
) -> dict[str, Any]:
    """Return what study.json holds but for ensembles; errors are fractions.

    Args:
        study: the study.
        results: of the runs that count.
        others: of those of the grid that were not best.
        runs: that count; they say at which scale.
    """
    return {
        "study": study.name,
        "title": study.title,
        "claim": study.claim,
        "paper": study.paper,
        "source": study.source,
        "measure": study.measure,
        "goal": study.goal if study.measure == "pictures" else None,
        "scale": scale(runs),
        "rows": [one.row(study.measure) for one in results],
        "grid": [one.row(study.measure) for one in others],
        "variants": variants(study, results, others),
        "spread": pooled([_values(results, one.name) for one in study.shown]),
        "plot": PLOT,
    }


def scale(runs: Sequence[Run]) -> str:
    """At which scale this was run, in words: what the paper had otherwise."""
    found = []
    for run in runs:
        manifest = Manifest.load(fetch_metadata(run.data))
        config = run.config
        text = (
            f"{run.pictures:,} training images of {len(manifest.classes)} classes, width "
            f"{config.design.width:g}, at most {run.total // config.batch_size:,} steps of "
            f"{config.batch_size}"
        )
        if text not in found:
            found.append(text)
    return "; ".join(found)


def variants(
    study: Study, results: Sequence[Result], others: Sequence[Result]
) -> list[dict[str, Any]]:
    """Return mean, spread over seeds, and the comparison with the first variant, of each."""
    found: list[dict[str, Any]] = []
    for variant in study.shown:
        mine = [one for one in results if one.variant == variant.name]
        values = _values(results, variant.name)
        whole = len(values) == len(mine) and bool(values)
        mean = statistics.fmean(values) if whole else None
        found.append(
            {
                "variant": variant.name,
                "lr": mine[0].lr,
                "at": mine[0].at,
                "n": len(mine),
                "came_to_it": len(values),
                "mean": mean,
                "sd": statistics.stdev(values) if whole and len(values) > 1 else None,
                "against_first": _against(study, mean, found),
                "img_s": statistics.fmean(one.img_s for one in mine),
                "val_error": _mean([one.val_error for one in mine]),
                "train_error": _mean([one.train_error for one in mine]),
                "edge": _at_edge(variant, mine[0], others),
            }
        )
    return found


def pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation over seeds, pooled over variants; None if there is none."""
    spreads = [statistics.variance(one) for one in groups if len(one) > 1]
    return statistics.fmean(spreads) ** 0.5 if spreads else None


def _against(study: Study, mean: float | None, before: Sequence[dict[str, Any]]) -> float | None:
    """A factor for images, a difference for errors; None for the first and what has no mean."""
    if mean is None or not before or before[0]["mean"] is None:
        return None
    first = float(before[0]["mean"])
    return mean / first if study.measure == "pictures" else mean - first


def _at_edge(variant: Variant, chosen: Result, others: Sequence[Result]) -> bool:
    """Whether the best value was the first or last tried: a better one may lie beyond it."""
    values = variant.values
    tried = any(one.variant == chosen.variant for one in others)
    return tried and chosen.at in (values[0], values[-1])


def _values(results: Sequence[Result], variant: str) -> list[float]:
    return [one.value for one in results if one.variant == variant and math.isfinite(one.value)]


def _mean(values: Sequence[float]) -> float | None:
    known = [one for one in values if math.isfinite(one)]
    return statistics.fmean(known) if known else None


def as_text(study: Study, found: dict[str, Any]) -> str:
    """Return the findings as Markdown."""
    head = [f"### {study.title}", "", f"{study.claim} ({study.source}). Paper: {study.paper}.", ""]
    body = _of_nets(found) if study.measure == "nets" else _of_variants(study, found)
    return "\n".join([*head, *body, "", f"Here: {found['scale']}. {_noise(study, found)}"]) + "\n"


def _of_variants(study: Study, found: dict[str, Any]) -> list[str]:
    first = found["variants"][0]["variant"]
    what, rate = {
        "pictures": (f"images to {study.goal:.0%} training error", f"over {first}"),
        "error": ("top-1 error, validation", f"against {first}"),
        "gap": ("validation less training error, points", f"against {first}"),
    }[study.measure]
    extra = " top-1 error, validation / training |" if study.measure == "gap" else ""
    grid = f" best {study.grid[0]} |" if study.grid[1] else ""
    lines = [
        f"| variant |{grid} {what} (each seed) | {rate} |{extra} img/s a run |",
        "|---" * (4 + bool(grid) + bool(extra)) + "|",
    ]
    for one in found["variants"]:
        rows = [row for row in found["rows"] if row["variant"] == one["variant"]]
        each = ", ".join(_cell(study, row["value"], row) for row in rows)
        mean = _cell(study, one["mean"]) if one["mean"] is not None else "not by all"
        middle = f" {one['at']}{' (edge of the grid)' if one['edge'] else ''} |" if grid else ""
        errors = (
            f" {_percent(one['val_error'])} / {_percent(one['train_error'])} |" if extra else ""
        )
        lines.append(
            f"| `{one['variant']}` |{middle} {mean} ({each}) | {_rate(study, one)} |{errors} "
            f"{one['img_s']:,.0f} |"
        )
    return lines


def _of_nets(found: dict[str, Any]) -> list[str]:
    lines = [
        "| networks | top-1, equal weights | top-5 | searched on these images | top-5 "
        "| searched on the other half | top-5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["nets"]:
        cells = []
        for kind in ("equal", "searched", "held_out"):
            errors = one[kind]
            for name in ("top1_error", "top5_error"):
                sd = f" ± {100 * errors[f'{name}_sd']:.1f}" if errors[f"{name}_sd"] else ""
                cells.append(f"{100 * errors[name]:.1f}{sd} %")
        ways = f" ({one['combinations']} combinations)" if one["combinations"] > 1 else ""
        lines.append(f"| {one['nets']}{ways} | {' | '.join(cells)} |")
    return lines


def _noise(study: Study, found: dict[str, Any]) -> str:
    if study.measure == "nets":
        return "± is the standard deviation over the combinations."
    if found["spread"] is None:
        return "One seed each: nothing is known of the noise."
    one = found["spread"]
    gap = one * (2 / len(study.seeds)) ** 0.5
    if study.measure == "pictures":
        return f"Standard deviation over seeds {one:,.0f} images (pooled)."
    return (
        f"Standard deviation over seeds {100 * one:.1f} points (pooled), of a difference "
        f"{100 * gap:.1f}: below {200 * gap:.1f} it may be chance."
    )


def _cell(study: Study, value: float | None, row: dict[str, Any] | None = None) -> str:
    if value is None:
        note = row["note"] if row else "not reached"
        error = row["train_error"] if row else None
        return f"{note}{f' ({error:.0%} at the end)' if error is not None else ''}"
    return f"{value:,.0f}" if study.measure == "pictures" else f"{100 * value:.1f}"


def _rate(study: Study, one: dict[str, Any]) -> str:
    if one["against_first"] is None:
        return ""
    if study.measure == "pictures":
        return f"{one['against_first']:.2f}×"
    return f"{100 * one['against_first']:+.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def as_json(found: dict[str, Any]) -> str:
    """Return it as one line of JSON."""
    return json.dumps(found) + "\n"


def write(study: Study, found: dict[str, Any], out: Path) -> str:
    """Write study.json and study.md, and return the text of the latter."""
    text = as_text(study, found)
    for name, content in ((TABLE, text), (RESULT, as_json(found))):
        with atomic_write(out / name) as file:
            file.write(content.encode())
    return text
