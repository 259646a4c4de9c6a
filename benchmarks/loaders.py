"""Data loaders in turn on the same images: ours, DALI's own, and those of others.

    python benchmarks/loaders.py DATA [--raw RAWDATA] [--only ours,native,ffcv] [--device gpu]
    python benchmarks/loaders.py DATA500 --crop resized      # --size 500 --fit shorter

Every loader gives shuffled batches of random 224x224 crops, half of them mirrored, as float32
[b, 3, 224, 224] minus the channel mean, from the same stored bytes; ours adds PCA color. With
`--crop resized` a crop is a part of random area and aspect ratio, resized (RandomResizedCrop). Each
runs in a process of its own with all cores (settings: `benchmarks/peers/`) and waits while another
is measured. A round is one turn of each, every second round in reverse; ratios are taken within
rounds. Most others read a copy in their own format in a temporary folder, and some hold all
images in memory: a set of some hundred to some ten thousand images does. Missing libraries are
listed; `pip install -e '.[bench]'` brings most of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import nvidia.dali
import rich.box
import rich.console
import rich.table
import torch
import tyro
from peers import PEERS, Peer
from peers.turns import Runner
from peers.work import Work

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.tools.errors import UsageError, run
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count

EPOCH = 25_600
"""Images in a loader's epoch at least: smaller sets are gone over several times."""
OURS = {"jpeg": "ours", "raw": "ours-raw"}
"""The loader that the others of a lane are compared with."""


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
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
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass
class LoaderRow:
    """Measurements of one loader."""

    name: str
    peer: Peer
    missing: str = ""
    """Reason why it was not measured."""
    rates: list[float] = field(default_factory=list)
    """img/s of each round."""

    def over(self, other: LoaderRow | None) -> float | None:
        """Return the median over the rounds of our rate divided by another's."""
        if other is None or not (self.rates and other.rates):
            return None
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


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
    """Let the loaders take turns, and fill in the rows.

    Raises:
        SetupError: a loader failed.
        DataError: a loader delivers other batches than it should.
    """
    with ExitStack() as stack:
        running: list[tuple[LoaderRow, Runner]] = []
        present = [row for row in rows if not row.missing]
        with Progress("preparing", total=len(present), unit="loaders") as progress:
            for row in present:  # one after the other: converting takes all cores
                progress.note(row.peer.title)
                runner = Runner(row.peer, make_work(row.peer, options, folder / row.name))
                stack.enter_context(closing(runner))
                row.missing = runner.wait() or ""
                if not row.missing:
                    running.append((row, runner))
                progress.advance(1)
        turns = options.rounds * len(running)
        with Progress("measuring", total=turns, unit="turns") as progress:
            for number in range(options.rounds):
                for row, runner in running[:: -1 if number % 2 else 1]:
                    progress.note(row.peer.title)
                    row.rates.append(runner.turn(options.seconds))
                    progress.advance(1)


def collect_facts(rows: list[LoaderRow], options: LoaderOptions) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    found = {row.name: row for row in rows}
    loaders = {}
    for row in rows:
        limit = found.get("limit") if row.peer.lane == "jpeg" else None
        ours = found.get(OURS[row.peer.lane])
        share = None if limit is None else row.over(limit)
        ratio = None if ours is None or row.name == "limit" else ours.over(row)
        loaders[row.name] = {
            "title": row.peer.title,
            "library": row.peer.library,
            "version": _version(row.peer),
            "img_s": round(statistics.median(row.rates), 1) if row.rates else None,
            "rounds": [round(rate, 1) for rate in row.rates],
            "share_of_limit": share and round(share, 3),
            "ours_over_it": ratio and round(ratio, 3),
            "missing": row.missing or None,
        }
    return {
        "cpu": _cpu(),
        "cores": cpu_count(),
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": nvidia.dali.__version__,
        "device": options.device,
        "crop": options.crop,
        "batch_size": options.batch_size,
        "seconds": options.seconds,
        "loaders": loaders,
    }


def make_table(found: dict[str, Any]) -> rich.table.Table:
    """Return the facts as a table."""
    out = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False)
    out.add_column("loader", no_wrap=True)
    for title in ("img/s", "rounds", "of limit", "ours is"):
        out.add_column(title, justify="right", no_wrap=True)
    missing = []
    versions = {"": f"torch {found['torch']}", "native": f"DALI {found['dali']}"}
    for name, row in found["loaders"].items():
        if row["version"]:
            versions[name.split("-")[0]] = f"{row['library']} {row['version']}"
        if row["missing"]:
            missing.append(f"{name}: {row['missing']}")
            continue
        rates, share, ratio = row["rounds"], row["share_of_limit"], row["ours_over_it"]
        out.add_row(
            row["title"],
            f"{row['img_s']:,.0f}",
            f"{min(rates):,.0f} to {max(rates):,.0f}",
            "" if share is None else f"{share:.2f}",
            "" if ratio is None else f"{ratio:.2f}x",
        )
    out.title = (
        f"{found['cpu']}, {found['cores']} cores, {found['device']}; {found['crop']} crops, "
        f"batch {found['batch_size']}, "
        f"turns of {found['seconds']:g} s\n{', '.join(versions.values())}"
    )
    out.title_justify = "left"
    out.caption = "\n".join(missing)
    out.caption_justify = "left"
    return out


def _version(peer: Peer) -> str | None:
    try:
        return None if peer.library is None else importlib.metadata.version(peer.library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Compare the loaders and print the table."""
    options = tyro.cli(LoaderOptions, prog="python benchmarks/loaders.py", description=__doc__)
    if min(options.rounds, options.batch_size) < 1 or options.seconds <= 0:
        raise UsageError("--rounds, --batch-size and --seconds must be above 0")
    if options.folder is not None and not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder} is not a folder; make it or name another")
    rows = select_loaders(options)
    with tempfile.TemporaryDirectory(prefix="loaders-", dir=options.folder) as folder:
        measure(rows, options, Path(folder))
    found = collect_facts(rows, options)
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    rich.console.Console(stderr=options.json).print(make_table(found))


if __name__ == "__main__":
    run(main)
