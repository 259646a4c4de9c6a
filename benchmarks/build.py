"""Ways of packing images in turn, on the same images with as many processes.

    python benchmarks/build.py IMAGES [--rounds 5] [--workers 2] [--only ours,plain] [--quality]

IMAGES is a folder per class of JPEGs as they were taken, some hundred of them; they are linked
several times, so that a turn lasts. A turn is a whole program, from its start to its last byte. All
make 256x256 JPEGs of quality 96; ours besides turns images upright and into sRGB, checks, hashes
and counts them, shuffles, and writes an index. `steady` leaves out the time and the images of a
set with each image once (`once`), and with it the seconds of imports in every process that a real
set does not notice. `cpu ms` is the processor time of all processes for an image, also without the
start: it tells least of what else the machine does. Every second round goes in reverse; ratios are
medians of those within a round.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.console
import rich.table
import tyro
from builders import BUILDERS, Builder
from builders.quality import make_quality_table, measure_quality

from pipeline.tools.errors import SetupError, UsageError, run
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Measure ways of packing in turn."""

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder with a folder of JPEGs for each class."""
    rounds: int = 5
    """Number of turns of each."""
    workers: int = 2
    """Number of processes of each."""
    repeat: int = 10
    """Number of times each image is packed in a turn."""
    only: str = ""
    """Names with commas between; the default is all that are installed."""
    folder: Path | None = None
    """Folder for the temporary one with the outputs."""
    quality: bool = False
    """Also measure what the stored images lose, over every fifth of them."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class Turn:
    """Time that a program took."""

    seconds: float
    cpu: float
    """Processor seconds of the program and all its processes."""


@dataclass
class BuilderRow:
    """Measurements of one builder."""

    name: str
    builder: Builder
    workers: int
    missing: str = ""
    once: Turn = Turn(0, 0)
    """Turn over the set with each image once."""
    turns: list[Turn] = field(default_factory=list)
    """Turn of each round."""

    def steady_rates(self, more: int) -> list[float]:
        """Return img/s of each round for the `more` images than once."""
        return [more / max(t.seconds - self.once.seconds, 1e-9) for t in self.turns]

    def cpu_ms(self, more: int) -> list[float]:
        """Return milliseconds of processor time an image of each round, for the same ones."""
        return [1000 * (t.cpu - self.once.cpu) / more for t in self.turns]


@dataclass(frozen=True)
class ImageSet:
    """Images as the programs take them: a folder per class, and a list."""

    folder: Path
    listed: Path
    count: int


def select_builders(options: BuildOptions) -> list[BuilderRow]:
    """Return a row for each way that is to be measured.

    Raises:
        UsageError: an unknown name.
    """
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in BUILDERS]:
        raise UsageError(f"--only {unknown[0]}: no such way; there are {', '.join(BUILDERS)}")
    rows = []
    for name, builder in BUILDERS.items():
        if not names or name in names:
            there = builder.module is None or importlib.util.find_spec(builder.module) is not None
            missing = "" if there else f"not installed (pip install {builder.library})"
            rows.append(BuilderRow(name, builder, options.workers, missing))
    if options.workers > 1 and rows[0].name == "ours":
        rows.append(BuilderRow("ours-1", BUILDERS["ours"], 1))
    return rows


def link_images(images: Path, folder: Path, repeat: int) -> ImageSet:
    """Link the images into a folder per class, `repeat` times each.

    Raises:
        UsageError: there are none.
    """
    files = sorted(p for p in images.glob("*/*") if p.suffix.lower() in {".jpg", ".jpeg"})
    if not files:
        raise UsageError(f"{images} has no JPEG in a folder of its class; name another folder")
    classes = {name: label for label, name in enumerate(sorted({p.parent.name for p in files}))}
    lines = []
    for number in range(repeat):
        for file in files:
            link = folder / "pictures" / file.parent.name / f"{number:03d}_{file.stem}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
            lines.append(f"{link}\t{classes[file.parent.name]}\n")
    (folder / "list.txt").write_text("".join(lines))
    return ImageSet(folder / "pictures", folder / "list.txt", len(lines))


