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

import tyro
from builders import BUILDERS, Builder
from builders.quality import make_quality_table, measure_quality
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import list_ratios, order_round

from pipeline.tools.errors import DuetError, SetupError, UsageError
from pipeline.tools.progress import Progress


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Options):
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
            for row in order_round(present, number):
                progress.note(row.builder.title)
                try:
                    if number == 0:
                        tries = [run_turn(row, once, folder / "out") for _ in range(2)]
                        row.once = Turn(min(t.seconds for t in tries), min(t.cpu for t in tries))
                    elif not row.missing:
                        row.turns.append(run_turn(row, whole, folder / "out"))
                except DuetError as error:
                    row.missing, row.turns = str(error), []
                    shutil.rmtree(folder / "out", ignore_errors=True)
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
        both = ours["missing"] is None and way["missing"] is None
        way["ours_over_it"] = list_ratios(ours["steady_img_s"], way["steady_img_s"]) if both else []
        way["its_cpu_over_ours"] = list_ratios(way["cpu_ms"], ours["cpu_ms"]) if both else []
    return {
        "pictures": count,
        "workers": options.workers,
        "ways": found,
    }


def make_table(found: dict[str, Any]) -> Table:
    """Return the facts as a table."""
    rows = []
    for name, way in found["ways"].items():
        if way["missing"]:
            continue
        steady = way["steady_img_s"]
        ratios = (way["ours_over_it"], way["its_cpu_over_ours"])
        rate, cpu = (f"{statistics.median(one):.2f}x" if one else "" for one in ratios)
        rows.append((
            f"**{way['title']}**" if name == "ours" else way["title"], f"{way['once_s']:.1f}",
            f"{statistics.median(way['img_s']):,.0f}", f"{statistics.median(steady):,.0f}",
            format_range(steady), rate, f"{statistics.median(way['cpu_ms']):.2f}", cpu,
        ))  # fmt: skip
    title = f"{found['pictures']:,} images a turn, {found['workers']} processes"
    head = ("way", "once s", "img/s", "steady", "rounds", "ours is", "CPU ms an image", "ours is")
    return Table(head, rows, title)


def _version(builder: Builder) -> str | None:
    try:
        return builder.library and importlib.metadata.version(builder.library)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(options: BuildOptions) -> Report:
    """Compare the ways of packing."""
    if options.repeat < 2:
        raise UsageError("--repeat must be above 1")
    rows = select_builders(options)
    with tempfile.TemporaryDirectory(prefix="build-", dir=options.folder) as folder:
        count = measure(rows, options, Path(folder))
    found = collect_facts(rows, count, options)
    tables = {"build": make_table(found)}
    if options.quality:
        found["quality"] = measure_quality(sorted(options.images.glob("*/*"))[::5])
        tables["build-quality"] = make_quality_table(found["quality"])
    ways = {name: way for name, way in found["ways"].items() if not way["missing"]}
    return Report(
        tables=tables,
        figures={name: Figure(way["steady_img_s"]) for name, way in ways.items()}
        | {
            f"ours over {name}": Figure(way["ours_over_it"], "x")
            for name, way in ways.items()
            if way["ours_over_it"]
        },
        missing={row.name: row.missing for row in rows if row.missing},
        facts=found,
    )


if __name__ == "__main__":
    start(BuildOptions, report, __doc__)
