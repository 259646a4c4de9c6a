"""The ledgers of a run, sorted into attempts: which rank should have delivered which position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.dataset.manifest import Manifest, identity
from pipeline.stream.ledger.format import ENDING, LedgerFile, scan
from pipeline.stream.order import Ids, share
from pipeline.tools.errors import UsageError

FOLDER = "ledger"
"""Where a run keeps its ledgers: RUN/ledger/."""

RAGGED = 8
"""Batches by which ranks may differ at the end of an attempt: they were stopped in the midst of a
step, and a host runs that far ahead of its GPU. A rank that lacks more has lost something."""


@dataclass
class Attempt:
    """The ranks that started together: files with one start, batch and world, each rank once."""

    position: int
    batch_size: int
    world_size: int
    files: dict[int, LedgerFile] = field(default_factory=dict)
    """By rank."""

    @property
    def reach(self) -> int:
        """Position after the last batch that any rank got, a whole number of batches on."""
        return self.position + max(map(self._batches, self.files)) * self.batch_size

    @property
    def ragged(self) -> int:
        """Position from which on some ranks got nothing because they were stopped; else `reach`."""
        fewest = min(map(self._batches, self.files))
        low = self.position + fewest * self.batch_size
        lost = len(self.files) < self.world_size or self.reach - low > RAGGED * self.batch_size
        return self.reach if lost else low

    def ranks(self, positions: Ids) -> Ids:
        """Return whose slice each position is in, int64 [n]."""
        ends = [share(self.batch_size, rank, self.world_size)[1] for rank in range(self.world_size)]
        places = (positions - self.position) % self.batch_size
        return np.searchsorted(ends, places, side="right").astype(np.int64)

    def _batches(self, rank: int) -> int:
        return max(0, -((self.position - self.files[rank].end) // self.batch_size))


class Opened(NamedTuple):
    """What was found in the folders."""

    files: list[LedgerFile]
    """In order of time, as their names tell it."""
    torn: int
    """Files whose last frame or first line was not finished."""
    unreadable: dict[Path, str]
    """Files that are damaged from their first line on, and why."""


def open_ledgers(data: Path, manifest: Manifest, runs: Sequence[Path]) -> Opened:
    """Open all ledgers of runs, and make sure that they belong together.

    Args:
        data: folder of the data set.
        manifest: of that.
        runs: folders of runs (RUN with RUN/ledger in it), or folders with ledgers.

    Raises:
        UsageError: a folder without ledgers, or a ledger of another data set, split, seed or
            shuffle, or not one that can be read.
    """
    files, torn, unreadable = [], 0, {}
    for path in _paths(runs):
        try:
            file = scan(path)
        except ValueError as error:
            unreadable[path] = str(error)
            continue
        torn += file is None or file.torn
        if file is not None:
            files.append(file)
    if not files:
        reasons = [f"{path}: {reason}" for path, reason in unreadable.items()]
        raise UsageError(f"no ledger can be read ({reasons[0] if reasons else 'all are empty'})")
    known = identity(data)
    for file in files:
        _of_set(file, data, manifest, known)
        _of_run(file, files[0])
    return Opened(files, torn, unreadable)


def _paths(runs: Sequence[Path]) -> list[Path]:
    """All ledgers in order of time, each once."""
    found: dict[Path, Path] = {}
    for run in runs:
        folder = run / FOLDER if (run / FOLDER).is_dir() else run
        paths = list(folder.glob(f"*{ENDING}"))
        if not paths:
            raise UsageError(
                f"{folder} holds no ledger (*{ENDING}); name a run that was trained with --ledger"
            )
        found |= {path.resolve(): path for path in paths}
    return sorted(found.values(), key=lambda path: path.name)


def _of_set(file: LedgerFile, data: Path, manifest: Manifest, known: str) -> None:
    about = file.about
    if about.data_sha256 != known:
        raise UsageError(
            f"ledger {file.path} is of another data set (manifest {about.data_sha256[:12]}, that "
            f"of {data} is {known[:12]}); name the set it was trained on"
        )
    samples = manifest.split(about.split, data).samples
    if about.samples != samples:
        raise UsageError(
            f"ledger {file.path} counts {about.samples} samples, split {about.split!r} of {data} "
            f"has {samples}; leave this file out"
        )


def _of_run(file: LedgerFile, first: LedgerFile) -> None:
    for name in ("split", "seed", "shuffle"):
        mine, others = getattr(file.about, name), getattr(first.about, name)
        if mine != others:
            raise UsageError(
                f"ledger {file.path} has {name} {mine!r}, {first.path.name} has {others!r}: "
                "they are of different runs; name the folders of one"
            )


def attempts_of(files: Sequence[LedgerFile]) -> list[Attempt]:
    """Sort files, in order of time, into attempts: a rank seen again is the next attempt."""
    attempts: list[Attempt] = []
    latest: dict[tuple[int, int, int], Attempt] = {}
    for file in files:
        about = file.about
        key = about.position, about.batch_size, about.world_size
        if key not in latest or about.rank in latest[key].files:
            latest[key] = Attempt(*key)
            attempts.append(latest[key])
        latest[key].files[about.rank] = file
    return attempts


def out_of_line(file: LedgerFile) -> tuple[int, int, int]:
    """Compare the frames of a file with its first line.

    Returns:
        How many frames are not where the one before them says, number of the first such frame,
        and where it should have been.
    """
    about = file.about
    first, last = share(about.batch_size, about.rank, about.world_size)
    starts, counts = file.frames[:, 1], file.frames[:, 2]
    due = np.concatenate(([about.position + first], starts[:-1] + about.batch_size))[: len(starts)]
    (wrong,) = np.nonzero((starts != due) | (counts != last - first))
    return (len(wrong), int(wrong[0]), int(due[wrong[0]])) if len(wrong) else (0, 0, 0)
