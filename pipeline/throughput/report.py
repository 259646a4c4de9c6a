"""The report of a measurement: JSON file, text, page, and the comparison of two reports."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import torch
from rich.table import Column, Table
from rich.text import Text

from pipeline.dataset.manifest import identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.remote.filesystem import is_remote
from pipeline.throughput.clock import SURE, StageRow
from pipeline.throughput.hardware import Machine, describe_machine
from pipeline.throughput.model import MEANING, UNSTEADY, WORTH, Remedy
from pipeline.tools import charts
from pipeline.tools.errors import UsageError
from pipeline.tools.files import atomic_write, read_document
from pipeline.tools.jsonl import parse_json
from pipeline.tools.text import hide_credentials, human_bytes


def write_page(
    path: Path, table: Mapping[str, Any], step: Mapping[str, float] | None = None
) -> None:
    """Write the page of a report.

    Args:
        path: of the page.
        table: `ThroughputReport.to_table()`.
        step: seconds of the parts of a training step, if a trainer was measured too.
    """
    rows = {row["name"]: row for row in table["stages"]}
    names = ("storage, page cache", "checksum", "feed", "decode", "normalise", "hand-over")
    image = {name: rows[name]["cores"] / rows[name]["img_s"] for name in names if name in rows}
    templates = charts.page_templates(Path(__file__).parent)
    templates.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    text = templates.get_template("page.html.j2").render(
        r=table, short=summarize(table, image), stages=make_stage_bars(table),
        image=make_waterfall(image, 1e6, "µs"),
        step=make_waterfall(step, 1e3, "ms") if step else [],
        charts=[chart for chart in (draw_queue(table), draw_threads(table)) if chart],
    )  # fmt: skip
    with atomic_write(path) as file:
        file.write(text.encode(errors="replace"))


def summarize(table: Mapping[str, Any], image: Mapping[str, float]) -> dict[str, Any]:
    """Return what the head of the page says: limit, next bound, best remedy, cost of an image.

    Args:
        table: `ThroughputReport.to_table()`.
        image: seconds of a core by stage.
    """
    (first, img_s, detail), *others = table["bounds"]
    worth = [one for one in table["remedies"] if (one["gain"] or 0) >= WORTH]
    best = next((one for one in worth if one["sure"]), worth[0] if worth else None)
    total, most = sum(image.values()), max(image, key=lambda name: image[name], default="")
    share = table["img_s"] / table["needed"] if table["needed"] else None
    return {
        "limit": MEANING[first],
        "detail": f"{img_s:,.0f} img/s, {detail or 'measured'}",
        "trainer": "" if share is None else
        f"A trainer that takes {table['needed']:,.0f} img/s gets {share:.2f} times that.",
        "next": (MEANING[others[0][0]], others[0][1]) if others else None,
        "remedy": best and {
            **best, "doubt": "not steady" if UNSTEADY in best["note"] else "no more than noise",
        },
        "cost": (total * 1e6, most, image[most] / total) if total else None,
    }  # fmt: skip


def make_stage_bars(table: Mapping[str, Any]) -> list[charts.Bar]:
    """Return stages and the stream on a logarithmic scale: they lie orders of magnitude apart."""
    rows = [row for row in (*table["stages"], table["whole"]) if row["name"] != "hand-over"]
    top = max(max(row["img_s"], row["limit_img_s"] or 0) for row in rows)
    low = min(row["img_s"] for row in rows) / 3

    def length(value: float) -> float:
        return max(0.02, math.log(value / low) / math.log(top / low))

    return [
        charts.Bar(
            name=row["name"],
            figure=f"{row['img_s']:,.0f}" + (f" · {row['share']:.0%}" if row["share"] else ""),
            length=length(row["img_s"]),
            limit=length(row["limit_img_s"]) if row["limit_img_s"] else None,
            note=f"{row['against'] or row['note']}"
            + (f": {row['limit_img_s']:,.0f} img/s" if row["limit_img_s"] else ""),
            color=charts.COLUMN_A if row is table["whole"] else charts.COLUMN_B,
        )
        for row in rows
    ]


def make_waterfall(parts: Mapping[str, float], scale: float, unit: str) -> list[charts.Bar]:
    """Return a bar for each part, where it lies in the sum of all."""
    total, start, found = sum(parts.values()) or 1.0, 0.0, []
    for number, (name, value) in enumerate(parts.items()):
        share = value / total
        figure = f"{value * scale:,.1f} {unit} · {share:.1%}"
        color, _ = charts.pick_series(number % len(charts.SERIES))
        found.append(charts.Bar(name, figure, share, start=start, color=color))
        start += share
    return found


def draw_queue(table: Mapping[str, Any]) -> charts.Chart | None:
    """Draw the batches that lay read at each moment, and a dot where the pixels were not ready."""
    points = np.array(table["queue"], float).reshape(-1, 3)
    if len(points) < 2:
        return None
    seconds, read, ready = points.T
    most = max(table["setting"]["prefetch"], 1)
    axes = charts.new_axes((0, seconds[-1] or 1.0), (0, most), lambda value: f"{value:g} s")
    axes.set_yticks(range(0, most + 1, max(1, most // 4)))
    charts.draw_line(axes, seconds, read, charts.COLUMN_B)
    late = seconds[ready == 0]
    charts.draw_dots(axes, late, np.zeros(len(late)), charts.COLUMN_A, size=4)
    return charts.as_chart(
        axes, "Batches read ahead",
        f"At each batch taken: how many lay read and waited for DALI ({table['read_full']:.0%} of "
        f"the time as many as may, {table['read_empty']:.0%} none). Empty: reading holds the "
        "stream back. Full: what comes after it does. Dots: the pixels were waited for.",
    )  # fmt: skip


def draw_threads(table: Mapping[str, Any]) -> charts.Chart | None:
    """Draw images per second over threads: DALI alone, and the stream as predicted."""
    rates = {int(count): pair for count, pair in table["sweep"].items()}  # text in a JSON file
    counts, knee = sorted(rates), table["knee"]
    if len(counts) < 2:
        return None
    x = np.array(counts, float)
    alone, predicted = np.array([rates[count] for count in counts], float).T
    top = charts.round_up(max(alone.max(), predicted.max()))
    axes = charts.new_axes((counts[0], counts[-1]), (0, top), y_label=lambda value: f"{value:,.0f}")
    axes.set_xticks(counts)
    charts.draw_line(axes, x, alone, charts.SOFT, "DALI alone", dashes="--")
    charts.draw_line(axes, x, predicted, charts.COLUMN_B, "the stream, predicted")
    charts.draw_dots(axes, np.array([knee], float), np.array([rates[knee][1]]), charts.COLUMN_A)
    return charts.as_chart(
        axes, "Threads", f"img/s by DALI's threads; {knee} of them give nearly all (the dot)."
    )


LEAST = 0.03
"""Relative difference up to which rates count as the same: machines drift."""


@dataclass(frozen=True, kw_only=True)
class RateComparison:
    """The rate of a row in two reports."""

    name: str
    before: float
    """Images per second."""
    after: float
    noise: float
    """Relative difference that is still noise."""

    @property
    def ratio(self) -> float:
        """New over old rate."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same` within the noise."""
        if abs(self.ratio - 1) <= self.noise:
            return "same"
        return "faster" if self.ratio > 1 else "slower"


