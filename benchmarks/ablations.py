"""Every ablation of configs/ at equal pictures seen: one row each, with the noise over seeds.

    python benchmarks/ablations.py DATA OUT [--steps 800] [--width 0.25] [--seeds 2]

Trains each preset `--seeds` times through `cluster.train`, one run on each core, and prints a table
of the errors on the whole validation set (centre view) after the last step. A run is a folder of
OUT; what is finished is not made again, what was killed goes on. Rates fall as in
configs/narrow.toml: so short a run has no time for the presets' own.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cluster.config_file import load
from model.design import Design
from model.summary import table, totals
from pipeline.dataset import metadata
from pipeline.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
BASE = "dexp"
"""The row that the others are compared with: the released source's network."""
PAPER = {
    "paper": "",
    "one_gpu": "+1.7 / +1.2",
    "no_lrn": "+1.4 / +1.2",
    "pool2": "+0.4 / +0.3",
    "tanh": "slower",
    "no_conv3": "about +2",
    "no_conv4": "about +2",
    "no_conv5": "about +2",
}
"""Top-1 / top-5 error more than the base, on ImageNet, in points (facts of each config's head)."""


@dataclass(frozen=True)
class Setup:
    """What to run."""

    data: Annotated[str, tyro.conf.Positional]
    """A sealed data set with train and val."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the runs and the table."""
    steps: int = 800
    """Steps of 128 pictures in each run."""
    width: float = 0.25
    """Factor on all maps and units."""
    seeds: int = 2
    """Runs of each preset."""
    only: tuple[str, ...] = ()
    """Presets to run; all without it."""
    flags: tuple[str, ...] = ()
    """More flags for every cluster.train, written with = ("--lr=0.02")."""


@dataclass
class Row:
    """A preset and what its runs came to; errors in per cent."""

    preset: str
    parameters: int
    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    img_s: list[float] = field(default_factory=list)


def main() -> None:
    """Run what is missing, then print and write the table."""
    setup = tyro.cli(Setup, description=__doc__)
    presets = [BASE, *PAPER]
    if unknown := set(setup.only) - set(presets):
        raise SystemExit(f"no preset {', '.join(unknown)}; there are {', '.join(presets)}")
    presets = [name for name in presets if not setup.only or name in setup.only]
    setup.out.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in range(setup.seeds) for name in presets]
    failed = run_all(setup, jobs)
    rows = [read(setup, name) for name in presets]
    rows = [row for row in rows if row.top1]
    text = as_table(rows, setup)
    print(text)
    (setup.out / "ablations.md").write_text(text + "\n", encoding="utf-8")
    told = {"setup": asdict(setup) | {"out": str(setup.out)}, "rows": [asdict(r) for r in rows]}
    (setup.out / "ablations.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on")


def run_all(setup: Setup, jobs: list[tuple[str, int]]) -> list[str]:
    """Make all runs, one on each core at a time; returns the names of those that failed."""
    todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    failed: list[str] = []

    def work(core: int) -> None:
        while True:
            try:
                preset, seed = todo.get_nowait()
            except queue.Empty:
                return
            if not run_one(setup, preset, seed, core):
                failed.append(f"{preset}-{seed}")

    threads = [threading.Thread(target=work, args=(c,)) for c in sorted(os.sched_getaffinity(0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def run_one(setup: Setup, preset: str, seed: int, core: int) -> bool:
    """Train one preset with one seed on one core."""
    run = setup.out / f"{preset}-{seed}"
    train = [
        "cluster.train", f"configs/{preset}.toml", "--data", setup.data, "--run", str(run),
        "--width", f"{setup.width}", "--steps", f"{setup.steps}", "--seed", f"{seed}",
        "--schedule", "dexp", "--lr-drop", "8", "--lr-drops", "4", "--bias-drops", "1",
        "--changes", "--columns-per-worker", "2", "--checkpoint-every", "400",
        "--validate-every", "400", *setup.flags,
    ]  # fmt: skip
    with (setup.out / f"{preset}-{seed}.log").open("a") as log:
        done = subprocess.run(
            ["taskset", "-c", f"{core}", sys.executable, "-m", *train],
            cwd=ROOT, stdout=log, stderr=log, check=False,
        )  # fmt: skip
    if done.returncode:
        print(f"{preset}-{seed}: ended with {done.returncode}, see {log.name}", flush=True)
        return False
    print(f"{preset}-{seed}: done", flush=True)
    return True


def read(setup: Setup, preset: str) -> Row:
    """What the finished runs of a preset left behind."""
    design = Design.of(load(ROOT / "configs" / f"{preset}.toml") | {"width": setup.width})
    classes = len(Manifest.load(metadata(setup.data)).classes)
    row = Row(preset, totals(table(classes, design)).parameters)
    for seed in range(setup.seeds):
        run = setup.out / f"{preset}-{seed}"
        last = [{}, *rows_of(run / "validation.jsonl")][-1]
        if last.get("step") != setup.steps:
            continue
        steps = rows_of(run / "metrics.jsonl")
        row.top1.append(100 * last["top1_error"])
        row.top5.append(100 * last["top5_error"])
        row.loss.append(last["loss"])
        row.train_loss.append(statistics.fmean(step["loss"] for step in steps[-50:]))
        row.img_s.append(statistics.median(step["img_s"] for step in steps))
    return row


def rows_of(path: Path) -> list[dict[str, float]]:
    """The rows of a JSON-lines file; none if it is not there."""
    return [json.loads(line) for line in path.open()] if path.is_file() else []


def as_table(rows: list[Row], setup: Setup) -> str:
    """A Markdown table, and how large a difference must be to mean something."""
    base = next((row for row in rows if row.preset == BASE), None)
    lines = [
        "| preset | parameters | top-1 error, centre (each seed) | against "
        f"{BASE} | on ImageNet, paper | top-5 | val loss | train loss | img/s, one core |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean = statistics.fmean
        each = " ".join(f"{value:.1f}" for value in row.top1)
        gap = "" if base is None or row is base else f"{mean(row.top1) - mean(base.top1):+.1f}"
        lines.append(
            f"| {row.preset} | {row.parameters:,} | {mean(row.top1):.1f} ({each}) | {gap} | "
            f"{PAPER.get(row.preset, '')} | {mean(row.top5):.1f} | {mean(row.loss):.2f} | "
            f"{mean(row.train_loss):.2f} | {mean(row.img_s):,.0f} |"
        )
    return "\n".join([*lines, "", noise(rows, setup)])


def noise(rows: list[Row], setup: Setup) -> str:
    """The noise of a difference of two rows, from the spread over seeds of all rows together."""
    spreads = [statistics.variance(row.top1) for row in rows if len(row.top1) > 1]
    seen = f"{setup.steps * 128:,} pictures seen in each run, width {setup.width:g}"
    if not spreads:
        return f"{seen}; one seed: nothing is known of the noise."
    one = statistics.fmean(spreads) ** 0.5
    gap = one * (2 / setup.seeds) ** 0.5
    return (
        f"{seen}; standard deviation over seeds {one:.2f} points (pooled over {len(spreads)} "
        f"presets of {setup.seeds}), "
        f"of a difference {gap:.2f}: below {2 * gap:.1f} it may be chance."
    )


if __name__ == "__main__":
    main()
