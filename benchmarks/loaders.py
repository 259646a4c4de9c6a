"""Data loaders in turn on the same images: ours, DALI's own, and those of others.

    python benchmarks/loaders.py DATA [--raw RAWDATA] [--only ours,native,ffcv] [--device gpu]
    python benchmarks/loaders.py DATA500 --crop resized      # --size 500 --fit shorter

Every loader gives shuffled batches of random 224x224 crops, half of them mirrored, as float32 [b,
3, 224, 224] minus the channel mean, from the same stored bytes; ours adds PCA color. With `--crop
resized` a crop is a part of random area and aspect ratio, resized (RandomResizedCrop). Each runs in
a process of its own with all cores (settings: `benchmarks/peers/`) and waits while another is
measured. Processor time and memory are those of all its processes: a page that several share, also
of a mapped file, counts once. The first batch is timed from the opening, and, where a loader can
resume, from a state in the middle of an epoch of 14 million images, made of the few by links. A
round is one turn of each, every second round in reverse; ratios are taken within rounds. Most
others read a copy in their own format in a temporary folder, and some hold all images in memory: a
set of some hundred to some ten thousand images does. Missing libraries are listed; `pip install -e
'.[bench]'` brings most of it.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from harness.report import Figure, Options, Report, Table, format_figure, format_range, start
from harness.rounds import list_ratios, order_round
from peers import PEERS, Peer
from peers.turns import Runner, Turn
from peers.work import SHARD, Work

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

EPOCH = 25_600
"""Images in a loader's epoch at least: smaller sets are gone over several times."""
OURS = {"jpeg": "ours", "raw": "ours-raw"}
"""The loader that the others of a lane are compared with."""


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Measure data loaders in turn."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of the data set, JPEGs."""
    raw: Path | None = None
    """Folder of a data set built with `--encoding raw`, for the loaders of raw pixels."""
    only: str = ""
    """Names with commas between; the default is all, with `--device gpu` all that can."""
    crop: Literal["random", "resized"] = "random"
    """Random squares of 224 pixels, or parts of random area and aspect ratio resized to that."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device on which `ours` and `native` decode; the others know the CPU only."""
    rounds: int = 5
    """Number of turns of each loader."""
    seconds: float = 4.0
    """Seconds of a turn, without its warm-up."""
    batch_size: int = 128
    """Images in a batch."""
    folder: Path | None = None
    """Folder for the temporary one with the others' formats."""
    resumes: int = 1
    """Times that each loader that can resumes in an epoch of `--samples`, each in a new process."""
    samples: int = 14_000_000
    """Images of that epoch, in whole thousands."""


@dataclass
class LoaderRow:
    """Measurements of one loader."""

    name: str
    peer: Peer
    missing: str = ""
    """Reason why it was not measured."""
    turns: list[Turn] = field(default_factory=list)
    """Measurement of each round."""
    first: float | None = None
    """Seconds until the first batch."""
    resumed: list[float] = field(default_factory=list)
    """Seconds until the first batch after a resume."""
    no_resume: str = ""
    """Reason why there is none."""

    def __post_init__(self) -> None:
        self.no_resume = self.no_resume or self.peer.no_resume

    @property
    def rates(self) -> list[float]:
        """img/s of each round."""
        return [turn.img_s for turn in self.turns]

    def over(self, other: LoaderRow | None) -> list[float]:
        """Return our rate divided by another's in each round; nothing if either has none."""
        if other is None or not (self.turns and other.turns):
            return []
        return list_ratios(self.rates, other.rates)


def select_loaders(options: LoaderOptions) -> list[LoaderRow]:
    """Return a row for each loader that is to be measured, in the order of the table.

    Raises:
        UsageError: an unknown name, or one that cannot run as asked.
    """
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in PEERS]:
        raise UsageError(f"--only {unknown[0]}: no such loader; there are {', '.join(PEERS)}")
    rows = []
    for name, peer in PEERS.items():
        cannot = ""
        if peer.lane == "raw" and options.raw is None:
            cannot = "needs --raw RAWDATA, a set built with --encoding raw"
        elif options.device == "gpu" and not peer.gpu:
            cannot = "knows the CPU only"
        if name in names and cannot:
            raise UsageError(f"--only {name}: {cannot}")
        if name in names or not (names or cannot):
            rows.append(
                LoaderRow(name, peer, "" if peer.installed else f"not installed ({peer.install})")
            )
    return rows


