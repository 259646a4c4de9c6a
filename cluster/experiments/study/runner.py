"""Many runs, as many at a time as there is room for: one on each GPU, or one on each core.

Each is a process of its own that a user could have started, told to save and end by the signal that
Ctrl-C would send. Here they are only started, watched through their rows, and told to end. What a
run says is in OUT/NAME.log.

One run in this process, without Ray: what many small runs beside each other want.

    python -m cluster.experiments.study.runner CONFIG --data DATA --run RUN

Takes what `cluster.train` takes and does what it does, up to where that starts workers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from cluster import train
from cluster.checkpoint.loader import pin_init
from cluster.checkpoint.storage import find_last_step
from cluster.config import Config, find_conflicts, read_run_config
from cluster.launch.controller import count_interrupts
from cluster.mesh import ProcessMesh
from cluster.run.console import RunConsole
from cluster.run.folder import CONFIG, METRICS, lock_leader, write_machine
from cluster.run.jsonl import read_tail
from cluster.training.loop import train as make_run
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DuetError, SetupError, UsageError, run
from pipeline.tools.files import atomic_write
from pipeline.tools.processes import request_parent_death_signal
from pipeline.tools.progress import Progress


def main(argv: list[str] | None = None) -> int:
    """Run the command; raises as `cluster.train.main`."""
    return train.main(argv, train_here)


def train_here(config: Config, data: str, folder: Path, screen: RunConsole) -> None:
    """Have the run trained by this process, with both columns, on the first GPU it sees.

    Raises:
        DuetError: the run failed.
        KeyboardInterrupt: the user ended it; it is saved.
    """
    there = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "gpu" and not there:
        raise SetupError("device gpu needs a CUDA device, and torch sees none; use --device cpu")
    place = ProcessMesh(
        device=torch.device("cuda" if there else "cpu"), cores=len(os.sched_getaffinity(0))
    )
    with lock_leader(folder), count_interrupts() as end:
        write_machine(folder, place.world_size)
        make_run(config, data, folder, place, screen.show, is_stopping=lambda: end() > 0)
        if end():
            raise KeyboardInterrupt


LOOK = 1.0
"""Seconds between looks at the rows of the runs."""
GRACE = 120.0
"""Seconds that runs have to save when the user wants to end."""
DIVERGED = "error: the loss of step "
"""How the last line begins that a run says whose loss is no number (health.py)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study."""

    name: str
    config: Config
    data: str
    out: Path
    """Folder of the study."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """What it said."""
        return self.out / f"{self.name}.log"

    @property
    def toml(self) -> bytes:
        """Its settings as a config file."""
        table = self.config.to_settings()
        return "".join(f"{key} = {json.dumps(table[key])}\n" for key in table).encode()

    @property
    def pictures(self) -> int:
        """Training images in its data set."""
        return _samples(self.data)

    @property
    def total(self) -> int:
        """Images seen after its last step."""
        return self.config.total_steps(self.pictures) * self.config.batch_size

    @property
    def position(self) -> int:
        """Images seen so far."""
        rows = list(read_tail(self.folder / METRICS, 2))
        return int(rows[-1].get("position", 0)) if rows else 0

    @property
    def diverged(self) -> bool:
        """Its loss became no number, and would again."""
        try:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return False
        return bool(lines) and lines[-1].startswith(DIVERGED)

    @property
    def complete(self) -> bool:
        """The last step is made and saved."""
        total = self.config.total_steps(self.pictures)
        return self.folder.is_dir() and find_last_step(self.folder, self.config.store) >= total

    def check(self) -> None:
        """Refuse what is there if it was made with other settings, or on other data.

        Raises:
            UsageError: names the run and what differs.
        """
        if not (path := self.folder / CONFIG).is_file():
            return
        before, data = read_run_config(path)
        found = find_conflicts(before, pin_init(self.config, self.folder, 0), self.pictures)
        if data != identity(fetch_metadata(self.data)):
            found.append("the data set")
        if found:
            raise UsageError(
                f"run {self.folder} was made otherwise ({'; '.join(found)}); name another --out"
            )


@dataclass(frozen=True)
class Slot:
    """What one run at a time may have."""

    cores: tuple[int, ...]
    gpu: str = ""
    """As CUDA_VISIBLE_DEVICES has it; "": what there is."""


def slots(at_once: int = 0, gpus: Sequence[str] = ()) -> list[Slot]:
    """Share cores and GPUs out among `at_once` runs; 0: one for each GPU, or for each core."""
    cores = sorted(os.sched_getaffinity(0))
    count = at_once or len(gpus) or len(cores)
    shares = [tuple(cores[place::count]) or (cores[place % len(cores)],) for place in range(count)]
    return [
        Slot(share, gpus[place % len(gpus)] if gpus else "") for place, share in enumerate(shares)
    ]


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine, as CUDA_VISIBLE_DEVICES would name them."""
    import torch  # here: whoever only reads a study file need not wait for it

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    there = [one for one in named.split(",") if one]
    return there or [str(number) for number in range(torch.cuda.device_count())]


