"""Shared by the programs: their arguments, and a process for each share of the list."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

Share = list[tuple[str, int]]
"""Path and label of each image."""


def parse_arguments() -> tuple[Share, Path, int]:
    """Return the images, the empty folder and the number of processes."""
    listed, out, workers = sys.argv[1:]
    rows = [line.split("\t") for line in Path(listed).read_text().splitlines()]
    return [(path, int(label)) for path, label in rows], Path(out), int(workers)


def run_processes(work: Callable[[Share, Path], None]) -> None:
    """Run `work(share, folder)` once in each process, with every n-th image and its own folder.

    Raises:
        SystemExit: a process failed.
    """
    images, out, workers = parse_arguments()
    processes = []
    for number in range(workers):
        folder = out / str(number)
        folder.mkdir()
        share = images[number::workers]
        processes.append(multiprocessing.Process(target=work, args=(share, folder)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process failed")
