"""What a job needs of cores, disks, networks and caches: reckoned from measured figures.

    python -m pipeline.throughput --plan --gpus 16 --img-s 20000 --store s3 [--measured FILE]

Every figure that goes in is marked: measured (in a `throughput.json`), given, or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import rich.box
import rich.console
import rich.table

HEADROOM = 1.1
"""The stream should give so much more than the trainer takes: then the accelerators are used
90 % and more, as MLPerf Storage demands."""

StoreKind = Literal["disk", "nfs", "s3", "gs", "http"]

ASSUMED_STORES: Mapping[str, tuple[float, str]] = {
    "disk": (2e9, "a local NVMe disk, read end to end"),
    "nfs": (1e9, "a 10 Gbit/s share"),
    "s3": (4 * 85e6, "4 requests at a time of 85 MB/s each, per worker"),
    "gs": (4 * 85e6, "4 requests at a time of 85 MB/s each, per worker"),
    "http": (125e6, "1 Gbit/s"),
}
"""Bytes a second of a worker (disk and nfs: of a node)."""

IMAGENET = 1_281_167
"""Training images of ILSVRC-2012."""
PICTURE_BYTES = 37_300.0
"""Of a 256x256 image at quality 96, tar headers included: the mean of ImageNet's sample here."""
CORE_SECONDS = 6e-4
"""Of a core for an image that the CPU decodes: 2-core AMD EPYC, README's measurement."""


@dataclass(frozen=True)
class Figure:
    """A number, and where it is from."""

    name: str
    value: float
    source: str
    """measured, given, or assumed."""
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Need:
    """One answer."""

    name: str
    value: float
    unit: str
    how: str
    """The reckoning in words."""
    enough: bool | None = None
    """Whether what is known of the store suffices."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The job."""

    gpus: int
    img_s: float
    """Images a second of the whole job."""
    store: StoreKind
    gpus_per_node: int = 8
    pictures: int = 0
    """In an epoch; 0: as measured, or ImageNet's."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What goes in, and what comes out."""

    figures: tuple[Figure, ...]
    needs: tuple[Need, ...]


def plan(question: Question, report: Mapping[str, Any] | None) -> Answer:
    """Reckon.

    Args:
        question: the job.
        report: a `throughput.json`; without one, figures are assumed.
    """
    nodes = -(-question.gpus // question.gpus_per_node)
    pictures, each = _set(question, report)
    core = _core_seconds(report)
    store = _store(question, report)
    img_s, size = question.img_s, pictures.value * each.value
    rate = img_s * each.value * HEADROOM
    lanes = nodes if question.store in ("disk", "nfs") else question.gpus
    have = store.value * (1 if question.store == "nfs" else lanes)
    first = max(pictures.value / img_s, size / have)
    bound = "the store bounds it" if size / have > pictures.value / img_s else "the GPUs bound it"
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
        Need("later epochs", pictures.value / img_s / 60, "min", "from the cache"),
    )  # fmt: skip
    given = Figure("images a second", img_s, "given", "img/s",
                   f"{img_s / question.gpus:,.0f} a GPU")  # fmt: skip
    return Answer(figures=(given, pictures, each, core, store), needs=needs)


def _set(question: Question, report: Mapping[str, Any] | None) -> tuple[Figure, Figure]:
    if report is None:
        count, source, size = IMAGENET, "assumed", PICTURE_BYTES
    else:
        count, source = report["data"]["pictures"], "measured"
        size = report["data"]["bytes"] / count
    if question.pictures:
        return (Figure("images in an epoch", question.pictures, "given"),
                Figure("bytes of an image", size, source, "B"))  # fmt: skip
    note = "ImageNet" if report is None else ""
    return (Figure("images in an epoch", count, source, note=note),
            Figure("bytes of an image", size, source, "B"))  # fmt: skip


def _core_seconds(report: Mapping[str, Any] | None) -> Figure:
    if report is None:
        return Figure("core time of an image", CORE_SECONDS, "assumed", "s",
                      "decoded by the CPU")  # fmt: skip
    seconds = report["whole"]["cores"] / report["whole"]["img_s"]
    where = report["setting"]["device"]
    return Figure("core time of an image", seconds, "measured", "s",
                  f"decoded by the {where.upper()}, {report['machine']['processor']}")  # fmt: skip


def _store(question: Question, report: Mapping[str, Any] | None) -> Figure:
    name = f"{question.store}, bytes a second"
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


def show(answer: Answer, console: rich.console.Console) -> None:
    """Print both tables."""
    table = rich.table.Table("what goes in", box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("from")
    table.add_column("", style="dim")
    for one in answer.figures:
        style = "yellow" if one.source == "assumed" else ""
        table.add_row(one.name, f"{_number(one.value)} {one.unit}", f"[{style or 'default'}]"
                      f"{one.source}[/]", one.note)  # fmt: skip
    console.print(table)
    table = rich.table.Table("what is needed", box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    for need in answer.needs:
        more = {None: "", True: "; the store gives that", False: "; the store does NOT give that"}
        table.add_row(need.name, f"{_number(need.value)} {need.unit}", need.how + more[need.enough])
    console.print(table)


def _number(value: float) -> str:
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.2e}"
