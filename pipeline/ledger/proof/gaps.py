"""Positions that nobody delivered, and who should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.ledger.proof.findings import LISTED, Finding, count, listed, ranges
from pipeline.stream.ledger.attempts import Attempt
from pipeline.stream.order import Ids

_ALL = -1
"""In place of a rank: all of them."""
_BETWEEN = -1
"""In place of an attempt: none went there."""


@dataclass
class _Gap:
    """What one rank of one attempt should have delivered."""

    count: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)
    """First and last position of each run, the first `LISTED` and one more."""

    def add(self, count: int, runs: list[tuple[int, int]]) -> None:
        self.count += count
        if self.runs and runs[0][0] == self.runs[-1][1] + 1:
            runs = [(self.runs.pop()[0], runs[0][1]), *runs[1:]]
        self.runs = (self.runs + runs)[: LISTED + 1]


class Gaps:
    """Collects them, in rising order."""

    def __init__(self, attempts: Sequence[Attempt], samples: int) -> None:
        self._attempts = attempts
        self._samples = samples
        self._gaps: dict[tuple[int, int], _Gap] = {}
        self._starts = np.sort([attempt.position for attempt in attempts])
        # An attempt that starts somewhere says that everything before was consumed.
        self._vouched = int(self._starts[-1])

    def add(self, missing: Ids) -> Ids:
        """Take positions in rising order, int64 [n].

        Returns:
            Those which are no gap: the attempt was stopped when only some ranks had got there,
            and nobody went on from beyond it.
        """
        if not len(missing):
            return missing
        attempt, rank, stopped = self._whose(missing)
        for key in {*zip(attempt[~stopped].tolist(), rank[~stopped].tolist(), strict=True)}:
            mine = missing[~stopped & (attempt == key[0]) & (rank == key[1])]
            self._gaps.setdefault(key, _Gap()).add(len(mine), ranges(mine))
        return missing[stopped]

    def add_run(self, first: int, last: int) -> None:
        """Take all positions [first, last): no rank delivered any of them."""
        if first < last:
            attempt, rank, _ = self._whose(np.array([first]))
            key = int(attempt[0]), _ALL if attempt[0] != _BETWEEN else int(rank[0])
            self._gaps.setdefault(key, _Gap()).add(last - first, [(first, last - 1)])

    def findings(self) -> list[Finding]:
        """Return one finding for each rank of each attempt that lacks anything."""
        return [self._finding(*key, gap) for key, gap in self._gaps.items()]

    def _whose(self, missing: Ids) -> tuple[Ids, Ids, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Return number of the attempt, rank, and whether it was only stopped there.

        Where no attempt went, the "rank" is the place of the next start in `_starts`.
        """
        attempt = np.full(len(missing), _BETWEEN)
        rank = np.searchsorted(self._starts, missing, side="right").astype(np.int64)
        stopped = np.zeros(len(missing), np.bool_)
        for number, one in enumerate(self._attempts):  # later ones went over earlier ones again
            here = slice(*np.searchsorted(missing, (one.position, one.reach)))
            attempt[here] = number
            rank[here] = one.ranks(missing[here])
            stopped[here] = missing[here] >= max(one.ragged, self._vouched)
        return attempt, rank, stopped

    def _finding(self, attempt: int, rank: int, gap: _Gap) -> Finding:
        first = gap.runs[0][0]
        where = listed("position", gap.runs[:LISTED], more=len(gap.runs) > LISTED)
        what = f"{where} ({count(gap.count, 'sample')}, from epoch {first // self._samples} on)"
        files: tuple[str, ...] = ()
        if attempt == _BETWEEN:
            who = self._between(first, rank)
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
        return Finding(
            kind="missing",
            reason=f"nobody delivered {what}; {who}",
            epoch=first // self._samples,
            position=first,
            count=gap.count,
            files=files,
        )

    def _between(self, first: int, following: int) -> str:
        """Say between which attempts a gap lies."""
        start = int(self._starts[following])
        number = next(k for k, one in enumerate(self._attempts) if one.position == start)
        begun = f"attempt {number + 1} began at {start:,}"
        ended = [(one.reach, k) for k, one in enumerate(self._attempts) if one.reach <= first]
        if not ended:
            return f"{begun}, and no ledger tells of what was before"
        reach, before = max(ended)
        return f"attempt {before + 1} ended at {reach:,}, and {begun}"
