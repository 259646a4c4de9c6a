"""An entry of the page: what the paper claims, what was found here, and at which scale."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.experiments.evidence.claims import BATCH, CLASSES, EPOCHS, PICTURES, WIDTH, Claim
from cluster.experiments.evidence.runs import Group, Run

NOT_COMPARABLE = "another scale"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, in words."""

    what: str
    """What was measured."""
    group: str = ""
    """Letters of the groups of runs it is from."""
    paper: str
    ours: str
    seeds: str = ""
    """The single values, or how many there are."""
    verdict: str
    scale: str = ""
    """What was different in scale."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What is not there, and the command that makes it."""

    title: str
    command: str
    why: str = ""


@dataclass
class Item:
    """A claim with what there is to say about it."""

    claim: Claim
    rows: list[Row] = field(default_factory=list)
    kind: str = ""
    """Which part of the template shows `body`; "": none."""
    body: Any = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For machines: without pictures."""
        return {
            "key": self.claim.key,
            "claim": self.claim.text,
            "section": self.claim.section,
            "paper": self.claim.number,
            "rows": [vars(row) for row in self.rows],
            "notes": self.notes,
        }


def word(path: Path | str) -> str:
    """A path or an address as a word of a command."""
    return shlex.quote(str(path))


def scale_of(group: Group) -> str:
    """How the runs of a group differ in scale from the paper's, in words."""
    run = group.first
    words = []
    if not math.isnan(run.pictures) and abs(run.pictures / PICTURES - 1) > 0.01:
        words.append(f"{rounded(run.pictures)} training pictures instead of {PICTURES:,}")
    if len(run.found.classes) != CLASSES:
        words.append(f"{len(run.found.classes):,} classes instead of {CLASSES:,}")
    if run.config.width != WIDTH:
        words.append(f"width {run.config.width:g}")
    if not math.isnan(run.epochs) and abs(run.epochs - EPOCHS) > 5:
        words.append(f"{run.epochs:.3g} passes instead of {EPOCHS}")
    if run.config.batch_size != BATCH:
        words.append(f"batch {run.config.batch_size} instead of {BATCH}")
    return ", ".join(words) or "none"


def rounded(count: float) -> str:
    """A count to four digits: it comes from a row that has the epoch with four decimals."""
    digits = max(0, math.floor(math.log10(max(count, 1))) - 3)
    return f"{round(count / 10**digits) * 10**digits:,}"


def seeds_of(group: Group) -> str:
    """How many seeds, and which."""
    names = ", ".join(str(run.config.seed) for run in group.runs)
    return f"seed{'s' if len(group.runs) > 1 else ''} {names}"


def data_word(run: Run) -> str:
    """The data set of a run by what is known of it: its classes and its hash."""
    names = run.found.classes
    some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names):,} classes ({some}), manifest {run.data_sha256[:8]}"