class RunPool:
    """Makes runs."""

    def __init__(self, room: Sequence[Slot], module: str, progress: Progress) -> None:
        """Prepare.

        Args:
            room: for as many runs at a time.
            module: that makes a run (`cluster.experiments.study.runner` or `cluster.train`).
            progress: gets the images seen.
        """
        self._room, self._module, self._progress = room, module, progress

    def make(self, runs: Sequence[Run], enough: Callable[[Run], bool]) -> None:
        """Make runs.

        Args:
            runs: those that are not done, in this order.
            enough: whether a run has shown what it should, and may end before its last step.

        Raises:
            DuetError: one failed, for another reason than that its loss is no number any more; the
                others have saved.
            KeyboardInterrupt: the user ended it; all have saved.
        """
        waiting, free, failed = list(runs), list(self._room), ""
        busy: list[_Process] = []
        try:
            while (busy or waiting) and not failed:
                while free and waiting:
                    busy.append(_Process(waiting.pop(0), free.pop(0), self._module))
                time.sleep(LOOK)
                for one in list(busy):
                    self._progress.advance(one.seen(enough))
                    if one.ended:
                        busy.remove(one)
                        free.append(one.slot)
                        failed = failed or one.failure
                self._progress.note(", ".join(one.run.name for one in busy))
        finally:
            _end(busy)
        if failed:
            raise DuetError(failed)


class _Process:
    """A run under way."""

    def __init__(self, run: Run, slot: Slot, module: str) -> None:
        self.run, self.slot = run, slot
        self._before, self._asked = run.position, False
        run.out.mkdir(parents=True, exist_ok=True)
        file = run.out / f"{run.name}.toml"
        with atomic_write(file, durable=False) as settings:
            settings.write(run.toml)
        words = [str(file), "--data", run.data, "--run", str(run.folder)]
        with run.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu else {})},
                start_new_session=True,  # a Ctrl-C of the terminal is ours to hand on, once
                preexec_fn=lambda: _settle(slot),
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failure(self) -> str:
        """Why it failed; empty if it did not."""
        if self._process.returncode == 0 or self._asked or self.run.diverged:
            return ""
        said = self.run.log.read_text("utf-8", "replace").strip().splitlines()
        why = said[-1].removeprefix("error: ") if said else f"code {self._process.returncode}"
        return f"run {self.run.name} failed: {why}; see {self.run.log}"

    def seen(self, enough: Callable[[Run], bool]) -> int:
        """Return the images since the last time; tell it to end if that is enough."""
        now = self.run.position
        more, self._before = now - self._before, now
        if not self._asked and more and enough(self.run):
            self.ask_to_end()
        return max(0, more)

    def ask_to_end(self) -> None:
        """Have it save and end."""
        if not self._asked and not self.ended:
            self._asked = True
            self._process.send_signal(signal.SIGINT)

    def wait_until(self, deadline: float) -> None:
        """Wait, and end it the hard way when it takes longer."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()


@cache
def _samples(data: str) -> int:
    folder = fetch_metadata(data)
    return Manifest.load(folder).split("train", folder).samples


def _settle(slot: Slot) -> None:
    """In a new process, before its program: its cores, and what happens when we are no more."""
    os.sched_setaffinity(0, slot.cores)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request_parent_death_signal(signal.SIGTERM)


def _end(processes: Sequence[_Process]) -> None:
    """Have all save and end."""
    for one in processes:
        one.ask_to_end()
    deadline = time.monotonic() + GRACE
    for one in processes:
        one.wait_until(deadline)


if __name__ == "__main__":
    run(main)
