"""One training step of the one-process network: forward, backward, update, on random pictures.

    python benchmarks/step.py [--width 0.25] [--batch-size 128] [--threads 2]

Prints img/s in float32 and bfloat16, in turn in one run, median of the steps.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from cluster.compute import autocast, keep_memory
from model.alexnet import AlexNet
from model.optim import Sgd2012
from model.schedule import Rates


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What to measure."""

    width: float = 0.25
    """Factor on all maps and units; 1 is the network of the paper."""
    classes: int = 1000
    """Classes to tell apart."""
    batch_size: int = 128
    """Pictures in a step."""
    threads: int = len(os.sched_getaffinity(0))
    """CPU threads; a GPU is used where there is one."""
    rounds: int = 5
    """How often each type has its turn."""


def step_seconds(setup: Setup, dtype: torch.dtype, device: torch.device, steps: int = 4) -> float:
    """Return the median seconds of a step after one that is not counted."""
    net = AlexNet(classes=setup.classes, width=setup.width).to(device)
    optimiser = Sgd2012(net.named_parameters())
    images = 60 * torch.randn(setup.batch_size, 3, 224, 224, device=device)
    labels = torch.randint(0, setup.classes, (setup.batch_size,), device=device)
    seconds = []
    for step in range(1 + steps):
        start = time.perf_counter()
        net.set_step(step)
        with autocast(dtype, device):
            logits = net(images).float()
        optimiser.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimiser.step(Rates(1e-3, 2e-3))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure both types in turn and print the medians."""
    setup = tyro.cli(Setup, description=__doc__)
    keep_memory()
    torch.set_num_threads(setup.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(setup.rounds):
        for dtype, found in rates.items():
            found.append(setup.batch_size / step_seconds(setup, dtype, device))
    for dtype, found in rates.items():
        median, low, high = statistics.median(found), min(found), max(found)
        print(f"{dtype}  {median:7.1f} img/s  ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
