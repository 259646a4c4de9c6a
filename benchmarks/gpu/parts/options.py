"""Options of `stream.py`, and the check of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.dataset.manifest import Manifest
from pipeline.stream.config import Device
from pipeline.stream.transfer import select_gpu
from pipeline.tools.errors import UsageError

STEPS = ("pixels", "damage", "sweep", "turns", "exact", "bare", "raw")
"""All there are, in their order; each is a method of the same name."""
MIXED = 0.65
"""DALI's default load, checked and compared besides the best and the exact ones."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure and check the stream on a GPU."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of a data set of JPEGs; some hundred images will do."""
    raw: Path | None = None
    """Folder of a set built with `--encoding raw`; the default is one made of DATA for the run."""
    out: Path = Path(__file__).parents[1] / "results"
    """Folder for the results."""
    device: Device = "gpu"
    """`cpu` runs what makes sense there, to try this out."""
    minutes: float = 8.0
    """Minutes for the whole run."""
    seconds: float = 3.0
    """Seconds of a window."""
    rounds: int = 5
    """Number of turns of each lane."""
    samples: int = 20_000
    """Fewest samples: a smaller set is repeated, by links to its shards, until it has as many."""
    checked: int = 512
    """Number of images whose pixels are compared."""
    skip: str = ""
    """Steps to leave out, with commas between: pixels, damage, sweep, turns, exact, bare, raw."""
    threads: int | None = None
    """Threads that the sweep begins with, or that are used without one; default: one per core."""
    load: float = MIXED
    """Decoder load, 0..1, that the sweep begins with, or that is used without one."""
    prefetch: int = 2
    """Batches in flight that the sweep begins with, or that are used without one."""
    batch: int = 256
    """Images in a batch that the sweep begins with, or that are used without one."""


def select_steps(options: Options) -> list[str]:
    """Return the steps to take.

    Raises:
        UsageError: an option that cannot work, or no data set of JPEGs.
        SetupError: device `gpu` without a CUDA device.
    """
    skipped = [name.strip() for name in options.skip.split(",") if name.strip()]
    if unknown := [name for name in skipped if name not in STEPS]:
        raise UsageError(f"--skip {unknown[0]}: no such step; there are {', '.join(STEPS)}")
    for name in ("minutes", "seconds", "rounds", "checked", "samples", "prefetch", "batch"):
        if (value := getattr(options, name)) <= 0:
            raise UsageError(f"--{name} is {value}; it must be above 0")
    if not 0 <= options.load <= 1:
        raise UsageError(f"--load is {options.load}; it must be from 0 to 1")
    for data, wanted in ((options.data, "jpeg"), (options.raw, "raw")):
        if data and (holds := Manifest.load(data).encoding) != wanted:
            raise UsageError(f"data set {data} holds {holds} images; {wanted} is wanted here")
    select_gpu(options.device)
    return [step for step in STEPS if step not in skipped]
