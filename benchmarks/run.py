"""All benchmarks, one after the other: what each measured, and what changed since the last time.

    python benchmarks/run.py --quick                       # make bench
    python benchmarks/run.py loaders step --out benchmarks/results --page docs/results.md

Each benchmark is a script of its own, with options of its own (`--list` shows all). Its results, a
JSON file with the machine, how busy others kept it, and every round, replace those of the last time
in the folder `--out`, after a comparison with them (`harness/comparison.py` states the rule). One
that breaks or lacks something is a row with its reason; its last results stay. Data that is not
named is drawn and packed once, in `data/benchmark`.

pyperf and pytest-benchmark are not used: both measure one function at a time, while ratios here are
taken between processes that take turns within a round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.console
import rich.table
import tyro
from harness.comparison import compare, list_obstacles
from harness.page import read_results, write_page
from harness.report import describe_facts, describe_load

from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
MADE = ROOT / "data" / "benchmark"
"""Folder of the data that is drawn."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A script in this folder."""

    title: str
    """Quantity that it measures, in words."""
    script: str = ""
    """Name of the script, where it is not that of the benchmark."""
    arguments: str = ""
    """Its arguments; `{data}` is a dataset of JPEGs, `{images}` a folder per class of images."""
    quick: str | None = None
    """Arguments of a short form; None: it has none."""


BENCHMARKS = {
    "loaders": Benchmark(
        title="Duet's stream and other loaders in turn",
        arguments="{data}",
        quick="{data} --rounds 3 --seconds 1 --samples 1000000 "
        "--only limit,ours,native,dynamic,torchcodec,spdl,grain",
    ),
    "loaders-resized": Benchmark(
        title="the same with resized crops",
        script="loaders",
        arguments="{data} --crop resized --batch-size 64 --resumes 0",
    ),
    "resume": Benchmark(
        title="loaders cut, killed and resumed", quick="--only duet --cases middle,twice,process"
    ),
    "build": Benchmark(
        title="ways of packing in turn",
        arguments="{images}",
        quick="{images} --rounds 3 --repeat 2 --only ours,limit,plain",
    ),
    "order": Benchmark(
        title="order, restart and mixing at 14 million",
        arguments="{data}",
        quick="{data} --samples 2000000 --rounds 3",
    ),
    "metadata": Benchmark(title="index, order and checks of made-up sets", quick="--samples 1e6"),
    "plan": Benchmark(title="planning 14 million images", quick="--images 1e6"),
    "accounting": Benchmark(title="cost of timers and ledger", arguments="{data}", quick="{data}"),
    "predictions": Benchmark(title="the profiler's predictions", arguments="{data}"),
    "step": Benchmark(
        title="a training step beside plain PyTorch",
        arguments="--rounds 5",
        quick="--width 0.25 --batch-size 32 --rounds 5 --steps 1",
    ),
    "norms": Benchmark(title="a step with each normalization"),
    "pair": Benchmark(
        title="two columns against one process",
        quick="--widths 0.25 --dtypes float32 --batch-size 32 --rounds 5 --steps 2",
    ),
    "replicas": Benchmark(
        title="averaging over two replicas", quick="--width 0.25 --batch-size 32 --rounds 5"
    ),
    "exact": Benchmark(
        title="exact mode",
        quick="--width 0.25 --batch-size 64 --microbatches 32 --rounds 5",
    ),
    "saving": Benchmark(title="checkpoints", quick="--width 0.25 --batch-size 32 --rounds 3"),
    "goodput": Benchmark(title="what failures cost a training"),
    "neighbors": Benchmark(title="searches beside faiss's", quick="--base 10000 --queries 200"),
    "real_images": Benchmark(title="photographs through stream and network", arguments="{images}"),
}
"""All benchmarks that measure on a CPU; `gpu/` has its own command."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Run benchmarks, and compare with the last results."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Names of benchmarks; the default is all, with `--quick` all that have a short form."""
    quick: bool = False
    """Run short forms: all of them take ten minutes on two cores."""
    list: bool = False
    """List the benchmarks, and run none."""
    data: Path | None = None
    """Dataset of JPEGs; default: drawn images."""
    images: Path | None = None
    """Folder per class of JPEGs; default: drawn images."""
    out: Path = ROOT / "runs" / "benchmarks"
    """Folder for the results, a file for each benchmark."""
    against: Path | None = None
    """Folder of results to compare with; the default is that of `--out`."""
    page: Path | None = None
    """Page whose tables are written from the files of `--out`; alone, nothing is measured."""
    timeout: float = 7200.0
    """Seconds after which a benchmark is ended."""


