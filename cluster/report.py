"""One page that says how a run went: RUN/report.html, made from files only.

    python -m cluster.report RUN [--data DATA]

The page needs no network, no script and no other file; it can be sent by mail or printed. A
piece that cannot be made (no evaluation yet, no checkpoint, no data set here) is named in its
place, so a report can be made at any time, of a running or a broken run too.
"""

from __future__ import annotations

import datetime
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro

from cluster.log import METRICS
from cluster.report_curves import curves
from cluster.report_pictures import Unavailable, first_kernels, mosaic
from cluster.run_records import Records, read_records
from model.summary import Row, table, totals
from pipeline.errors import DuetError, UsageError, run
from pipeline.files import sealed
from pipeline.manifest import Manifest, identity

NAME = "report.html"
FEW_CLASSES = 30  # up to so many are all listed, of more the ends
ENDS = 15
NUMBERED = 15  # up to so many classes the confusion matrix shows its numbers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write RUN/report.html: how a run went, on one page."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    data: Path | None = None
    """Its data set, for the pictures and the class names."""


@dataclass(frozen=True)
class Tile:
    """A big number."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """A layer with the shares of its columns in the largest layer's parameters, 0..1."""

    a: Row
    b: Row
    shares: tuple[float, float]


def report(run: Path, data: Path | None) -> Path:
    """Write RUN/report.html and return its path.

    Raises:
        UsageError: RUN is not the folder of a run, or cannot be written.
    """
    records = read_records(run)
    page = render(records, data)
    try:
        with sealed(run / NAME) as file:
            file.write(page.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{run / NAME} cannot be written ({reason}); mend the folder") from error
    return run / NAME


def render(records: Records, data: Path | None) -> str:
    """The page as HTML text."""
    manifest, data_note = _manifest(data, records)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "bytes": human_bytes, "plain": plain}
    samples, samples_note = _mosaic(data, records)
    kernels, kernels_note = _kernels(records)
    return environment.get_template("report.html.j2").render(
        title=records.run.resolve().name,
        lead=_lead(records, manifest),
        errors=_error_tiles(records),
        tiles=_tiles(records),
        charts=curves(records) if len(records.metrics) else [],
        samples=samples,
        samples_note=samples_note,
        kernels=kernels,
        kernels_note=kernels_note,
        layers=_layers(records, manifest),
        classes=_classes(records),
        confusion=_confusion(records),
        config=records.config,
        machine=records.machine,
        manifest=manifest,
        data_note=data_note,
        restarts=records.metrics.restarts,
        notes=records.notes,
        made=_last_change(records.run),
    )


def _manifest(data: Path | None, records: Records) -> tuple[Manifest | None, str]:
    """The data set's manifest, or why there is none; a note when it is not the run's own."""
    if data is None:
        return None, "No data folder was given (--data), so nothing is known of the data set."
    try:
        manifest = Manifest.load(data)
        known = records.config.get("data_sha256")
        other = known is not None and known != identity(data)
    except (DuetError, OSError) as error:
        return None, f"{error}."
    return manifest, f"{data} is not the data set that the run was trained on." if other else ""


def _mosaic(data: Path | None, records: Records) -> tuple[list[Any], str]:
    if data is None:
        return [], "No pictures: no data folder was given (--data)."
    try:
        return list(mosaic(data, records.config)), ""
    except Unavailable as error:
        return [], str(error)


def _kernels(records: Records) -> tuple[list[Any], str]:
    try:
        return list(first_kernels(records.run)), ""
    except Unavailable as error:
        return [], str(error)


def _lead(records: Records, manifest: Manifest | None) -> str:
    """The run in a sentence or two."""
    metrics = records.metrics
    width = records.config.get("width")
    size = "" if width is None else " at full width" if width == 1 else f" at width {width:g}"
    words = f"AlexNet of 2012, both columns,{size}".rstrip(",")
    if len(metrics):
        words += f", after {metrics.last('step'):,.0f} steps"
    if math.isfinite(metrics.last("epoch")):
        words += f" or {metrics.last('epoch'):.3g} epochs"
    if manifest is not None and "train" in manifest.splits:
        words += (
            f" over {manifest.splits['train'].samples:,} training pictures "
            f"of {len(manifest.classes):,} classes"
        )
    return words + "."


