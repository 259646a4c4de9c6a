"""A pair of column processes against the one-process network, a training step of each, in turn.

    python benchmarks/pair.py [--widths 1 0.25] [--dtypes bfloat16 float32] [--json]

The pair has half of the threads in each process. All processes of a case are started once and wait
while another form has its turn; a round is one turn of each, and ratios are taken within rounds.
`waited` is the time in a step that a column waited for the other column or for gloo.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import list_ratios, take_turns

from cluster.training.precision import autocast, keep_memory
from model.alexnet import AlexNet
from model.exchange import Exchange
from model.timing import Stopwatch, sum_seconds
from pipeline.tools.units import cpu_count

CPU = torch.device("cpu")
FORMS = {"one process": ((0, 1),), "pair": ((0,), (1,)), "pair, bfloat16 wire": ((0,), (1,))}
"""Columns of each process."""


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Measure a pair of processes against one with both columns."""

    widths: tuple[float, ...] = (1.0, 0.25)
    """Factors on all maps and units; 1 is the network of the paper."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Data types of the computation; float32 also has a turn with bfloat16 between the columns."""
    batch_size: int = 128
    """Images in a step."""
    classes: int = 1000
    """Number of classes."""
    threads: int = cpu_count()
    """CPU threads of the one process, at least 2; the columns of a pair have half of them each."""
    rounds: int = 5
    """Number of turns of each form."""
    steps: int = 3
    """Steps in a turn; the median counts."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step."""

    whole: float
    forward: float
    backward: float
    update: float
    waited: float
    sent: int
    """Bytes to the other column."""


def work(
    setup: Setup, form: str, column: int, case: tuple[float, str], init: str, ask: Any
) -> None:
    """Main function of a process: take the steps that it is sent, and send back their seconds."""
    keep_memory()
    columns = FORMS[form][column]
    torch.set_num_threads(max(1, setup.threads * len(columns) // 2))
    exchange = None
    if len(columns) == 1:
        dist.init_process_group("gloo", init_method=init, rank=column, world_size=2)
        exchange = Exchange(wire=torch.bfloat16 if "wire" in form else None)
    net = AlexNet(columns, classes=setup.classes, width=case[0], exchange=exchange)
    steps = training(net, setup, getattr(torch, case[1]))
    while (count := ask.recv()) > 0:
        ask.send([next(steps) for _ in range(count)])
    if exchange is not None:
        dist.destroy_process_group()


def training(net: AlexNet, setup: Setup, dtype: torch.dtype) -> Iterator[Step]:
    """Train on random images without end."""
    generator = torch.Generator().manual_seed(1)
    images = 60 * torch.randn(setup.batch_size, 3, 224, 224, generator=generator)
    labels = torch.randint(0, setup.classes, (setup.batch_size,), generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    traffic = {} if net.exchange is None else net.exchange.traffic
    waits = Stopwatch() if net.exchange is None else net.exchange.waits
    step = 0
    while True:
        traffic.clear()
        step += 1
        marks = [time.perf_counter()]
        net.set_position(step)
        with autocast(dtype, CPU):
            loss = F.cross_entropy(net(images).float(), labels)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        parts = [later - sooner for sooner, later in itertools.pairwise(marks)]
        waited = sum_seconds(waits.take())
        sent = sum(place.forward + place.backward for place in traffic.values())
        yield Step(marks[-1] - marks[0], *parts, waited, sent)


@contextmanager
def start_processes(setup: Setup, form: str, case: tuple[float, str]) -> Iterator[list[Connection]]:
    """Start the processes of a form, which wait for their turn; they end after the block."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        lines, processes = [], []
        for column in range(len(FORMS[form])):
            line, other = context.Pipe()
            arguments = (setup, form, column, case, f"file://{folder}/init", other)
            processes.append(context.Process(target=work, args=arguments, daemon=True))
            processes[-1].start()
            lines.append(line)
        yield lines
        for line in lines:
            line.send(0)
        for process in processes:
            process.join()


def take_turn(lines: list[Connection], steps: int) -> Step:
    """Let a form take some steps; return the median one, of the slower process each time."""
    for line in lines:
        line.send(steps)
    found = zip(*[line.recv() for line in lines], strict=True)
    slower = [max(columns, key=lambda step: step.whole) for columns in found]
    return sorted(slower, key=lambda step: step.whole)[len(slower) // 2]


def measure(setup: Setup, case: tuple[float, str]) -> list[dict[str, Any]]:
    """Measure all forms in turn; return a row for each."""
    forms = [form for form in FORMS if case[1] == "float32" or "wire" not in form]
    with ExitStack() as stack:
        lines = {form: stack.enter_context(start_processes(setup, form, case)) for form in forms}
        for form in forms:
            take_turn(lines[form], 1)
        ways = {form: partial(take_turn, lines[form], setup.steps) for form in forms}
        taken = take_turns(ways, setup.rounds)
    return [
        make_row(setup, case, form, steps, taken["one process"]) for form, steps in taken.items()
    ]


def make_row(
    setup: Setup, case: tuple[float, str], form: str, steps: list[Step], one: list[Step]
) -> dict[str, Any]:
    """Return the medians over the rounds."""
    ratios = list_ratios([step.whole for step in one], [step.whole for step in steps])
    medians = {
        key: statistics.median(asdict(step)[key] for step in steps) for key in asdict(steps[0])
    }
    return {
        "width": case[0],
        "dtype": case[1],
        "form": form,
        "images_per_second": setup.batch_size / medians["whole"],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **medians,
    }


def make_cells(found: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    parts = [found[key] * 1e3 for key in ("whole", "forward", "backward", "update", "waited")]
    return [
        f"{found['width']:g}", found["dtype"], found["form"], f"{found['images_per_second']:.1f}",
        f"{found['ratio']:.2f}", format_range(found["ratios"], ".2f"),
        *(f"{part:.1f}" for part in parts), f"{found['sent'] / 1e6:.1f}",
    ]  # fmt: skip


HEAD = ("width", "dtype", "form", "img/s", "of one process", "rounds", "step ms", "forward",
        "backward", "update", "waited", "sent MB")  # fmt: skip


def report(setup: Setup) -> Report:
    """Measure all widths and types."""
    rows = [row for w in setup.widths for d in setup.dtypes for row in measure(setup, (w, d))]
    return Report(
        tables={"pair": Table(HEAD, [make_cells(row) for row in rows])},
        figures={
            f"{row['form']} of one process, width {row['width']:g}, {row['dtype']}": Figure(
                row["ratios"], "x"
            )
            for row in rows
            if row["form"] != "one process"
        },
        facts={"rows": rows},
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
