"""Cost of exact mode: training steps of one process, a pair and two replicas, in both modes.

    python benchmarks/exact.py [--width 1] [--microbatches 16 32 64] [--json]

The processes of a layout make a step in each mode in turn, on the same images; ratios are within
rounds. Each layout has all the threads: a column of a pair, or a replica, half of them. An exact
column has one.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import list_ratios

from cluster.config import Config
from cluster.mesh import ProcessMesh, create_mesh
from cluster.training.components import create_columns, create_optimizer, create_step
from cluster.training.precision import compute_dtype, prepare_device
from cluster.training.step import ReplicaBatch
from model.architecture import Design
from model.schedule import Rates
from pipeline.tools.units import cpu_count

CPU = torch.device("cpu")
LAYOUTS = {"one process": ((0,),), "pair": ((0, 1),), "2 replicas": ((0,), (1,))}
"""Ranks of each replica."""


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Measure what exact mode costs."""

    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Data type that layers compute in."""
    batch_size: int = 128
    """Images in a step of all replicas."""
    microbatches: tuple[int, ...] = (0, 32, 64)
    """Micro-batches of exact mode; 0: its default."""
    layouts: tuple[Literal["one process", "pair", "2 replicas"], ...] = (
        "one process", "pair", "2 replicas",
    )  # fmt: skip
    """Layouts to measure."""
    threads: int = cpu_count()
    """CPU threads of all processes of a layout."""
    rounds: int = 7
    """Number of turns of each mode."""


def make_configs(setup: Setup, replicas: int) -> dict[str, Config]:
    """Return the modes: today's, and exact with each micro-batch."""
    plain = Config(
        design=Design(width=setup.width), dtype=setup.dtype, batch_size=setup.batch_size,
        replicas=replicas,
    )  # fmt: skip
    table = plain.to_settings()
    found = {"default": plain}
    for size in setup.microbatches:
        exact = Config.from_settings({**table, "exact": True, "microbatch": size})
        found[f"exact, {exact.microbatch_size(replicas)} images"] = exact
    return found


def work(rank: int, setup: Setup, layout: str, folder: str) -> None:
    """Main function of a process; the first writes the seconds of every step into a file."""
    ranks = LAYOUTS[layout]
    world = sum(map(len, ranks))
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    threads = max(1, setup.threads // world)
    mesh = create_mesh(ranks, CPU, threads) if world > 1 else ProcessMesh(cores=threads)
    share = setup.batch_size // mesh.replicas
    generator = torch.Generator().manual_seed(mesh.replica)
    batch = ReplicaBatch(
        images=60 * torch.randn(share, 3, 224, 224, generator=generator),
        labels=torch.randint(0, 1000, (share,), generator=generator),
        weights=torch.ones(share), replaced=torch.zeros(share), position=setup.batch_size,
    )  # fmt: skip
    with ExitStack() as parts:
        ways = {
            name: make_way(parts, config, mesh)
            for name, config in make_configs(setup, mesh.replicas).items()
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(1 + setup.rounds):
            for name, way in ways.items():
                dist.barrier()
                start = time.perf_counter()
                way(batch)
                dist.barrier()
                if turn:
                    found[name].append(time.perf_counter() - start)
    if rank == 0:
        with open(f"{folder}/found", "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def make_way(
    parts: ExitStack, config: Config, mesh: ProcessMesh
) -> Callable[[ReplicaBatch], object]:
    """Return a function that makes a step of a mode."""
    net = create_columns(config, 1000, mesh)
    step = parts.enter_context(create_step(config, net, create_optimizer(config, net), mesh))

    def make_step(batch: ReplicaBatch) -> None:
        prepare_device(mesh.device, 1 if config.exact else mesh.cores)
        step(batch, 0, Rates(1e-4, 2e-4)).tolist()

    return make_step


def measure(setup: Setup, layout: str) -> list[dict[str, Any]]:
    """Measure the modes of a layout; return a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (setup, layout, folder), nprocs=sum(map(len, LAYOUTS[layout])))
        with open(f"{folder}/found", encoding="utf-8") as file:
            found: dict[str, list[float]] = json.load(file)
    plain = found["default"]
    rows = []
    for name, seconds in found.items():
        ratios = list_ratios(plain, seconds)
        rate = setup.batch_size / statistics.median(seconds)
        rows.append(
            {"layout": layout, "mode": name, "images_per_second": round(rate, 1),
             "ratio": round(statistics.median(ratios), 3),
             "ratios": [round(ratio, 3) for ratio in ratios]}
        )  # fmt: skip
    return rows


def report(setup: Setup) -> Report:
    """Measure all layouts."""
    rows = [row for layout in setup.layouts for row in measure(setup, layout)]
    cells = [
        (
            row["layout"], row["mode"], f"{row['images_per_second']:.1f}", f"{row['ratio']:.2f}",
            format_range(row["ratios"], ".2f"),
        )
        for row in rows
    ]  # fmt: skip
    dtype = str(compute_dtype(setup.dtype, CPU)).removeprefix("torch.")
    return Report(
        tables={"exact": Table(("layout", "mode", "img/s", "of default", "rounds"), cells)},
        figures={
            f"{row['layout']}, {row['mode']}, of default": Figure(row["ratios"], "x")
            for row in rows
            if row["mode"] != "default"
        },
        facts={"dtype": dtype, "rows": rows},
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
