"""Draw a small picture set of ten shapes and textures, to try everything on without a download.

    python -m pipeline.demo_images OUT [--seed 0] [--train 4000] [--val 800] [--workers N]

OUT/train/<class>/00000.jpg ... and OUT/val/<class>/00000.jpg ..., the layout of ImageNet's
folders. Each picture is a pure function of (seed, split, class, number), so the set is the same
for any number of workers; with the same Pillow and NumPy on the same kind of processor also to
the byte. OUT appears whole or not at all, with a `demo.json` that says how it was drawn.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import TimeoutError as MultiprocessingTimeout
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pipeline.demo_drawing import FIGURES, draw_jpeg
from pipeline.tools.errors import DuetError, UsageError, run
from pipeline.tools.processes import tie_to_parent
from pipeline.tools.progress import Progress

VERSION = 1  # of the drawings: raise it when the same arguments give other pictures
RECORD = "demo.json"
SPLITS = ("train", "val")  # the position is part of each picture's seed
PART = 40  # pictures of one job in the pool: about a quarter of a second
PATIENCE = 120  # seconds without a finished job until a process is taken for dead


@dataclass(frozen=True)
class Options:
    """Draw a small picture set of ten shapes and textures."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to create."""
    seed: int = 0
    """Other seeds give other pictures (0 or more)."""
    train: int = 4000
    """Training pictures in all; classes differ by one at most."""
    val: int = 800
    """Validation pictures in all."""
    workers: int = 0
    """Processes that draw; 0 is one per usable core."""


@dataclass(frozen=True)
class Part:
    """A run of pictures of one class: numbers start <= n < stop."""

    split: str
    name: str
    start: int
    stop: int


def parts(split: str, pictures: int) -> Iterator[Part]:
    """Cut `pictures` of a split into jobs; the first classes get what does not divide evenly."""
    for label, name in enumerate(FIGURES):
        count = pictures // len(FIGURES) + (label < pictures % len(FIGURES))
        for start in range(0, count, PART):
            yield Part(split, name, start, min(count, start + PART))


def draw_part(folder: Path, seed: int, part: Part) -> int:
    """Write the JPEG files of one part below `folder`; returns how many."""
    label = list(FIGURES).index(part.name)
    target = folder / part.split / part.name
    target.mkdir(parents=True, exist_ok=True)
    for number in range(part.start, part.stop):
        entropy = np.random.SeedSequence([seed, SPLITS.index(part.split), label, number])
        picture = draw_jpeg(part.name, np.random.default_rng(entropy))
        (target / f"{number:05d}.jpg").write_bytes(picture)
    return part.stop - part.start


def draw_set(options: Options) -> bool:
    """Draw the set; False when it was there already, made with the same arguments.

    Raises UsageError when the arguments cannot work or OUT holds anything else.
    """
    _check(options)
    out = options.out.resolve()  # "." has no name to put a partial folder beside
    if out.is_dir() and any(out.iterdir()):
        if _record_of(out) == _record(options):
            return False
        raise UsageError(
            f"{options.out} holds something else than this demo set: "
            "name another folder or remove it"
        )
    unfinished = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        _draw_all(unfinished, options)
        (unfinished / RECORD).write_text(json.dumps(_record(options), indent=2) + "\n")
        unfinished.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{options.out} cannot be written ({reason}): name another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _draw_all(folder: Path, options: Options) -> None:
    jobs = [*parts("train", options.train), *parts("val", options.val)]
    with Progress("drawing", total=options.train + options.val, unit="img") as progress:
        for drawn in _run(partial(draw_part, folder, options.seed), options.workers, jobs):
            progress.advance(drawn)


def _run(draw: Callable[[Part], int], workers: int, jobs: list[Part]) -> Iterator[int]:
    """Pictures drawn by each job as it ends, in this process or in a pool.

    Processes are spawned, not forked, as a progress line runs a thread here; being daemons they
    end with this process, however it ends.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from map(draw, jobs)
        return
    with get_context("spawn").Pool(workers, initializer=tie_to_parent) as pool:
        done = pool.imap_unordered(draw, jobs)
        for _ in jobs:
            try:
                yield done.next(timeout=PATIENCE)
            except MultiprocessingTimeout:
                raise DuetError(
                    f"no picture drawn in {PATIENCE} s (a process died, out of memory?); "
                    "run the same command again with fewer --workers"
                ) from None


def _check(options: Options) -> None:
    for name in ("seed", "train", "val", "workers"):
        if (value := getattr(options, name)) < 0:
            raise UsageError(f"--{name} {value}: give 0 or more")
    if options.train < len(FIGURES):
        raise UsageError(f"--train {options.train}: give {len(FIGURES)} or more, one a class")
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"{options.out} is a file: name a folder")


def _record(options: Options) -> dict[str, object]:
    return {
        "version": VERSION,
        "seed": options.seed,
        "train": options.train,
        "val": options.val,
        "classes": list(FIGURES),
    }


def _record_of(folder: Path) -> object:
    """What `demo.json` says, None when the folder has none that can be read."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None


def main() -> None:
    """Draw what the command line asks for."""
    options = tyro.cli(Options, prog="python -m pipeline.demo_images")
    new = draw_set(options)
    state = "drawn" if new else "already complete"
    sys.stderr.write(
        f"{options.train} training and {options.val} validation pictures of "
        f"{len(FIGURES)} classes {state} in {options.out}\n"
    )


if __name__ == "__main__":
    run(main)
