"""What a look through the ledgers of a run can find, and what it proves if it finds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.stream.order import Ids

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
