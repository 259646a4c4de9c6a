"""The plot of a study: curves of its variants, or errors over the number of networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.experiments.study.config import Study
from cluster.experiments.study.goals import Curves, read_curves
from cluster.experiments.study.results import Result, format_factor
from pipeline.tools.charts import save_figure, style_axes
from pipeline.tools.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", "-.", ":")


def draw_plot(
    study: Study, results: Sequence[Result], others: Sequence[Result], summary: dict[str, Any],
    path: Path,
) -> None:  # fmt: skip
    """Draw the plot of a study into a PNG file.

    Args:
        study: names what is drawn.
        results: results of the runs that count.
        others: results of the grid's other runs, drawn faintly where goals are compared.
        summary: content of study.json.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure  # importing it takes half a second

    names = [one.name for one in study.shown]
    groups = {
        name: [read_curves(study, one.run) for one in results if one.variant == name]
        for name in names
    }
    panels = len(names) if study.plot == "both" else 1
    figure = Figure(
        figsize=(7.2 if panels == 1 else 10.5, 4.4 if panels <= 3 else 6.6), layout="constrained"
    )
    grid = figure.subplots(-(-panels // 3), min(3, panels), squeeze=False, sharex=True, sharey=True)
    flat: list[Axes] = list(grid.flat)
    if study.plot == "nets":
        _draw_nets(flat[0], summary["nets"])
    elif study.plot == "both":
        for axes, name in zip(flat, names, strict=False):
            _draw_both(axes, name, groups[name])
        for axes in flat[panels:]:
            axes.set_visible(False)
        figure.supylabel("top-1 error", fontsize=9)
    elif study.measure == "pictures":
        _draw_goals(flat[0], study, results, others, summary)
    else:
        _draw_variants(flat[0], study, groups)
    figure.suptitle(f"{study.title}\npaper: {study.paper}", fontsize=10)
    figure.supxlabel("networks averaged" if study.plot == "nets" else "images seen", fontsize=9)
    figure.text(0.995, 0.005, summary["scale"], fontsize=5.5, ha="right", va="bottom", color="0.4")
    with atomic_write(path) as file:
        save_figure(figure, file, "png", dpi=150)


def _draw_variants(axes: Axes, study: Study, groups: dict[str, list[Curves]]) -> None:
    """All variants in one plot: the errors of training, or of validation."""
    is_train = study.plot == "train"
    for number, (name, found) in enumerate(groups.items()):
        _draw_seeds(axes, found, is_train, f"C{number}", name, DASHES[number % len(DASHES)])
    axes.set_ylabel("training error rate" if is_train else "top-1 error, validation")
    _finish_panel(axes)


def _draw_goals(
    axes: Axes, study: Study, results: Sequence[Result], others: Sequence[Result],
    summary: dict[str, Any],
) -> None:  # fmt: skip
    """Training errors as in figure 1 of the paper, with a line at each goal and the factor there.

    A variant has a line for each value of the grid that is the best at a goal, and faint lines for
    the others.
    """
    images = max(one.run.images for one in results)
    for number, variant in enumerate(study.shown):
        color, dashes = f"C{number}", DASHES[number % len(DASHES)]
        mine = [one for one in results if one.variant == variant.name]
        for place, at in enumerate(dict.fromkeys(one.at for one in mine)):
            found = [read_curves(study, one.run) for one in mine if one.at == at]
            name = variant.name if at is None else f"{variant.name}, {study.grid[0]} {at}"
            _draw_seeds(axes, found, True, color, name, dashes, 1.8 if place == 0 else 1.1)
        for one in others:
            if one.variant == variant.name:
                curves = read_curves(study, one.run)
                axes.plot(curves.train_at, curves.train, color=color, linewidth=0.6, alpha=0.35,
                          linestyle=dashes)  # fmt: skip
    axes.set_ylabel("training error rate")
    _finish_panel(axes)
    above = axes.secondary_xaxis(
        "top", (lambda x: np.asarray(x) / images, lambda x: np.asarray(x) * images)
    )
    above.tick_params(labelsize=8, length=2)
    above.set_xlabel("epochs", fontsize=8)
    for table in summary["goals"]:
        axes.axhline(table["goal"], color="0.4", linewidth=0.9, linestyle=(0, (2, 3)))
        factors = [f"{one['variant']} {text}" for one in table["variants"][1:]
                   if (text := format_factor(one))]  # fmt: skip
        text = f"{100 * table['goal']:g}%: {', '.join(factors) or 'no factor'}"
        axes.text(1.01, table["goal"], text, transform=axes.get_yaxis_transform(), fontsize=7,
                  ha="left", va="center", color="0.25")  # fmt: skip


def _draw_both(axes: Axes, name: str, found: list[Curves]) -> None:
    """One variant: training and validation."""
    _draw_seeds(axes, found, True, "C0", "training, as trained on")
    _draw_seeds(axes, found, False, "C1", "validation")
    axes.set_title(name, fontsize=9)
    _finish_panel(axes)


def _draw_nets(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    """Errors over the number of networks."""
    sizes = [one["nets"] for one in lines]
    for number, (kind, name) in enumerate(
        (("equal", "equal weights"), ("searched", "searched on these images"),
         ("held_out", "searched on the other half"))
    ):  # fmt: skip
        errors = [one[kind]["top1_error"] for one in lines]
        spread = [one[kind]["top1_error_sd"] or 0.0 for one in lines]
        x = np.array(sizes) + 0.06 * (number - 1)
        axes.errorbar(x, errors, spread, marker="o", capsize=3, label=name,
                      linestyle=DASHES[number])  # fmt: skip
    axes.set_ylabel("top-1 error, validation")
    _finish_panel(axes, sizes)


def _draw_seeds(
    axes: Axes, found: Sequence[Curves], is_train: bool, color: str, name: str, dashes: str = "-",
    width: float = 1.8,
) -> None:  # fmt: skip
    """The mean over seeds, up to where the shortest ends, and each seed as a thin line."""
    lines = [(one.train_at, one.train) if is_train else (one.val_at, one.val) for one in found]
    known = [(x, y) for x, y in lines if len(x)]
    if not known:
        return
    for x, y in known if len(known) > 1 else []:
        axes.plot(x, y, color=color, linewidth=0.6, alpha=0.5, linestyle=dashes)
    first, last = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
    is_same = all(len(x) == len(known[0][0]) and (x == known[0][0]).all() for x, _ in known)
    at = known[0][0] if is_same else np.linspace(first, last, 200)
    mean = np.mean([np.interp(at, x, y) for x, y in known], axis=0)
    axes.plot(
        at, mean, color=color, linewidth=width, label=name, linestyle=dashes,
        marker="o" if not is_train and len(at) < 30 else None, markersize=3,
    )  # fmt: skip


def _finish_panel(axes: Axes, sizes: Sequence[int] = ()) -> None:
    """Legend and ticks; errors over images start at 0, those over `sizes` do not."""
    if not sizes:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    style_axes(axes, lambda value: f"{value:,.0f}", font_size=8)
    if sizes:
        axes.set_xticks(sizes)
    axes.legend(fontsize=8, frameon=False)
