"""Runs of a study: many processes side by side, one on each GPU or core, and one run without Ray.

    python -m cluster.experiments.study.runner CONFIG --data DATA --run RUN

`run_side_by_side` starts each run as a process, with the command that a user could type, follows it
by its rows in RUN/metrics.jsonl, and ends it with the signal that Ctrl-C would send. What a run
prints goes to OUT/NAME.log. The command above is such a process: it takes the arguments of
`cluster.train` and trains both columns itself, which suits many small runs side by side.
"""

from __future__ import annotations

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
from cluster.config import Config, read_run_config
from cluster.launch.controller import count_interrupts
from cluster.mesh import ProcessMesh
from cluster.run.console import RunConsole
from cluster.run.folder import (
    CONFIG,
    METRICS,
    find_conflicts,
    format_value,
    lock_leader,
    read_identity,
    write_machine,
)
from cluster.run.jsonl import read_tail
from cluster.training.finite_check import NotFinite
from cluster.training.loop import train as make_run
from cluster.training.precision import choose_device, compute_dtype
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DuetError, UsageError, run
from pipeline.tools.files import atomic_write
from pipeline.tools.processes import request_parent_death_signal
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

POLL = 1.0
"""Seconds between two reads of the runs' rows."""
GRACE = 120.0
"""Seconds that runs have to save a checkpoint when the user stops the study."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    name: str
    config: Config
    data: str
    out: Path
    """Folder of the study."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """File with what the run prints."""
        return self.out / f"{self.name}.log"

    @property
    def toml(self) -> bytes:
        """Its settings as a config file."""
        table = self.config.to_settings()
        return "".join(f"{key} = {format_value(table[key])}\n" for key in table).encode()

    @property
    def images(self) -> int:
        """Number of training images in its data set."""
        return _count_images(self.data)

    @property
    def steps(self) -> int:
        """Number of its last step."""
        return self.config.total_steps(self.images)

    @property
    def total(self) -> int:
        """Number of images seen after the last step."""
        return self.steps * self.config.batch_size

    @property
    def position(self) -> int:
        """Number of images seen so far."""
        rows = list(read_tail(self.folder / METRICS, 2))
        return int(rows[-1].get("position", 0)) if rows else 0

    @property
    def images_left(self) -> int:
        """Number of images to be seen until the last step."""
        return max(0, self.total - self.position)

    @property
    def has_diverged(self) -> bool:
        """True if its loss became NaN or infinite, as it would again."""
        return _read_last_line(self.log).startswith(f"error: {NotFinite.START}")

    @property
    def is_complete(self) -> bool:
        """True if there is a checkpoint of the last step."""
        return self.folder.is_dir() and find_last_step(self.folder, self.config.store) >= self.steps

    def check(self) -> None:
        """Refuse an existing run folder of other settings, or of other data.

        Raises:
            UsageError: names the run and what differs.
        """
        if not (path := self.folder / CONFIG).is_file():
            return
        before, data = read_run_config(path)
        found = find_conflicts(before, pin_init(self.config, self.folder), self.images)
        if data != identity(fetch_metadata(self.data)):
            found.append("the data set")
        if found:
            raise UsageError(
                f"run {self.folder} was made otherwise ({'; '.join(found)}); name another --out"
            )


@cache
def load_manifest(data: str) -> Manifest:
    """Load the manifest of a data set, once."""
    return Manifest.load(fetch_metadata(data))


@cache
def _count_images(data: str) -> int:
    return load_manifest(data).split("train", fetch_metadata(data)).samples


def _read_last_line(log: Path) -> str:
    """Last line of a log that is not blank; empty if there is none."""
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    return "".join(text.strip().splitlines()[-1:])


@dataclass(frozen=True)
class Slot:
    """Cores and GPU of one run at a time."""

    cores: tuple[int, ...]
    gpu: str = ""
    """Value of CUDA_VISIBLE_DEVICES; "": leave it as it is."""


def make_slots(at_once: int = 0, gpus: Sequence[str] = ()) -> list[Slot]:
    """Divide cores and GPUs among `at_once` runs; 0: one for each GPU, or for each core."""
    cores = sorted(os.sched_getaffinity(0))[: cpu_count()]
    count = at_once or len(gpus) or len(cores)
    shares = [tuple(cores[index::count]) or (cores[index % len(cores)],) for index in range(count)]
    return [
        Slot(share, gpus[index % len(gpus)] if gpus else "") for index, share in enumerate(shares)
    ]


def list_gpus() -> list[str]:
    """List the GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def run_side_by_side(
    runs: Sequence[StudyRun],
    slots: Sequence[Slot],
    module: str,
    progress: Progress,
    is_enough: Callable[[StudyRun], bool],
) -> None:
    """Make runs side by side.

    Args:
        runs: runs that are not complete, in this order.
        slots: a slot for each run at a time.
        module: command that makes a run (`cluster.experiments.study.runner`, `cluster.train`).
        progress: bar that counts the images seen.
        is_enough: whether a run may end before its last step.

    Raises:
        DuetError: a run failed, other than by diverging; the others have saved.
        KeyboardInterrupt: the user stopped the study; all have saved.
    """
    waiting, free, failure = list(runs), list(slots), ""
    busy: list[_RunProcess] = []
    try:
        while (busy or waiting) and not failure:
            while free and waiting:
                busy.append(_RunProcess(waiting.pop(0), free.pop(0), module))
            time.sleep(POLL)
            for one in list(busy):
                progress.advance(one.poll(is_enough))
                if one.has_ended:
                    busy.remove(one)
                    free.append(one.slot)
                    failure = failure or one.failure
            progress.note(", ".join(one.run.name for one in busy))
    finally:
        for one in busy:
            one.stop()
        deadline = time.monotonic() + GRACE
        for one in busy:
            one.wait_until(deadline)
    if failure:
        raise DuetError(failure)


