"""Proof from ledgers that each epoch was delivered exactly once, or the errors that forbid it.

Every position must have been delivered; the ids that were due within an epoch must be each of
0..N-1 once, N being that of the version that was read; and what was delivered again after a restart
must be what was delivered before, ids and pixels, but for samples that were withdrawn in between.
The order itself is not consulted: any permutation will do. Where a stream selected, weighted or
mixed samples, the order decides: each id must be the one that was due at its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.index import load_index, read_key_from_idx, sample_key
from pipeline.dataset.manifest import Manifest, find_root
from pipeline.dataset.segments import Segment
from pipeline.dataset.versions import find_withdrawn
from pipeline.remote.local import LocalDataset
from pipeline.stream.ledger.attempts import (
    Gaps,
    RunLedgers,
    find_misplaced_frames,
    group_attempts,
    open_ledgers,
)
from pipeline.stream.ledger.findings import (
    LISTED,
    LedgerFinding,
    Proof,
    SegmentProof,
    limit_findings,
    pluralize,
)
from pipeline.stream.ledger.format import LedgerFile
from pipeline.stream.ledger.replays import DeliveryWindow, Flags, Replays, Stretch
from pipeline.stream.order import AnyOrder, Ids
from pipeline.stream.selection.record import make_order
from pipeline.tools.progress import Progress

WINDOW = 1 << 22
"""Positions checked together: as many whole epochs as fit, at least one."""

NAMED = 3
"""Samples that a finding names with shard and key."""


def prove(data: Path, runs: Sequence[Path]) -> Proof:
    """Prove from all ledgers of a run that each epoch was delivered exactly once.

    Args:
        data: folder of the dataset; its manifests are read, and the indices if samples were
            withdrawn.
        runs: folders of runs (RUN with RUN/ledger in it), or folders with ledgers.

    Raises:
        UsageError: no dataset, no ledgers, none with a header, or ledgers that do not belong
            together.
        DataError: the manifest cannot be read.
    """
    Manifest.load(data)
    ledgers = open_ledgers(data, runs)
    prover = _Prover(ledgers, data)
    for path, reason in ledgers.unreadable.items():
        prover.add_finding("unreadable", f"{path}: {reason}", files=(path.name,))
    prover.run()
    return prover.make_proof(ledgers.torn)


class _Prover:
    """Checks all positions, some epochs at a time, and collects findings."""

    def __init__(self, ledgers: RunLedgers, data: Path) -> None:
        """Args: the ledgers of a run, and the folder of its data set."""
        self.findings: list[LedgerFinding] = []
        self._data, self._versions = find_root(data), ledgers.versions
        self._files = files = ledgers.files
        self._attempts = group_attempts(files)
        header, selection, segments = files[0].header, ledgers.selection, ledgers.segments
        self._split = header.split
        self._order = None
        self._replaces = False
        if selection is not None:
            self._order = make_order(selection, header.seed, header.shuffle)
            self._replaces = selection.has_replacement
            segments = (Segment(header.data_sha256, self._order.samples),)
        self._mixed = selection is not None and len(selection.shards) > 1
        self._segments = segments
        self._stored = max(file.header.samples for file in files)
        withdrawn = self._find_withdrawn() if not self._mixed else np.zeros(0, np.int64)
        self._gaps = Gaps(self._attempts, segments)
        self._replays = Replays(files, withdrawn)
        self._whole: list[int] = []
        self._again = self._compared = self._replaced = self._unfinished = 0
        starts = [attempt.position for attempt in self._attempts]
        self._end = max(*starts, *(file.end for file in files))
        if files[0].header.shuffle == "stored":  # one pass; what is beyond pads the last batch
            self._end = min(self._end, segments[0].samples)
        self._frontier = self._end
        self._stretches = list(self._list_stretches())

    def _list_stretches(self) -> Iterator[Stretch]:
        """Yield the stretches that were begun."""
        ends = [*(segment.position for segment in self._segments[1:]), self._end]
        offset = 0
        for segment, end in zip(self._segments, ends, strict=True):
            last = min(end, self._end)
            if last > segment.position or segment.position == 0:
                yield Stretch(segment.position, last, segment.epoch, segment.samples, offset)
            offset += segment.samples

    def _find_withdrawn(self) -> Ids:
        """Return the ids, as ledgers have them, of the samples that are withdrawn by now."""
        root = LocalDataset(self._data)
        found, offset = [np.zeros(0, np.int64)], 0
        if withdrawn := root.list_withdrawn():
            for version in self._versions:
                manifest = version.manifest
                shards = [shard.name for shard in manifest.splits[self._split].shards]
                index = load_index(self._data, self._split, manifest)
                found.append(find_withdrawn(withdrawn, shards, index) + offset)
                offset += len(index)
        return np.concatenate(found)

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
            for stretch, first, last in self._windows():
                self._gaps.add_run(reached, first)
                self._check_window(stretch, first, last, progress)
                reached = last
        self._gaps.add_run(reached, self._end)

    def make_proof(self, torn: int) -> Proof:
        """Return the proof; `torn` is the number of files with an incomplete end."""
        findings = self.findings + self._gaps.list_findings() + self._replays.list_findings()
        return Proof(
            findings=tuple(limit_findings(findings)),
            samples=self._stretches[-1].samples,
            segments=self._describe_segments(),
            replaces=self._replaces,
            epochs=tuple(self._whole),
            position=self._frontier,
            unfinished=self._unfinished,
            files=len(self._files),
            worlds=tuple(attempt.world_size for attempt in self._attempts),
            deliveries=sum(file.deliveries for file in self._files),
            superseded=sum(file.superseded for file in self._files),
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

    def _describe_segments(self) -> tuple[SegmentProof, ...]:
        """Return what was proved of each segment, if there are several."""
        if len(self._segments) == 1:
            return ()
        pairs = zip(self._stretches, self._versions, strict=False)
        return tuple(
            SegmentProof(
                version=version.identity,
                number=version.number,
                samples=stretch.samples,
                position=stretch.first,
                epochs=tuple(
                    epoch
                    for epoch in self._whole
                    if stretch.epoch <= epoch <= stretch.find_epoch(stretch.last - 1)
                ),
                epoch=stretch.epoch,
            )
            for stretch, version in pairs
        )

    def _windows(self) -> Iterator[tuple[Stretch, int, int]]:
        """Yield the windows with any delivery: the segment, first and last position."""
        for stretch in self._stretches:
            start, end, samples = stretch.first, stretch.last, stretch.samples
            span = max(1, min(WINDOW // samples, -(-(end - start) // samples))) * samples
            touched: set[int] = set()
            for file in self._files:
                firsts = file.frames[:, 1].clip(min=start)
                lasts = (file.frames[:, 1] + file.frames[:, 2]).clip(max=min(end, file.limit))
                inside = firsts < lasts
                lows = (firsts[inside] - start) // span
                highs = (lasts[inside] - 1 - start) // span
                for step in range(int((highs - lows).max(initial=-1)) + 1):
                    touched.update(np.unique(np.minimum(lows + step, highs)).tolist())
            for number in sorted(touched):
                first = start + number * span
                whole = -(-(end - first) // samples) * samples
                yield stretch, first, first + min(span, whole)

    def _check_window(self, stretch: Stretch, first: int, last: int, progress: Progress) -> None:
        """Find positions that are missing in a window, and ids that are due twice or never."""
        window = DeliveryWindow(stretch, first, last, self._stored)
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
        open_epochs = {stretch.find_epoch(one) for one in (*stopped.tolist(), self._end)}
        self._check_epochs(window, owned, open_epochs)

    def _check_epochs(self, window: DeliveryWindow, owned: Flags, open_epochs: set[int]) -> None:
        """Check each epoch of a window; in open epochs, missing ids may be due later."""
        if self._order is not None:
            self._check_order(window, owned, self._order)
            return
        stretch, samples = window.stretch, window.stretch.samples
        times = self._count_due(window, owned)
        filled = owned.reshape(-1, samples).sum(axis=1)
        once = (times == 1).sum(axis=1)
        epochs = stretch.find_epoch(window.first) + np.arange(len(times))
        self._whole.extend(epochs[once == samples].tolist())
        for row in np.flatnonzero((once < samples) & (filled > 0)).tolist():
            epoch = int(epochs[row])
            here = slice(row * samples, (row + 1) * samples)
            order = np.where(owned[here], window.due[here].astype(np.int64), -1)
            start, offset = window.first + row * samples, stretch.offset
            self._add_ids(epoch, "twice", offset + np.flatnonzero(times[row] > 1), order, start)
            if filled[row] == samples or epoch not in open_epochs:
                never = offset + np.flatnonzero(times[row] == 0)
                self._add_ids(epoch, "never", never, order, start)

    def _check_order(self, window: DeliveryWindow, owned: Flags, order: AnyOrder) -> None:
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
                epoch=window.stretch.find_epoch(position),
                position=position,
                count=len(slots),
                ids=tuple(window.due[slots[:LISTED]].tolist()),
                files=(self._files[number].path.name,),
            )
        whole = (owned & ~wrong).reshape(-1, window.stretch.samples).all(axis=1)
        first = window.stretch.find_epoch(window.first)
        self._whole.extend((first + np.flatnonzero(whole)).tolist())

    def _count_due(self, window: DeliveryWindow, owned: Flags) -> Ids:
        """Return how often each id was due in each epoch of a window, [epochs, N]."""
        low, samples = window.stretch.offset, window.stretch.samples
        high = low + samples
        known: Flags = (window.due < high) & (window.delivered < high)
        if low:
            known &= (window.due >= low) & (window.delivered >= low)
        for slot in np.flatnonzero(owned & ~known)[: LISTED + 1].tolist():
            position, due = window.first + slot, int(window.due[slot])
            epoch = window.stretch.find_epoch(position)
            file = self._files[window.owner[slot]].path.name
            reason = (
                f"position {position:,} (epoch {epoch}): sample {due} was due and "
                f"{window.delivered[slot]} delivered, but the split has only "
                f"{pluralize(samples, 'sample')}{f', from {low:,} on' if low else ''}"
            )
            self.add_finding(
                "unknown id", reason, epoch=epoch, position=position, ids=(due,), files=(file,)
            )
        slots: Ids = np.flatnonzero(owned & known)
        keys = slots // samples * samples + window.due[slots].astype(np.int64) - low
        times = np.bincount(keys, minlength=window.last - window.first)
        return times.reshape(-1, samples)

    def _add_ids(self, epoch: int, kind: str, ids: Ids, order: Ids, start: int) -> None:
        """Add a finding about `ids`, if there are any.

        Args:
            epoch: number of the epoch.
            kind: of the finding.
            ids: samples concerned.
            order: ids that were due in the epoch.
            start: position at which it begins.
        """
        if not len(ids):
            return
        names = []
        for sample in ids[:NAMED].tolist():
            places = (start + np.flatnonzero(order == sample)[:LISTED]).tolist()
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
        own, version = sample, self._versions[0]
        for segment, version in zip(self._segments, self._versions, strict=True):  # noqa: B007
            if own < segment.samples or self._order is not None:
                break
            own -= segment.samples
        shards = version.manifest.splits[self._split].shards
        starts = np.cumsum([0, *(shard.samples for shard in shards)])
        shard = int(np.searchsorted(starts, own, side="right")) - 1
        place = own - int(starts[shard])
        if not version.manifest.foreign:
            key = sample_key(shard, place)
        else:
            idx = (self._data / shards[shard].name).with_suffix(".idx")
            key = read_key_from_idx(idx, place) or "unknown"
        return f"sample {sample} ({shards[shard].name}, key {key})"
