"""Proves from ledgers that each epoch was delivered exactly once, or names what was not.

Every position must have been delivered; the ids that were due within an epoch must be each of
0..N-1 once; and what was delivered again after a restart must be what was delivered before, ids
and pixels. The order itself is not consulted: any permutation will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.dataset.index import key_in_idx, sample_key
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.ledger.proof.findings import LISTED, Finding, Proof, capped, count
from pipeline.ledger.proof.gaps import Gaps
from pipeline.ledger.proof.replays import Flags, Replays, Window
from pipeline.stream.ledger.attempts import attempts_of, open_ledgers, out_of_line
from pipeline.stream.ledger.format import LedgerFile
from pipeline.stream.order import Ids
from pipeline.tools.progress import Progress

WINDOW = 1 << 22
"""Positions looked at together: whole epochs, and one at least."""

NAMED = 3
"""Samples that a line names with shard and key."""


def prove(data: Path, runs: Sequence[Path]) -> Proof:
    """Prove from all ledgers of a run that each epoch was delivered exactly once.

    Args:
        data: folder of the data set; only its manifest is read.
        runs: folders of runs (RUN with RUN/ledger in it), or folders with ledgers.

    Raises:
        UsageError: no data set, no ledgers, none that says what it is of, or ledgers that do not
            belong together.
        DataError: the manifest cannot be read.
    """
    manifest = Manifest.load(data)
    opened = open_ledgers(data, manifest, runs)
    shards = manifest.splits[opened.files[0].about.split].shards
    search = _Search(opened.files, shards, data if manifest.foreign else None)
    for path, reason in opened.unreadable.items():
        reason = f"{path}: {reason}"
        search.found.append(Finding(kind="unreadable", reason=reason, files=(path.name,)))
    search.run()
    return search.proof(opened.torn)


class _Search:
    """Goes through all positions, some epochs at a time, and collects what is found."""

    def __init__(
        self, files: Sequence[LedgerFile], shards: Sequence[Shard], foreign: Path | None
    ) -> None:
        """Take the ledgers, and the shards; `foreign` is their folder if keys are not ours."""
        self.found: list[Finding] = []
        self._foreign = foreign
        self._files = files
        self._attempts = attempts_of(files)
        self._samples = files[0].about.samples
        self._shards = shards
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._gaps = Gaps(self._attempts, self._samples)
        self._replays = Replays(files, self._samples)
        self._whole: list[int] = []
        self._again = self._compared = self._replaced = self._unfinished = 0
        starts = [attempt.position for attempt in self._attempts]
        self._end = max(*starts, *(file.end for file in files))
        if files[0].about.shuffle == "stored":  # one pass; what is beyond pads the last batch
            self._end = min(self._end, self._samples)
        self._frontier = self._end

    def run(self) -> None:
        """Look at every file and every position."""
        for file in self._files:
            self._look_at(file)
        reached = 0
        total = sum(file.deliveries for file in self._files)
        with Progress("proving", total=total, unit="samples") as progress:
            for first, last in self._windows():
                self._gaps.add_run(reached, first)
                self._look_between(first, last, progress)
                reached = last
        self._gaps.add_run(reached, self._end)

    def proof(self, torn: int) -> Proof:
        """Return what was found; `torn` files had a torn end."""
        findings = self.found + self._gaps.findings() + self._replays.findings()
        return Proof(
            findings=tuple(capped(findings)),
            samples=self._samples,
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

    def _look_at(self, file: LedgerFile) -> None:
        """Look for damage of a file, and for frames that are not where they should be."""
        name = file.path.name
        if file.damage:
            reason = f"{file.path}: {file.damage}; what follows was not read"
            self.found.append(Finding(kind="unreadable", reason=reason, files=(name,)))
        wrong, number, due = out_of_line(file)
        if wrong:
            _, position, samples, _ = file.frames[number].tolist()
            more = f"; {wrong - 1} more such frames" if wrong > 1 else ""
            self.found.append(
                Finding(
                    kind="out of line",
                    reason=f"{name}: frame {number} holds {count(samples, 'sample')} from position "
                    f"{position:,}, but its rank was due at position {due:,}{more}",
                    position=position,
                    count=wrong,
                    files=(name,),
                )
            )

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Return the windows in which anything was delivered."""
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

    def _look_between(self, first: int, last: int, progress: Progress) -> None:
        """Look for what is missing in a window, and for ids due twice or never."""
        window = Window(first, last, self._samples)
        deliveries = 0
        for number, file in enumerate(self._files):
            if file.start < last and file.end > first:
                told = file.between(first, last)
                self._replays.compare(window, number, told)
                deliveries += len(told.positions)
                progress.advance(len(told.positions))
        owned = window.owner >= 0
        self._again += deliveries - int(owned.sum())
        self._compared += window.compared
        self._replaced += int((window.due != window.delivered).sum())
        stopped = self._gaps.add(first + np.flatnonzero(~owned[: self._end - first]))
        if len(stopped):
            self._frontier = min(self._frontier, int(stopped[0]))
        self._unfinished += int(owned[max(0, self._frontier - first) :].sum())
        open_epochs = {*(stopped // self._samples).tolist(), self._end // self._samples}
        self._look_at_epochs(window, owned, open_epochs)

    def _look_at_epochs(self, window: Window, owned: Flags, open_epochs: set[int]) -> None:
        """Look at each epoch of a window; in those that are open, ids may be due later."""
        times = self._times(window, owned)
        filled = owned.reshape(-1, self._samples).sum(axis=1)
        once = (times == 1).sum(axis=1)
        epochs = window.first // self._samples + np.arange(len(times))
        self._whole.extend(epochs[once == self._samples].tolist())
        for row in np.flatnonzero((once < self._samples) & (filled > 0)).tolist():
            epoch = int(epochs[row])
            here = slice(row * self._samples, (row + 1) * self._samples)
            order = np.where(owned[here], window.due[here].astype(np.int64), -1)
            self._ids(epoch, "twice", np.flatnonzero(times[row] > 1), order)
            if filled[row] == self._samples or epoch not in open_epochs:
                self._ids(epoch, "never", np.flatnonzero(times[row] == 0), order)

    def _times(self, window: Window, owned: Flags) -> Ids:
        """Return how often each id was due in each epoch of a window, [epochs, N]."""
        known: Flags = (window.due < self._samples) & (window.delivered < self._samples)
        for slot in np.flatnonzero(owned & ~known)[: LISTED + 1].tolist():
            position, due = window.first + slot, int(window.due[slot])
            self.found.append(
                Finding(
                    kind="unknown id",
                    reason=f"position {position:,} (epoch {position // self._samples}): sample "
                    f"{due} was due and {window.delivered[slot]} delivered, but the split has "
                    f"only {count(self._samples, 'sample')}",
                    epoch=position // self._samples,
                    position=position,
                    ids=(due,),
                    files=(self._files[window.owner[slot]].path.name,),
                )
            )
        slots: Ids = np.flatnonzero(owned & known)
        keys = slots // self._samples * self._samples + window.due[slots].astype(np.int64)
        times = np.bincount(keys, minlength=window.last - window.first)
        return times.reshape(-1, self._samples)

    def _ids(self, epoch: int, kind: str, ids: Ids, order: Ids) -> None:
        """Add a finding about `ids`, if there are any; `order` holds the epoch's due ids."""
        if not len(ids):
            return
        names = []
        for sample in ids[:NAMED].tolist():
            places = (epoch * self._samples + np.flatnonzero(order == sample)[:LISTED]).tolist()
            where = ", ".join(f"{place:,}" for place in places)
            names.append(self._name(sample) + (f" at positions {where}" if kind == "twice" else ""))
        self.found.append(
            Finding(
                kind=kind,
                reason=f"epoch {epoch}: {count(len(ids), 'sample')} "
                f"{'was' if len(ids) == 1 else 'were'} due "
                f"{'more than once' if kind == 'twice' else 'at no position'}: "
                f"{'; '.join(names)}{'; ...' if len(ids) > NAMED else ''}",
                epoch=epoch,
                count=len(ids),
                ids=tuple(ids[:LISTED].tolist()),
            )
        )

    def _name(self, sample: int) -> str:
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        place = sample - int(self._starts[shard])
        if self._foreign is None:
            key = sample_key(shard, place)
        else:
            idx = (self._foreign / self._shards[shard].name).with_suffix(".idx")
            key = key_in_idx(idx, place) or "unknown"
        return f"sample {sample} ({self._shards[shard].name}, key {key})"
