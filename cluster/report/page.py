"""The page about a run, RUN/report.html, or about several, made from files only.

    python -m cluster.report RUN [--data DATA] [--evaluate]
    python -m cluster.report RUN RUN ... [--out PAGE]

The page needs no network, no script and no other file; it can be sent by mail or printed. A
section that cannot be made (no evaluation, checkpoint or data set) says why, so a report can be
made at any time, also of a running or failed run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jinja2

from cluster.checkpoint.format import Checkpoint
from cluster.cli.options import CHOICES, Choice, ReportOptions
from cluster.config import read_run_config
from cluster.report import images, tables
from cluster.report.comparison import describe_comparison, read_runs
from cluster.report.curves import draw_curves, draw_updates, list_missing_curves
from cluster.report.feature_maps import check_layers, draw_feature_maps
from cluster.report.kernels import compute_noise_limit, describe_first_layer
from cluster.report.records import Records, read_records
from cluster.report.settings import describe_settings, format_setting
from cluster.run.folder import CONFIG, KERNELS
from cluster.run.kernels import read_kernels
from pipeline.dataset.manifest import Manifest, identity
from pipeline.dataset.record import read_segments
from pipeline.remote.dataset import locate_dataset
from pipeline.sources.paths import base_name
from pipeline.tools.arguments import parse_options
from pipeline.tools.charts import page_templates
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.files import atomic_write

NAME, COMPARISON = "report.html", "comparison.html"
T = TypeVar("T")


def write_report(
    run: Path, data: str = "", choices: Sequence[Choice] = CHOICES, each: int = ReportOptions.each,
    out: Path | None = None, maps: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write the page about a run and return its path.

    Args:
        run: folder of the run.
        data: its data set; "": the one that it recorded.
        choices: rules by which images are shown with the network's answers.
        each: images of each choice.
        out: path of the page; None: RUN/report.html.
        maps: layers whose feature maps are drawn.

    Raises:
        UsageError: RUN is not the folder of a run, a layer has no maps, or the page cannot be
            written.
    """
    if each < 1:
        raise UsageError(f"--each is {each}; it must be above 0")
    if maps:
        check_layers(run, maps)
    page = render_page(read_records(run), data, choices, each, maps)
    return write_page(out or run / NAME, page)


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its path.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(page.encode(errors="replace"))
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{path} cannot be written ({reason}); mend the folder") from error
    return path


def render_page(
    records: Records,
    data: str = "",
    choices: Sequence[Choice] = CHOICES,
    each: int = ReportOptions.each,
    maps: Sequence[str] = (),
) -> str:
    """Return the page as HTML text; the arguments are those of `write_report`."""
    run, config = records.run, records.config
    manifest, data_note = _load_manifest(data, records)
    found, no_checkpoint = _try_figure(lambda: images.find_newest_checkpoint(run))
    names = _find_class_names(records, manifest, found)
    answers, answers_note = _try_figure(
        lambda: images.collect_answers(run, data, config, choices, each)
    )
    figures = {
        "samples": _try_figure(lambda: images.load_training_images(run, data, config)),
        "kernels": _try_figure(lambda: describe_first_layer(found, read_kernels(run / KERNELS)))
        if found is not None
        else (None, no_checkpoint),
        "maps": _try_figure(lambda: draw_feature_maps(run, data, found, answers, maps))
        if maps and answers is not None and found is not None
        else (None, (answers_note or no_checkpoint) if maps else ""),
    }
    has_steps = len(records.metrics) > 0
    tiles = tables.make_error_tiles(records) + tables.make_run_tiles(records)
    pairs = tables.list_confusions(records, names) or (answers.confusions if answers else ())
    return load_templates().get_template("page.html.j2").render(
        title=run.resolve().name,
        lead=tables.write_lead(records, manifest, base_name(data or str(config.get("data", "")))),
        state=records.state,
        progress=tables.write_progress(records),
        verdict=tables.write_verdict(records, len(names)),
        settings=describe_settings(config) if config else None,
        big=tiles[:4],
        small=tiles[4:],
        answers=answers,
        answers_note=answers_note,
        charts=draw_curves(records) if has_steps else [],
        missing_curves=list_missing_curves(records),
        updates=draw_updates(records),
        layers=tables.make_layer_table(records, len(names)),
        classes=tables.rank_class_errors(records),
        confusion=tables.make_confusion_table(records, names),
        pairs=tables.make_confusion_bars(pairs),
        config=config,
        machine=records.machine,
        manifest=manifest,
        data_note=data_note,
        attempts=tables.list_attempts(records),
        checkpoints=tables.list_saved_checkpoints(records),
        restarts=records.metrics.restarts,
        notes=records.notes,
        made=tables.format_time(records),
        **{name: figure for name, (figure, _) in figures.items()},
        **{f"{name}_note": note for name, (_, note) in figures.items()},
    )  # fmt: skip