def run_turn(row: BuilderRow, images: ImageSet, out: Path) -> Turn:
    """Run a program on all images, time it, and delete its output.

    Raises:
        SetupError: it failed.
    """
    here = Path(__file__).parent
    if row.name.startswith("ours"):
        what = ["-m", row.builder.program, str(out), "--train", str(images.folder)]
        what += ["--workers", str(row.workers)]
    else:
        out.mkdir()
        program = here / "builders" / f"{row.builder.program}.py"
        what = [str(program), str(images.listed), str(out), str(row.workers)]
    started, before = time.perf_counter(), _cpu()
    done = subprocess.run([sys.executable, *what], cwd=here.parent, capture_output=True)
    result = Turn(time.perf_counter() - started, _cpu() - before)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise SetupError(f"{row.builder.title} failed: {' '.join(lines)}")
    shutil.rmtree(out)
    return result


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(rows: list[BuilderRow], options: BuildOptions, folder: Path) -> int:
    """Let the programs take turns, fill in the rows, and return the images of a turn."""
    for name in ("once", "whole"):
        (folder / name).mkdir()
    once = link_images(options.images, folder / "once", 1)
    whole = link_images(options.images, folder / "whole", options.repeat)
    present = [row for row in rows if not row.missing]
    with Progress("measuring", total=(options.rounds + 1) * len(present), unit="turns") as progress:
        for number in range(options.rounds + 1):
            for row in present[:: -1 if number % 2 else 1]:
                progress.note(row.builder.title)
                if number == 0:
                    tries = [run_turn(row, once, folder / "out") for _ in range(2)]
                    row.once = Turn(min(t.seconds for t in tries), min(t.cpu for t in tries))
                else:
                    row.turns.append(run_turn(row, whole, folder / "out"))
                progress.advance(1)
    return whole.count


def collect_facts(rows: list[BuilderRow], count: int, options: BuildOptions) -> dict[str, Any]:
    """Return all measurements, ready for JSON."""
    found = {}
    more = count - count // options.repeat
    for row in rows:
        found[row.name] = {
            "title": row.builder.title + (f", {row.workers} process" if row.workers == 1 else ""),
            "library": row.builder.library,
            "version": _version(row.builder),
            "workers": row.workers,
            "once_s": round(row.once.seconds, 2),
            "img_s": [round(count / one.seconds, 1) for one in row.turns],
            "steady_img_s": [round(rate, 1) for rate in row.steady_rates(more)],
            "cpu_ms": [round(ms, 3) for ms in row.cpu_ms(more)],
            "missing": row.missing or None,
        }
    for way in found.values():
        ours = found.get("ours", way)
        way["ours_over_it"] = _ratio(ours["steady_img_s"], way["steady_img_s"])
        way["its_cpu_over_ours"] = _ratio(way["cpu_ms"], ours["cpu_ms"])
    return {
        "cores": cpu_count(),
        "load_at_end": round(os.getloadavg()[0], 2),
        "pictures": count,
        "workers": options.workers,
        "ways": found,
    }


def _ratio(ones: list[float], others: list[float]) -> float | None:
    ratios = [one / other for one, other in zip(ones, others, strict=True)]
    return round(statistics.median(ratios), 3) if ratios else None


def make_table(found: dict[str, Any]) -> rich.table.Table:
    """Return the facts as a table."""
    out = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False)
    out.add_column("way", no_wrap=True)
    for title in ("once s", "img/s", "steady", "rounds", "ours is", "cpu ms", "ours is"):
        out.add_column(title, justify="right", no_wrap=True)
    missing = []
    for way in found["ways"].values():
        if way["missing"]:
            missing.append(f"{way['title']}: {way['missing']}")
            continue
        steady = way["steady_img_s"]
        out.add_row(
            way["title"],
            f"{way['once_s']:.1f}",
            f"{statistics.median(way['img_s']):,.0f}",
            f"{statistics.median(steady):,.0f}",
            f"{min(steady):,.0f} to {max(steady):,.0f}",
            f"{way['ours_over_it']:.2f}x",
            f"{statistics.median(way['cpu_ms']):.2f}",
            f"{way['its_cpu_over_ours']:.2f}x",
        )
    out.title = (
        f"{found['pictures']:,} images a turn, {found['workers']} processes on {found['cores']} "
        f"cores; load at the end {found['load_at_end']}"
    )
    out.title_justify = "left"
    out.caption, out.caption_justify = "\n".join(missing), "left"
    return out


def _version(builder: Builder) -> str | None:
    try:
        return builder.library and importlib.metadata.version(builder.library)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Compare the ways of packing and print the tables."""
    options = tyro.cli(BuildOptions, prog="python benchmarks/build.py", description=__doc__)
    if min(options.rounds, options.workers, options.repeat - 1) < 1:
        raise UsageError("--rounds and --workers must be above 0, --repeat above 1")
    if options.folder is not None and not options.folder.is_dir():
        raise UsageError(f"--folder {options.folder} is not a folder; make it or name another")
    rows = select_builders(options)
    with tempfile.TemporaryDirectory(prefix="build-", dir=options.folder) as folder:
        count = measure(rows, options, Path(folder))
    found = collect_facts(rows, count, options)
    console = rich.console.Console(stderr=options.json)
    console.width = max(console.width, 112)  # no column is cut where nobody looks
    console.print(make_table(found))
    if options.quality:
        found["quality"] = measure_quality(sorted(options.images.glob("*/*"))[::5])
        console.print(make_quality_table(found["quality"]))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    run(main)
