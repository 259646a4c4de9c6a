"""A loader in a process of its own, which works only during its turns.

The process prepares the loader, looks once at what it delivers, and then waits. Between its turns
no batches are taken from it, so that it fills its queues and waits; the batches that lie
ready when its turn begins are not counted.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from harness.rounds import measure_seconds

from peers import Peer
from peers.crops import CROP
from peers.work import Work
from pipeline.throughput.clock import CpuLoad
from pipeline.throughput.foreign_loader import read_memory
from pipeline.tools.errors import DataError, DuetError, SetupError
from pipeline.tools.processes import tie_to_parent

PATIENCE = 600.0
"""Seconds after which a loader counts as hanging."""
CHECKED = 8
"""Number of batches whose values are checked before any measurement."""
CHANNEL_OFF = 10.0
"""Grey levels that their channel means may be away from those of the whole set."""


@dataclass(frozen=True)
class Turn:
    """Measurement of a loader in its turn."""

    img_s: float
    cpu_ms: float
    """Milliseconds of processor time an image, of all its processes."""
    memory: int
    """Bytes held by its processes at the end; a page that several share counts once."""


class Runner:
    """One loader, in a process that ends with this one."""

    def __init__(self, peer: Peer, work: Work, resumed: int = 0) -> None:
        """Start the process; `wait` returns when it is ready.

        Args:
            peer: the loader.
            work: its job.
            resumed: images of a made-up set, in the middle of whose epoch the loader resumes and
                ends after a batch; 0 begins to deliver the images of `work`.
        """
        self.title = peer.title
        self._log = work.folder / "log"
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(peer, work, theirs, self._log, resumed))
        self._process.start()
        theirs.close()

    def wait(self, seconds: float = PATIENCE) -> float:
        """Return the seconds until the loader's first batch, imports not counted.

        Args:
            seconds: time for preparing and for the first batches.

        Raises:
            SetupError: it cannot be imported, failed, or was not ready in time.
            DataError: it delivers other batches than `work` describes.
        """
        return float(self._answer(seconds))

    def turn(self, seconds: float) -> Turn:
        """Return what was measured over whole batches in a window of `seconds`.

        Raises:
            SetupError: the loader failed.
        """
        self._pipe.send(seconds)
        turn: Turn = self._answer(seconds + PATIENCE)
        return turn

    def close(self) -> None:
        """End the process and all that it started."""
        self._pipe.close()  # its `recv` ends
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, seconds: float) -> Any:
        try:
            answer: Any = SetupError(f"nothing came within {seconds:.0f} s")
            if self._pipe.poll(seconds):
                answer = self._pipe.recv()
            else:
                self._process.kill()
        except EOFError:
            self._process.join()
            answer = SetupError(f"its process ended with exit code {self._process.exitcode}")
        if isinstance(answer, DuetError):
            lines = self._log.read_text(errors="replace").split("\n")
            last = next(
                (f"; it printed: {line.strip()}" for line in lines[::-1] if line.strip()), ""
            )
            raise type(answer)(f"{self.title}: {answer}{last}")
        return answer


def _serve(peer: Peer, work: Work, pipe: Connection, log: Path, resumed: int) -> None:
    """Run one loader: the main function of its process."""
    tie_to_parent()
    # Loaders start workers as they do elsewhere on Linux; this process has no threads yet.
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)  # libraries print; the parent's stdout may be JSON
    os.dup2(file, 2)
    # Workers that a loader spawns would import the benchmark, as the main module.
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        adapter = importlib.import_module(f"peers.{peer.adapter}")
    except Exception as error:
        traceback.print_exc()
        pipe.send(SetupError(f"cannot be imported: {_line(error)}"))
        return
    try:
        if resumed:
            state = adapter.prepare_resume(work, resumed)
            pipe.send(measure_seconds(lambda: next(adapter.resume(work, resumed, state))))
            return
        adapter.prepare(work)
        batches = adapter.batches(work)
        first = measure_seconds(lambda: next(batches))
        check_batches(batches, work, decoded_only=peer.adapter == "bare_decode")
        pipe.send(first)
        while True:
            pipe.send(_measure(batches, work, pipe.recv()))
    except EOFError:
        pass  # the parent has ended
    except DuetError as error:
        pipe.send(error)
    except BaseException as error:  # what ends it matters, not how
        traceback.print_exc()
        pipe.send(SetupError(_line(error)))


def check_batches(batches: Iterator[Any], work: Work, *, decoded_only: bool = False) -> None:
    """Check some batches: shape, type, range, mean, and that they are not always the same.

    Args:
        batches: of a loader.
        work: the job of the loader.
        decoded_only: it yields uint8 [height, width, 3] instead, one image of each batch.

    Raises:
        DataError: something else was delivered.
    """
    if decoded_only:
        image = next(batches)
        _expect("channels", image.shape[2:], (3,))
        _expect("dtype", image.dtype, np.dtype(np.uint8))
        return
    dtype = torch.float16 if work.device == "gpu" else torch.float32
    sums, last = torch.zeros(3, dtype=torch.float64), None
    for _ in range(CHECKED):
        images = next(batches)
        _expect("shape", tuple(images.shape), (work.batch_size, 3, CROP, CROP))
        _expect("dtype", images.dtype, dtype)
        low, high = images.min().item(), images.max().item()
        # The paper's color noise, which is in ours alone, moves an image by some tens of levels.
        if not -255 < low < -20 < 20 < high < 355:
            raise DataError(f"pixels from {low:.1f} to {high:.1f}, not 0..255 minus the mean")
        if last is not None and torch.equal(images[0], last):
            raise DataError("two batches begin with the same pixels")
        last = images[0].clone()
        sums += images.double().mean((0, 2, 3)).cpu() / CHECKED
    if sums.abs().max() > CHANNEL_OFF:
        found = ", ".join(f"{value:+.1f}" for value in sums)
        raise DataError(f"channel means {found} after the mean was subtracted, expected 0, 0, 0")


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise DataError(f"{what} {found}, expected {wanted}")


def _measure(batches: Iterator[Any], work: Work, seconds: float) -> Turn:
    """Measure a turn; the batches that were made before it are taken first."""
    for _ in range(8 + 2 * work.cores):  # torch's workers keep two each, DALI two, FFCV five
        next(batches)
    _synchronize(work)
    load, count, start = CpuLoad(), 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    if work.device == "gpu":
        _synchronize(work)
        passed = time.perf_counter() - start
    rate = count * work.batch_size / passed
    return Turn(rate, 1000 * load.cores() / rate, read_memory()[0])


def _synchronize(work: Work) -> None:
    if work.device == "gpu":
        torch.cuda.synchronize()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
