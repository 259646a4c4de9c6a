"""The numbers of a report, in tiles, bars and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.report.records import Records
from cluster.run.jsonl import WAITS
from model.architecture import Design
from model.summary import ColumnRow, build_table, sum_rows
from pipeline.dataset.manifest import Manifest
from pipeline.tools.charts import Bar
from pipeline.tools.text import human_duration, percent, short_number

FEW_CLASSES = 30  # up to so many are all listed, of more the ends
ENDS = 15
NUMBERED = 15  # up to so many classes the confusion matrix shows its numbers


@dataclass(frozen=True)
class Tile:
    """A big number of the page."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """A layer, and the parameters of its columns over those of the largest layer, 0..1."""

    a: ColumnRow
    b: ColumnRow | None
    """None in a network of one column."""
    shares: tuple[float, float]


def write_lead(records: Records, manifest: Manifest | None) -> str:
    """Return the run in a sentence."""
    metrics = records.metrics
    width = records.config.get("width")
    size = "" if width is None else " at full width" if width == 1 else f" at width {width:g}"
    columns = "one column" if records.config.get("columns") == 1 else "both columns"
    words = f"AlexNet of 2012, {columns},{size}".rstrip(",")
    if len(metrics):
        words += f", after {metrics.last('step'):,.0f} steps"
    if math.isfinite(metrics.last("epoch")):
        words += f" or {short_number(metrics.last('epoch'))} epochs"
    if manifest is not None and "train" in manifest.splits:
        words += (
            f" over {manifest.splits['train'].samples:,} training images "
            f"of {len(manifest.classes):,} classes"
        )
    return words + "."


def make_error_tiles(records: Records) -> list[Tile]:
    """Return top-1 and top-5 error with one and ten views; one view falls back to validation."""
    tiles = []
    for rank in ("1", "5"):
        for views in (1, 10):
            label = f"top-{rank} error, {'one view' if views == 1 else 'ten views'}"
            value = records.evaluations.get(views, {}).get(f"top{rank}_error")
            note = _describe_evaluation(records.evaluations.get(views, {}))
            if value is None and views == 1 and len(records.validation):
                value = records.validation.last(f"top{rank}_error")
                note = f"validation at step {records.validation.last('step'):,.0f}"
            if value is None:
                note = f"not evaluated (cluster.evaluate --views {views})"
            tiles.append(Tile(label, percent(value), "%" if value is not None else "", note))
    return tiles


def _describe_evaluation(evaluation: dict[str, Any]) -> str:
    samples, step = evaluation.get("samples"), evaluation.get("step")
    over = f"{samples:,} images" if isinstance(samples, int) else ""
    at = f"step {step:,}" if isinstance(step, int) else ""
    return ", ".join(part for part in (over, at) if part)


def make_run_tiles(records: Records) -> list[Tile]:
    """Return images, damage, speed, waiting and time of a run; empty without steps."""
    metrics = records.metrics
    if not len(metrics):
        return []
    lasted, waited, speeds = metrics["seconds"], metrics["data_wait"], metrics["img_s"]
    timed = np.isfinite(lasted) & np.isfinite(waited) & np.isfinite(speeds)
    seconds = float(lasted[timed].sum())
    epochs = metrics.last("epoch")
    note = f"{short_number(epochs)} epochs" if math.isfinite(epochs) else ""
    tiles = [Tile("images seen", f"{metrics.last('position'):,.0f}", note=note)]
    if replaced := int(np.nansum(metrics["replaced"])):
        note = "others stood in; quarantine.jsonl lists them"
        tiles.append(Tile("damaged images left out", f"{replaced:,}", note=note))
    if seconds > 0:
        wait = float((waited[timed] * lasted[timed]).sum()) / seconds
        speed = float(np.median(speeds[timed]))
        tiles += [
            Tile("images per second", f"{speed:,.0f}", note="median step, whole job"),
            Tile("waiting for data", percent(wait), "%",
                 f"of the time in steps{_describe_waits(records)}"),
            Tile("time in steps", *human_duration(seconds), "without validation and checkpoints"),
        ]  # fmt: skip
    return tiles


def _describe_waits(records: Records) -> str:
    """Describe the two stages that were waited for most, if the rows have them."""
    sums = {name: float(np.nansum(records.metrics[name])) for name in WAITS}
    total = sum(sums.values())
    if not total:
        return ""
    parts = sorted(sums.items(), key=lambda part: -part[1])[:2]
    return "; for " + ", ".join(
        f"{name.removeprefix('wait_')} {value / total:.0%}" for name, value in parts if value
    )


def make_layer_table(records: Records, classes: int) -> dict[str, Any] | None:
    """Return rows and totals of the network; None if its classes or width are unknown."""
    if not classes or "width" not in records.config:
        return None
    try:
        design = Design.from_settings(records.config)
        rows = build_table(classes, design)
    except (ValueError, TypeError):
        return None
    most = max(row.parameters for row in rows)
    a, b = rows[:: design.columns], rows[1::2] if design.columns == 2 else [None] * len(rows)
    return {
        "rows": [
            LayerRow(x, y, (x.parameters / most, y.parameters / most if y else 0.0))
            for x, y in zip(a, b, strict=True)
        ],
        "a": sum_rows(a),
        "b": sum_rows(y for y in b if y) if design.columns == 2 else None,
        "both": sum_rows(rows),
    }


def rank_class_errors(records: Records) -> dict[str, Any] | None:
    """Return errors by class, worst first, from the evaluation with the most views."""
    for views in (10, 1):
        errors = records.evaluations.get(views, {}).get("classes")
        if errors:
            ranked = sorted(errors.items(), key=lambda item: (-item[1], item[0]))
            few = len(ranked) <= FEW_CLASSES
            parts = [("", ranked)] if few else [("worst", ranked[:ENDS]), ("best", ranked[-ENDS:])]
            groups = [
                (title, [Bar(name, f"{percent(error)} %", error) for name, error in part])
                for title, part in parts
            ]
            return {"views": views, "groups": groups, "count": len(ranked)}
    return None


def make_confusion_table(records: Records, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the confusion matrix as counts and their shares of the row (a true class)."""
    for views in (10, 1):
        counts = records.evaluations.get(views, {}).get("confusion")
        if not counts or len(counts) != len(names):
            continue
        rows = [
            (name, [(count, count / max(1, sum(row))) for count in row])
            for name, row in zip(names, counts, strict=True)
        ]
        return {"views": views, "rows": rows, "names": names, "numbered": len(rows) <= NUMBERED}
    return None


def format_probability(p: float) -> str:
    """Return a p value as text."""
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"


def format_setting(value: object) -> str:
    """Return a setting as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else f"{value}"