def _error_tiles(records: Records) -> list[Tile]:
    """Top-1 and top-5 error with one and ten views; the last validation stands in for one view."""
    tiles = []
    for rank in ("1", "5"):
        for views in (1, 10):
            label = f"top-{rank} error, {'one view' if views == 1 else 'ten views'}"
            value = records.evaluations.get(views, {}).get(f"top{rank}_error")
            note = _evaluated(records.evaluations.get(views, {}))
            if value is None and views == 1 and len(records.validation):
                value = records.validation.last(f"top{rank}_error")
                note = f"validation at step {records.validation.last('step'):,.0f}"
            if value is None:
                note = f"not evaluated (cluster.evaluate --views {views})"
            tiles.append(Tile(label, percent(value), "%" if value is not None else "", note))
    return tiles


def _evaluated(evaluation: dict[str, Any]) -> str:
    samples, step = evaluation.get("samples"), evaluation.get("step")
    over = f"{samples:,} pictures" if isinstance(samples, int) else ""
    at = f"step {step:,}" if isinstance(step, int) else ""
    return ", ".join(part for part in (over, at) if part)


def _tiles(records: Records) -> list[Tile]:
    metrics = records.metrics
    if not len(metrics):
        return []
    seconds = float(np.nansum(metrics["seconds"]))
    pictures = metrics.last("position")
    speed, wait = (
        np.nanmedian(metrics["img_s"]),
        np.nansum(metrics["data_wait"] * metrics["seconds"]),
    )
    return [
        Tile("pictures seen", f"{pictures:,.0f}", note=f"{metrics.last('epoch'):.3g} epochs"),
        Tile("pictures per second", f"{speed:,.0f}", note="median step, whole job"),
        Tile("waiting for data", percent(wait / seconds), "%", "of the time in steps"),
        Tile("time in steps", *duration(seconds), "without validation and checkpoints"),
    ]


def _layers(records: Records, manifest: Manifest | None) -> dict[str, Any] | None:
    """Rows and totals of the network; None when its classes are not known."""
    named = next((e["classes"] for e in records.evaluations.values() if e.get("classes")), None)
    classes = len(manifest.classes) if manifest else len(named) if named else None
    if classes is None or "width" not in records.config:
        return None
    try:
        rows = table(classes=classes, width=records.config["width"])
    except (ValueError, TypeError):
        return None
    most = max(row.parameters for row in rows)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return {
        "rows": [LayerRow(a, b, (a.parameters / most, b.parameters / most)) for a, b in pairs],
        "a": totals(rows[::2]),
        "b": totals(rows[1::2]),
        "both": totals(rows),
    }


def _classes(records: Records) -> dict[str, Any] | None:
    """Errors by class, worst first, from the evaluation with the most views."""
    for views in (10, 1):
        errors = records.evaluations.get(views, {}).get("classes")
        known = {name: e for name, e in (errors or {}).items() if e is not None}
        if known:
            ranked = sorted(known.items(), key=lambda item: (-item[1], item[0]))
            few = len(ranked) <= FEW_CLASSES
            groups = [("", ranked)] if few else [("worst", ranked[:ENDS]), ("best", ranked[-ENDS:])]
            return {"views": views, "groups": groups, "count": len(ranked)}
    return None


def _confusion(records: Records) -> dict[str, Any] | None:
    """The confusion matrix as shares of each row (a true class), with its counts."""
    for views in (10, 1):
        evaluation = records.evaluations.get(views, {})
        counts, classes = evaluation.get("confusion"), evaluation.get("classes")
        if not counts or not classes or len(counts) != len(classes):
            continue
        rows = [
            (name, [(count, count / max(1, sum(row))) for count in row])
            for name, row in zip(classes, counts, strict=True)
        ]
        numbered = len(rows) <= NUMBERED
        return {"views": views, "rows": rows, "names": list(classes), "numbered": numbered}
    return None


def _last_change(folder: Path) -> str:
    moment = datetime.datetime.fromtimestamp((folder / METRICS).stat().st_mtime, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def percent(share: float | None) -> str:
    """A share 0..1 in per cent with one decimal; a dash when it is not known."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def human_bytes(size: float) -> str:
    """A size in bytes, kB, MB or GB (powers of ten)."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size:.0f} bytes"


def duration(seconds: float) -> tuple[str, str]:
    """Seconds as a number and its unit."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g}", unit
    return f"{seconds:.0f}", "s"


def plain(value: object) -> str:
    """A setting as a person would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else f"{value}"


def main() -> None:
    """Write the report that the command line asks for and print its path."""
    options = tyro.cli(Options, prog="python -m cluster.report")
    sys.stdout.write(f"{report(options.run, options.data)}\n")


if __name__ == "__main__":
    run(main)
