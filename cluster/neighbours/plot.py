"""The histogram of distances as an SVG file of its own."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import jinja2
import numpy as np

from cluster.experiments.neighbors.search import Floats
from cluster.neighbours.distances import Pairs
from cluster.report.charts import Axis, axis_to, short

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 64, 52


def histogram(pairs: Pairs, title: str) -> str:
    """Both distributions in one chart, as SVG text."""
    edges, same, other = pairs.histogram()
    across = Axis(float(edges[0]), float(edges[-1]))
    up = axis_to(float(max(same.max(), other.max())))
    x0, x1, y0, y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def x(value: float) -> float:
        return x0 + across.place(value) * (x1 - x0)

    def y(value: float) -> float:
        return y0 - up.place(value) * (y0 - y1)

    def steps(shares: Floats) -> str:
        tops = np.repeat(shares, 2)
        sides = np.repeat(edges, 2)[1:-1]
        points = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(sides, tops, strict=True)]
        return f"M{x0} {y0}L" + "L".join(points) + f"L{x1} {y0}Z"

    means = [(float(values.mean()), look) for values, look in _looks(pairs)]
    return _TEMPLATE.render(
        width=WIDTH,
        height=HEIGHT,
        box=(x0, x1, y0, y1),
        title=escape(title),
        auc=f"AUC {pairs.auc:.3f}",
        paths=[(steps(other), "other"), (steps(same), "same")],
        means=[(x(mean), look, f"{mean:.3g}") for mean, look in means],
        xs=[(x(value), short(value)) for value in across.round_values(6)],
        ys=[(y(value), f"{value:.3g}") for value in up.round_values(4)],
    )


def _looks(pairs: Pairs) -> list[tuple[Floats, str]]:
    return [(pairs.other, "other"), (pairs.same, "same")]


_TEMPLATE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("distances.svg.j2")
