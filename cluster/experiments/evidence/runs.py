"""What lies in the folders that a page is asked for: runs, by groups of seeds, and results.

An entry of the page: what the paper claims, what was found here, and at which scale.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.checkpoint.format import Checkpoint, choose_checkpoint
from cluster.config import CHANGEABLE, Config, read_run_config
from cluster.experiments.evidence.claims import (
    ABLATIONS,
    BATCH,
    CLASSES,
    EPOCHS,
    PICTURES,
    WIDTH,
    Claim,
)
from cluster.report.records import Records, read_records
from cluster.run.folder import CONFIG, METRICS
from pipeline.dataset.manifest import identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DataError, UsageError

STUDY = "study.json"
COUNTED = ("top1_error", "top5_error", "samples")
SAME = {"seed", "epochs", *CHANGEABLE}
"""Settings that runs of a group may differ in; how long they were is told by their step."""


@dataclass(frozen=True)
class Run:
    """A run with a checkpoint."""

    path: Path
    config: Config
    data_sha256: str
    records: Records
    found: Checkpoint
    """Its newest checkpoint."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.resolve().name

    @property
    def pictures(self) -> float:
        """Training images, from position and epoch of its last row; NaN without rows."""
        epoch = self.records.metrics.last("epoch")
        return self.records.metrics.last("position") / epoch if epoch > 0 else math.nan

    @property
    def epochs(self) -> float:
        """Passes over the training images that the checkpoint has behind it."""
        return self.found.mark.position / self.pictures

    def errors(self, views: int) -> dict[str, Any] | None:
        """The evaluation of the newest checkpoint on "val"; of one view the validation will do."""
        table = self.records.evaluations.get(views, {})
        if table.get("step") == self.found.mark.step and _whole(table):
            return table
        rows = self.records.validation
        if views == 1 and len(rows) and rows.last("step") == self.found.mark.step:
            last = {name: rows.last(name) for name in COUNTED}
            if all(math.isfinite(value) for value in last.values()):
                return last
        return None


def _whole(table: dict[str, Any]) -> bool:
    return table.get("split") == "val" and all(name in table for name in COUNTED)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, and have come equally far."""

    letter: str
    runs: tuple[Run, ...]
    differs: str = ""
    """What it has otherwise than the first group, in words."""

    @property
    def first(self) -> Run:
        """The one with the lowest seed."""
        return self.runs[0]

    @property
    def settings(self) -> dict[str, Any]:
        """What all its runs have in common."""
        return settings(self.first)


@dataclass
class Gathered:
    """All that was found."""

    groups: list[Group] = field(default_factory=list)
    studies: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    ensembles: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What was there but cannot be used, and why: a sentence each."""

    data: str | None = None
    """The data set that was named."""
    data_sha256: str = ""

    @property
    def runs(self) -> list[Run]:
        """Of all groups."""
        return [run for group in self.groups for run in group.runs]

    def data_of(self, run: Run) -> str:
        """The data set of a run as a word of a command: the one named, if it is that."""
        fits = self.data is not None and self.data_sha256 == run.data_sha256
        return shlex.quote(str(self.data)) if fits else "DATA"


