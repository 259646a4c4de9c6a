"""What a job needs of cores, disks, networks and caches, computed from measured figures.

    python -m pipeline.throughput --plan --gpus 16 --img-s 20000 --store s3 [--measured FILE]

Every input is marked: measured (in a `throughput.json`), given, or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import rich.box
import rich.console
import rich.table

HEADROOM = 1.1
"""Rate of the stream over the trainer's at which accelerators are 90 % busy (MLPerf Storage)."""

StoreKind = Literal["disk", "nfs", "s3", "gs", "http"]

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
    """Whether the store delivers that; None where it does not matter."""


@dataclass(frozen=True, kw_only=True)
class CapacityQuestion:
    """The job to plan for."""

    gpus: int
    img_s: float
    """Images per second of the whole job."""
    store: StoreKind
    gpus_per_node: int = 8
    images: int = 0
    """Images in an epoch; 0: as measured, or ImageNet's."""


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """Inputs and needs of a job."""

    figures: tuple[Figure, ...]
    needs: tuple[Need, ...]


def plan_capacity(question: CapacityQuestion, report: Mapping[str, Any] | None) -> CapacityPlan:
    """Compute the needs of a job.

    Args:
        question: the job.
        report: content of a `throughput.json`; without one, figures are assumed.
    """
    nodes = -(-question.gpus // question.gpus_per_node)
    images, each = _find_images(question, report)
    core = _find_core_seconds(report)
    store = _find_store(question, report)
    img_s, size = question.img_s, images.value * each.value
    rate = img_s * each.value * HEADROOM
    lanes = nodes if question.store in ("disk", "nfs") else question.gpus
    have = store.value * (1 if question.store == "nfs" else lanes)
    first = max(images.value / img_s, size / have)
    bound = "the store bounds it" if size / have > images.value / img_s else "the GPUs bound it"
    gb = size / 1e9
    needs = (
        Need("nodes", nodes, "", f"{question.gpus} GPUs, {question.gpus_per_node} a node"),
        Need("cores, all nodes", img_s * core.value * HEADROOM, "",
             f"{img_s:,.0f} img/s x {core.value * 1e6:,.0f} µs of a core x {HEADROOM}"),
        Need("cores, a node", img_s * core.value * HEADROOM / nodes, "", "the same, shared out"),
        Need("read, all nodes", rate / 1e9, "GB/s",
             f"{img_s:,.0f} img/s x {each.value / 1e3:,.1f} kB x {HEADROOM}", have >= rate),
        Need("read, a node", rate / nodes / 1e9, "GB/s",
             f"its network (or its disk) in the first epoch: {rate / nodes * 8 / 1e9:,.1f} Gbit/s"),
        Need("cache, a node", gb, "GB",
             "--cache-size; with less, epochs after the first fetch again"
             if question.store not in ("disk", "nfs") else "the set itself"),
        Need("memory, a node", gb, "GB", "to read from the page cache, else the disk gives "
             f"{rate / nodes / 1e9:,.2f} GB/s all the time"),
        Need("first epoch", first / 60, "min", bound),
        Need("later epochs", images.value / img_s / 60, "min", "from the cache"),
    )  # fmt: skip
    given = Figure("images per second", img_s, "given", "img/s",
                   f"{img_s / question.gpus:,.0f} per GPU")  # fmt: skip
    return CapacityPlan(figures=(given, images, each, core, store), needs=needs)


def _find_images(
    question: CapacityQuestion, report: Mapping[str, Any] | None
) -> tuple[Figure, Figure]:
    if report is None:
        count, source, size = IMAGENET, "assumed", PICTURE_BYTES
    else:
        count, source = report["data"]["pictures"], "measured"
        size = report["data"]["bytes"] / count
    if question.images:
        return (Figure("images in an epoch", question.images, "given"),
                Figure("bytes of an image", size, source, "B"))  # fmt: skip
    note = "ImageNet" if report is None else ""
    return (Figure("images in an epoch", count, source, note=note),
            Figure("bytes of an image", size, source, "B"))  # fmt: skip


def _find_core_seconds(report: Mapping[str, Any] | None) -> Figure:
    if report is None:
        return Figure("core time of an image", CORE_SECONDS, "assumed", "s",
                      "decoded by the CPU")  # fmt: skip
    seconds = report["whole"]["cores"] / report["whole"]["img_s"]
    where = report["setting"]["device"]
    return Figure("core time of an image", seconds, "measured", "s",
                  f"decoded by the {where.upper()}, {report['machine']['processor']}")  # fmt: skip


def _find_store(question: CapacityQuestion, report: Mapping[str, Any] | None) -> Figure:
    name = f"{question.store}, bytes per second"
    rows = {row["name"]: row for row in report["stages"]} if report else {}
    if question.store == "disk" and (row := rows.get("storage, cold")) and row["limit_img_s"]:
        each = row["bytes_s"] / row["img_s"]
        return Figure(name, row["limit_img_s"] * each, "measured", "B/s", "files end to end")
    remote = question.store not in ("disk", "nfs")
    if remote and report and (row := rows.get("fetch from the store")):  # noqa: SIM102
        if str(report["data"]["where"]).startswith(question.store):
            return Figure(name, row["bytes_s"], "measured", "B/s", "per worker")
    value, note = ASSUMED_STORES[question.store]
    return Figure(name, value, "assumed", "B/s", note)


def print_plan(answer: CapacityPlan, console: rich.console.Console) -> None:
    """Print both tables."""
    table = rich.table.Table("what goes in", box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("from")
    table.add_column("", style="dim")
    for one in answer.figures:
        style = "yellow" if one.source == "assumed" else ""
        table.add_row(one.name, f"{_format_number(one.value)} {one.unit}", f"[{style or 'default'}]"
                      f"{one.source}[/]", one.note)  # fmt: skip
    console.print(table)
    table = rich.table.Table("what is needed", box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for need in answer.needs:
        more = {None: "", True: "; the store gives that", False: "; the store does NOT give that"}
        table.add_row(
            need.name, f"{_format_number(need.value)} {need.unit}", need.how + more[need.enough]
        )
    console.print(table)


def _format_number(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.2e}"