def make_work(peer: Peer, options: LoaderOptions, folder: Path) -> Work:
    """Return the job of a loader; makes its folder.

    Raises:
        UsageError: no data set with a train split, not of the lane's encoding; no room.
    """
    data = options.raw if peer.lane == "raw" else options.data
    assert data is not None  # checked in `select_loaders`
    manifest = Manifest.load(data)
    if manifest.encoding != peer.lane:
        raise UsageError(f"data set {data} holds {manifest.encoding} images, not {peer.lane}")
    split = manifest.split("train", data)
    passes = -(-EPOCH // split.samples)
    if peer.copies:
        _check_room(folder.parent, split.bytes * (passes if peer.lane == "jpeg" else 1), peer)
    red, green, blue = map(float, Statistics.load(data, manifest).channel_mean)
    folder.mkdir()
    return Work(
        data=data.resolve(),
        lane=peer.lane,
        folder=folder,
        crop=options.crop,
        mean=(red, green, blue),
        samples=split.samples,
        passes=passes,
        cores=cpu_count(),
        batch_size=options.batch_size,
        planes=peer.planes,
        device=options.device,
    )


def _check_room(folder: Path, size: int, peer: Peer) -> None:
    if (free := shutil.disk_usage(folder).free) < 1.1 * size:
        raise UsageError(
            f"{peer.title} may need {size / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are "
            "free; choose another place with --folder, or a smaller set"
        )


def measure(rows: list[LoaderRow], options: LoaderOptions, folder: Path) -> None:
    """Let the loaders take turns, and fill in the rows; one that fails has its reason there."""
    with ExitStack() as stack:
        running: list[tuple[LoaderRow, Runner]] = []
        present = [row for row in rows if not row.missing]
        with Progress("preparing", total=len(present), unit="loaders") as progress:
            for row in present:  # one after the other: converting takes all cores
                progress.note(row.peer.title)
                runner = Runner(row.peer, make_work(row.peer, options, folder / row.name))
                stack.enter_context(closing(runner))
                try:
                    row.first = runner.wait()
                    running.append((row, runner))
                except DuetError as error:
                    row.missing = str(error)
                progress.advance(1)
        turns = options.rounds * len(running)
        with Progress("measuring", total=turns, unit="turns") as progress:
            for number in range(options.rounds):
                for row, runner in order_round(running, number):
                    progress.note(row.peer.title)
                    try:
                        if not row.missing:
                            row.turns.append(runner.turn(options.seconds))
                    except DuetError as error:
                        row.missing, row.turns = str(error), []
                    progress.advance(1)


def measure_resumes(rows: list[LoaderRow], options: LoaderOptions, folder: Path) -> None:
    """Time the first batch after a resume, and fill in the rows."""
    able = [row for row in rows if not (row.missing or row.no_resume)]
    with Progress("resuming", total=options.resumes * len(able), unit="loaders") as progress:
        for number in range(options.resumes):
            for row in order_round(able, number):
                progress.note(row.peer.title)
                own = folder / f"{row.name}-{number}"
                work = make_work(row.peer, options, own)
                with closing(Runner(row.peer, work, options.samples)) as runner:
                    try:
                        row.resumed.append(runner.wait())
                    except DuetError as error:
                        row.no_resume = str(error)
                shutil.rmtree(own)
                progress.advance(1)


def collect_facts(rows: list[LoaderRow]) -> dict[str, dict[str, Any]]:
    """Return all measurements of each loader, ready for JSON."""
    found = {row.name: row for row in rows}
    facts = {}
    for row in rows:
        limit = found.get("limit") if row.peer.lane == "jpeg" else None
        ours = found.get(OURS[row.peer.lane])
        facts[row.name] = {
            "title": row.peer.title,
            "library": row.peer.library,
            "version": _version(row.peer),
            "img_s": [round(rate, 1) for rate in row.rates],
            "share_of_limit": row.over(limit),
            "ours_over_it": [] if ours is None or row.name == "limit" else ours.over(row),
            "cpu_ms": [round(turn.cpu_ms, 3) for turn in row.turns],
            "memory_mb": [round(turn.memory / 1e6) for turn in row.turns],
            "first_batch_s": row.first,
            "resumed_s": row.resumed,
            "no_resume": row.no_resume,
            "missing": row.missing or None,
        }
    return facts


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


HEAD = ("loader", "img/s", "rounds", "of the limit", "ours is", "CPU ms an image", "memory, MB",
        "first batch, s", "resumed, s")  # fmt: skip


def make_table(facts: dict[str, dict[str, Any]], options: LoaderOptions) -> Table:
    """Return the facts as a table."""
    rows, notes, reasons = [], [], []
    for name, row in facts.items():
        version = f" {row['version']}" if row["version"] else ""
        if row["missing"]:
            reasons.append(f"{row['title']}: {row['missing']}.")
            continue
        resumed = format_figure(_median(row["resumed_s"]), ".2f")
        if row["no_resume"] and name not in ("limit", *OURS.values()):
            notes.append(f"{row['title']}: {row['no_resume']}")
        rows.append((
            f"**{row['title']}**" if name in OURS.values() else f"{row['title']}{version}",
            f"{statistics.median(row['img_s']):,.0f}", format_range(row["img_s"]),
            format_figure(_median(row["share_of_limit"]), ".2f", ""),
            format_figure(_median(row["ours_over_it"]), ".2f", ""),
            f"{statistics.median(row['cpu_ms']):.2f}", f"{max(row['memory_mb']):,.0f}",
            format_figure(row["first_batch_s"], ".2f"), resumed,
        ))  # fmt: skip
    said = [f"Not resumed: {'; '.join(notes)}."] if notes and options.resumes else []
    title = (
        f"{options.device}; {options.crop} crops, batches of {options.batch_size}, "
        f"{options.rounds} rounds of {options.seconds:g} s; resumed: first batch in the middle of "
        f"an epoch of {options.samples:,}"
    )
    return Table(HEAD, rows, title, [*said, *reasons])


def make_figures(facts: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """Return what a later run is compared with."""
    found = {}
    for name, row in facts.items():
        found[name] = Figure(row["img_s"])
        found[f"ours over {name}"] = Figure(row["ours_over_it"], "x")
        found[f"{name}, CPU"] = Figure(row["cpu_ms"], "ms", "lower")
        found[f"{name}, memory"] = Figure(row["memory_mb"], "MB", "lower")
        found[f"{name}, resumed"] = Figure(row["resumed_s"], "s", "lower")
    return {name: figure for name, figure in found.items() if figure.rounds}


def _version(peer: Peer) -> str | None:
    try:
        return None if peer.library is None else importlib.metadata.version(peer.library)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(options: LoaderOptions) -> Report:
    """Compare the loaders."""
    if options.samples % SHARD or options.samples < SHARD:
        raise UsageError(f"--samples {options.samples} is no multiple of {SHARD}")
    rows = select_loaders(options)
    with tempfile.TemporaryDirectory(prefix="loaders-", dir=options.folder) as folder:
        measure(rows, options, Path(folder))
        if options.resumes:
            measure_resumes(rows, options, Path(folder))
    facts = collect_facts(rows)
    name = "loaders" if options.crop == "random" else f"loaders-{options.crop}"
    return Report(
        tables={name: make_table(facts, options)},
        figures=make_figures(facts),
        missing={row.name: row.missing for row in rows if row.missing},
        facts={"loaders": facts},
        exit_code=int(any(row.missing for row in rows if row.name in OURS.values())),
    )


if __name__ == "__main__":
    start(LoaderOptions, report, __doc__)