@dataclass(frozen=True)
class Outcome:
    """Results of a benchmark, or the reason why there are none."""

    seconds: float
    found: dict[str, Any] | None
    """Its results."""
    lines: list[str]
    """Lines for people: why there is none, who was missing, what changed."""


def choose(options: RunOptions) -> dict[str, Benchmark]:
    """Return the benchmarks to run.

    Raises:
        UsageError: an unknown name, or one without a short form.
    """
    for name in options.names:
        if name not in BENCHMARKS:
            raise UsageError(f"{name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
        if options.quick and BENCHMARKS[name].quick is None:
            raise UsageError(f"{name} has no short form; leave out --quick")
    return {
        name: one
        for name, one in BENCHMARKS.items()
        if name in options.names or not (options.names or (options.quick and one.quick is None))
    }


def make_data(options: RunOptions) -> dict[str, str]:
    """Return the paths that stand for `{data}` and `{images}`; draws and packs what is missing."""
    images = options.images or MADE / "images" / "train"
    data = options.data or MADE / "data"
    steps = []
    if not images.is_dir():
        steps.append(["pipeline.demo_images", MADE / "images"])
    if not (data / "manifest.json").is_file():
        steps.append(["pipeline.build_shards", data, "--train", images])
    for module, *arguments in steps:
        subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, cwd=ROOT)
    return {"data": str(data), "images": str(images)}


def run_script(name: str, words: list[str], timeout: float) -> Outcome:
    """Run a script, and return its results or the last line that it printed."""
    script = Path(__file__).parent / f"{name}.py"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, str(script), *words, "--json"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        said, out = done.stderr.strip().splitlines(), done.stdout
        code = done.returncode
    except subprocess.TimeoutExpired:
        said, out, code = [f"not done after {timeout:g} s"], "", 1
    seconds = time.monotonic() - begun
    try:
        found = json.loads(out)
    except ValueError:
        return Outcome(seconds, None, [said[-1] if said else f"exit code {code}"])
    lines = [f"{way}: {reason}" for way, reason in found["missing"].items()]
    if code:
        lines.insert(0, f"exit code {code}: not all is as it must be")
    return Outcome(seconds, found, lines)


def list_changes(old: Path, new: dict[str, Any]) -> list[str]:
    """Return a line for each figure that changed beyond noise, or why none can be told."""
    if not old.is_file():
        return ["no earlier results to compare with"]
    last = read_results(old)
    if obstacles := list_obstacles(last, new):
        return [f"not compared with the results of {last['date']}: {obstacles[0]}"]
    changes = list(compare(last, new))
    told = [str(change) for change in changes if change.verdict != "same"]
    same = sum(change.verdict == "same" for change in changes)
    return [*told, f"{same} of {len(changes)} figures as on {last['date']}, within noise"]


def save(path: Path, found: dict[str, Any]) -> None:
    """Write a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def print_list() -> None:
    """Print the table of all benchmarks."""
    table = rich.table.Table("name", "measures", "arguments", "with --quick", box=rich.box.SIMPLE)
    for name, one in BENCHMARKS.items():
        table.add_row(name, one.title, one.arguments, "–" if one.quick is None else one.quick)
    rich.console.Console(width=160, markup=False).print(table)


def run_all(options: RunOptions) -> int:
    """Run the chosen benchmarks, and print a line for each; return how many gave no results."""
    console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
    chosen, failed = choose(options), 0
    texts = [(one.quick if options.quick else one.arguments) or "" for one in chosen.values()]
    paths = make_data(options) if any("{" in text for text in texts) else {}
    for (name, one), text in zip(chosen.items(), texts, strict=True):
        outcome = run_script(one.script or name, text.format(**paths).split(), options.timeout)
        console.print(f"\n{name} ({one.title}): {outcome.seconds:.0f} s")
        lines = outcome.lines
        if outcome.found is None:
            failed += 1
            lines = [f"no results: {lines[0]}"]
        else:
            file = f"{name}-quick.json" if options.quick else f"{name}.json"
            lines = lines + list_changes((options.against or options.out) / file, outcome.found)
            lines += filter(None, [describe_load(outcome.found["machine"])])
            save(options.out / file, outcome.found)
            console.print(f"    {describe_facts(outcome.found)}")
        for line in lines:
            console.print(f"    {line}")
    return failed


def main() -> int:
    """Run what is asked for; 1 if a benchmark gave no results."""
    options = tyro.cli(RunOptions, prog="python benchmarks/run.py", description=__doc__)
    if options.list:
        print_list()
        return 0
    only_page = options.page is not None and not options.names and not options.quick
    failed = 0 if only_page else run_all(options)
    if options.page is not None:
        write_page(options.page, options.out)
    return min(1, failed)


if __name__ == "__main__":
    run(main)
