"""Cost of a checkpoint to a training: the full network, 488 MB of state.

    python benchmarks/saving.py [--rounds 5] [--batch-size 128] [--folder DISK] [--json]

One process holds both columns, so it writes the whole state alone: the worst case. After some
quiet steps a checkpoint is begun, steps are made until it is on the disk, then it is finished; in
turns with one that training waits for, as it would without a thread. All numbers are medians of the
rounds:

    begin, finish   seconds for which training stands still, copying and sealing
    writing         seconds until the thread has written, hashed and synced both columns
    slower          seconds that the steps beside it take longer than quiet ones
    waited for      seconds that the same takes when training waits for it

The share of training time is (begin + finish + slower) per checkpoint, of that and the steps
between two checkpoints. Where a step is short and the disk slow, look at `writing`, too: it must
fit between two checkpoints.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from harness.report import Figure, Options, Report, Table, start
from harness.rounds import measure_seconds

from cluster.checkpoint.format import collect_state
from cluster.checkpoint.storage import open_storage
from cluster.checkpoint.writer import CheckpointManager
from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Event, Warned
from cluster.run.folder import Mark
from cluster.training.precision import autocast, choose_device, compute_dtype, keep_memory
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from model.schedule import Rates
from pipeline.tools.errors import DuetError

INTERVALS = (Config.checkpoint_every, 50)
"""Steps between checkpoints: the default, and often."""
QUIET = 3
"""Quiet steps of a round."""


@dataclass(frozen=True, kw_only=True)
class SavingOptions(Options):
    """Measure the cost of checkpoints."""

    rounds: int = 5
    """Number of checkpoints of each kind."""
    batch_size: int = 128
    """Images in a step."""
    width: float = 1.0
    """Factor on all maps and units; 1 is the network of the paper."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    folder: Path | None = None
    """Folder of the disk to write to; default: the folder of temporary files."""


@dataclass(frozen=True)
class Round:
    """Seconds of a round, or their medians."""

    step: float
    """A quiet step."""
    begin: float
    finish: float
    writing: float
    slower: float
    waited_for: float

    def share(self, interval: int, *, waiting: bool = False) -> float:
        """Return the share of the training time of a checkpoint every so many steps."""
        cost = self.waited_for if waiting else self.begin + self.finish + self.slower
        return cost / (interval * self.step + cost)


class Training:
    """Steps of the full network on random images."""

    def __init__(self, options: SavingOptions, device: torch.device) -> None:
        self._device = device
        self._dtype = compute_dtype("auto", device)
        self.net = AlexNet(width=options.width).to(device)
        self.optimizer = Sgd2012(self.net.named_parameters())
        self._images = 60 * torch.randn(options.batch_size, 3, 224, 224, device=device)
        self._labels = torch.randint(0, 1000, (options.batch_size,), device=device)
        self._step = 0

    def step(self) -> float:
        """Make a step; return its seconds."""
        start, self._step = time.perf_counter(), self._step + 1
        self.net.set_position(self._step * len(self._labels))
        self.optimizer.zero_grad()
        with autocast(self._dtype, self._device):
            logits = self.net(self._images)
        F.cross_entropy(logits.float(), self._labels).backward()
        self.optimizer.step(Rates(1e-3, 2e-3))
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def bytes(self) -> int:
        """Number of bytes of all weights and velocities."""
        state = collect_state(self.net, self.optimizer)
        return sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    @property
    def mark(self) -> Mark:
        """Mark after the steps so far."""
        return Mark(step=self._step, position=self._step)


def run_round(training: Training, checkpoints: CheckpointManager) -> Round:
    """Make a checkpoint beside the training, then one that it waits for."""
    quiet = statistics.median(training.step() for _ in range(QUIET))
    begin = measure_seconds(
        lambda: checkpoints.begin(training.mark, training.net, training.optimizer)
    )
    beside: list[float] = []
    while checkpoints.is_busy or not beside:
        beside.append(training.step())
    writing = checkpoints.write_seconds
    finish = measure_seconds(checkpoints.finish)
    beside.append(training.step())  # old ones are removed beside it
    slower = sum(beside) - len(beside) * quiet

    def at_once() -> None:
        checkpoints.begin(training.mark, training.net, training.optimizer)
        checkpoints.finish(must=True)

    return Round(quiet, begin, finish, writing, slower, measure_seconds(at_once))


def measure(options: SavingOptions, device: torch.device, folder: Path) -> tuple[list[Round], int]:
    """Return all rounds, and the bytes of a checkpoint."""

    def tell(event: Event) -> None:
        if isinstance(event, Warned):
            raise DuetError(event.text)

    training = Training(options, device)
    about = {"config": {}, "data_sha256": "", "classes": []}
    open_storage(folder, "").prepare()
    checkpoints = CheckpointManager(
        folder, ProcessMesh(device=device), about, tell, keep=Config.keep
    )
    with closing(checkpoints):
        run_round(training, checkpoints)  # memory grows, kernels are chosen
        rounds = [run_round(training, checkpoints) for _ in range(options.rounds)]
    return rounds, training.bytes


PARTS = ("begin", "writing", "finish", "slower", "waited_for")
"""Parts of a round beside the quiet step."""


def report(options: SavingOptions) -> Report:
    """Measure the parts of a checkpoint, and what they are of the time of a training."""
    keep_memory()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(prefix="duet-saving-", dir=options.folder) as folder:
        rounds, size = measure(options, device, Path(folder))
    seconds = {name: [getattr(one, name) for one in rounds] for name in ("step", *PARTS)}
    found = Round(**{name: statistics.median(values) for name, values in seconds.items()})
    blocked = found.begin + found.finish
    parts = [(name.replace("_", " "), f"{getattr(found, name):.3f} s") for name in PARTS]
    shares = [
        (
            str(every), f"{blocked / (every * found.step + blocked):.2%}",
            f"{found.share(every):.2%}", f"{found.share(every, waiting=True):.2%}",
        )
        for every in INTERVALS
    ]  # fmt: skip
    title = f"{size / 1e6:,.0f} MB, {found.step:.3f} s a step, {device.type}"
    head = ("a checkpoint every", "standing still", "with slower steps", "waited for")
    return Report(
        tables={
            "saving": Table(("part of a checkpoint", "time"), parts, title),
            "saving-shares": Table(head, shares),
        },
        figures={name: Figure(seconds[name], "s", "lower") for name in ("begin", "writing")},
        facts={"device": device.type, "bytes": size, "seconds": seconds},
    )


if __name__ == "__main__":
    start(SavingOptions, report, __doc__)