def compare_reports(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[RateComparison]:
    """Compare the rows that both reports have, the whole stream last."""
    before = {row["name"]: row for row in (*old["stages"], old["whole"]) if row["img_s"] > 0}
    found = []
    for row in (*new["stages"], new["whole"]):
        if then := before.get(row["name"]):
            noise = max(LEAST, SURE * math.hypot(then["error"], row["error"]))
            found.append(RateComparison(name=row["name"], before=then["img_s"], after=row["img_s"],
                                        noise=noise))  # fmt: skip
    return found


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference of machine, settings and data between two reports.

    Settings that the older report does not have yet are left out.
    """
    return [
        f"{name}: {old[part][name]} -> {value}"
        for part in ("machine", "setting", "data")
        for name, value in new[part].items()
        if name in old[part] and old[part][name] != value
    ]


def has_regressed(found: list[RateComparison]) -> bool:
    """Return whether the whole stream is slower beyond noise; a single stage does not count."""
    return bool(found) and found[-1].verdict == "slower"


VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """All measurements of a stream on a machine."""

    date: str
    command: str
    machine: Machine
    data: dict[str, Any]
    """Address, number of images, bytes, encoding, whether it fits into memory, and its identity."""
    setting: dict[str, Any]
    """Settings of the stream."""
    stages: tuple[StageRow, ...]
    whole: StageRow
    waits: dict[str, float]
    """Fraction of the time, 0..1, that the caller waited for each stage."""
    read_full: float
    """Fraction of the batches, 0..1, taken while the queue of read batches was full."""
    read_empty: float
    """Likewise, while it was empty."""
    queue: tuple[tuple[float, int, int], ...]
    """(seconds, batches that were read, 1 if pixels were ready) at each batch, thinned."""
    sweep: dict[int, tuple[float, float]]
    """Images per second of DALI alone and, predicted, of the stream, by threads."""
    knee: int
    """The fewest threads that give 95 % of the highest rate."""
    bounds: tuple[tuple[str, float, str], ...]
    """Upper bounds of the rate, lowest first: name, images per second, detail."""
    state: str
    """Source of the bytes, in words (page cache, disk, store); bounds and remedies are for it."""
    img_s: float
    """Images per second there."""
    model: float
    """Predicted over measured rate; the bounds are scaled by it."""
    remedies: tuple[Remedy, ...]
    verdict: str
    needed: float | None = None
    """Images per second that the trainer takes."""
    warnings: tuple[str, ...] = ()
    version: int = VERSION

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.to_table(), indent=1).encode() + b"\n")

    def to_table(self) -> dict[str, Any]:
        """Return the report as plain values with five digits."""
        found: dict[str, Any] = round_floats(dataclasses.asdict(self))
        return found


def round_floats(value: Any) -> Any:
    """Return a value whose numbers have five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: round_floats(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [round_floats(one) for one in value]
    return value


def load_report(path: Path) -> dict[str, Any]:
    """Return the content of a saved report.

    Raises:
        UsageError: the file is missing, no report, or of another version.
    """
    try:
        table: dict[str, Any] = parse_json(read_document(path))
        version = table["version"]
        if version == VERSION:
            _check_table(table)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a throughput.json"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no report of pipeline.throughput; name a throughput.json"
        ) from error
    if version != VERSION:
        raise UsageError(f"{path} is of version {version}, not {VERSION}; measure again")
    return table


def _check_table(table: Mapping[str, Any]) -> None:
    """Check what is read of a saved report: by comparisons, plans and tables.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: something else is there, or nothing.
    """
    numbers = [table["machine"]["cores"], table["data"]["bytes"]]
    positive = [table["data"]["pictures"], table["whole"]["img_s"]]
    for row in (*table["stages"], table["whole"]):
        numbers += [row["img_s"], row["error"], row["bytes_s"], row["cores"],
                    row["limit_img_s"] or 0]  # fmt: skip
        row["name"].encode()
    for text in (table["machine"]["processor"], table["data"]["where"],
                 table["setting"]["device"]):  # fmt: skip
        text.encode()
    if not all(0 <= number < math.inf for number in numbers + positive) or min(positive) <= 0:
        raise ValueError("a number is out of range")


def find_other_origin(table: Mapping[str, Any], data: str | None) -> str:
    """Return what a saved report is of, if not of this machine and data set; "" if it is of them.

    Args:
        table: content of the report.
        data: folder or address of the data set; None: the one that the report is of, if that is a
            folder that is as it was.

    Raises:
        DuetError: `data` holds no data set, or its store does not answer.
    """
    machine = table["machine"]
    here = describe_machine(bool(machine.get("gpu")) and torch.cuda.is_available())
    for name in ("processor", "cores", "gpu"):
        if machine.get(name) != getattr(here, name):
            return f"a machine with {name} {machine.get(name)}, and this one has " + str(
                getattr(here, name) or "none"
            )
    where = str(table["data"]["where"])
    if data is None and (is_remote(where) or not Path(where).is_dir()):
        return f"{hide_credentials(where)}, which cannot be looked at from here"
    known = table["data"].get("sha256")
    folder = fetch_metadata(data or where, version=table["setting"].get("version"))
    if known is not None and known != identity(folder):
        return f"another data set than {hide_credentials(data or where)} is now"
    if known is None and data is not None and data != where:
        return hide_credentials(where)  # a report of before its identity was kept
    return ""


def print_report(report: ThroughputReport, console: rich.console.Console) -> None:
    """Print stages, stream, remedies and verdict."""
    machine, setting, data = report.machine, report.setting, report.data
    console.print(
        f"{hide_credentials(data['where'])}: {data['pictures']:,} {data['encoding']} images, "
        f"{human_bytes(data['bytes'])}; {machine.processor}, {machine.cores} cores"
        + (f", {machine.gpu}" if machine.gpu else "")
        + f"; {setting['device']}, {setting['threads']} threads, batch {setting['batch_size']}, "
        f"prefetch {setting['prefetch']}, shuffle {setting['shuffle']}"
    )
    console.print(_stage_table(report), _remedy_table(report))
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    console.print(report.verdict)


def _stage_table(report: ThroughputReport) -> Table:
    names = ("img/s", "±", "MB/s", "cores", "limit img/s", "of it")
    numbers = (Column(name, justify="right") for name in names)
    table = Table("stage alone", *numbers, Column("the limit", style="dim"),
                  box=rich.box.SIMPLE, pad_edge=False)  # fmt: skip
    for row in (*report.stages, report.whole):
        if row is report.whole:
            table.add_section()
        table.add_row(
            row.name, f"{row.img_s:,.0f}", f"{row.spread:.0%}",
            f"{row.bytes_s / 1e6:,.0f}" if row.bytes_s else "", f"{row.cores:.2f}",
            f"{row.limit_img_s:,.0f}" if row.limit_img_s else "",
            f"{row.share:.0%}" if row.share else "", row.against or row.note,
        )  # fmt: skip
    return table


def _remedy_table(report: ThroughputReport) -> Table:
    numbers = (Column(name, justify="right") for name in ("predicted img/s", "gain"))
    table = Table("what could be changed", "how", *numbers, Column(style="dim"),
                  box=rich.box.SIMPLE, pad_edge=False)  # fmt: skip
    for one in report.remedies:
        table.add_row(
            one.name, one.change, f"{one.img_s:,.0f}" if one.img_s is not None else "",
            f"{one.gain:.2f}x" if one.gain is not None else "", one.note,
            style="bold" if one.is_worth and one.sure else "",
        )  # fmt: skip
    return table
