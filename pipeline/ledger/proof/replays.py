"""What was delivered where, and whether it was the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ledger.proof.findings import Finding, count
from pipeline.stream.ledger.format import Deliveries, LedgerFile

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]


class Window:
    """What was delivered at positions [first, last): the first delivery of each, in file order."""

    def __init__(self, first: int, last: int, samples: int) -> None:
        """Start with nothing delivered; `samples` is N."""
        size = last - first
        ids = np.uint32 if samples <= 1 << 32 else np.int64
        self.first, self.last = first, last
        self.owner: Numbers = np.full(size, -1, np.int32)
        """Number of the file that told of it first; -1 where there is none."""
        self.due: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.delivered: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.compared = 0
        """Deliveries whose pixels were compared with those of an earlier one."""
        self._sums: dict[object, tuple[Numbers, npt.NDArray[np.uint32]]] = {}

    def add_ids(self, number: int, told: Deliveries) -> tuple[Flags, Numbers]:
        """Take the ids that file `number` tells.

        Returns:
            Where they differ from an earlier delivery, and the file of that; both [n].
        """
        at = told.positions - self.first
        new = self.owner[at] < 0
        self.owner[at[new]] = number
        self.due[at[new]] = told.due[new]
        self.delivered[at[new]] = told.delivered[new]
        differ = (self.due[at] != told.due) | (self.delivered[at] != told.delivered)
        return differ, self.owner[at]

    def add_pixels(self, number: int, kind: object, told: Deliveries) -> tuple[Flags, Numbers]:
        """Take the checksums that file `number` tells; those of another `kind` are left alone.

        Returns:
            As `add_ids`.
        """
        if kind not in self._sums:
            size = self.last - self.first
            self._sums[kind] = np.full(size, -1, np.int32), np.zeros(size, np.uint32)
        owner, sums = self._sums[kind]
        at = told.positions - self.first
        new = owner[at] < 0
        self.compared += len(at) - int(new.sum())
        owner[at[new]] = number
        sums[at[new]] = told.checksums[new]
        return sums[at] != told.checksums, owner[at]


@dataclass
class _Difference:
    """Between two files: the first one, and how many."""

    position: int
    sample: int
    text: str
    count: int = 0


class Replays:
    """Collects the differences between deliveries of the same positions, by pair of files."""

    def __init__(self, files: Sequence[LedgerFile], samples: int) -> None:
        self._files = files
        self._samples = samples
        self._found: dict[tuple[str, int, int], _Difference] = {}

    def compare(self, window: Window, number: int, told: Deliveries) -> None:
        """Add what file `number` tells about a window to it, and note where it differs."""
        about = self._files[number].about
        other_ids, owner = window.add_ids(number, told)
        self._note("ids", number, told, other_ids, owner, window)
        # Other devices decode to other pixels, and what is cut or coloured otherwise looks so.
        colour = about.colour, about.colour_divide
        kind = about.checksum, about.device, about.view, about.mean, colour
        other_pixels, owner = window.add_pixels(number, kind, told)
        self._note("pixels", number, told, other_pixels & ~other_ids, owner, window)

    def findings(self) -> list[Finding]:
        """Return one finding for each pair of files that differ."""
        return [self._finding(*key, difference) for key, difference in self._found.items()]

    def _note(
        self,
        what: str,
        number: int,
        told: Deliveries,
        wrong: Flags,
        owner: Numbers,
        window: Window,
    ) -> None:
        for other in np.unique(owner[wrong]).tolist():
            places = np.flatnonzero(wrong & (owner == other))
            first = int(places[0])
            position, sample = int(told.positions[first]), int(told.due[first])
            text = f"the pixels of sample {told.delivered[first]} differ"
            if what == "ids":
                slot = position - window.first
                text = (
                    f"sample {window.due[slot]} was due and {window.delivered[slot]} delivered, "
                    f"and the second time {sample} and {told.delivered[first]}"
                )
            new = _Difference(position, sample, text)
            self._found.setdefault((what, other, number), new).count += len(places)

    def _finding(self, what: str, one: int, other: int, difference: _Difference) -> Finding:
        names = self._files[one].path.name, self._files[other].path.name
        epoch = difference.position // self._samples
        positions = count(difference.count, "position")
        return Finding(
            kind="replay",
            reason=(
                f"{names[0]} and {names[1]} tell of other {what} at {positions}: at position "
                f"{difference.position:,} (epoch {epoch}), {difference.text}"
            ),
            epoch=epoch,
            position=difference.position,
            count=difference.count,
            ids=(difference.sample,),
            files=names,
        )
