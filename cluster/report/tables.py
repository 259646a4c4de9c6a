"""The numbers of a report, in tiles, bars and tables."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.report.images import MOST_PAIRS, Confusion
from cluster.report.records import Records
from cluster.report.settings import format_setting
from cluster.run.folder import METRICS, list_own_checkpoints, parse_step
from cluster.run.jsonl import WAITS
from model.architecture import Design
from model.summary import ColumnRow, build_table, sum_rows
from pipeline.dataset.manifest import Manifest
from pipeline.tools.charts import Bar
from pipeline.tools.text import human_bytes, human_duration, percent, short_number

FEW_CLASSES = 30  # up to so many are all listed, of more the ends
ENDS = 15
RECENT = 20  # batches whose mean stands in for a validation
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


def write_lead(records: Records, manifest: Manifest | None, data: str = "") -> str:
    """Return what was trained, and on what, in a sentence."""
    width = records.config.get("width")
    size = "" if width is None else " at full width" if width == 1 else f" at width {width:g}"
    columns = "one column" if records.config.get("columns") == 1 else "both columns"
    words = f"AlexNet of 2012, {columns}{',' if size else ''}{size}"
    if manifest is not None and "train" in manifest.splits:
        name = f"{data}: " if data else ""
        words += (
            f", trained on {name}{manifest.splits['train'].samples:,} images "
            f"of {len(manifest.classes):,} classes"
        )
    return words + "."


def write_progress(records: Records) -> str:
    """Return how far the run has come."""
    metrics, state = records.metrics, records.state
    if not len(metrics):
        return "no step is recorded yet"
    total = f" of {state.total:,}" if state and state.total else ""
    words = f"step {metrics.last('step'):,.0f}{total}"
    if math.isfinite(metrics.last("epoch")):
        words += f", {short_number(metrics.last('epoch'))} epochs"
    return words + f", {metrics.last('position'):,.0f} images seen"


@dataclass(frozen=True)
class RunErrors:
    """Errors of a run on images that it was not trained on, 0..1."""

    top1: float
    top5: float
    views: int
    samples: int | None
    step: int | None
    is_evaluation: bool
    """False: of the validation during the training."""

    @property
    def source(self) -> str:
        """Images, views and step that the errors are of, in words."""
        view = "ten views" if self.views == 10 else "one view"
        over = f"{self.samples:,} images, " if self.samples else ""
        at = f", step {self.step:,}" if self.step is not None else ""
        return f"{over}{view}{at}{'' if self.is_evaluation else ' (validation)'}"


def list_results(records: Records) -> list[RunErrors]:
    """Return the evaluations, that of ten views first; the last validation stands in for one view.

    An error that a file lacks is NaN.
    """
    found = []
    for views in (10, 1):
        if table := records.evaluations.get(views, {}):
            samples, step = table.get("samples"), table.get("step")
            found.append(
                RunErrors(
                    table.get("top1_error", math.nan), table.get("top5_error", math.nan), views,
                    samples if isinstance(samples, int) else None,
                    step if isinstance(step, int) else None, True,
                )
            )  # fmt: skip
        elif views == 1 and len(records.validation):
            last = records.validation.last
            samples, step = last("samples"), last("step")
            found.append(
                RunErrors(last("top1_error"), last("top5_error"), 1,
                       int(samples) if math.isfinite(samples) else None, int(step), False)
            )  # fmt: skip
    return [one for one in found if math.isfinite(one.top1)]


def write_verdict(records: Records, classes: int) -> str:
    """Return the result in a sentence, beside that of guessing.

    Args:
        records: content of RUN.
        classes: number of classes; 0 if it is not known.
    """
    results = list_results(records)
    if not results:
        if not len(records.metrics):
            return "There is no result yet."
        known = records.metrics["top1_error"]
        known = known[np.isfinite(known)][-RECENT:]
        if not len(known):
            return "Not validated yet."
        so_far = f"{percent(float(known.mean()))} % top-1 error"
        return f"Not validated yet. The last training batches: {so_far}."
    best = results[0]
    has_top5 = math.isfinite(best.top5) and not 0 < classes <= 5
    top5 = f" and {percent(best.top5)} % top-5" if has_top5 else ""
    text = f"{percent(best.top1)} % top-1{top5} error ({best.source})"
    if not classes:
        return f"{text}."
    chance = 1 - 1 / classes
    text += f"; guessing would have {100 * chance:.3g} %"
    text += f" and {100 - 500 / classes:.3g} %." if has_top5 else "."
    if best.samples and best.top1 > chance - 2 * math.sqrt(chance * (1 - chance) / best.samples):
        text += " This cannot be told from guessing."
    return text


def make_error_tiles(records: Records) -> list[Tile]:
    """Return top-1 and top-5 error of the most views, with those of the others below."""
    results = list_results(records)
    has = {one.views for one in results}
    missing = [f"--views {views}" for views in (10, 1) if views not in has]
    tiles = []
    for rank in ("1", "5"):
        errors = [getattr(one, f"top{rank}") for one in results]
        notes = [one.source for one in results[:1]]
        notes += [
            f"{'one view' if one.is_evaluation else 'validation'} {percent(error)} %"
            for one, error in zip(results[1:], errors[1:], strict=True)
        ]
        if missing:
            notes.append(f"not evaluated with {' and '.join(missing)}")
        value = percent(errors[0]) if results else "–"
        tiles.append(Tile(f"top-{rank} error", value, "%" if results else "", "; ".join(notes)))
    return tiles


def make_run_tiles(records: Records) -> list[Tile]:
    """Return speed, time, waiting, memory, dtype and damage of a run; empty without steps."""
    metrics = records.metrics
    if not len(metrics):
        return []
    lasted, waited, speeds = metrics["seconds"], metrics["data_wait"], metrics["img_s"]
    timed = np.isfinite(lasted) & np.isfinite(waited) & np.isfinite(speeds)
    seconds, tiles = float(lasted[timed].sum()), []
    if seconds > 0:
        wait = float((waited[timed] * lasted[timed]).sum()) / seconds
        note = "without validation and checkpoints"
        if records.state and records.state.elapsed_s is not None:
            is_over = records.state.state in ("finished", "stopped", "failed")
            end = "from the first start to the end" if is_over else "since the first start"
            note = f"{' '.join(human_duration(records.state.elapsed_s))} {end}"
        tiles += [
            Tile("images per second", f"{float(np.median(speeds[timed])):,.0f}",
                 note="median step, whole job"),
            Tile("time in steps", *human_duration(seconds), note),
            Tile("waiting for data", percent(wait), "%",
                 f"of the time in steps{_describe_waits(records)}"),
        ]  # fmt: skip
    tiles += [Tile("images seen", f"{metrics.last('position'):,.0f}",
                   note=f"{short_number(metrics.last('epoch'))} epochs"
                   if math.isfinite(metrics.last("epoch")) else "")]  # fmt: skip
    memory = metrics["memory"][np.isfinite(metrics["memory"])]
    if len(memory):
        value, unit = human_bytes(float(memory.max())).split()
        where = "on its GPU" if records.machine.get("gpus") else "of its process"
        tiles.append(Tile("memory, most", value, unit, f"of the first worker, {where}"))
    if dtype := records.machine.get("dtype"):
        wanted = format_setting(records.config.get("dtype", ""))
        note = f"layers compute in it; the setting was {wanted}"
        tiles.append(Tile("computed in", str(dtype), note=note))
    if replaced := int(np.nansum(metrics["replaced"])):
        note = "damaged or withdrawn; quarantine.jsonl lists them"
        tiles.append(Tile("images replaced", f"{replaced:,}", note=note))
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


def format_time(records: Records) -> str:
    """Return when the last step was written; "never" without steps."""
    try:
        written = (records.run / METRICS).stat().st_mtime
    except OSError:
        return "never"
    return f"{datetime.datetime.fromtimestamp(written, datetime.UTC):%Y-%m-%d %H:%M UTC}"


def list_attempts(records: Records) -> list[tuple[str, str, str, str]]:
    """Return (time, event, step, detail) of every start and end of the workers."""
    rows = []
    for row in records.attempts:
        workers, step = row.get("workers"), row.get("step")
        detail = row.get("why") or (f"{len(workers)} workers" if isinstance(workers, list) else "")
        rows.append((
            _format_moment(row.get("time")), str(row.get("event", "")),
            f"{step:,}" if isinstance(step, int) else "", str(detail),
        ))  # fmt: skip
    return rows


def _format_moment(seconds: Any) -> str:
    """Return seconds since 1970 as a date; a dash for anything else."""
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (TypeError, ValueError, OverflowError, OSError):
        return "–"


def list_saved_checkpoints(records: Records) -> list[tuple[str, str, str]]:
    """Return (step, size, validation error then) of the checkpoints of the run."""
    store = str(records.config.get("store") or "")
    validation, found = records.validation, []
    for path in list_own_checkpoints(records.run, store):
        step = parse_step(path)
        try:
            size = human_bytes(sum(file.stat().st_size for file in path.iterdir()))
        except OSError:  # deleted meanwhile
            continue
        known = validation["top1_error"][validation["step"] == step]
        found.append((f"{step:,}", size, f"{percent(float(known[0]))} %" if len(known) else "–"))
    return found


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


def list_confusions(records: Records, names: Sequence[str]) -> list[Confusion]:
    """Return the pairs of classes that the confusion matrix has most images of."""
    counts = _find_confusion(records, names)
    pairs = [
        Confusion(names[truth], names[answer], count, sum(row))
        for truth, row in enumerate(counts)
        for answer, count in enumerate(row)
        if truth != answer and count
    ]
    return sorted(pairs, key=lambda pair: -pair.count)[:MOST_PAIRS]


def make_confusion_bars(pairs: Sequence[Confusion]) -> list[Bar]:
    """Return a bar for each pair, as long as its share of the class."""
    return [
        Bar(f"{one.truth} → {one.answer}", f"{one.count:,} of {one.images:,}",
            one.count / max(1, one.images))
        for one in pairs
    ]  # fmt: skip


def _find_confusion(records: Records, names: Sequence[str]) -> list[list[int]]:
    """Return the confusion matrix of the most views, if it is of these classes; else no rows."""
    tables = (records.evaluations.get(views, {}).get("confusion") for views in (10, 1))
    return next((counts for counts in tables if counts and len(counts) == len(names)), [])


def make_confusion_table(records: Records, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the confusion matrix as counts and their shares of the row (a true class)."""
    counts = _find_confusion(records, names)
    rows = [
        (name, [(count, count / max(1, sum(row))) for count in row])
        for name, row in zip(names, counts, strict=False)
    ]
    return {"rows": rows, "names": names, "numbered": len(rows) <= NUMBERED} if rows else None


def format_probability(p: float) -> str:
    """Return a p value as text."""
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"
