"""Runs and results that the page is made from: runs in groups of seeds, items, comparisons."""

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
from cluster.experiments.evidence import claims
from cluster.experiments.evidence.claims import Claim
from cluster.report.records import Records, read_records
from cluster.run.folder import CONFIG, METRICS
from pipeline.dataset.manifest import identity
from pipeline.dataset.record import read_address
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DataError, UsageError, summarize_error
from pipeline.tools.jsonl import parse_json

STUDY = "study.json"
COUNTED = ("top1_error", "top5_error", "samples")
DECIDED = ("as the paper says", "contrary to the paper", "above chance", "beyond a random split",
           "lower error", "higher error", " times ", " against ")  # fmt: skip
"""Parts of the verdicts that say something about a claim."""
UNDECIDED = ("from chance", "no verdict", "not reached", "not above", "not beyond")
"""Parts of the verdicts that leave a claim open, whatever else they say."""
MAY_DIFFER = {"seed", "epochs", *CHANGEABLE}
"""Settings that runs of a group may differ in; their length is compared by their step."""


@dataclass(frozen=True)
class TrainedRun:
    """A run that has a checkpoint."""

    path: Path
    config: Config
    data_sha256: str
    records: Records
    checkpoint: Checkpoint
    """Its newest checkpoint."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Step of the checkpoint."""
        return self.checkpoint.mark.step

    @property
    def images(self) -> float:
        """Number of training images: position over epoch of the last row; NaN without rows."""
        epoch = self.records.metrics.last("epoch")
        return self.records.metrics.last("position") / epoch if epoch > 0 else math.nan

    @property
    def epochs(self) -> float:
        """Passes over the training images up to the checkpoint."""
        return self.checkpoint.mark.position / self.images

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that the runs of a group share, with the data set and the step."""
        table = {
            key: one for key, one in self.config.to_settings().items() if key not in MAY_DIFFER
        }
        return table | {"data set": self.data_sha256, "step": self.step}

    def find_errors(self, views: int) -> dict[str, Any] | None:
        """Errors of the checkpoint on "val"; for one view those of the last validation will do."""
        table = self.records.evaluations.get(views, {})
        whole = table.get("split") == "val" and all(name in table for name in COUNTED)
        if whole and table.get("step") == self.step:
            return table
        rows = self.records.validation
        if views == 1 and len(rows) and rows.last("step") == self.step:
            last = {name: rows.last(name) for name in COUNTED}
            if all(math.isfinite(value) for value in last.values()):
                return last
        return None


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed and have reached the same step."""

    letter: str
    runs: tuple[TrainedRun, ...]
    """Ordered by seed."""
    differs: str = ""
    """Settings in which the group differs from the first one, in words."""

    @property
    def first(self) -> TrainedRun:
        """The run with the lowest seed."""
        return self.runs[0]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A number of the paper beside the number found here, in words: a row of the page."""

    what: str
    """The quantity measured."""
    group: str = ""
    """Letters of the groups of runs that it was measured on."""
    paper: str
    ours: str
    seeds: str = ""
    """The single values, or how many there are."""
    verdict: str
    scale: str = ""
    """Differences in scale from the paper's runs."""
    command: str = ""
    """Command that makes the number, with the runs that it is made from."""

    @property
    def weight(self) -> int:
        """Sort key: 0 for a verdict on the claim, 1 where chance or the seeds allow none, else 2.

        The last are numbers of another scale, another machine, or to be looked at.
        """
        if any(words in self.verdict for words in UNDECIDED):
            return 1
        return 0 if any(words in self.verdict for words in DECIDED) else 2


@dataclass
class Item:
    """A claim with the comparisons that test it."""

    claim: Claim
    rows: list[Comparison] = field(default_factory=list)
    kind: str = ""
    """Part of the template that shows `body`: kernels, answers or images; "": none."""
    body: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def weight(self) -> int:
        """Sort key: that of the row that says most."""
        return min((row.weight for row in self.rows), default=3)

    @property
    def commands(self) -> list[str]:
        """The commands of the rows, each once."""
        return list(dict.fromkeys(row.command for row in self.rows if row.command))

    def as_json(self) -> dict[str, Any]:
        """The item for `--json`, without images."""
        return {
            "key": self.claim.key,
            "claim": self.claim.text,
            "section": self.claim.section,
            "paper": self.claim.number,
            "rows": [vars(row) for row in self.rows],
            "notes": self.notes,
        }


