"""Charts for the pages and files of all packages, drawn by matplotlib; bars, images, templates.

A chart inside a page is SVG without scripts, links or fonts of its own: its text takes the page's
font, and its colors are the page's CSS variables (`PALETTE`), so dark mode and print work. The
same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from pipeline.tools.text import human_bytes, percent, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE = "#1d1c1a", "#6b675f", "#e3dfd6"
COLUMN_A, COLUMN_B, CHECK = "#b5441c", "#1e5f9e", "#12806a"
SERIES = ("#0b5fa5", "#c96a12", "#8c2f5b", "#1aa08a", "#4a3418", "#9a7fd6")
"""Colors of lines or bars beside each other: they stay apart for eyes that lack a kind of cones."""
PALETTE = {
    INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)",
    COLUMN_A: "var(--a)", COLUMN_B: "var(--b)", CHECK: "var(--check)",
    **{color: f"var(--s{number})" for number, color in enumerate(SERIES, 1)},
}  # fmt: skip
"""Colors that a page sets for light and dark mode (`page.css`)."""

MOST_POINTS = 500
"""Points of a line and dots of a series: a chart stays a few tens of kilobytes."""
FONT_SIZE = 11.5
MARGINS = (46.0, 8.0, 22.0, 40.0)
"""CSS pixels left, right, above and below the axes of a chart."""

Floats = npt.NDArray[np.float64]
Label = Callable[[float], str]


@dataclass(frozen=True)
class Chart:
    """A chart of a page; a template writes it as `{{ chart }}`."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str, bool], ...]
    """(name, CSS color, whether it is dashed) of every named line."""
    caption: str = ""
    unit: str = ""
    """Unit of the y axis, in words or as a sign."""

    def __html__(self) -> str:
        """Return the figure as HTML."""
        entry = Markup('<span class="{}" style="--k:{}">{}</span>')
        key = [entry.format("dashed" if dashed else "", color, name)
               for name, color, dashed in self.legend]  # fmt: skip
        return Markup(
            '<figure class="chart"><header><h3>{}{}</h3><div class="key">{}</div></header>{}{}'
            "</figure>"
        ).format(
            self.title, Markup(" <small>{}</small>").format(self.unit) if self.unit else "",
            Markup().join(key), self.svg,
            Markup("<figcaption>{}</figcaption>").format(self.caption) if self.caption else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A row of a list of bars; lengths are shares of the track, 0..1."""

    name: str
    figure: str
    """Text at the end of the row."""
    length: float
    start: float = 0.0
    limit: float | None = None
    """Share of the track at which a black mark stands, 0..1."""
    note: str = ""
    """Text below the bar."""
    color: str = COLUMN_A


def new_axes(
    x: tuple[float, float], y: tuple[float, float], x_label: Label = short_number,
    y_label: Label = short_number, width: float = 440, height: float = 250,
    margins: tuple[float, float, float, float] = MARGINS,
) -> Axes:  # fmt: skip
    """Return the empty axes of a chart in a page, with a few round ticks.

    Args:
        x: first and last value of the axis.
        y: lowest and highest value; `draw_line` and `draw_dots` keep within it.
        x_label: formats the number at a tick of the x axis.
        y_label: formats the number at a tick of the y axis.
        width: width of the chart in CSS pixels where the page shows it at its natural size.
        height: height of the chart in CSS pixels.
        margins: room left, right, above and below the axes, in CSS pixels.
    """
    from matplotlib.figure import Figure  # importing it takes half a second

    left, right, top, bottom = margins
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((left / width, bottom / height,
                            1 - (left + right) / width, 1 - (top + bottom) / height))  # fmt: skip
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    style_axes(axes, x_label, y_label)
    for patch in (figure.patch, axes.patch, *axes.spines.values()):
        patch.set_visible(False)
    return axes


def style_axes(
    axes: Axes, x_label: Label = short_number, y_label: Label = short_number,
    font_size: float = FONT_SIZE,
) -> None:  # fmt: skip
    """Give axes the look of all charts, with labels for the numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis, label in ((axes.xaxis, x_label), (axes.yaxis, y_label)):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _, label=label: label(value)))
    axes.tick_params(length=0, pad=7, labelsize=font_size, labelcolor=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(SOFT)


def name_axis(axes: Axes, *names: str) -> None:
    """Write the quantities of the x axis, a line each, to the left of its numbers."""
    axes.annotate(
        "\n".join(names), (0, 0), (-9, -8), "axes fraction", "offset points",
        ha="right", va="top", color=SOFT, fontsize=FONT_SIZE - 1, alpha=0.8,
    )  # fmt: skip


def round_up(most: float) -> float:
    """Return the first round number at or above `most`; 1 for what is not above 0 or not finite."""
    from matplotlib.ticker import MaxNLocator

    if not (np.isfinite(most) and most > 0):
        return 1.0
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, most)
    return float(next(tick for tick in ticks if tick >= most * (1 - 1e-9)))


