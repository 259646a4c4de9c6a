"""The plot of a study: curves of its variants, or errors over the number of networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.experiments.study.config import Study
from cluster.experiments.study.results import Curves, read_curves
from cluster.experiments.study.runner import StudyRun
from cluster.report.records import Floats
from pipeline.tools.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 200
"""Places along a curve at which the seeds are averaged."""
DASHES = ("-", "--", "-.", ":")
DPI = 150
Named = Sequence[tuple[str, StudyRun]]


def draw(study: Study, runs: Named, found: dict[str, Any], path: Path) -> None:
    """Draw a PNG.

    Args:
        study: says what is drawn.
        runs: with the names of their variants.
        found: what study.json holds.
        path: of the image.
    """
    import matplotlib  # slow to import: whoever only asks for --help need not wait

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [one.name for one in study.shown]
    groups = {
        name: [read_curves(study, run) for other, run in runs if other == name] for name in names
    }
    wide = 2 if study.plot == "both" and len(names) > 1 else 1
    panels = len(names) if study.plot == "both" else 1
    figure, axes = pyplot.subplots(
        -(-panels // 3), min(3, panels), squeeze=False, sharex=True, sharey=True,
        figsize=(7.2 if wide == 1 else 10.5, 4.4 if panels <= 3 else 6.6), layout="constrained",
    )  # fmt: skip
    flat: list[Axes] = list(axes.flat)
    if study.plot == "nets":
        _nets(flat[0], found)
    elif study.plot == "both":
        for axis, name in zip(flat, names, strict=False):
            _both(axis, name, groups[name])
        for axis in flat[panels:]:
            axis.set_visible(False)
        figure.supylabel("top-1 error", fontsize=9)
    else:
        _together(flat[0], study, groups)
    figure.suptitle(f"{study.title}\npaper: {study.paper}", fontsize=10)
    figure.supxlabel("networks averaged" if study.plot == "nets" else "images seen", fontsize=9)
    figure.text(0.995, 0.005, found["scale"], fontsize=5.5, ha="right", va="bottom", color="0.4")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    pyplot.close(figure)


def _together(axis: Axes, study: Study, groups: dict[str, list[Curves]]) -> None:
    """All variants in one plot: the errors of training, or of validation."""
    train = study.plot == "train"
    for number, (name, found) in enumerate(groups.items()):
        lines = [(one.train_at, one.train) if train else (one.val_at, one.val) for one in found]
        _line(axis, lines, f"C{number}", name, DASHES[number % len(DASHES)], marks=not train)
    axis.set_ylabel("training error rate" if train else "top-1 error, validation")
    if study.measure == "pictures":
        axis.axhline(study.goal, color="0.5", linewidth=0.8, linestyle=":")
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis)


def _both(axis: Axes, name: str, found: list[Curves]) -> None:
    """One variant: training and validation."""
    _line(axis, [(one.train_at, one.train) for one in found], "C0", "training, as trained on", "-")
    _line(axis, [(one.val_at, one.val) for one in found], "C1", "validation", "-", marks=True)
    axis.set_title(name, fontsize=9)
    axis.legend(fontsize=7, frameon=False)
    _tidy(axis)


def _nets(axis: Axes, found: dict[str, Any]) -> None:
    """Errors over the number of networks."""
    sizes = [one["nets"] for one in found["nets"]]
    for number, (kind, name) in enumerate(
        (("equal", "equal weights"), ("searched", "searched on these images"),
         ("held_out", "searched on the other half"))
    ):  # fmt: skip
        errors = [one[kind]["top1_error"] for one in found["nets"]]
        spread = [one[kind]["top1_error_sd"] or 0.0 for one in found["nets"]]
        places = np.array(sizes) + 0.06 * (number - 1)
        style = DASHES[number]
        axis.errorbar(places, errors, spread, marker="o", capsize=3, label=name, linestyle=style)
    axis.set_xticks(sizes)
    axis.set_ylabel("top-1 error, validation")
    axis.legend(fontsize=8, frameon=False)
    _tidy(axis, zero=False)


def _line(
    axis: Axes, lines: Sequence[tuple[Floats, Floats]], colour: str, name: str, dashes: str,
    marks: bool = False,
) -> None:  # fmt: skip
    """The mean over seeds, up to where the shortest ends, and each seed as a thin line."""
    known = [(x, y) for x, y in lines if len(x)]
    if not known:
        return
    for x, y in known if len(known) > 1 else []:
        axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.5, linestyle=dashes)
    first, last = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    same = all(len(x) == len(known[0][0]) and (x == known[0][0]).all() for x, _ in known)
    at = known[0][0] if same else np.linspace(first, last, POINTS)
    mean = np.mean([np.interp(at, x, y) for x, y in known], axis=0)
    axis.plot(
        at, mean, color=colour, linewidth=1.8, label=name, linestyle=dashes,
        marker="o" if marks and len(at) < 30 else None, markersize=3,
    )  # fmt: skip


def _tidy(axis: Axes, zero: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    if zero:
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
