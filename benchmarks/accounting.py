"""Cost of the timers: `python benchmarks/accounting.py DATA`.

The reading thread with its clocks and with a clock that does nothing, in turn; and the clocks of a
step of training, called again and again. Both as shares of what they are part of.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.folder import Mark
from cluster.run.metrics import MetricsLog
from model.schedule import Rates
from pipeline.stream.timing import WaitTimes
from pipeline.throughput.stages import Setting, measure_reading, open_parts
from pipeline.throughput.stream_rate import measure_stream

TURNS = 7


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


def main() -> None:
    """Print the shares."""
    setting = Setting(data=sys.argv[1])
    with open_parts(setting) as parts:
        measure_reading(parts, 1.0, 40)
    pairs = [(measure_reader(setting, True), measure_reader(setting, False))
             for _ in range(TURNS)]  # fmt: skip
    each = statistics.median(1 / on - 1 / off for on, off in pairs)
    stream = measure_stream(setting, 3.0).rate.median
    print(f"clocks of the reading thread: {each * 1e9:,.0f} ns an image, "
          f"{each * stream:.2%} of the time of a stream of {stream:,.0f} img/s")  # fmt: skip
    print(f"clocks and row of a step: {measure_step() * 1e6:,.0f} µs")


if __name__ == "__main__":
    main()
