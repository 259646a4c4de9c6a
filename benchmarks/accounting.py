"""Cost of the timers: `python benchmarks/accounting.py DATA`.

The reading thread with its clocks and with a clock that does nothing, in turn; and the clocks of a
step of training, called again and again. Both as shares of what they are part of.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import tyro
from harness.report import Figure, Options, Report, Table, start
from harness.rounds import take_turns

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.folder import Mark
from cluster.run.metrics import MetricsLog
from model.schedule import Rates
from pipeline.stream.timing import WaitTimes
from pipeline.throughput.stages import Setting, measure_reading, open_parts
from pipeline.throughput.stream_rate import measure_stream

TURNS = 7


@dataclass(frozen=True, kw_only=True)
class AccountingOptions(Options):
    """Measure what the timers cost."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Dataset in a folder."""


def measure_reader(setting: Setting, clock: bool) -> float:
    """Measure the images per second of the reading thread alone, from the page cache."""
    with open_parts(setting) as parts:
        batches = iter(parts.read_batches(0))
        done, start = 0, time.perf_counter()
        reader = "pipeline.stream.shard_reader"
        with mock.patch.multiple(reader, perf_counter=time.perf_counter if clock
                                 else lambda: 0.0):  # fmt: skip
            while time.perf_counter() - start < 0.5:
                parts.recycle(next(batches))
                done += setting.batch_size
        return done / (time.perf_counter() - start)


def measure_step() -> float:
    """Measure the seconds of the timers and the metrics row of one training step."""
    config, rates, values = Config(), Rates(0.1, 0.2), torch.tensor([1.0, 0.5, 0.0])
    with (
        tempfile.TemporaryDirectory() as folder,
        MetricsLog(Path(folder), ProcessMesh(), lambda _: None, 1000, 0) as log,
    ):
        start = time.perf_counter()
        for step in range(1, 2001):
            with log.waiting(WaitTimes()):
                pass
            with log.computing():
                pass
            log.step(Mark(step=step, position=step), config, rates, values)
        return (time.perf_counter() - start) / 2000


def report(options: AccountingOptions) -> Report:
    """Measure the shares."""
    setting = Setting(data=str(options.data))
    with open_parts(setting) as parts:
        measure_reading(parts, 1.0, 40)
    rates = take_turns(
        {"with": lambda: measure_reader(setting, True),
         "without": lambda: measure_reader(setting, False)}, TURNS,
    )  # fmt: skip
    each = [1 / on - 1 / off for on, off in zip(rates["with"], rates["without"], strict=True)]
    stream = measure_stream(setting, 3.0).rate.median
    steps = [measure_step() for _ in range(3)]
    median = statistics.median(each)
    rows = [
        ("clocks of the reading thread", f"{median * 1e9:,.0f} ns an image",
         f"{median * stream:.2%} of the time of a stream of {stream:,.0f} img/s"),
        ("clocks and row of a step", f"{statistics.median(steps) * 1e6:,.0f} µs", ""),
    ]  # fmt: skip
    return Report(
        tables={"accounting": Table(("what", "cost", "share"), rows)},
        figures={"clocks and row of a step": Figure([s * 1e6 for s in steps], "µs", "lower")},
        facts={"reader_img_s": rates, "stream_img_s": stream},
    )


if __name__ == "__main__":
    start(AccountingOptions, report, __doc__)
