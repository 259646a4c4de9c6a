"""A report in a terminal."""

from __future__ import annotations

import rich.box
import rich.console
import rich.table

from pipeline.throughput.remedies import WORTH
from pipeline.throughput.report import Report
from pipeline.throughput.row import Row


def show(report: Report, console: rich.console.Console) -> None:
    """Print stages, the stream, remedies and the verdict."""
    machine, setting = report.machine, report.setting
    console.print(
        f"{report.data['where']}: {report.data['pictures']:,} {report.data['encoding']} pictures, "
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
