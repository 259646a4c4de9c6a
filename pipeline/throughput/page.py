"""The report as one page to look at: no network, no script, no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pipeline.tools.files import sealed

WIDTH, HEIGHT = 520, 220
"""Of a chart's plot, in SVG units."""


@dataclass(frozen=True)
class Bar:
    """A stage against its limit: lengths as shares of the longest, 0..1."""

    name: str
    length: float
    limit: float | None
    figure: str
    hint: str
    strong: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of a waterfall: where it starts and how long it is, as shares of the whole."""

    name: str
    start: float
    length: float
    figure: str
    look: str


@dataclass(frozen=True)
class Plot:
    """Paths in a WIDTH x HEIGHT square, ticks to be set beside them."""

    lines: tuple[tuple[str, str], ...]
    """(path, look) each."""
    x: tuple[tuple[float, str], ...]
    y: tuple[tuple[float, str], ...]
    dots: tuple[tuple[float, float, str], ...] = ()


def write(path: Path, table: Mapping[str, Any], step: Mapping[str, float] | None = None) -> None:
    """Write the page of a report.

    Args:
        path: where to.
        table: `Report.table()`.
        step: seconds of the parts of a training step, if a trainer was measured too.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    text = environment.get_template("page.html.j2").render(
        r=table, bars=bars(table), wide=WIDTH, high=HEIGHT,
        picture=waterfall(picture_parts(table), 1e6, "µs"),
        step=waterfall(step, 1e3, "ms") if step else [],
        queue=queue_plot(table), sweep=sweep_plot(table),
    )  # fmt: skip
    with sealed(path) as file:
        file.write(text.encode())


def bars(table: Mapping[str, Any]) -> list[Bar]:
    """Stages and the stream, on a scale of powers of ten: they lie orders of magnitude apart."""
    rows = [row for row in (*table["stages"], table["whole"]) if row["name"] != "hand-over"]
    top = max(max(row["img_s"], row["limit_img_s"] or 0) for row in rows)
    low = min(row["img_s"] for row in rows) / 3

    def place(value: float) -> float:
        return max(0.02, math.log(value / low) / math.log(top / low))

    return [
        Bar(
            row["name"], place(row["img_s"]),
            place(row["limit_img_s"]) if row["limit_img_s"] else None,
            f"{row['img_s']:,.0f}" + (f" · {row['share']:.0%}" if row["share"] else ""),
            f"{row['against'] or row['note']}"
            + (f": {row['limit_img_s']:,.0f} img/s" if row["limit_img_s"] else ""),
            row is table["whole"],
        )
        for row in rows
    ]  # fmt: skip


def picture_parts(table: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a core that a picture takes at each stage, alone."""
    rows = {row["name"]: row for row in table["stages"]}
    names = ("storage, page cache", "checksum", "feed", "decode", "normalise", "hand-over")
    return {name: rows[name]["cores"] / rows[name]["img_s"] for name in names if name in rows}


def waterfall(parts: Mapping[str, float], scale: float, unit: str) -> list[Piece]:
    """Parts one after the other."""
    total, at, found = sum(parts.values()) or 1.0, 0.0, []
    for number, (name, value) in enumerate(parts.items()):
        share = value / total
        found.append(Piece(name, at, share, f"{value * scale:,.1f} {unit} · {share:.1%}",
                           f"p{number % 8}"))  # fmt: skip
        at += share
    return found


def queue_plot(table: Mapping[str, Any]) -> Plot | None:
    """Batches that lay ready at each moment: read ones as a line, pixels as dots below."""
    points = table["queue"]
    if len(points) < 2:
        return None
    end, most = points[-1][0] or 1.0, max(table["setting"]["prefetch"], 1)
    path = "".join(
        f"{'M' if not number else 'L'}{WIDTH * at / end:.1f} {HEIGHT * (1 - read / most):.1f}"
        for number, (at, read, _) in enumerate(points)
    )
    late = tuple((WIDTH * at / end, HEIGHT * 1.0, "late") for at, _, ready in points if not ready)
    return Plot(
        ((path, "read"),),
        tuple((WIDTH * share, f"{end * share:.1f} s") for share in (0, 0.5, 1)),
        tuple((HEIGHT * (1 - count / most), str(count)) for count in _whole(most)), late,
    )  # fmt: skip


def sweep_plot(table: Mapping[str, Any]) -> Plot | None:
    """Pictures a second over threads: DALI alone, and the stream as predicted."""
    counts = sorted(int(count) for count in table["sweep"])
    if len(counts) < 2:
        return None
    # The keys of a dict are text once it has been a JSON file.
    rates = {count: table["sweep"].get(count) or table["sweep"][str(count)] for count in counts}
    top = 1.08 * max(max(pair) for pair in rates.values())

    def at(count: int) -> float:
        return WIDTH * (count - counts[0]) / (counts[-1] - counts[0])

    def path(which: int) -> str:
        moves = (f"{at(count):.1f} {HEIGHT * (1 - rates[count][which] / top):.1f}"
                 for count in counts)  # fmt: skip
        return "M" + "L".join(moves)

    knee = table["knee"]
    gap = 10 ** math.floor(math.log10(top))
    while top / gap < 3:
        gap /= 2
    dots = ((at(knee), HEIGHT * (1 - rates[knee][1] / top), f"knee: {knee} threads"),)
    return Plot(
        ((path(0), "alone"), (path(1), "read")),
        tuple((at(count), str(count)) for count in counts),
        tuple((HEIGHT * (1 - gap * step / top), f"{gap * step:,.0f}")
              for step in range(int(top / gap) + 1)),
        dots,
    )  # fmt: skip


def _whole(most: int) -> Sequence[int]:
    return range(0, most + 1, max(1, most // 4))
