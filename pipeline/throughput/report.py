"""All that was found out, as plain values: the same for the table, the page, a file and a diff.

The report as one page to look at: no network, no script, no other file.

Two reports side by side: what changed, and whether that is more than noise.

A report in a terminal.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import rich.box
import rich.console
import rich.table

from pipeline.throughput.clock import Row
from pipeline.throughput.hardware import Machine
from pipeline.throughput.model import WORTH, Remedy
from pipeline.tools.errors import UsageError
from pipeline.tools.files import atomic_write

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
        picture=waterfall(image_parts(table), 1e6, "µs"),
        step=waterfall(step, 1e3, "ms") if step else [],
        queue=queue_plot(table), sweep=sweep_plot(table),
    )  # fmt: skip
    with atomic_write(path) as file:
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


def image_parts(table: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a core that an image takes at each stage, alone."""
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
    """Images a second over threads: DALI alone, and the stream as predicted."""
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


SURE = 3.0
"""Standard errors of a difference that are more than noise."""
LEAST = 0.03
"""Share below which no difference counts, however steady both were: machines drift."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row then and now."""

    name: str
    before: float
    """Images a second."""
    after: float
    noise: float
    """Share of it that a difference has to exceed."""

    @property
    def ratio(self) -> float:
        """Now over then."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same` within the noise."""
        if abs(self.ratio - 1) <= self.noise:
            return "same"
        return "faster" if self.ratio > 1 else "slower"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the rows that both have, the whole stream last."""
    before = {row["name"]: row for row in (*old["stages"], old["whole"])}
    found = []
    for row in (*new["stages"], new["whole"]):
        if (then := before.get(row["name"])) is not None and then["img_s"] > 0:
            error = (then["error"] ** 2 + row["error"] ** 2) ** 0.5
            found.append(Change(name=row["name"], before=then["img_s"], after=row["img_s"],
                                noise=max(LEAST, SURE * error)))  # fmt: skip
    return found


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the two besides their speed, in words."""
    found = []
    for part in ("machine", "setting", "data"):
        for name, value in new[part].items():
            if (then := old[part].get(name)) != value:
                found.append(f"{name}: {then} -> {value}")
    return found


def regressed(found: list[Change]) -> bool:
    """Whether the whole stream is slower beyond noise; a stage that does not matter may be."""
    return bool(found) and found[-1].verdict == "slower"


VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """One examination of one stream on one machine."""

    date: str
    command: str
    machine: Machine
    data: dict[str, Any]
    """Where, images, bytes, encoding; whether it fits into memory."""
    setting: dict[str, Any]
    """Of the stream."""
    stages: tuple[Row, ...]
    whole: Row
    waits: dict[str, float]
    """Share of the stream's time that its taker waited for each part, 0..1."""
    read_full: float
    read_empty: float
    queue: tuple[tuple[float, int, int], ...]
    """Seconds, batches that lay read, 1 if pixels were ready: at each batch, thinned."""
    sweep: dict[int, tuple[float, float]]
    """By threads: images a second of DALI alone, and predicted of the stream."""
    knee: int
    """The fewest threads that give nearly all."""
    bounds: tuple[tuple[str, float, str], ...]
    """What holds the stream back, lowest first: name, images a second, how."""
    state: str
    """In words: from memory, disk or store; what bounds and remedies are about."""
    img_s: float
    """In that state."""
    model: float
    """What the model of the bounds gives for it, over that; bounds are scaled to fit."""
    remedies: tuple[Remedy, ...]
    verdict: str
    needed: float | None = None
    """Images a second that the trainer takes."""
    warnings: tuple[str, ...] = ()
    version: int = field(default=VERSION)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.table(), indent=1).encode() + b"\n")

    def table(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = rounded(dataclasses.asdict(self))
        return found


def rounded(value: Any) -> Any:
    """Numbers with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def load(path: Path) -> dict[str, Any]:
    """Return the table of a saved report.

    Raises:
        UsageError: there is none, or it is no report.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version = table["version"]
        _ = table["whole"]["img_s"], table["stages"], table["machine"]["cores"]
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a throughput.json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no report of pipeline.throughput; name a throughput.json"
        ) from error
    if version != VERSION:
        raise UsageError(f"{path} is of version {version}, not {VERSION}; make it anew")
    found: dict[str, Any] = table
    return found


def show(report: Report, console: rich.console.Console) -> None:
    """Print stages, the stream, remedies and the verdict."""
    machine, setting = report.machine, report.setting
    console.print(
        f"{report.data['where']}: {report.data['pictures']:,} {report.data['encoding']} images, "
        f"{report.data['bytes'] / 1e9:,.2f} GB; {machine.processor}, {machine.cores} cores"
        + (f", {machine.gpu}" if machine.gpu else "")
        + f"; {setting['device']}, {setting['threads']} threads, batch {setting['batch_size']}, "
        f"prefetch {setting['prefetch']}, shuffle {setting['shuffle']}",
        highlight=False,
    )
    console.print(_stages(report), _remedies(report))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    console.print(report.verdict, highlight=False)


def _stages(report: Report) -> rich.table.Table:
    table = rich.table.Table("stage alone", box=rich.box.SIMPLE, pad_edge=False)
    for name in ("img/s", "±", "MB/s", "cores", "limit img/s", "of it"):
        table.add_column(name, justify="right")
    table.add_column("the limit", style="dim")
    for row in (*report.stages, report.whole):
        if row is report.whole:
            table.add_section()
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    return [
        row.name, f"{row.img_s:,.0f}", f"{row.spread:.0%}",
        f"{row.bytes_s / 1e6:,.0f}" if row.bytes_s else "", f"{row.cores:.2f}",
        f"{row.limit_img_s:,.0f}" if row.limit_img_s else "",
        f"{row.share:.0%}" if row.share else "", row.against or row.note,
    ]  # fmt: skip


def _remedies(report: Report) -> rich.table.Table:
    table = rich.table.Table("what could be changed", "how", box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("predicted img/s", justify="right")
    table.add_column("gain", justify="right")
    table.add_column("", style="dim")
    for one in report.remedies:
        if one.gain is None or one.img_s is None:
            table.add_row(one.name, one.change, "", "", one.note)
        else:
            style = "bold" if one.gain >= WORTH else ""
            table.add_row(one.name, one.change, f"{one.img_s:,.0f}", f"{one.gain:.2f}x", one.note,
                          style=style)  # fmt: skip
    return table
