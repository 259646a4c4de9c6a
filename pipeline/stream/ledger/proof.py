"""Proves from ledgers that each epoch was delivered exactly once, or names what was not.

Every position must have been delivered; the ids that were due within an epoch must be each of
0..N-1 once; and what was delivered again after a restart must be what was delivered before, ids
and pixels. The order itself is not consulted: any permutation will do.

What a look through the ledgers of a run can find, and what it proves if it finds nothing.

Positions that nobody delivered, and who should have.

What was delivered where, and whether it was the same each time.

Ledgers → proof that each epoch was delivered exactly once, or the names of what was not.

exactly_once   `prove`: goes through all positions
attempts       files → attempts: which rank should have delivered which position
gaps           positions that nobody delivered, and who should have
replays        what was delivered again: the same?
findings       what is found, and what is proved
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset.index import read_key_from_idx, sample_key
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.stream.ledger.attempts import Attempt, attempts_of, open_ledgers, out_of_line
from pipeline.stream.ledger.format import Deliveries, LedgerFile
from pipeline.stream.order import Ids
from pipeline.tools.progress import Progress

LISTED = 10
"""Ids or ranges listed in a finding, and findings of a kind; the rest is counted."""

KINDS = ("unreadable", "out of line", "missing", "replay", "unknown id", "twice", "never")
"""What can be wrong with files, positions and ids: causes before their consequences."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it must be."""

    kind: str
    """One of `KINDS`, or `more` for those that are only counted."""
    reason: str
    """One line for people."""
    epoch: int | None = None
    position: int | None = None
    """The first one concerned."""
    count: int = 1
    """How many samples (frames, where they are out of line) are concerned."""
    ids: tuple[int, ...] = ()
    """Ids concerned, the first `LISTED` of them."""
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the ledgers prove."""

    findings: tuple[Finding, ...]
    """Empty: exactly once."""
    samples: int
    """N."""
    epochs: tuple[int, ...]
    """Epochs delivered from end to end, each sample once."""
    position: int
    """Everything before it was delivered, if there are no findings."""
    unfinished: int
    """Samples beyond it that only some ranks got before they were stopped."""
    files: int
    worlds: tuple[int, ...]
    """Ranks of each attempt, in order of time."""
    deliveries: int
    again: int
    """Samples delivered again after restarts."""
    compared: int
    """Those of them whose pixels could be compared."""
    replaced: int
    """Positions whose sample was damaged, and another delivered."""
    torn: int
    """Files that end in the midst of a frame: their writer was killed."""

    def facts(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {"sound": not self.findings, **asdict(self)}

    def summary(self) -> str:
        """Return one line about what is proved; to be shown when there are no findings."""
        epoch, place = divmod(self.position, self.samples)
        parts = []
        if self.epochs:
            times = f"{len(self.epochs)} x {self.samples:,} samples"
            parts.append(f"{listed('epoch', ranges(np.array(self.epochs)))} exactly once ({times})")
        if place or not self.epochs:
            parts.append(f"epoch {epoch} to {place:,}")
        *most, last = map(str, dict.fromkeys(self.worlds))
        worlds = f"{', '.join(most)} and {last}" if most else last
        tries = count(len(self.worlds), "attempt")
        ranks = "rank" if set(self.worlds) == {1} else "ranks"
        return "; ".join([", ".join(parts), f"{tries} on {worlds} {ranks}" + self._notes()])

    def _notes(self) -> str:
        text = ""
        if self.again:
            text += f", {count(self.again, 'sample')} delivered again after restarts, "
            text += "all identical"
            if self.compared < self.again:
                other = self.again - self.compared
                text += f" (but the pixels of {other:,} were made otherwise, and not compared)"
        if self.replaced:
            text += f"; {self.replaced:,} replaced"
        if self.torn:
            text += f"; {count(self.torn, 'file')} with a torn end"
        if self.unfinished:
            text += f"; {count(self.unfinished, 'sample')} of the last batches on some ranks only"
        return text


def ranges(positions: Ids) -> list[tuple[int, int]]:
    """Return the runs of neighbours in rising numbers: first and last of each."""
    (breaks,) = np.nonzero(np.diff(positions) > 1)
    firsts = positions[np.concatenate(([0], breaks + 1))]
    lasts = positions[np.concatenate((breaks, [len(positions) - 1]))]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def listed(what: str, runs: Sequence[tuple[int, int]], more: bool = False) -> str:
    """Return, for example, `positions 0-63, 128-191, ...`."""
    texts = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in runs]
    many = len(runs) > 1 or more or runs[0][0] != runs[0][1]
    return f"{what}{'s' if many else ''} {', '.join(texts + ['...'] * more)}"


def count(number: int, what: str) -> str:
    """Return `1 sample`, `2 samples`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def capped(findings: Iterable[Finding]) -> list[Finding]:
    """Return the first `LISTED` findings of each kind, and one for the rest of it."""
    by_kind: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    kept: list[Finding] = []
    for kind, all_of in by_kind.items():
        kept += all_of[:LISTED]
        rest = len(all_of) - LISTED
        if rest > 0:
            reason = f"{rest} more of the kind {kind!r}"
            kept.append(Finding(kind="more", reason=reason, count=rest))
    return kept


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
            key = read_key_from_idx(idx, place) or "unknown"
        return f"sample {sample} ({self._shards[shard].name}, key {key})"
