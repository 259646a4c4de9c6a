"""Time of 90 epochs of ImageNet on 1 to 512 GPUs, computed: `python benchmarks/scaling.py`.

Nothing here runs on a GPU: rates and bandwidths are arguments, whose defaults are published figures
or specifications, and are printed with the result. A step takes

    max(images a GPU / rate of a GPU, images a GPU / rate of its decoding) + exposed all-reduce

where the all-reduce of the gradients is hidden behind the backward pass in the best case, and not
at all in the worst. Both columns are on each GPU, which exchanges nothing then; weights, and so the
gradients that are reduced, are those of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from model.summary import FLOAT32_BYTES, build_table, sum_rows

IMAGES = 1_281_167
"""Training images of ILSVRC-2012."""
NODE = 8
"""GPUs of a node."""
RECIPES = {1: ("dexp", 128), 8: ("dexp, --rate-scaling linear", 1024), 64: ("lars8k", 8192),
           512: ("lars32k", 32_768)}  # fmt: skip
"""Preset and batch by the number of GPUs."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Compute the time of 90 epochs from rates of one GPU and bandwidths; nothing is measured."""

    rate: float = 16_487.0
    """Images per second that a GPU trains on without data. Default: A100, AlexNet of one column,
    no normalization, synthetic images, float16 (Lambda's tf_cnn_benchmarks, 2021): published."""
    decoding: float = 21_567.0
    """Images per second that the JPEG engines and cores of a GPU decode. Default: DALI on an H100,
    full-size images, 70 host threads: published."""
    within: float = 300e9
    """Bytes per second and GPU that an all-reduce sends within a node. Default: NVLink of an A100,
    600 GB/s in both directions: specification."""
    between: float = 25e9
    """Bytes per second and GPU between nodes. Default: one port of 200 Gbit/s for each GPU:
    specification."""
    epochs: float = 90.0
    """Passes over the training images."""


@dataclass(frozen=True)
class Estimate:
    """A row of the table."""

    gpus: int
    recipe: str
    batch: int
    steps: int
    """Steps of the whole run."""
    compute: float
    """Seconds of a step's passes, and of decoding where that takes longer."""
    reduce: float
    """Seconds of a step's all-reduce."""
    limit: str
    """Slower of the two: "GPU" or "decoding"."""

    @property
    def best(self) -> float:
        """Seconds of the run with the all-reduce hidden as far as the passes are long."""
        return self.steps * max(self.compute, self.reduce)

    @property
    def worst(self) -> float:
        """Seconds of the run with the all-reduce after the passes."""
        return self.steps * (self.compute + self.reduce)


def compute_reduce_seconds(gpus: int, size: int, figures: Figures) -> float:
    """Seconds of a ring all-reduce of `size` bytes over all GPUs, at its slowest link."""
    link = figures.within if gpus <= NODE else figures.between
    return 2 * (gpus - 1) / gpus * size / link


def estimate(gpus: int, figures: Figures) -> Estimate:
    """Return the row for a number of GPUs in `RECIPES`."""
    recipe, batch = RECIPES[gpus]
    size = sum_rows(build_table()).parameters * FLOAT32_BYTES
    rate = min(figures.rate, figures.decoding)
    return Estimate(
        gpus, recipe, batch,
        steps=round(figures.epochs * IMAGES / batch),
        compute=batch / gpus / rate,
        reduce=compute_reduce_seconds(gpus, size, figures),
        limit="GPU" if figures.rate <= figures.decoding else "decoding",
    )  # fmt: skip


def format_time(seconds: float) -> str:
    """Format seconds as people read them: hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def format_table(figures: Figures) -> str:
    """Format the table as Markdown."""
    lines = [
        "| GPUs | preset | batch | steps | step, passes | step, all-reduce | "
        f"{figures.epochs:g} epochs, all-reduce hidden | not hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in RECIPES:
        row = estimate(gpus, figures)
        lines.append(
            f"| {row.gpus} | {row.recipe} | {row.batch:,} | {row.steps:,} | "
            f"{row.compute * 1e3:.1f} ms ({row.limit}) | {row.reduce * 1e3:.1f} ms | "
            f"{format_time(row.best)} | {format_time(row.worst)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures that go in, and the table that comes out."""
    figures = tyro.cli(Figures, args=argv, prog="python benchmarks/scaling.py")
    print(
        f"computed, not measured: {figures.rate:,.0f} img/s a GPU, {figures.decoding:,.0f} "
        f"decoded, {figures.within / 1e9:g} GB/s within a node of {NODE}, "
        f"{figures.between / 1e9:g} GB/s between nodes\n"
    )
    print(format_table(figures))


if __name__ == "__main__":
    main()
