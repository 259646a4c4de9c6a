"""Findings about ledgers, the proof if there are none, and the text of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.stream.order import Ids

LISTED = 10
"""Ids or ranges listed in a finding, and findings listed of a kind; the rest is counted."""

KINDS = (
    "unreadable", "out of line", "missing", "replay", "unknown id", "not due", "twice", "never",
)  # fmt: skip
"""Kinds of errors of files, positions and ids: causes before their consequences."""


@dataclass(frozen=True, kw_only=True)
class LedgerFinding:
    """One error in the ledgers of a run."""

    kind: str
    """One of `KINDS`, or `more` for those that are only counted."""
    reason: str
    """One line of text."""
    epoch: int | None = None
    position: int | None = None
    """First position concerned."""
    count: int = 1
    """Number of samples concerned; of frames, where the kind is `out of line`."""
    ids: tuple[int, ...] = ()
    """Ids of the samples concerned, the first `LISTED` of them."""
    files: tuple[str, ...] = ()
    """Names of the ledgers concerned."""


@dataclass(frozen=True, kw_only=True)
class SegmentProof:
    """Part of a proof about one version of the data set that was read."""

    version: str
    """Identity of the version."""
    number: int
    """Its number."""
    samples: int
    """Number of samples in an epoch, N."""
    position: int
    """First position."""
    epoch: int
    """First epoch."""
    epochs: tuple[int, ...]
    """Epochs delivered completely, each sample once."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Result of reading the ledgers of a run: the errors, or the proof of exactly once."""

    findings: tuple[LedgerFinding, ...]
    """Errors; if empty, each epoch was delivered exactly once."""
    samples: int
    """Number of samples in an epoch, N; of the last segment."""
    segments: tuple[SegmentProof, ...] = ()
    """Versions that were read one after the other; empty if there is one."""
    replaces: bool = False
    """True if samples were drawn by weight or from several datasets: then each delivery was the one
    that was due, and an epoch is N of them."""
    epochs: tuple[int, ...]
    """Epochs delivered completely, each sample once."""
    position: int
    """Position before which every sample was delivered, if there are no findings."""
    unfinished: int
    """Number of samples after `position` that some ranks got before they were stopped."""
    files: int
    """Number of ledgers."""
    worlds: tuple[int, ...]
    """World size of each attempt, in order of time."""
    deliveries: int
    """Number of samples in all ledgers."""
    superseded: int = 0
    """Number of those that do not count: a restart has read another version there."""
    again: int
    """Number of samples delivered again after restarts."""
    compared: int
    """Number of those whose pixels could be compared."""
    replaced: int
    """Number of positions where a substitute for a damaged sample was delivered."""
    torn: int
    """Number of ledgers that end inside a frame because their writer was killed."""

    def facts(self) -> dict[str, Any]:
        """Return the proof as a JSON object."""
        return {"sound": not self.findings, **asdict(self)}

    def summary(self) -> str:
        """Return the proof in one line; only meaningful without findings."""
        parts = [
            self._describe_epochs(one.epochs, one.samples, f" of version {one.number}")
            for one in self.segments
            if one.epochs
        ]
        if self.epochs and not self.segments:
            parts = [self._describe_epochs(self.epochs, self.samples)]
        start, first, samples = 0, 0, self.samples
        for one in self.segments:
            if one.position <= self.position:
                start, first, samples = one.position, one.epoch, one.samples
        epoch, place = divmod(self.position - start, samples)
        if place or not self.epochs:
            parts.append(f"epoch {first + epoch} to {place:,}")
        *most, last = map(str, dict.fromkeys(self.worlds))
        worlds = f"{', '.join(most)} and {last}" if most else last
        tries = pluralize(len(self.worlds), "attempt")
        ranks = "rank" if set(self.worlds) == {1} else "ranks"
        return "; ".join([", ".join(parts), f"{tries} on {worlds} {ranks}" + self._notes()])

    def _describe_epochs(self, epochs: Sequence[int], samples: int, about: str = "") -> str:
        """Return, for example, `epochs 0-3 of version 1 exactly once (4 x 60 samples)`."""
        times = f"{len(epochs)} x {samples:,} samples"
        how = f"as drawn ({times})" if self.replaces else f"exactly once ({times})"
        return f"{format_runs('epoch', find_runs(np.array(epochs)))}{about} {how}"

    def _notes(self) -> str:
        text = ""
        if self.again:
            text += f", {pluralize(self.again, 'sample')} delivered again after restarts, "
            text += "all identical"
            if self.compared < self.again:
                other = self.again - self.compared
                text += f" (but the pixels of {other:,} were made otherwise, and not compared)"
        if self.superseded:
            text += f"; {pluralize(self.superseded, 'sample')} of an older version made again"
        if self.replaced:
            text += f"; {self.replaced:,} replaced"
        if self.torn:
            text += f"; {pluralize(self.torn, 'file')} with a torn end"
        if self.unfinished:
            samples = pluralize(self.unfinished, "sample")
            text += f"; {samples} of the last batches on some ranks only"
        return text


def find_runs(positions: Ids) -> list[tuple[int, int]]:
    """Return first and last of each run of consecutive numbers in rising `positions`."""
    (breaks,) = np.nonzero(np.diff(positions) > 1)
    firsts = positions[np.concatenate(([0], breaks + 1))]
    lasts = positions[np.concatenate((breaks, [len(positions) - 1]))]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def format_runs(what: str, runs: Sequence[tuple[int, int]], more: bool = False) -> str:
    """Return, for example, `positions 0-63, 128-191, ...`."""
    texts = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in runs]
    many = len(runs) > 1 or more or runs[0][0] != runs[0][1]
    return f"{what}{'s' if many else ''} {', '.join(texts + ['...'] * more)}"


def pluralize(number: int, what: str) -> str:
    """Return `1 sample`, `2 samples`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def limit_findings(findings: Iterable[LedgerFinding]) -> list[LedgerFinding]:
    """Return the first `LISTED` findings of each kind, and one that counts the rest of it."""
    by_kind: dict[str, list[LedgerFinding]] = {kind: [] for kind in KINDS}
    for finding in findings:
        by_kind[finding.kind].append(finding)
    kept: list[LedgerFinding] = []
    for kind, all_of in by_kind.items():
        kept += all_of[:LISTED]
        rest = len(all_of) - LISTED
        if rest > 0:
            reason = f"{rest} more of the kind {kind!r}"
            kept.append(LedgerFinding(kind="more", reason=reason, count=rest))
    return kept
