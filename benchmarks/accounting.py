"""Cost of accounts and checks: `python benchmarks/accounting.py DATA`.

A stream with a ledger, one whose reader computes no CRC-32, and a plain one, each in a process of
its own, in turn: a round is one turn of each, every second round in reverse, and medians are taken
of the ratios within rounds. CPU time tells more than the rate where others use the cores. Then the
reading thread with its clocks and with a clock that does nothing, in turn; and the clocks of a step
of training, called again and again.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, NamedTuple
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
from pipeline.stream.shard_reader import ShardReader
from pipeline.stream.timing import WaitTimes
from pipeline.throughput.stages import Setting, measure_reading, open_parts
from pipeline.throughput.stream_rate import measure_stream

TURNS = 7
ROUNDS, SECONDS = 30, 0.6
"""Turns of each stream, and their length."""
DISCARDED = 5
"""Batches at the beginning of a turn that do not count: they lay ready."""


class Turn(NamedTuple):
    """One turn of a stream."""

    rate: float
    """Images per second."""
    cpu: float
    """Seconds of CPU time an image."""


def accept(*_: object) -> object:
    """Return what equals every CRC-32."""
    return mock.ANY


def serve_stream(pipe: Connection, data: str, kind: str) -> None:
    """Run the turns of one stream: the main function of its process."""
    setting = Setting(data=data)
    with ExitStack() as stack:
        if kind == "unchecked":
            stack.enter_context(mock.patch.object(ShardReader, "_crc", accept))
        ledger = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stream = stack.enter_context(setting.open_stream(ledger if kind == "ledger" else None))
        while pipe.recv():
            for _ in itertools.islice(stream, DISCARDED):
                pass
            count, cpu, start = 0, time.process_time(), time.perf_counter()
            while (passed := time.perf_counter() - start) < SECONDS:
                count += len(next(stream).ids)
            pipe.send(Turn(count / passed, (time.process_time() - cpu) / count))


def measure_checks(data: str) -> dict[str, list[Turn]]:
    """Measure a plain stream, one with a ledger, and one that computes no CRC-32, in turn."""
    spawn = multiprocessing.get_context("spawn")
    ways: dict[str, Callable[[], Turn]] = {}
    pipes: list[Connection] = []
    for kind in ("plain", "ledger", "unchecked"):
        pipe, theirs = spawn.Pipe()
        spawn.Process(target=serve_stream, args=(theirs, data, kind), daemon=True).start()
        pipes.append(pipe)
        ways[kind] = partial(take_turn, pipe)
    turns = take_turns(ways, ROUNDS, warm_up=1)
    for pipe in pipes:
        pipe.send(False)
    return turns


def take_turn(pipe: Connection) -> Turn:
    """Let the stream at the other end of a pipe have its turn."""
    pipe.send(True)
    turn: Turn = pipe.recv()
    return turn


def describe_check(name: str, on: list[Turn], off: list[Turn]) -> tuple[str, str, str]:
    """Return the row of a check, from the turns with it and without."""
    pairs = list(zip(on, off, strict=True))
    each = statistics.median(one.cpu - other.cpu for one, other in pairs)
    cpu = statistics.median(one.cpu / other.cpu for one, other in pairs) - 1
    lost = sorted(1 - one.rate / other.rate for one, other in pairs)
    low, median, high = statistics.quantiles(lost, n=4)
    share = f"{cpu:.1%} of the CPU time; {median:.1%} of the rate ({low:.1%} to {high:.1%})"
    return name, f"{each * 1e6:,.1f} µs of CPU time an image", share


@dataclass(frozen=True, kw_only=True)
class AccountingOptions(Options):
    """Measure what accounts and checks cost."""

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
    turns = measure_checks(setting.data)
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
        describe_check("ledger", turns["ledger"], turns["plain"]),
        describe_check("CRC-32 of what is read", turns["plain"], turns["unchecked"]),
        ("clocks of the reading thread", f"{median * 1e9:,.0f} ns an image",
         f"{median * stream:.2%} of the time of a stream of {stream:,.0f} img/s"),
        ("clocks and row of a step", f"{statistics.median(steps) * 1e6:,.0f} µs", ""),
    ]  # fmt: skip
    return Report(
        tables={"accounting": Table(("what", "cost", "share"), rows)},
        figures={"clocks and row of a step": Figure([s * 1e6 for s in steps], "µs", "lower")},
        facts={"reader_img_s": rates, "stream_img_s": stream, "turns": turns},
    )


if __name__ == "__main__":
    start(AccountingOptions, report, __doc__)