@functools.cache
def load_templates(*folders: Path) -> jinja2.Environment:
    """Return the templates in `folders` and of this package, with their filters."""
    environment = page_templates(*folders, Path(__file__).parent)
    environment.filters |= {"plain": format_setting, "p": tables.format_probability}
    environment.globals["noise_limit"] = compute_noise_limit()
    return environment


def _load_manifest(data: str, records: Records) -> tuple[Manifest | None, str]:
    """Return the manifest of the data set, and a note if it is missing or not of the run."""
    try:
        cached = images.read_cache_settings(records.config)
        data, folder = locate_dataset(records.run, data, **cached)
        manifest = Manifest.load(folder)
        known = records.config.get("data_sha256")
        own = (known, *(segment.version for segment in read_segments(records.run)))
        other = known is not None and identity(folder) not in own
    except (DuetError, OSError) as error:
        return None, f"{error}."
    return manifest, f"{data} is not the data set that the run was trained on." if other else ""


def _try_figure(make: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a section shows, or None and a note that says why it cannot be made."""
    try:
        return make(), ""
    except images.MissingFigure as error:
        return None, str(error)


def _find_class_names(
    records: Records, manifest: Manifest | None, found: Checkpoint | None
) -> Sequence[str]:
    """Return the class names in the order of their labels, from the best source there is."""
    if found is not None:
        return found.classes
    if manifest is not None:
        return manifest.classes
    # An evaluation leaves out classes without images.
    errors = (evaluation.get("classes") for evaluation in records.evaluations.values())
    return next((list(classes) for classes in errors if classes), [])


def evaluate_runs(options: ReportOptions) -> None:
    """Evaluate the newest checkpoint of each run with ten views, and keep the probabilities.

    Raises:
        DuetError: from `cluster.evaluate`.
    """
    from cluster import evaluate  # here: a report alone may need no torch

    data = ["--data", options.data] if options.data else []
    for run in options.runs:
        config, _ = read_run_config(run / CONFIG)
        _, folder = locate_dataset(run, options.data, **config.cached)
        is_whole = Manifest.load(folder).side == config.design.image_size
        views = "1" if is_whole else "10"  # ten views of a whole image are one
        evaluate.main([str(run), "--views", views, "--save-probabilities", *data])


def main(argv: list[str] | None = None) -> int:
    """Run the command: write the report and print its path.

    Raises:
        UsageError: as `write_report`.
    """
    options = parse_options(ReportOptions, argv, "python -m cluster.report")
    if not options.runs:
        raise UsageError("no RUN is named; name the --run of a training, or several to compare")
    if options.maps:
        if len(options.runs) > 1:
            raise UsageError("--maps is for a single run; name one RUN")
        check_layers(options.runs[0], options.maps)  # before an evaluation, which takes minutes
    if options.evaluate:
        evaluate_runs(options)
    if len(options.runs) == 1:
        found = write_report(
            options.runs[0], options.data, options.answers, options.each, options.out,
            options.maps,
        )  # fmt: skip
    else:
        template = load_templates().get_template("comparison.html.j2")
        page = template.render(describe_comparison(read_runs(options.runs)))
        found = write_page(options.out or Path(COMPARISON), page)
    sys.stdout.write(f"{found}\n")
    return 0
