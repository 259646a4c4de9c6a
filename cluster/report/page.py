"""One page that says how a run went: RUN/report.html, made from files only.

    python -m cluster.report RUN [--data DATA]

The page needs no network, no script and no other file; it can be sent by mail or printed. A
piece that cannot be made (no evaluation yet, no checkpoint, no data set here) is named in its
place, so a report can be made at any time, of a running or a broken run too.
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
from cluster.report.charts import curves
from cluster.report.images import (
    CHOICES,
    EACH,
    Answers,
    Choice,
    Sample,
    Unavailable,
    answers,
    cache_of,
    mosaic,
    newest_checkpoint,
)
from cluster.report.kernels import FirstLayer, first_layer, noise_limit
from cluster.report.records import Records, read_records
from cluster.report.tables import (
    class_errors,
    confusion,
    error_tiles,
    human_bytes,
    layers,
    lead,
    percent,
    plain,
    probability,
    run_tiles,
)
from cluster.run.folder import KERNELS, METRICS
from cluster.run.kernels import read_kernels
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import atomic_write

NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write RUN/report.html: how a run went, on one page."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    data: str | None = None
    """Its data set (folder or address), for the images and the class names."""
    answers: tuple[Choice, ...] = CHOICES
    """Which images to show with the network's answers."""
    each: int = EACH
    """How many of each choice."""


def report(
    run: Path, data: str | None, choices: Sequence[Choice] = CHOICES, each: int = EACH
) -> Path:
    """Write RUN/report.html and return its path.

    Args:
        run: folder of the run.
        data: its data set, if it is there.
        choices: which images are shown with the network's answers.
        each: how many of each choice.

    Raises:
        UsageError: RUN is not the folder of a run, or cannot be written.
    """
    if each < 1:
        raise UsageError(f"--each is {each}; it must be above 0")
    records = read_records(run)
    page = render(records, data, choices, each)
    try:
        with atomic_write(run / NAME) as file:
            file.write(page.encode())
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{run / NAME} cannot be written ({reason}); mend the folder") from error
    return run / NAME


def render(
    records: Records, data: str | None, choices: Sequence[Choice] = CHOICES, each: int = EACH
) -> str:
    """The page as HTML text; the arguments are those of `report`."""
    manifest, data_note = _manifest(data, records)
    samples, samples_note = _mosaic(data, records)
    found, kernels, kernels_note = _kernels(records)
    answered, answers_note = _answers(records, data, choices, each)
    names = _class_names(records, manifest, found)
    page = templates().get_template("page.html.j2")
    return page.render(
        title=records.run.resolve().name,
        lead=lead(records, manifest),
        errors=error_tiles(records),
        tiles=run_tiles(records),
        charts=curves(records) if len(records.metrics) else [],
        samples=samples,
        samples_note=samples_note,
        kernels=kernels,
        kernels_note=kernels_note,
        answers=answered,
        answers_note=answers_note,
        layers=layers(records, len(names)),
        classes=class_errors(records),
        confusion=confusion(records, names),
        config=records.config,
        machine=records.machine,
        manifest=manifest,
        data_note=data_note,
        restarts=records.metrics.restarts,
        notes=records.notes,
        made=_last_change(records.run),
    )


def templates(*folders: Path) -> jinja2.Environment:
    """The templates of this package, after those in `folders`, with the filters they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "bytes": human_bytes,
        "plain": plain,
        "p": probability,
    }
    environment.globals["noise_limit"] = noise_limit()
    return environment


def _manifest(data: str | None, records: Records) -> tuple[Manifest | None, str]:
    """The data set's manifest, or why there is none; a note when it is not the run's own."""
    if data is None:
        return None, "No data folder was given (--data), so nothing is known of the data set."
    try:
        folder = fetch_metadata(data, **cache_of(records.config))
        manifest = Manifest.load(folder)
        known = records.config.get("data_sha256")
        other = known is not None and known != identity(folder)
    except (DuetError, OSError) as error:
        return None, f"{error}."
    return manifest, f"{data} is not the data set that the run was trained on." if other else ""


def _mosaic(data: str | None, records: Records) -> tuple[list[Sample], str]:
    if data is None:
        return [], "No images: no data folder was given (--data)."
    try:
        return mosaic(data, records.config), ""
    except Unavailable as error:
        return [], str(error)


def _kernels(records: Records) -> tuple[Checkpoint | None, FirstLayer | None, str]:
    found = None
    try:
        found = newest_checkpoint(records.run)
        return found, first_layer(found, read_kernels(records.run / KERNELS)), ""
    except Unavailable as error:
        return found, None, str(error)


def _answers(
    records: Records, data: str | None, choices: Sequence[Choice], each: int
) -> tuple[Answers | None, str]:
    try:
        return answers(records.run, data, records.config, choices, each), ""
    except Unavailable as error:
        return None, str(error)


def _class_names(
    records: Records, manifest: Manifest | None, found: Checkpoint | None
) -> Sequence[str]:
    """The classes in the order of their labels, from the best source there is."""
    if found is not None:
        return found.classes
    if manifest is not None:
        return manifest.classes
    # An evaluation leaves out classes without images.
    tables = (evaluation.get("classes") for evaluation in records.evaluations.values())
    return next((list(classes) for classes in tables if classes), [])


def _last_change(folder: Path) -> str:
    moment = datetime.datetime.fromtimestamp((folder / METRICS).stat().st_mtime, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def main(argv: list[str] | None = None) -> int:
    """Write the report that the command line asks for and print its path.

    Raises:
        UsageError: as `report`.
    """
    options = tyro.cli(Options, args=argv, prog="python -m cluster.report")
    sys.stdout.write(f"{report(options.run, options.data, options.answers, options.each)}\n")
    return 0
