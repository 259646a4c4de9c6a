"""A training step with each normalization, and of the four-layer network: img/s, CPU.

    python benchmarks/norms.py [--width 1.0] [--batch-size 128] [--rounds 3] [--json]

Forward, backward and update of random images, in the type that `cluster.train` takes there
(bfloat16 where the CPU has matrix units for it, unless `--dtype` says otherwise). All networks are
in one process and take turns; rates are the best and the median over the rounds, ratios medians of
the ratios within rounds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from harness.report import Figure, Options, Report, Table, start
from harness.rounds import median_ratio, take_turns
from nets import Step, duet_step

from cluster.training.precision import compute_dtype, keep_memory
from model.alexnet import AlexNet
from model.architecture import Design
from pipeline.tools.units import cpu_count

LANES = {
    "lrn": Design(),
    "lrn of 9 maps": Design(lrn_size=9),
    "constant factor": Design(norm="scale"),
    "lrn and spatial (source)": Design(spatial_norm=True),
    "spatial": Design(norm="spatial"),
    "lcn": Design(norm="lcn"),
    "batch": Design(norm="batch"),
    "none": Design(norm="none"),
    "conv6": Design(conv6=True),
    "four layers, no norm": Design(net="four", columns=1, norm="none"),
    "locally connected (11 %)": Design(net="local11", columns=1, lrn_size=9, lrn_k=1.0),
}
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Time training steps on the CPU, one normalization after the other."""

    width: float = 1.0
    """Factor on all maps and units; the four-layer network stays as it is."""
    classes: int = 1000
    """Number of classes."""
    batch_size: int = 128
    """Images in a step."""
    threads: int = cpu_count()
    """CPU threads."""
    rounds: int = 3
    """Number of turns, of one step, of each network."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the computation, as the setting of that name in `cluster.train`."""
    cpu_time: bool = False
    """Seconds of this process on a core, not of the clock: where others run; with one thread."""


def measure(setup: Setup, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return img/s of every round of each lane."""
    images = 60 * torch.randn(setup.batch_size, 3, 224, 224)
    labels = torch.randint(0, setup.classes, (setup.batch_size,))
    now = time.process_time if setup.cpu_time else time.perf_counter
    ways = {}
    for name, design in LANES.items():
        width = {"width": setup.width} if design.net == "paper" else {}
        one = Design(**{**vars(design), **width})
        step, numbers = duet_step(AlexNet(classes=setup.classes, design=one)), itertools.count()

        def measure_rate(step: Step = step, numbers: Iterator[int] = numbers) -> float:
            start = now()
            step(next(numbers), images, labels, dtype)
            return setup.batch_size / (now() - start)

        ways[name] = measure_rate
    return take_turns(ways, setup.rounds, WARM_UP)


def report(setup: Setup) -> Report:
    """Measure all networks."""
    keep_memory()
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    dtype = compute_dtype(setup.dtype, torch.device("cpu"))
    rates = measure(setup, dtype)
    title = f"width {setup.width:g}, batch {setup.batch_size}, {setup.threads} threads, {dtype}"
    rows = [
        (
            name, f"{max(found):,.0f}", f"{statistics.median(found):,.0f}",
            f"{median_ratio(found, rates['lrn']):.2f}",
        )
        for name, found in rates.items()
    ]  # fmt: skip
    return Report(
        tables={"norms": Table(("network", "best img/s", "median", "of lrn"), rows, title)},
        figures={name: Figure(found) for name, found in rates.items()},
        facts={"dtype": str(dtype)},
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