def gather(paths: Sequence[Path], data: str | None = None) -> Gathered:
    """Look into runs, folders of runs or studies, and result files.

    Args:
        paths: of these.
        data: a data set of theirs, if one is at hand.

    Raises:
        UsageError: one is none of these, a run that was named has no checkpoint, or there is no
            such data set.
        DataError: none of the checkpoints of a run that was named is sound.
    """
    found = Gathered()
    runs: dict[Path, Run] = {}
    for path in paths:
        if path.is_file():
            _take_result(found, path, path)
        elif is_run(path):
            runs.setdefault(path.resolve(), read_run(path))
            _take_results(found, path)
        else:
            _look_into(found, runs, path)
    found.groups = grouped(runs.values())
    if data is not None:
        found.data, found.data_sha256 = data, identity(fetch_metadata(data))
        if found.runs and all(run.data_sha256 != found.data_sha256 for run in found.runs):
            found.left_out.append(f"{data}: none of the runs was trained on it.")
    return found


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run that has begun."""
    return (path / CONFIG).is_file() and (path / METRICS).is_file()


def read_run(path: Path) -> Run:
    """Read a run; raises as `gather`."""
    config, data = read_run_config(path / CONFIG)
    found = choose_checkpoint(path, config.store, lambda event: None)
    return Run(path, config, data, read_records(path), found)


def _look_into(found: Gathered, runs: dict[Path, Run], folder: Path) -> None:
    """Take what lies in a folder: the runs, studies and results of one level."""
    before = len(found.studies) + len(found.ensembles)
    # The runs of a study are told by its result.
    inside = folder.is_dir() and not (folder / STUDY).is_file()
    children = sorted(folder.iterdir()) if inside else []
    taken = 0
    for child in children:
        if is_run(child):
            taken += 1
            try:
                runs.setdefault(child.resolve(), read_run(child))
            except (UsageError, DataError) as error:
                found.left_out.append(f"{error}.")
        elif (child / STUDY).is_file():
            _take_result(found, child / STUDY, child)
    _take_results(found, folder)
    if not taken and len(found.studies) + len(found.ensembles) == before:
        raise UsageError(
            f"{folder} is no run, and holds neither runs nor results of studies or ensembles; "
            "name the --run of a training"
        )


def _take_results(found: Gathered, folder: Path) -> None:
    for path in sorted([folder / STUDY, *folder.glob("ensemble*.json")]):
        if path.is_file():
            _take_result(found, path, path)


def _take_result(found: Gathered, path: Path, named: Path) -> None:
    """Take study.json, or what `cluster.experiments.ensemble --out` wrote.

    Raises:
        UsageError: it is neither.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    kind = table if isinstance(table, dict) else {}
    if isinstance(kind.get("study"), str) and isinstance(kind.get("nets"), list):
        found.ensembles.append((path, {**kind, "sizes": kind["nets"]}))
    elif isinstance(kind.get("study"), str) and isinstance(kind.get("rows"), list):
        found.studies.append((path, kind))
    elif isinstance(kind.get("runs"), list) and ("average" in kind or "sizes" in kind):
        found.ensembles.append((path, kind))
    else:
        raise UsageError(
            f"{named} is neither a run nor the result of a study or of "
            "cluster.experiments.ensemble --out"
        )


def settings(run: Run) -> dict[str, Any]:
    """The settings that runs of a group share, with the data and how far it came."""
    table = {name: value for name, value in run.config.to_settings().items() if name not in SAME}
    return table | {"data_sha256": run.data_sha256, "step": run.found.mark.step}


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Sort runs into groups: most seeds first, then the nearest to the paper, then as they came."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(settings(run), sort_keys=True), []).append(run)
    ordered = sorted(found.values(), key=lambda group: (-len(group), _departures(group[0])))
    first = settings(ordered[0][0]) if ordered else {}
    return [
        Group(
            letter=chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else ""),
            runs=tuple(sorted(group, key=lambda run: run.config.seed)),
            differs=_differs(first, settings(group[0])),
        )
        for number, group in enumerate(ordered)
    ]


def _departures(run: Run) -> int:
    """How many of the paper's choices a run does without."""
    table = run.config.to_settings()
    return sum(table[one.setting] in one.instead for one in ABLATIONS)


def _differs(first: dict[str, Any], other: dict[str, Any]) -> str:
    words = []
    for name in sorted({*first, *other}):
        one, two = first.get(name), other.get(name)
        if one != two:
            short = (str(two)[:8]) if name == "data_sha256" else f"{two}"
            words.append(f"{name.replace('data_sha256', 'data set')} {short or 'none'}")
    return ", ".join(words)


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
        """For machines: without images."""
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
        words.append(f"{rounded(run.pictures)} training images instead of {PICTURES:,}")
    if len(run.found.classes) != CLASSES:
        words.append(f"{len(run.found.classes):,} classes instead of {CLASSES:,}")
    if run.config.design.width != WIDTH:
        words.append(f"width {run.config.design.width:g}")
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