class _RunProcess:
    """The process of a run."""

    def __init__(self, run: StudyRun, slot: Slot, module: str) -> None:
        self.run, self.slot = run, slot
        self._position, self._is_stopping = run.position, False
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
                start_new_session=True,  # the terminal's Ctrl-C reaches the pool, which forwards it
                preexec_fn=lambda: _prepare_process(slot),
            )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def failure(self) -> str:
        """Message of its failure; empty if it did not fail."""
        if self._process.returncode == 0 or self._is_stopping or self.run.has_diverged:
            return ""
        last = _read_last_line(self.run.log)
        why = last.removeprefix("error: ") if last else f"code {self._process.returncode}"
        return f"run {self.run.name} failed: {why}; see {self.run.log}"

    def poll(self, is_enough: Callable[[StudyRun], bool]) -> int:
        """Return the images seen since the last poll; stop the run if it is enough."""
        now = self.run.position
        more, self._position = now - self._position, now
        if not self._is_stopping and more and is_enough(self.run):
            self.stop()
        return max(0, more)

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        if not self._is_stopping and not self.has_ended:
            self._is_stopping = True
            self._process.send_signal(signal.SIGINT)

    def wait_until(self, deadline: float) -> None:
        """Wait for its end, and kill it at the deadline (of `time.monotonic`)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()


def _prepare_process(slot: Slot) -> None:
    """Set the cores and signals of a new process before its program starts."""
    os.sched_setaffinity(0, slot.cores)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request_parent_death_signal(signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Run the command; raises as `cluster.train.main`."""
    return train.main(argv, train_here)


def train_here(config: Config, data: str, folder: Path, screen: RunConsole) -> None:
    """Train in this process, with both columns, on the first GPU that torch sees.

    Raises:
        DuetError: the run failed.
        KeyboardInterrupt: the user stopped it; it is saved.
    """
    mesh = ProcessMesh(device=choose_device(config.device), cores=cpu_count())
    with lock_leader(folder), count_interrupts() as end:
        dtype = compute_dtype(config.dtype, mesh.device)
        write_machine(folder, mesh.world_size, dtype)
        make_run(
            config, data, folder, mesh, screen.show,
            identity=read_identity(folder), is_stopping=lambda: end() > 0,
        )  # fmt: skip
        if end():
            raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
