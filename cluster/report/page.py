"""The page about a run, RUN/report.html, made from files only.

    python -m cluster.report RUN [--data DATA]

The page needs no network, no script and no other file; it can be sent by mail or printed. A
section that cannot be made (no evaluation, checkpoint or data set) says why, so a report can be
made at any time, also of a running or failed run.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jinja2
import tyro

from cluster.checkpoint.format import Checkpoint
from cluster.report.curves import draw_curves
from cluster.report.images import (
    CHOICES,
    EACH,
    Answers,
    Choice,
    MissingFigure,
    TrainingImage,
    collect_answers,
    find_newest_checkpoint,
    load_training_images,
    read_cache_settings,
)
from cluster.report.kernels import FirstLayer, compute_noise_limit, describe_first_layer
from cluster.report.records import Records, read_records
from cluster.report.tables import (
    format_probability,
    format_setting,
    make_confusion_table,
    make_error_tiles,
    make_layer_table,
    make_run_tiles,
    rank_class_errors,
    write_lead,
)
from cluster.run.folder import KERNELS, METRICS
from cluster.run.kernels import read_kernels
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.charts import page_templates
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import atomic_write

NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write RUN/report.html, one page about a run."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    data: str | None = None
    """Its data set (folder or address), for images and class names."""
    answers: tuple[Choice, ...] = CHOICES
    """Which images to show with the network's answers."""
    each: int = EACH
    """Number of images of each choice."""


def write_report(
    run: Path, data: str | None, choices: Sequence[Choice] = CHOICES, each: int = EACH
) -> Path:
    """Write RUN/report.html and return its path.

    Args:
        run: folder of the run.
        data: its data set, None if it is not here.
        choices: rules by which images are shown with the network's answers.
        each: images of each choice.

    Raises:
        UsageError: RUN is not the folder of a run, or cannot be written.
    """
    if each < 1:
        raise UsageError(f"--each is {each}; it must be above 0")
    records = read_records(run)
    page = render_page(records, data, choices, each)
    try:
        with atomic_write(run / NAME) as file:
            file.write(page.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{run / NAME} cannot be written ({reason}); mend the folder") from error
    return run / NAME


def render_page(
    records: Records, data: str | None, choices: Sequence[Choice] = CHOICES, each: int = EACH
) -> str:
    """Return the page as HTML text; the arguments are those of `write_report`."""
    manifest, data_note = _load_manifest(data, records)
    samples, samples_note = _load_images(data, records)
    found, kernels, kernels_note = _load_kernels(records)
    answered, answers_note = _collect_answers(records, data, choices, each)
    names = _find_class_names(records, manifest, found)
    page = load_templates().get_template("page.html.j2")
    return page.render(
        title=records.run.resolve().name,
        lead=write_lead(records, manifest),
        errors=make_error_tiles(records),
        tiles=make_run_tiles(records),
        charts=draw_curves(records) if len(records.metrics) else [],
        samples=samples,
        samples_note=samples_note,
        kernels=kernels,
        kernels_note=kernels_note,
        answers=answered,
        answers_note=answers_note,
        layers=make_layer_table(records, len(names)),
        classes=rank_class_errors(records),
        confusion=make_confusion_table(records, names),
        config=records.config,
        machine=records.machine,
        manifest=manifest,
        data_note=data_note,
        restarts=records.metrics.restarts,
        notes=records.notes,
        made=_format_last_change(records.run),
    )


def load_templates(*folders: Path) -> jinja2.Environment:
    """Return the templates in `folders` and of this package, with their filters."""
    environment = page_templates(*folders, Path(__file__).parent)
    environment.filters |= {"plain": format_setting, "p": format_probability}
    environment.globals["noise_limit"] = compute_noise_limit()
    return environment


def _load_manifest(data: str | None, records: Records) -> tuple[Manifest | None, str]:
    """The manifest of the data set, and a note if it is missing or not of the run."""
    if data is None:
        return None, "No data folder was given (--data), so nothing is known of the data set."
    try:
        folder = fetch_metadata(data, **read_cache_settings(records.config))
        manifest = Manifest.load(folder)
        known = records.config.get("data_sha256")
        other = known is not None and known != identity(folder)
    except (DuetError, OSError) as error:
        return None, f"{error}."
    return manifest, f"{data} is not the data set that the run was trained on." if other else ""


def _load_images(data: str | None, records: Records) -> tuple[list[TrainingImage], str]:
    if data is None:
        return [], "No images: no data folder was given (--data)."
    try:
        return load_training_images(data, records.config), ""
    except MissingFigure as error:
        return [], str(error)


def _load_kernels(records: Records) -> tuple[Checkpoint | None, FirstLayer | None, str]:
    found = None
    try:
        found = find_newest_checkpoint(records.run)
        return found, describe_first_layer(found, read_kernels(records.run / KERNELS)), ""
    except MissingFigure as error:
        return found, None, str(error)


def _collect_answers(
    records: Records, data: str | None, choices: Sequence[Choice], each: int
) -> tuple[Answers | None, str]:
    try:
        return collect_answers(records.run, data, records.config, choices, each), ""
    except MissingFigure as error:
        return None, str(error)


def _find_class_names(
    records: Records, manifest: Manifest | None, found: Checkpoint | None
) -> Sequence[str]:
    """The class names in the order of their labels, from the best source there is."""
    if found is not None:
        return found.classes
    if manifest is not None:
        return manifest.classes
    # An evaluation leaves out classes without images.
    tables = (evaluation.get("classes") for evaluation in records.evaluations.values())
    return next((list(classes) for classes in tables if classes), [])


def _format_last_change(folder: Path) -> str:
    moment = datetime.datetime.fromtimestamp((folder / METRICS).stat().st_mtime, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def main(argv: list[str] | None = None) -> int:
    """Run the command: write the report and print its path.

    Raises:
        UsageError: as `write_report`.
    """
    options = tyro.cli(ReportOptions, args=argv, prog="python -m cluster.report")
    sys.stdout.write(f"{write_report(options.run, options.data, options.answers, options.each)}\n")
    return 0
