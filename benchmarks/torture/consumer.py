"""The trainer of the torture table: a process for each rank, which notes what its loader gives it.

It has the loop that every trainer has, and a checkpoint that holds the loader's state and its own
place, epoch and step. Notes go to a file batch by batch, without a buffer, so that a killed
process leaves all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch

from torture.judge import Delivery, Place

HELPERS = ("resource_tracker", "forkserver")
"""Child processes of Python's own, by a word of their command lines: not loader workers."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of a loader on one rank."""

    folder: Path
    """Folder with the images in the loader's own format."""
    scratch: Path
    """Folder that lives for one attempt, for caches."""
    batch: int = 16
    """Samples in a global batch."""
    world: int = 1
    rank: int = 0
    workers: int = 2
    """Loader workers: processes, or threads where the loader has no processes."""
    prefetch: int = 2
    """Batches prefetched, by each worker where the loader counts them so."""
    seed: int = 7
    epochs: int = 3
    elastic: bool = False
    """Ranks or workers change at a resume: for libraries that have another class for that."""

    @property
    def local_batch(self) -> int:
        """Samples in a rank's part of a global batch."""
        return self.batch // self.world


class ResumableLoader(Protocol):
    """Interface of what an adapter opens."""

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield identities and pixels, uint8 [b, ...], of what is left of an epoch."""

    def state(self) -> Any:
        """Return the state as the library saves it."""

    def close(self) -> None:
        """Let go of threads and processes."""


class StatefulLoader:
    """A loader in torch's manner that saves its own place; each adapter makes its `_loader`."""

    _loader: Any
    """Iterable of identities and pixels as tensors, with `state_dict`."""

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        for ids, pixels in self._loader:
            yield ids.tolist(), pixels.numpy()

    def state(self) -> Any:
        """Return the state of the loader."""
        return self._loader.state_dict()

    def close(self) -> None:
        """Do nothing: workers end with their epoch."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Place and way in which an attempt ends before its last epoch has."""

    epoch: int
    step: int = 0
    """Batch of the epoch, from 0, after which it ends."""
    how: Literal["stop", "loop", "kill", "worker"] = "stop"
    """Save and stop after the batch; after the loop of the epoch; SIGKILL the process, or one of
    the loader's workers, without saving."""
    every: int = 0
    """Save each time after so many batches; 0: at the cut alone."""
    wait: float = 0.0
    """Seconds that the trainer waits before it saves, so that the prefetch is full."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of an attempt."""

    adapter: str
    setup: Setup
    notes: Path
    """Folder for notes and states of all ranks of the attempt."""
    start: Place = (0, 0)
    states: tuple[Path, ...] = ()
    """Saved states that are loaded, one for each rank that saved them."""
    cut: Cut | None = None
    most: int = 100
    """Batches of an epoch after which it is taken to be endless."""


def consume(job: Job) -> None:
    """Train: the main function of a consumer process."""
    os.setsid()
    setup, out = job.setup, job.notes / f"{job.setup.rank}"
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(setup.rank),
        LOCAL_RANK=str(setup.rank),
        WORLD_SIZE=str(setup.world),
        LOCAL_WORLD_SIZE=str(setup.world),
    )
    torch.set_num_threads(1)
    torch.manual_seed(setup.seed), random.seed(setup.seed), np.random.seed(setup.seed)
    notes = os.open(f"{out}.notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        if setup.world > 1:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{job.notes}/rendezvous",
                rank=setup.rank,
                world_size=setup.world,
            )
        _train(job, notes)
    except BaseException as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        _note(notes, {"error": f"{type(error).__name__}: {text}"[:300]})
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # some libraries' threads would keep the process


def _train(job: Job, notes: int) -> None:
    setup, cut = job.setup, job.cut
    states = [pickle.loads(path.read_bytes()) for path in job.states]
    loader: ResumableLoader = importlib.import_module(f"torture.{job.adapter}").open_loader(
        setup, states
    )
    consumed = 0
    for epoch in range(job.start[0], setup.epochs):
        step = job.start[1] if epoch == job.start[0] else 0
        for ids, pixels in loader.epoch(epoch):
            crcs = [zlib.crc32(np.ascontiguousarray(one)) for one in pixels]
            _note(notes, {"epoch": epoch, "step": step, "ids": list(map(int, ids)), "crcs": crcs})
            step, consumed = step + 1, consumed + 1
            if step > job.most:
                raise RuntimeError(f"epoch {epoch} has no end")
            at_cut = cut is not None and (epoch, step - 1) == (cut.epoch, cut.step)
            if cut and cut.every and consumed % cut.every == 0 and not at_cut:
                _save(job, notes, loader, (epoch, step))
            if (
                cut
                and at_cut
                and cut.how != "loop"
                and _end(cut, job, notes, loader, (epoch, step))
            ):
                return
        if cut and cut.how == "loop" and epoch == cut.epoch:
            _save(job, notes, loader, (epoch + 1, 0))
            return
    _note(notes, {"done": True, "reported": getattr(loader, "reported", lambda: 0)()})
    loader.close()


def _end(cut: Cut, job: Job, notes: int, loader: ResumableLoader, place: Place) -> bool:
    """End here as the case says; return True if the process itself is to stop."""
    if cut.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cut.how == "worker":
        workers = _workers()
        _note(notes, {"workers": len(workers)})
        if workers:
            workers[0].kill()
        return False
    time.sleep(cut.wait)
    _save(job, notes, loader, place)
    return True


def _save(job: Job, notes: int, loader: ResumableLoader, place: Place) -> None:
    """Save the state, as a trainer does: in full under another name first."""
    path = job.notes / f"state-{place[0]}-{place[1]}-{job.setup.rank}"
    path.with_suffix(".part").write_bytes(pickle.dumps(loader.state()))
    path.with_suffix(".part").rename(path)
    _note(notes, {"saved": list(place), "path": str(path)})


def _workers() -> list[psutil.Process]:
    """Return the worker processes of the loader, the oldest first."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            line = " ".join(child.cmdline())
            if not any(word in line for word in HELPERS):
                found.append(child)
    return sorted(found, key=lambda child: child.create_time())


def _note(notes: int, what: dict[str, Any]) -> None:
    os.write(notes, json.dumps(what).encode() + b"\n")


def read_notes(path: Path, rank: int) -> tuple[list[Delivery], dict[str, Any]]:
    """Return the deliveries that a rank noted, and all else by name (`saved`: a list)."""
    deliveries, facts = [], {"saved": []}
    for line in path.read_text().splitlines() if path.exists() else ():
        note = json.loads(line)
        if "ids" in note:
            ids, crcs = tuple(note["ids"]), tuple(note["crcs"])
            deliveries.append(Delivery(note["epoch"], note["step"], rank, ids, crcs))
        elif "saved" in note:
            facts["saved"].append((tuple(note["saved"]), Path(note["path"])))
        else:
            facts |= note
    return deliveries, facts
