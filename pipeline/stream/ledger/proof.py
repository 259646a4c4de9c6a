"""Proof from ledgers that each epoch was delivered exactly once, or the errors that forbid it.

Every position must have been delivered; the ids that were due within an epoch must be each of
0..N-1 once; and what was delivered again after a restart must be what was delivered before, ids
and pixels. The order itself is not consulted: any permutation will do. Where a stream selected,
weighted or mixed samples, the order decides: each id must be the one that was due at its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.index import read_key_from_idx, sample_key
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.stream.ledger.attempts import (
    Gaps,
    find_misplaced_frames,
    group_attempts,
    open_ledgers,
)
from pipeline.stream.ledger.findings import LISTED, LedgerFinding, Proof, limit_findings, pluralize
from pipeline.stream.ledger.format import Deliveries, LedgerFile
from pipeline.stream.order import Ids, Mixture, Order
from pipeline.stream.selection.record import Selection, make_order
from pipeline.tools.progress import Progress

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]


class _DeliveryWindow:
    """The first delivery of each position in [first, last), in the order of the files."""

    def __init__(self, first: int, last: int, samples: int) -> None:
        """Start with nothing delivered; `samples` is N."""
        size = last - first
        ids = np.uint32 if samples <= 1 << 32 else np.int64
        self.first, self.last = first, last
        self.owner: Numbers = np.full(size, -1, np.int32)
        """Number of the file with the first delivery; -1 where there is none."""
        self.due: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.delivered: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.compared = 0
        """Number of deliveries whose pixels were compared with those of an earlier one."""
        self._sums: dict[object, tuple[Numbers, npt.NDArray[np.uint32]]] = {}

    def add_ids(self, number: int, deliveries: Deliveries) -> tuple[Flags, Numbers]:
        """Add the ids of file `number`.

        Returns:
            Where they differ from an earlier delivery, and the number of its file; both [n].
        """
        at = deliveries.positions - self.first
        new = self.owner[at] < 0
        self.owner[at[new]] = number
        self.due[at[new]] = deliveries.due[new]
        self.delivered[at[new]] = deliveries.delivered[new]
        differ = (self.due[at] != deliveries.due) | (self.delivered[at] != deliveries.delivered)
        return differ, self.owner[at]

    def add_pixels(
        self, number: int, kind: object, deliveries: Deliveries
    ) -> tuple[Flags, Numbers]:
        """Add the checksums of file `number`; only those of the same `kind` are compared.

        Returns:
            As `add_ids`.
        """
        if kind not in self._sums:
            size = self.last - self.first
            self._sums[kind] = np.full(size, -1, np.int32), np.zeros(size, np.uint32)
        owner, sums = self._sums[kind]
        at = deliveries.positions - self.first
        new = owner[at] < 0
        self.compared += len(at) - int(new.sum())
        owner[at[new]] = number
        sums[at[new]] = deliveries.checksums[new]
        return sums[at] != deliveries.checksums, owner[at]


@dataclass
class _ReplayDifference:
    """The first difference between two files, and the number of differences."""

    position: int
    sample: int
    text: str
    count: int = 0


class _Replays:
    """Collects the differences between deliveries of the same positions, by pair of files."""

    def __init__(self, files: Sequence[LedgerFile], samples: int) -> None:
        self._files = files
        self._samples = samples
        self._found: dict[tuple[str, int, int], _ReplayDifference] = {}

    def compare(self, window: _DeliveryWindow, number: int, deliveries: Deliveries) -> None:
        """Add the deliveries of file `number` to a window, and record where they differ."""
        header = self._files[number].header
        other_ids, owner = window.add_ids(number, deliveries)
        self._record("ids", number, deliveries, other_ids, owner, window)
        # Pixels differ between devices, crops, means and colours: those are not compared.
        color = header.colour, header.colour_divide
        kind = header.checksum, header.device, header.crop, header.mean, color, header.pixels
        other_pixels, owner = window.add_pixels(number, kind, deliveries)
        self._record("pixels", number, deliveries, other_pixels & ~other_ids, owner, window)

    def list_findings(self) -> list[LedgerFinding]:
        """Return one finding for each pair of files that differ."""
        return [self._make_finding(*key, difference) for key, difference in self._found.items()]

    def _record(
        self,
        what: str,
        number: int,
        deliveries: Deliveries,
        wrong: Flags,
        owner: Numbers,
        window: _DeliveryWindow,
    ) -> None:
        for other in np.unique(owner[wrong]).tolist():
            places = np.flatnonzero(wrong & (owner == other))
            first = int(places[0])
            position, sample = int(deliveries.positions[first]), int(deliveries.due[first])
            text = f"the pixels of sample {deliveries.delivered[first]} differ"
            if what == "ids":
                slot = position - window.first
                text = (
                    f"sample {window.due[slot]} was due and {window.delivered[slot]} delivered, "
                    f"and the second time {sample} and {deliveries.delivered[first]}"
                )
            new = _ReplayDifference(position, sample, text)
            self._found.setdefault((what, other, number), new).count += len(places)

    def _make_finding(
        self, what: str, one: int, other: int, difference: _ReplayDifference
    ) -> LedgerFinding:
        names = self._files[one].path.name, self._files[other].path.name
        epoch = difference.position // self._samples
        positions = pluralize(difference.count, "position")
        return LedgerFinding(
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


WINDOW = 1 << 22
"""Positions checked together: as many whole epochs as fit, at least one."""

NAMED = 3
"""Samples that a finding names with shard and key."""


def prove(data: Path, runs: Sequence[Path]) -> Proof:
    """Prove from all ledgers of a run that each epoch was delivered exactly once.

    Args:
        data: folder of the dataset; only its manifest is read.
        runs: folders of runs (RUN with RUN/ledger in it), or folders with ledgers.

    Raises:
        UsageError: no dataset, no ledgers, none with a header, or ledgers that do not belong
            together.
        DataError: the manifest cannot be read.
    """
    manifest = Manifest.load(data)
    ledgers = open_ledgers(data, manifest, runs)
    shards = manifest.splits[ledgers.files[0].header.split].shards
    foreign = data if manifest.foreign else None
    prover = _Prover(ledgers.files, shards, foreign, ledgers.selection)
    for path, reason in ledgers.unreadable.items():
        prover.add_finding("unreadable", f"{path}: {reason}", files=(path.name,))
    prover.run()
    return prover.make_proof(ledgers.torn)


class _Prover:
    """Checks all positions, some epochs at a time, and collects findings."""

    def __init__(
        self,
        files: Sequence[LedgerFile],
        shards: Sequence[Shard],
        foreign: Path | None,
        selection: Selection | None,
    ) -> None:
        """Args: ledgers, shards of the split, their folder if the shards have keys of their own;
        the samples that took part, None for all.
        """
        self.findings: list[LedgerFinding] = []
        self._foreign = foreign
        self._files = files
        self._attempts = group_attempts(files)
        header = files[0].header
        self._stored = self._samples = header.samples
        self._order = None
        self._replaces = False
        if selection is not None:
            self._order = make_order(selection, header.seed, header.shuffle)
            self._samples = self._order.samples
            self._replaces = selection.has_replacement
        self._mixed = selection is not None and len(selection.shards) > 1
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._gaps = Gaps(self._attempts, self._samples)
        self._replays = _Replays(files, self._samples)
        self._whole: list[int] = []
        self._again = self._compared = self._replaced = self._unfinished = 0
        starts = [attempt.position for attempt in self._attempts]
        self._end = max(*starts, *(file.end for file in files))
        if files[0].header.shuffle == "stored":  # one pass; what is beyond pads the last batch
            self._end = min(self._end, self._samples)
        self._frontier = self._end

    def add_finding(self, kind: str, reason: str, **facts: Any) -> None:
        """Add an error; `facts` are further fields of `LedgerFinding`."""
        self.findings.append(LedgerFinding(kind=kind, reason=reason, **facts))

    def run(self) -> None:
        """Check every file and every position."""
        for file in self._files:
            self._check_file(file)
        reached = 0
        total = sum(file.deliveries for file in self._files)
        with Progress("proving", total=total, unit="samples") as progress:
            for first, last in self._windows():
                self._gaps.add_run(reached, first)
                self._check_window(first, last, progress)
                reached = last
        self._gaps.add_run(reached, self._end)

    def make_proof(self, torn: int) -> Proof:
        """Return the proof; `torn` is the number of files with an incomplete end."""
        findings = self.findings + self._gaps.list_findings() + self._replays.list_findings()
        return Proof(
            findings=tuple(limit_findings(findings)),
            samples=self._samples,
            replaces=self._replaces,
            epochs=tuple(self._whole),
            position=self._frontier,
            unfinished=self._unfinished,
            files=len(self._files),
            worlds=tuple(attempt.world_size for attempt in self._attempts),
            deliveries=sum(file.deliveries for file in self._files),
            again=self._again,
            compared=self._compared,
            replaced=self._replaced,
            torn=torn,
        )

    def _check_file(self, file: LedgerFile) -> None:
        """Find damage of a file, and frames that are not where they should be."""
        name = file.path.name
        if file.damage:
            reason = f"{file.path}: {file.damage}; what follows was not read"
            self.add_finding("unreadable", reason, files=(name,))
        wrong, number, due = find_misplaced_frames(file)
        if wrong:
            _, position, samples, _ = file.frames[number].tolist()
            more = f"; {wrong - 1} more such frames" if wrong > 1 else ""
            reason = (
                f"{name}: frame {number} holds {pluralize(samples, 'sample')} from position "
                f"{position:,}, but its rank was due at position {due:,}{more}"
            )
            self.add_finding("out of line", reason, position=position, count=wrong, files=(name,))

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Return first and last position of the windows with any delivery."""
        epochs = min(WINDOW // self._samples, -(-self._end // self._samples))
        span = max(1, epochs) * self._samples
        touched: set[int] = set()
        for file in self._files:
            lows = file.frames[:, 1] // span
            highs = (file.frames[:, 1] + file.frames[:, 2] - 1) // span
            for step in range(int((highs - lows).max(initial=-1)) + 1):
                touched.update(np.unique(np.minimum(lows + step, highs)).tolist())
        return (
            (number * span, (number + 1) * span)
            for number in sorted(touched)
            if number * span < self._end
        )

    def _check_window(self, first: int, last: int, progress: Progress) -> None:
        """Find positions that are missing in a window, and ids that are due twice or never."""
        window = _DeliveryWindow(first, last, self._stored)
        total = 0
        for number, file in enumerate(self._files):
            if file.start < last and file.end > first:
                deliveries = file.read(first, last)
                self._replays.compare(window, number, deliveries)
                total += len(deliveries.positions)
                progress.advance(len(deliveries.positions))
        owned = window.owner >= 0
        self._again += total - int(owned.sum())
        self._compared += window.compared
        self._replaced += int((window.due != window.delivered).sum())
        stopped = self._gaps.add(first + np.flatnonzero(~owned[: self._end - first]))
        if len(stopped):
            self._frontier = min(self._frontier, int(stopped[0]))
        self._unfinished += int(owned[max(0, self._frontier - first) :].sum())
        open_epochs = {*(stopped // self._samples).tolist(), self._end // self._samples}
        self._check_epochs(window, owned, open_epochs)

    def _check_epochs(self, window: _DeliveryWindow, owned: Flags, open_epochs: set[int]) -> None:
        """Check each epoch of a window; in open epochs, missing ids may be due later."""
        if self._order is not None:
            self._check_order(window, owned, self._order)
            return
        times = self._count_due(window, owned)
        filled = owned.reshape(-1, self._samples).sum(axis=1)
        once = (times == 1).sum(axis=1)
        epochs = window.first // self._samples + np.arange(len(times))
        self._whole.extend(epochs[once == self._samples].tolist())
        for row in np.flatnonzero((once < self._samples) & (filled > 0)).tolist():
            epoch = int(epochs[row])
            here = slice(row * self._samples, (row + 1) * self._samples)
            order = np.where(owned[here], window.due[here].astype(np.int64), -1)
            self._add_ids(epoch, "twice", np.flatnonzero(times[row] > 1), order)
            if filled[row] == self._samples or epoch not in open_epochs:
                self._add_ids(epoch, "never", np.flatnonzero(times[row] == 0), order)

    def _check_order(self, window: _DeliveryWindow, owned: Flags, order: Order | Mixture) -> None:
        """Check that each id of a window is the one that was due there."""
        due = order.list_slots(window.first, window.last - window.first).ids
        wrong = owned & (window.due != due)
        files = window.owner[wrong]
        for number in np.unique(files).tolist():
            slots = np.flatnonzero(wrong & (window.owner == number))
            slot = int(slots[0])
            position = window.first + slot
            self.add_finding(
                "not due",
                f"{self._files[number].path.name} has {pluralize(len(slots), 'sample')} that were "
                f"not due: at position {position:,} {self._name_sample(int(window.due[slot]))}, "
                f"where seed, order and selection have {self._name_sample(int(due[slot]))}",
                epoch=position // self._samples,
                position=position,
                count=len(slots),
                ids=tuple(window.due[slots[:LISTED]].tolist()),
                files=(self._files[number].path.name,),
            )
        whole = (owned & ~wrong).reshape(-1, self._samples).all(axis=1)
        self._whole.extend((window.first // self._samples + np.flatnonzero(whole)).tolist())

    def _count_due(self, window: _DeliveryWindow, owned: Flags) -> Ids:
        """Return how often each id was due in each epoch of a window, [epochs, N]."""
        known: Flags = (window.due < self._samples) & (window.delivered < self._samples)
        for slot in np.flatnonzero(owned & ~known)[: LISTED + 1].tolist():
            position, due = window.first + slot, int(window.due[slot])
            epoch, file = position // self._samples, self._files[window.owner[slot]].path.name
            reason = (
                f"position {position:,} (epoch {epoch}): sample {due} was due and "
                f"{window.delivered[slot]} delivered, but the split has only "
                f"{pluralize(self._samples, 'sample')}"
            )
            self.add_finding(
                "unknown id", reason, epoch=epoch, position=position, ids=(due,), files=(file,)
            )
        slots: Ids = np.flatnonzero(owned & known)
        keys = slots // self._samples * self._samples + window.due[slots].astype(np.int64)
        times = np.bincount(keys, minlength=window.last - window.first)
        return times.reshape(-1, self._samples)

    def _add_ids(self, epoch: int, kind: str, ids: Ids, order: Ids) -> None:
        """Add a finding about `ids`, if there are any; `order` holds the epoch's due ids."""
        if not len(ids):
            return
        names = []
        for sample in ids[:NAMED].tolist():
            places = (epoch * self._samples + np.flatnonzero(order == sample)[:LISTED]).tolist()
            where = ", ".join(f"{place:,}" for place in places)
            names.append(
                self._name_sample(sample) + (f" at positions {where}" if kind == "twice" else "")
            )
        reason = (
            f"epoch {epoch}: {pluralize(len(ids), 'sample')} {'was' if len(ids) == 1 else 'were'} "
            f"due {'more than once' if kind == 'twice' else 'at no position'}: "
            f"{'; '.join(names)}{'; ...' if len(ids) > NAMED else ''}"
        )
        self.add_finding(
            kind, reason, epoch=epoch, count=len(ids), ids=tuple(ids[:LISTED].tolist())
        )

    def _name_sample(self, sample: int) -> str:
        if self._mixed or not 0 <= sample < self._stored:
            return f"sample {sample}"
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        place = sample - int(self._starts[shard])
        if self._foreign is None:
            key = sample_key(shard, place)
        else:
            idx = (self._foreign / self._shards[shard].name).with_suffix(".idx")
            key = read_key_from_idx(idx, place) or "unknown"
        return f"sample {sample} ({self._shards[shard].name}, key {key})"
