"""A training step of the full network on the CPU: ours, the plain PyTorch version, torchvision's.

    python benchmarks/step.py [--rounds 3] [--profile] [--json]

Forward, backward and update of a batch of random images, in float32 and in bfloat16 (autocast).
Every network runs in a process of its own, with all threads, and they take turns; rates are
medians over the rounds, ratios are medians of the ratios within rounds.

    duet              this project's, with the settings of `cluster.train`
    duet without LRN  the same without the normalization: the difference is its cost
    plain             the paper's network out of torch.nn, as anybody would write it
    plain, memory     the same, but malloc keeps freed memory, as in Duet: where page faults are
                      slow (virtual machines) that alone is worth a factor of two
    torchvision       its AlexNet, which also keeps memory: ANOTHER network, of one column and
                      without normalization
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import list_ratios, median_ratio, order_round
from nets import Step, duet_step, eager_step, plain_alexnet, torchvision_alexnet
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cluster.training.precision import keep_memory
from model.alexnet import AlexNet
from model.architecture import Design
from model.norm import describe_backend
from pipeline.tools.errors import DuetError
from pipeline.tools.units import cpu_count

DTYPES = ("float32", "bfloat16")
KEPT = ("duet", "duet without LRN", "plain, memory", "torchvision")
"""Lanes in which malloc keeps freed memory."""
LANES = ("duet", "duet without LRN", "plain", "plain, memory", "torchvision")
WARM_UP = 2
"""Steps before the first turn: memory grows, kernels are chosen."""
MEMORY = "all networks together take 13 GB at full size and batch 128"
NORM = "NormKernel"
"""Autograd function of `model.norm`, as the profiler names it."""
Rates = dict[str, dict[str, list[float]]]
"""Lane -> type -> img/s of every round."""


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Time training steps on the CPU: ours, plain PyTorch, torchvision."""

    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper. Not for torchvision's."""
    classes: int = 1000
    """Number of classes."""
    batch_size: int = 128
    """Images in a step."""
    threads: int = cpu_count()
    """CPU threads of each network."""
    rounds: int = 3
    """Number of turns of each network."""
    steps: int = 2
    """Steps in a turn."""
    profile: bool = False
    """Also list the operations of our step by their share of its time."""


def make_step(lane: str, setup: Setup) -> Step:
    """The training step of a lane."""
    if lane.startswith("duet"):
        design = Design(width=setup.width, norm="none" if "without" in lane else "lrn")
        return duet_step(AlexNet(classes=setup.classes, design=design))
    if lane == "torchvision":
        return eager_step(torchvision_alexnet(setup.classes))
    return eager_step(plain_alexnet(setup.classes, setup.width))


def serve(wire: Connection, lane: str, setup: Setup) -> None:
    """Main function of a lane's process: answer requests until None arrives."""
    if lane in KEPT:
        keep_memory()
    torch.set_num_threads(setup.threads)
    torch.manual_seed(0)
    try:
        step = make_step(lane, setup)
    except ImportError as error:
        wire.send(str(error))
        return
    images = 60 * torch.randn(setup.batch_size, 3, 224, 224)
    labels = torch.randint(0, setup.classes, (setup.batch_size,))
    for dtype in DTYPES:
        for number in range(WARM_UP):
            step(number, images, labels, getattr(torch, dtype))
    wire.send(None)
    with contextlib.suppress(EOFError):  # the parent has ended
        answer_requests(wire, step, images, labels, setup)


def answer_requests(
    wire: Connection, step: Step, images: Tensor, labels: Tensor, setup: Setup
) -> None:
    """Answer each request with the img/s of a turn, or a profile."""
    while request := wire.recv():
        dtype = getattr(torch, request["dtype"])
        if request["profile"]:
            wire.send(profile_step(lambda: step(0, images, labels, dtype)))  # noqa: B023
            continue
        start = time.perf_counter()
        for number in range(setup.steps):
            step(number, images, labels, dtype)
        wire.send(setup.steps * setup.batch_size / (time.perf_counter() - start))


def profile_step(step: Any, steps: int = 3) -> dict[str, float]:
    """Profile a step: operation -> share of its time, without the operations that it calls."""
    step()
    with profile(activities=[ProfilerActivity.CPU]):
        step()  # the profiler's own memory has to grow, too
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    rows = {row.key: row.self_cpu_time_total for row in found.key_averages()}
    total = sum(rows.values())
    ordered = sorted(rows.items(), key=lambda row: -row[1])
    return {name: spent / total for name, spent in ordered}