def draw_line(
    axes: Axes, x: Floats, y: Floats, color: str, name: str = "", *, width: float = 1.7,
    alpha: float = 1.0, dashes: str = "-",
) -> None:  # fmt: skip
    """Draw the finite points as a line, of `MOST_POINTS` at most.

    Args:
        axes: axes with limits that are set.
        x: float [n].
        y: float [n]; values beyond the axis are drawn at its end.
        color: color of `PALETTE` or any other.
        name: name in the legend; without one the line is not listed.
        width: CSS pixels.
        alpha: opacity, 0..1.
        dashes: line style of matplotlib.
    """
    places = _finite_places(x, y)
    if len(places):
        axes.plot(
            x[places], y[places].clip(*axes.get_ylim()), color=color, label=name or "_",
            linewidth=width, alpha=alpha, linestyle=dashes, solid_capstyle="round",
        )  # fmt: skip


def draw_columns(
    axes: Axes, edges: Floats, heights: Floats, color: str, name: str = "", alpha: float = 1.0
) -> None:
    """Draw filled columns side by side, the bars of a histogram.

    Args:
        axes: axes with limits that are set.
        edges: float [n + 1].
        heights: float [n].
        color: color of `PALETTE` or any other.
        name: name in the legend.
        alpha: opacity of the filling, 0..1; below 1 the outline is drawn as well.
    """
    x, y = np.repeat(edges, 2), np.concatenate(([0.0], np.repeat(heights, 2), [0.0]))
    axes.fill(x, y, facecolor=(color, alpha), edgecolor=color, linewidth=1 if alpha < 1 else 0,
              label=name or "_")  # fmt: skip


def draw_dots(
    axes: Axes, x: Floats, y: Floats, color: str, hints: Sequence[str] = (), size: float = 7
) -> None:
    """Draw a dot for every finite point, `MOST_POINTS` at most and always the last.

    Args:
        axes: axes with limits that are set.
        x: float [n].
        y: float [n].
        color: color of `PALETTE` or any other.
        hints: n texts that show under the mouse.
        size: diameter in CSS pixels.
    """
    from matplotlib.collections import LineCollection

    places = _finite_places(x, y)
    y = y.clip(*axes.get_ylim())
    # A line of no length with round ends is a path of its own, which can have a title.
    axes.add_collection(
        LineCollection(
            [[(x[n], y[n])] * 2 for n in places], colors=color, linewidths=size, capstyle="round",
            urls=[hints[n] for n in places] if hints else None, zorder=3,
        ),
        autolim=False,
    )  # fmt: skip


def draw_mark(axes: Axes, x: float, label: str) -> None:
    """Draw a dotted upright line with a label above it."""
    axes.axvline(x, color=SOFT, linewidth=1, linestyle=(0, (2, 4)))
    axes.text(x, 1.03, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
              color=SOFT, fontsize=FONT_SIZE - 1)  # fmt: skip


def _finite_places(x: Floats, y: Floats) -> npt.NDArray[np.int64]:
    places = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(places) > MOST_POINTS:
        places = places[np.linspace(0, len(places) - 1, MOST_POINTS).round().astype(int)]
    return places


def pick_series(number: int) -> tuple[str, str]:
    """Return color and dashes of line `number`, from 0; the colors come again dashed."""
    return SERIES[number % len(SERIES)], "-" if number < len(SERIES) else "--"


