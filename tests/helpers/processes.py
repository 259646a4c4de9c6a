"""Processes for tests, forked from a server that has torch and DALI loaded already.

To start Python and import all that a command needs takes 4 s of a core; a fork of such a server
takes a tenth of one. Each process has an interpreter, signals, and an exit code of its own, as one
that was started from a shell; only module-level code of what is loaded before has run once before.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tests.helpers.training_processes import REPOSITORY

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "cluster",  # before torch: it says how OpenMP's threads wait
        "torch",
        "torch.distributed",
        "torch.utils._python_dispatch",
        "nvidia.dali.fn",
        "pytest",
        "cluster.checkpoint.loader",
        "cluster.report.page",
        "cluster.training.loop",
        "pipeline.batches",
        "pipeline.packing.build",
    ]
)


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Call `work(rank, *arguments)` in `count` processes; raise what one of them raises."""
    torch.multiprocessing.start_processes(
        _rank, (dict(os.environ), work, arguments), count, start_method="forkserver"
    )


def _rank(
    rank: int, environment: Mapping[str, str], work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _adopt(environment)
    work(rank, *arguments)


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Start `target(*arguments)` in a process and return that."""
    process = FORKS.Process(target=_call, args=(dict(os.environ), target, arguments))
    process.start()
    return process


def _call(
    environment: Mapping[str, str], target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    _adopt(environment)
    target(*arguments)


def run_module(
    module: str,
    words: Sequence[object],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path = REPOSITORY,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE WORDS` to its end, and return exit code and output.

    Raises:
        TimeoutExpired: it takes longer than `timeout` seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as work:
        out, err = Path(work, "out"), Path(work, "err")
        words = [str(word) for word in words]
        process = FORKS.Process(
            target=_module,
            args=(dict(environment or os.environ), folder, out, err, module, words),
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([module, *words], timeout, out.read_text())
        return subprocess.CompletedProcess(
            [module, *words], process.exitcode, out.read_text("utf-8"), err.read_text("utf-8")
        )


def _module(
    environment: Mapping[str, str],
    folder: Path,
    out: Path,
    err: Path,
    module: str,
    words: list[str],
) -> None:
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_CREAT),
        (2, err, os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    _adopt(environment)
    os.chdir(folder)
    sys.path[0] = str(folder)
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _adopt(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