class LaneProcess:
    """A lane in a process of its own."""

    def __init__(self, lane: str, setup: Setup) -> None:
        """Start the process, and wait for its warm-up."""
        context = multiprocessing.get_context("spawn")
        self.lane = lane
        self._wire, end = context.Pipe()
        self._process = context.Process(target=serve, args=(end, lane, setup), daemon=True)
        self._process.start()
        end.close()
        self.missing: str | None = self._receive()
        """Reason why the lane cannot run; None if it can."""

    def ask(self, dtype: str, profile: bool = False) -> Any:
        """Return the img/s of a turn, or a profile."""
        self._wire.send({"dtype": dtype, "profile": profile})
        return self._receive()

    def end(self) -> None:
        """End the process."""
        self._wire.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._wire.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            why = "killed, as when memory runs out" if code == -9 else f"exit code {code}"
            raise DuetError(f"the process of {self.lane!r} ended ({why}); {MEMORY}") from None


def measure_lanes(setup: Setup) -> tuple[Rates, dict[str, str], dict[str, dict[str, float]]]:
    """Return rates, reasons why lanes are missing, and the profile of our step in each type."""
    processes = [LaneProcess(lane, setup) for lane in LANES]
    missing = {peer.lane: peer.missing for peer in processes if peer.missing}
    peers = {peer.lane: peer for peer in processes if not peer.missing}
    rates: Rates = {lane: {dtype: [] for dtype in DTYPES} for lane in peers}
    for number in range(setup.rounds):
        for lane in order_round(peers, number):
            for dtype in DTYPES:
                rates[lane][dtype].append(peers[lane].ask(dtype))
    profiles = {dtype: peers["duet"].ask(dtype, profile=True) for dtype in DTYPES}
    for peer in peers.values():
        peer.end()
    return rates, missing, profiles


def find_best_dtype(found: dict[str, list[float]]) -> str:
    """Return the dtype with the highest median rate."""
    return max(found, key=lambda dtype: statistics.median(found[dtype]))


def summarize(rates: Rates, profiles: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the figures of the table and of the goals."""
    ours, bare = rates["duet"], rates["duet without LRN"]
    fastest = find_best_dtype(ours)
    passes = {
        dtype: sum(share for name, share in shares.items() if name.removesuffix("Backward") == NORM)
        for dtype, shares in profiles.items()
    }
    return {
        "best": {lane: find_best_dtype(found) for lane, found in rates.items()},
        "ratio_in_best": {
            lane: median_ratio(ours[fastest], found[find_best_dtype(found)])
            for lane, found in rates.items()
        },
        "ratio": {
            lane: {dtype: median_ratio(ours[dtype], found[dtype]) for dtype in DTYPES}
            for lane, found in rates.items()
        },
        "lrn_share": {dtype: 1 - 1 / median_ratio(bare[dtype], ours[dtype]) for dtype in DTYPES},
        "passes_share": passes,
    }


def make_tables(
    setup: Setup, rates: Rates, found: dict[str, Any], profiles: dict[str, dict[str, float]]
) -> dict[str, Table]:
    """Return the table of the networks, and with `--profile` one of operations for each type."""
    rows = []
    for lane, types in rates.items():
        for dtype, values in types.items():
            over = found["ratio_in_best"][lane] if dtype == found["best"][lane] else None
            rows.append((
                lane, dtype, f"{statistics.median(values):.1f}", format_range(values, ".1f"),
                f"{found['ratio'][lane][dtype]:.2f}x", "" if over is None else f"{over:.2f}x",
            ))  # fmt: skip
    notes = [f"Normalization by {describe_backend()}."]
    notes += [
        f"LRN in our step, {dtype}: {found['lrn_share'][dtype]:.1%} of its time (against the "
        f"network without); {found['passes_share'][dtype]:.1%} with the ReLU and the pooling "
        "of the same passes."
        for dtype in DTYPES
    ]
    head = ("network", "type", "img/s", "rounds", "ours is", "best of ours over its best")
    tables = {"step": Table(head, rows, notes=notes)}
    for dtype, shares in profiles.items() if setup.profile else ():
        cells = [(name, f"{share:.1%}") for name, share in list(shares.items())[:25]]
        tables[f"step-{dtype}"] = Table((f"operation, {dtype}", "share of our step"), cells)
    return tables


def report(setup: Setup) -> Report:
    """Measure all networks."""
    rates, missing, profiles = measure_lanes(setup)
    found = summarize(rates, profiles)
    flat = {f"{lane}, {dtype}": rates[lane][dtype] for lane in rates for dtype in DTYPES}
    return Report(
        tables=make_tables(setup, rates, found, profiles),
        figures={name: Figure(values) for name, values in flat.items()}
        | {
            f"duet over {lane}, {dtype}": Figure(list_ratios(rates["duet"][dtype], its[dtype]), "x")
            for lane, its in rates.items()
            if lane != "duet"
            for dtype in DTYPES
        },
        missing=missing,
        facts={"backend": describe_backend(), "img_s": rates, "profile": profiles} | found,
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
