"""The attempts of a run: which rank should have delivered which position, and which are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from pipeline.dataset.manifest import find_root
from pipeline.dataset.segments import Segments, find_divergence, find_epoch
from pipeline.dataset.versions import SealedVersion, list_versions, read_local
from pipeline.stream.config import split_batch
from pipeline.stream.ledger.findings import LISTED, LedgerFinding, find_runs, format_runs, pluralize
from pipeline.stream.ledger.format import ENDING, LedgerFile, scan_ledger
from pipeline.stream.order import Ids
from pipeline.stream.selection.record import Selection
from pipeline.tools.errors import UsageError

FOLDER = "ledger"
"""Folder of the ledgers within a run's."""

MAX_LAG = 8
"""Batches by which ranks may differ at the end of an attempt: they are stopped inside a step, and a
host runs that far ahead of its GPU. A rank that lacks more has lost something."""


@dataclass
class LedgerAttempt:
    """The ranks that started together: files with one start, batch and world, each rank once."""

    position: int
    batch_size: int
    world_size: int
    files: dict[int, LedgerFile] = field(default_factory=dict)
    """Ledger of each rank that left one."""

    @property
    def reach(self) -> int:
        """Position after the last batch that any rank got, rounded up to a whole batch."""
        return self.position + max(map(self._batches, self.files)) * self.batch_size

    @property
    def stop(self) -> int:
        """Position from which on ranks are missing only because they were stopped, or `reach`."""
        fewest = min(map(self._batches, self.files))
        low = self.position + fewest * self.batch_size
        lost = len(self.files) < self.world_size or self.reach - low > MAX_LAG * self.batch_size
        return self.reach if lost else low

    def find_ranks(self, positions: Ids) -> Ids:
        """Return whose slice each position is in, int64 [n]."""
        ends = [
            split_batch(self.batch_size, rank, self.world_size)[1]
            for rank in range(self.world_size)
        ]
        places = (positions - self.position) % self.batch_size
        return np.searchsorted(ends, places, side="right").astype(np.int64)

    def _batches(self, rank: int) -> int:
        return max(0, -((self.position - self.files[rank].end) // self.batch_size))


class RunLedgers(NamedTuple):
    """The ledgers found in the folders of a run."""

    files: list[LedgerFile]
    """Readable ledgers, in order of time by their names."""
    torn: int
    """Number of files whose last frame or first line is incomplete."""
    unreadable: dict[Path, str]
    """Reason why the first line cannot be read, of each damaged file."""
    selection: Selection | None
    """The samples that took part; None: all of the split, each once an epoch."""
    segments: Segments
    """Segments of the last attempt; what an earlier one has read of other versions, from where they
    differ on, was made again and does not count."""
    versions: tuple[SealedVersion, ...]
    """Version of each segment; of a mixture, that of the set that was named."""


def open_ledgers(data: Path, runs: Sequence[Path]) -> RunLedgers:
    """Open all ledgers of a run, and check that they belong together.

    Args:
        data: folder of the dataset.
        runs: folders of runs (RUN with RUN/ledger in it), or folders with ledgers.

    Raises:
        UsageError: a folder without ledgers, or a ledger of another dataset, split, seed,
            shuffle or selection, or no ledger that can be read.
        DamagedFile: the selection beside the ledgers, or a manifest, is missing or damaged.
    """
    files, torn, unreadable = [], 0, {}
    for path in _list_ledgers(runs):
        try:
            file = scan_ledger(path)
        except ValueError as error:
            unreadable[path] = str(error)
            continue
        torn += file is None or file.torn
        if file is not None:
            files.append(file)
    if not files:
        reasons = [f"{path}: {reason}" for path, reason in unreadable.items()]
        raise UsageError(f"no ledger can be read ({reasons[0] if reasons else 'all are empty'})")
    root = find_root(data)
    known = {one.identity: one for one in list_versions(read_local(root), str(root))}
    selections: dict[str, Selection | None] = {"": None}
    for file in files:
        if (digest := file.header.selection) not in selections:
            selections[digest] = Selection.load(file.path.parent, digest)
        _check_dataset(file, data, known, selections[digest])
        _check_run(file, files[0])
    segments, selection = files[-1].segments, selections[files[0].header.selection]
    for number, file in enumerate(files):
        if (limit := find_divergence(file.segments, segments)) is not None:
            files[number] = replace(file, limit=limit)
    wanted = selection.identities if selection else [segment.version for segment in segments]
    versions = tuple(known[identity] for identity in wanted if identity in known)
    return RunLedgers(files, torn, unreadable, selection, segments, versions)


def _list_ledgers(runs: Sequence[Path]) -> list[Path]:
    """Return all ledgers in order of time, each once."""
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


def _check_dataset(
    file: LedgerFile, data: Path, known: Mapping[str, SealedVersion], selection: Selection | None
) -> None:
    header = file.header
    if selection is not None and len(selection.identities) > 1:
        if not known.keys() & set(selection.identities):
            _refuse(file, data, known, "any of its mixture")
        if header.samples != selection.stored:
            _refuse_count(file, data, header.samples, selection.stored)
        return
    for segment in file.segments:
        if segment.version not in known:
            _refuse(file, data, known, f"manifest {segment.version[:12]}")
        stored = known[segment.version].manifest.split(header.split, data).samples
        if segment.samples != stored:
            _refuse_count(file, data, segment.samples, stored)


def _refuse(file: LedgerFile, data: Path, known: Iterable[str], named: str) -> NoReturn:
    newest = next(iter(known))
    raise UsageError(
        f"ledger {file.path} is of another data set ({named}, that of {data} is {newest[:12]}); "
        "name the set it was trained on"
    )


def _refuse_count(file: LedgerFile, data: Path, samples: int, stored: int) -> NoReturn:
    raise UsageError(
        f"ledger {file.path} counts {samples} samples, split {file.header.split!r} of {data} has "
        f"{stored}; leave this file out"
    )


def _check_run(file: LedgerFile, first: LedgerFile) -> None:
    for name in ("split", "seed", "shuffle", "selection"):
        mine, others = getattr(file.header, name), getattr(first.header, name)
        if mine != others:
            raise UsageError(
                f"ledger {file.path} has {name} {mine!r}, {first.path.name} has {others!r}: "
                "they are of different runs; name the folders of one"
            )


def group_attempts(files: Sequence[LedgerFile]) -> list[LedgerAttempt]:
    """Group files, in order of time, by attempt: a rank that comes again begins the next one."""
    attempts: list[LedgerAttempt] = []
    latest: dict[tuple[int, int, int], LedgerAttempt] = {}
    for file in files:
        header = file.header
        key = header.position, header.batch_size, header.world_size
        if key not in latest or header.rank in latest[key].files:
            latest[key] = LedgerAttempt(*key)
            attempts.append(latest[key])
        latest[key].files[header.rank] = file
    return attempts


def find_misplaced_frames(file: LedgerFile) -> tuple[int, int, int]:
    """Compare the frames of a file with its header.

    Returns:
        Number of frames that do not follow the one before them, index of the first such frame,
        and the position it should have.
    """
    header = file.header
    first, last = split_batch(header.batch_size, header.rank, header.world_size)
    starts, counts = file.frames[:, 1], file.frames[:, 2]
    due = np.concatenate(([header.position + first], starts[:-1] + header.batch_size))[
        : len(starts)
    ]
    (wrong,) = np.nonzero((starts != due) | (counts != last - first))
    return (len(wrong), int(wrong[0]), int(due[wrong[0]])) if len(wrong) else (0, 0, 0)


_ALL = -1
"""Stands for all ranks of an attempt."""
_BETWEEN = -1
"""Stands for the attempt where none reached a position."""


@dataclass
class _Gap:
    """Positions that one rank of one attempt should have delivered and did not."""

    count: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)
    """First and last position of each run, the first `LISTED` and one more."""

    def add(self, count: int, runs: list[tuple[int, int]]) -> None:
        self.count += count
        if self.runs and runs[0][0] == self.runs[-1][1] + 1:
            runs = [(self.runs.pop()[0], runs[0][1]), *runs[1:]]
        self.runs = (self.runs + runs)[: LISTED + 1]


class Gaps:
    """Collects positions that no rank delivered, and finds the rank that should have."""

    def __init__(self, attempts: Sequence[LedgerAttempt], segments: Segments) -> None:
        self._attempts = attempts
        self._segments = segments
        self._gaps: dict[tuple[int, int], _Gap] = {}
        self._starts = np.sort([attempt.position for attempt in attempts])
        # An attempt that starts at a position says that everything before it was consumed.
        self._consumed = int(self._starts[-1])

    def add(self, missing: Ids) -> Ids:
        """Take positions in rising order, int64 [n].

        Returns:
            Those which are no gap: the attempt was stopped when only some ranks had reached them,
            and no attempt resumed from beyond them.
        """
        if not len(missing):
            return missing
        attempt, rank, stopped = self._find_rank(missing)
        for key in {*zip(attempt[~stopped].tolist(), rank[~stopped].tolist(), strict=True)}:
            mine = missing[~stopped & (attempt == key[0]) & (rank == key[1])]
            self._gaps.setdefault(key, _Gap()).add(len(mine), find_runs(mine))
        return missing[stopped]

    def add_run(self, first: int, last: int) -> None:
        """Take all positions [first, last): no rank delivered any of them."""
        if first < last:
            attempt, rank, _ = self._find_rank(np.array([first]))
            key = int(attempt[0]), _ALL if attempt[0] != _BETWEEN else int(rank[0])
            self._gaps.setdefault(key, _Gap()).add(last - first, [(first, last - 1)])

    def list_findings(self) -> list[LedgerFinding]:
        """Return one finding for each rank of each attempt that lacks anything."""
        return [self._make_finding(*key, gap) for key, gap in self._gaps.items()]

    def _find_rank(
        self, missing: Ids
    ) -> tuple[Ids, Ids, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Return the attempt, the rank, and whether the rank was only stopped there, all [n].

        Where no attempt reached, the "rank" is the place of the next start in `_starts`.
        """
        attempt = np.full(len(missing), _BETWEEN)
        rank = np.searchsorted(self._starts, missing, side="right").astype(np.int64)
        stopped = np.zeros(len(missing), np.bool_)
        for number, one in enumerate(self._attempts):  # later ones override earlier ones
            here = slice(*np.searchsorted(missing, (one.position, one.reach)))
            attempt[here] = number
            rank[here] = one.find_ranks(missing[here])
            stopped[here] = missing[here] >= max(one.stop, self._consumed)
        return attempt, rank, stopped

    def _make_finding(self, attempt: int, rank: int, gap: _Gap) -> LedgerFinding:
        first = gap.runs[0][0]
        epoch = find_epoch(self._segments, first)
        where = format_runs("position", gap.runs[:LISTED], more=len(gap.runs) > LISTED)
        what = f"{where} ({pluralize(gap.count, 'sample')}, from epoch {epoch} on)"
        files: tuple[str, ...] = ()
        if attempt == _BETWEEN:
            who = self._describe_neighbors(first, rank)
        else:
            one = self._attempts[attempt]
            size = f"{one.world_size} rank{'s' * (one.world_size > 1)}"
            who = f"attempt {attempt + 1} (from position {one.position:,}, {size}): "
            if rank == _ALL:
                who += "all ranks should have"
            elif rank not in one.files:
                who += f"rank {rank} should have, and left no ledger"
            else:
                who += f"rank {rank} should have"
                files = (one.files[rank].path.name,)
        return LedgerFinding(
            kind="missing",
            reason=f"nobody delivered {what}; {who}",
            epoch=epoch,
            position=first,
            count=gap.count,
            files=files,
        )

    def _describe_neighbors(self, first: int, following: int) -> str:
        """Return between which attempts a gap lies."""
        start = int(self._starts[following])
        number = next(k for k, one in enumerate(self._attempts) if one.position == start)
        begun = f"attempt {number + 1} began at {start:,}"
        ended = [(one.reach, k) for k, one in enumerate(self._attempts) if one.reach <= first]
        if not ended:
            return f"{begun}, and no ledger tells of what was before"
        reach, before = max(ended)
        return f"attempt {before + 1} ended at {reach:,}, and {begun}"
