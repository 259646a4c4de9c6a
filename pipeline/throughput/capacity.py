"""Cores, disks, networks and caches that a job needs, computed from measured figures.

Every input is marked: measured (in a `throughput.json`), given, or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.console
from rich.table import Column, Table
from rich.text import Text

from pipeline.options import StoreKind

HEADROOM = 1.1
"""Rate of the stream over the trainer's at which accelerators are 90 % busy (MLPerf Storage)."""

ASSUMED_STORES: Mapping[str, tuple[float, str]] = {
    "disk": (2e9, "a local NVMe disk, read end to end"),
    "nfs": (1e9, "a 10 Gbit/s share"),
    "s3": (4 * 85e6, "4 requests at a time of 85 MB/s each, per worker"),
    "gs": (4 * 85e6, "4 requests at a time of 85 MB/s each, per worker"),
    "http": (125e6, "1 Gbit/s"),
}
"""Bytes per second of a worker (disk and nfs: of a node), and where the figure is from."""

IMAGENET = 1_281_167
"""Training images of ILSVRC-2012."""
PICTURE_BYTES = 37_300.0
"""Bytes of a 256x256 JPEG of quality 96 with its tar header, mean of a sample of ImageNet."""
CORE_SECONDS = 6e-4
"""CPU seconds per image decoded on the CPU (2-core AMD EPYC, docs/results.md)."""


@dataclass(frozen=True)
class Figure:
    """An input, and where it is from."""

    name: str
    value: float
    source: str
    """measured, given, or assumed."""
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Need:
    """A resource that the job needs."""

    name: str
    value: float
    unit: str
    how: str
    """The computation in words."""
    enough: bool | None = None
    """True if the store delivers that; None where it does not matter."""


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """Inputs and needs of a job."""

    figures: tuple[Figure, ...]
    needs: tuple[Need, ...]


def plan_capacity(
    report: Mapping[str, Any] | None, *, gpus: int, img_s: float, store: StoreKind,
    gpus_per_node: int = 8, images: int = 0,
) -> CapacityPlan:  # fmt: skip
    """Compute the needs of a job.

    Args:
        report: content of a `throughput.json`; without one, figures are assumed.
        gpus: GPUs of the job.
        img_s: images per second of the whole job.
        store: kind of store that holds the data set.
        gpus_per_node: GPUs of a node.
        images: images in an epoch; 0: as measured, or ImageNet's.
    """
    nodes = -(-gpus // gpus_per_node)
    epoch, each, core = _find_figures(report, images)
    source = _find_store(store, report)
    is_local = store in ("disk", "nfs")
    seconds, size = epoch.value / img_s, epoch.value * each.value
    cores, rate = img_s * core.value * HEADROOM, img_s * each.value * HEADROOM
    have = source.value * {"nfs": 1, "disk": nodes}.get(store, gpus)
    needs = (
        Need("nodes", nodes, "", f"{gpus} GPUs, {gpus_per_node} a node"),
        Need("cores, all nodes", cores, "",
             f"{img_s:,.0f} img/s x {core.value * 1e6:,.0f} µs of a core x {HEADROOM}"),
        Need("cores, a node", cores / nodes, "", "the same, shared out"),
        Need("read, all nodes", rate / 1e9, "GB/s",
             f"{img_s:,.0f} img/s x {each.value / 1e3:,.1f} kB x {HEADROOM}", have >= rate),
        Need("read, a node", rate / nodes / 1e9, "GB/s",
             f"its network (or its disk) in the first epoch: {rate / nodes * 8 / 1e9:,.1f} Gbit/s"),
        Need("cache, a node", size / 1e9, "GB", "the set itself" if is_local
             else "--cache-size; with less, epochs after the first fetch again"),
        Need("memory, a node", size / 1e9, "GB", "to read from the page cache, else the disk gives "
             f"{rate / nodes / 1e9:,.2f} GB/s all the time"),
        Need("first epoch", max(seconds, size / have) / 60, "min",
             "the store bounds it" if size / have > seconds else "the GPUs bound it"),
        Need("later epochs", seconds / 60, "min", "from the cache"),
    )  # fmt: skip
    given = Figure("images per second", img_s, "given", "img/s", f"{img_s / gpus:,.0f} per GPU")
    return CapacityPlan(figures=(given, epoch, each, core, source), needs=needs)


def _find_figures(report: Mapping[str, Any] | None, images: int) -> list[Figure]:
    """Return images in an epoch, and bytes and core seconds of an image."""
    if report is None:
        found = [
            Figure("images in an epoch", IMAGENET, "assumed", note="ImageNet"),
            Figure("bytes of an image", PICTURE_BYTES, "assumed", "B"),
            Figure("core time of an image", CORE_SECONDS, "assumed", "s", "decoded by the CPU"),
        ]
    else:
        data, whole = report["data"], report["whole"]
        decoder = f"decoded by the {report['setting']['device'].upper()}"
        found = [
            Figure("images in an epoch", data["pictures"], "measured"),
            Figure("bytes of an image", data["bytes"] / data["pictures"], "measured", "B"),
            Figure("core time of an image", whole["cores"] / whole["img_s"], "measured", "s",
                   f"{decoder}, {report['machine']['processor']}"),
        ]  # fmt: skip
    if images:
        found[0] = Figure("images in an epoch", images, "given")
    return found


def _find_store(store: StoreKind, report: Mapping[str, Any] | None) -> Figure:
    name = f"{store}, bytes per second"
    rows = {row["name"]: row for row in report["stages"]} if report else {}
    if store == "disk" and (row := rows.get("storage, cold")) and row["limit_img_s"]:
        each = row["bytes_s"] / row["img_s"]
        return Figure(name, row["limit_img_s"] * each, "measured", "B/s", "files end to end")
    fetched = rows.get("fetch from the store")
    if fetched and report and str(report["data"]["where"]).startswith(store):
        return Figure(name, fetched["bytes_s"], "measured", "B/s", "per worker")
    value, note = ASSUMED_STORES[store]
    return Figure(name, value, "assumed", "B/s", note)


def print_plan(answer: CapacityPlan, console: rich.console.Console) -> None:
    """Print both tables."""
    table = Table("what goes in", Column(justify="right"), "from", Column(style="dim"),
                  box=rich.box.SIMPLE, pad_edge=False)  # fmt: skip
    for one in answer.figures:
        style = "yellow" if one.source == "assumed" else "default"
        table.add_row(one.name, f"{_format_number(one.value)} {one.unit}",
                      Text(one.source, style), one.note)  # fmt: skip
    console.print(table)
    table = Table("what is needed", Column(justify="right"), Column(style="dim"),
                  box=rich.box.SIMPLE, pad_edge=False)  # fmt: skip
    more = {None: "", True: "; the store gives that", False: "; the store does NOT give that"}
    for need in answer.needs:
        table.add_row(
            need.name, f"{_format_number(need.value)} {need.unit}", need.how + more[need.enough]
        )
    console.print(table)


def _format_number(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.2e}"