@dataclass
class Evidence:
    """Everything found in the folders and files that were named: what the page shows."""

    groups: list[SeedGroup] = field(default_factory=list)
    studies: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    ensembles: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Results that were found but cannot be used, and why: a sentence each."""
    data: str = ""
    """The data set that was named; "": none, so that each run has its own."""
    data_sha256: str = ""
    items: list[Item] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    """Results that do not exist yet: title, command that makes it, and why it is missing."""

    @property
    def runs(self) -> list[TrainedRun]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def quote_data(self, run: TrainedRun) -> str:
        """The data set of a run as an argument of a command: the one named, or recorded."""
        is_named = self.data and self.data_sha256 == run.data_sha256
        return shlex.quote(self.data if is_named else read_address(run.path) or "DATA")

    def add_missing(self, title: str, command: str, why: str = "") -> None:
        """List a result as missing, with the command that makes it."""
        self.missing.append({"title": title, "command": command, "why": why})

    def as_json(self) -> dict[str, Any]:
        """The page for `--json`, without images."""
        return {
            "groups": [
                {
                    "letter": group.letter,
                    "runs": [str(run.path) for run in group.runs],
                    "seeds": [run.config.seed for run in group.runs],
                    "step": group.first.step,
                    "scale": describe_scale(group),
                    "differs": group.differs,
                }
                for group in self.groups
            ],
            "items": [item.as_json() for item in self.items],
            "missing": self.missing,
            "left_out": self.skipped,
        }


def gather_evidence(paths: Sequence[Path], data: str = "") -> Evidence:
    """Read runs, folders of runs or studies, and result files.

    Args:
        paths: the runs, folders and files.
        data: a data set of the runs; "": those that they recorded.

    Raises:
        UsageError: a path is none of these, a run that was named has no checkpoint, or there is
            no such data set.
        DataError: none of the checkpoints of a run that was named is sound.
    """
    evidence = Evidence()
    runs: dict[Path, TrainedRun] = {}
    for path in paths:
        if path.is_file():
            _add_result(evidence, path)
        elif is_run(path):
            runs.setdefault(path.resolve(), read_run(path))
            for result in _list_results(path):
                _add_result(evidence, result)
        else:
            _add_folder(evidence, runs, path)
    evidence.groups = group_by_settings(runs.values())
    if data:
        evidence.data, evidence.data_sha256 = data, identity(fetch_metadata(data))
        hashes = {run.data_sha256 for run in evidence.runs}
        if hashes and evidence.data_sha256 not in hashes:
            evidence.skipped.append(f"{data}: none of the runs was trained on it.")
    return evidence


def is_run(path: Path) -> bool:
    """True if a path is the folder of a run that has started."""
    return (path / CONFIG).is_file() and (path / METRICS).is_file()


def read_run(path: Path) -> TrainedRun:
    """Read a run; raises as `gather_evidence`."""
    config, data = read_run_config(path / CONFIG)
    checkpoint = choose_checkpoint(path, config.store, lambda event: None)
    return TrainedRun(path, config, data, read_records(path), checkpoint)


def _add_folder(evidence: Evidence, runs: dict[Path, TrainedRun], folder: Path) -> None:
    """Add what one level of a folder holds: runs, studies and results."""
    # The runs of a study are not listed one by one: its result sums them up.
    has_runs = folder.is_dir() and not (folder / STUDY).is_file()
    children = sorted(folder.iterdir()) if has_runs else []
    found = [child for child in children if is_run(child)]
    for run in found:
        try:
            runs.setdefault(run.resolve(), read_run(run))
        except (UsageError, DataError) as error:
            evidence.skipped.append(f"{error}.")
    studies = [child / STUDY for child in children if child not in found]
    results = [*filter(Path.is_file, studies), *_list_results(folder)]
    for result in results:
        _add_result(evidence, result)
    if not found and not results:
        raise UsageError(
            f"{folder} is no run, and holds neither runs nor results of studies or ensembles; "
            "name the --run of a training"
        )


def _list_results(folder: Path) -> list[Path]:
    return [
        one for one in sorted([folder / STUDY, *folder.glob("ensemble*.json")]) if one.is_file()
    ]


def _add_result(evidence: Evidence, path: Path) -> None:
    """Add study.json, or a file that `cluster.experiments.ensemble --out` wrote.

    Raises:
        UsageError: it is neither.
    """
    try:
        table = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = summarize_error(error)
        raise UsageError(f"{path} cannot be read ({reason}); name runs, or results") from error
    table = table if isinstance(table, dict) else {}
    is_study = isinstance(table.get("study"), str)
    if is_study and isinstance(table.get("nets"), list):
        evidence.ensembles.append((path, {**table, "sizes": table["nets"]}))
    elif is_study and isinstance(table.get("rows"), list):
        evidence.studies.append((path, table))
    elif isinstance(table.get("runs"), list) and ("average" in table or "sizes" in table):
        evidence.ensembles.append((path, table))
    else:
        raise UsageError(
            f"{path} is neither a run nor the result of a study or of duet ensemble --out"
        )


def group_by_settings(runs: Iterable[TrainedRun]) -> list[SeedGroup]:
    """Sort runs into groups: most seeds first, then nearest to the paper, then as they came.

    Nearest to the paper is the group that does without the fewest of its choices.
    """
    found: dict[str, list[TrainedRun]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)

    def rank(group: list[TrainedRun]) -> tuple[int, int]:
        settings = group[0].settings
        return -len(group), sum(settings[one.setting] in one.instead for one in claims.ABLATIONS)

    ordered = sorted(found.values(), key=rank)
    return [
        SeedGroup(
            letter=chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else ""),
            runs=tuple(sorted(group, key=lambda run: run.config.seed)),
            differs=_describe_changes(ordered[0][0].settings, group[0].settings),
        )
        for number, group in enumerate(ordered)
    ]


def _describe_changes(first: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in sorted(other) if first[name] != other[name]]
    texts = [str(other[name])[: 8 if name == "data set" else None] for name in names]
    return ", ".join(f"{name} {text or 'none'}" for name, text in zip(names, texts, strict=True))


def quote_path(path: Path | str) -> str:
    """Quote a path or an address for a command line."""
    return shlex.quote(str(path))


def describe_scale(group: SeedGroup) -> str:
    """List how the runs of a group differ in scale from the paper's."""
    run = group.first
    words = []
    if abs(run.images / claims.IMAGES - 1) > 0.01:
        words.append(f"{format_count(run.images)} training images instead of {claims.IMAGES:,}")
    if len(run.checkpoint.classes) != claims.CLASSES:
        words.append(f"{len(run.checkpoint.classes):,} classes instead of {claims.CLASSES:,}")
    if run.config.design.width != claims.WIDTH:
        words.append(f"width {run.config.design.width:g}")
    if abs(run.epochs - claims.EPOCHS) > 5:
        words.append(f"{run.epochs:.3g} passes instead of {claims.EPOCHS}")
    if run.config.batch_size != claims.BATCH:
        words.append(f"batch {run.config.batch_size} instead of {claims.BATCH}")
    return ", ".join(words) or "none"


def format_count(count: float) -> str:
    """Round a count to four digits: the rows that it comes from have the epoch to four decimals."""
    digits = max(0, math.floor(math.log10(max(count, 1))) - 3)
    return f"{round(count / 10**digits) * 10**digits:,}"


def describe_data(run: TrainedRun) -> str:
    """Describe the data set of a run by its classes and its hash."""
    names = run.checkpoint.classes
    some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return f"{len(names):,} classes ({some}), manifest {run.data_sha256[:8]}"