def as_chart(axes: Axes, title: str, caption: str = "", unit: str = "") -> Chart:
    """Return the chart that was drawn on `new_axes`; its legend lists the named lines."""
    legend = tuple(
        (name, css_color(line.get_color()), line.get_linestyle() != "-")
        for line in axes.get_lines()
        if not (name := str(line.get_label())).startswith("_")
    )
    spoken = "; ".join([title, *(name for name, _, _ in legend)])
    return Chart(title, _inline_svg(axes.figure, spoken), legend, caption, unit)


def css_color(color: object) -> str:
    """Return the CSS variable of a color of `PALETTE`, and any other color as it is."""
    return PALETTE.get(str(color), str(color))


def _inline_svg(figure: Any, title: str) -> Markup:
    """Return a figure as an SVG element whose text and colors are the page's."""
    file = io.StringIO()
    save_figure(figure, file, "svg")
    text = file.getvalue()
    width, height = figure.get_size_inches() * 72
    # The head has a style for all of a page, and the end closes the element.
    text = text[text.index("<g id=") : text.rindex("</svg>")]
    text = re.sub(r' (?:style|d|x|y|transform)="[^"]*"', _shorten_attribute, text)
    text = re.sub(r' (?:id|clip-path)="[^"]*"', "", text)
    text = re.sub(r"<g ?/>\s*|<defs>.*?</defs>", "", text, flags=re.DOTALL)
    hinted_path = r"""<a xlink:href=(["'])(.*?)\1[^>]*>\s*<path ([^>]*)/>\s*</a>"""
    text = re.sub(hinted_path, r"<path \3><title>\2</title></path>", text)
    head = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">').format(
        width, height, title
    )
    return head + Markup(re.sub(r"\n\s*", " ", text)) + Markup("</svg>")


def _shorten_attribute(hit: re.Match[str]) -> str:
    """Return an attribute with a tenth of a pixel, the page's font, and the page's colors."""
    text = re.sub(r"(\.\d)\d+", r"\1", hit[0])
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    return re.sub(r"#[0-9a-f]{6}", lambda color: css_color(color[0]), text)


def save_figure(figure: Any, file: IO[Any], kind: Literal["svg", "png"], dpi: float = 72) -> None:
    """Write a figure of matplotlib to a file; the same figure gives the same bytes of SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "duet"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def bar_list(bars: Iterable[Bar]) -> Markup:
    """Return a list of bars as HTML."""
    row = Markup(
        '<span class="name" title="{0}">{0}</span><span class="track"><i style="left:{1:.2f}%;'
        'width:{2:.2f}%;--k:{3}"></i>{4}</span><span class="figure">{5}</span>{6}\n'
    )
    mark = Markup('<b style="left:{:.2f}%"></b>')
    note = Markup('<span class="note">{}</span>')
    rows = [
        row.format(
            bar.name, 100 * bar.start, 100 * bar.length, css_color(bar.color),
            "" if bar.limit is None else mark.format(100 * bar.limit), bar.figure,
            note.format(bar.note) if bar.note else "",
        )
        for bar in bars
    ]  # fmt: skip
    return Markup('<div class="bars">{}</div>').format(Markup().join(rows))


def encode_image(pixels: npt.NDArray[np.uint8], width: int = 0, quality: int = 0) -> str:
    """Return an image as a data URI: a JPEG, or a PNG if `quality` is 0.

    Args:
        pixels: uint8 [height, width, 3], or for a PNG with an alpha channel, or [height, width, 2]:
            grey and alpha.
        width: pixels that it is scaled to; 0: as it is.
        quality: quality of the JPEG, 1..95; 0: a PNG.
    """
    image = Image.fromarray(pixels)
    if width and width != image.width:
        size = (width, round(image.height * width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    kind = "jpeg" if quality else "png"
    image.save(file, kind, **({"quality": quality} if quality else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_templates(*folders: Path) -> jinja2.Environment:
    """Return the templates in `folders`, with filters for numbers and `page.css` beside them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "bytes": human_bytes, "bar_list": bar_list}
    return environment
