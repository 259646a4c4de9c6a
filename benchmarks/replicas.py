"""Cost of averaging gradients over two replicas: ours, torch's DDP, and no averaging.

    python benchmarks/replicas.py [--width 1] [--dtype bfloat16] [--json]

Two processes with both columns each, on half of the threads and of the batch, take a training step
in every way in turn; ratios are within rounds. Over the loopback of one machine gloo's copies take
the time of the cores that compute: that much no overlap can hide.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import list_ratios
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.mesh import ProcessMesh
from cluster.training.gradients import GradientAverage
from cluster.training.precision import autocast, keep_memory
from model.alexnet import AlexNet
from pipeline.tools.units import cpu_count

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Measure ways to average gradients."""

    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the computation; gradients are averaged in float32."""
    batch_size: int = 128
    """Images in a step of both replicas."""
    threads: int = cpu_count()
    """CPU threads of both."""
    rounds: int = 7
    """Number of turns of each way."""


@dataclass(frozen=True)
class Way:
    """A network in training, and the function that follows its backward pass."""

    call: Callable[[Tensor], Tensor]
    net: AlexNet
    finish: Callable[[], object]
    optimizer: torch.optim.Optimizer


def skip_average() -> None:
    """Do not average."""


def average_afterwards(net: nn.Module, mesh: ProcessMesh) -> Callable[[], object]:
    """Average with the same messages, but none before the backward pass has ended."""
    average = GradientAverage(net, mesh)
    average.close()

    def finish() -> None:
        for parameter in reversed(list(net.parameters())):
            average._ready(parameter)
        average.finish()

    return finish


def average_overlapped(net: nn.Module, mesh: ProcessMesh) -> Callable[[], object]:
    """Average during the backward pass, as `cluster.train` does."""
    return GradientAverage(net, mesh).finish


def make_ways(setup: Setup, mesh: ProcessMesh) -> dict[str, Way]:
    """Return all ways, each with a network of its own."""

    def make_way(
        finish_of: Callable[[AlexNet, ProcessMesh], Callable[[], object]], ddp: bool = False
    ) -> Way:
        net = AlexNet(width=setup.width)
        optimizer = torch.optim.SGD(
            net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, fused=True
        )
        call: Any = DistributedDataParallel(net, gradient_as_bucket_view=True) if ddp else net
        return Way(call, net, finish_of(net, mesh), optimizer)

    return {
        "not averaged": make_way(lambda net, mesh: skip_average),
        "after the backward pass": make_way(average_afterwards),
        "during the backward pass": make_way(average_overlapped),
        "DistributedDataParallel": make_way(lambda net, mesh: skip_average, ddp=True),
    }


def work(rank: int, setup: Setup, folder: str) -> None:
    """Main function of a replica; the first writes the seconds of every step into a file."""
    warnings.filterwarnings("ignore", message=".*buffers.*")
    keep_memory()
    torch.set_num_threads(max(1, setup.threads // 2))
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    mesh = ProcessMesh(replica=rank, replicas=2, peers=dist.group.WORLD)
    generator = torch.Generator().manual_seed(rank)
    images = 60 * torch.randn(setup.batch_size // 2, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (setup.batch_size // 2,), generator=generator)
    step = partial(seconds_of_step, images, labels, getattr(torch, setup.dtype))
    there = make_ways(setup, mesh)
    found: dict[str, list[float]] = {name: [] for name in there}
    for turn in range(1 + setup.rounds):
        for name, way in there.items():
            seconds = statistics.mean(step(way, rank, turn) for _ in range(2))
            if turn:
                found[name].append(seconds)
    if rank == 0:
        with open(f"{folder}/found", "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def seconds_of_step(
    images: Tensor, labels: Tensor, dtype: torch.dtype, way: Way, rank: int, turn: int
) -> float:
    """Take one training step, both replicas from the same moment on."""
    dist.barrier()
    start = time.perf_counter()
    way.net.set_position(1000 * turn + rank)
    with autocast(dtype, CPU):
        loss = F.cross_entropy(way.call(images).float(), labels)
    way.optimizer.zero_grad()
    loss.backward()
    way.finish()
    way.optimizer.step()
    return time.perf_counter() - start


def report(setup: Setup) -> Report:
    """Measure all ways."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (setup, folder), nprocs=2)
        with open(f"{folder}/found", encoding="utf-8") as file:
            found: dict[str, list[float]] = json.load(file)
    ratios = {way: list_ratios(seconds, found["not averaged"]) for way, seconds in found.items()}
    rows = []
    for way, seconds in found.items():
        median = statistics.median(seconds)
        rows.append((
            way, f"{median * 1e3:.1f}", f"{setup.batch_size / median:.1f}",
            f"{statistics.median(ratios[way]):.2f}", format_range(ratios[way], ".2f"),
        ))  # fmt: skip
    head = ("gradients", "step ms", "img/s", "of not averaged", "rounds")
    return Report(
        tables={"replicas": Table(head, rows)},
        figures={
            f"{way}, of not averaged": Figure(found, "x", "lower")
            for way, found in ratios.items()
            if way != "not averaged"
        },
        facts={"seconds": found},
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
