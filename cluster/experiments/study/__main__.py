"""Command: a study, from its file to its table and plot; runs that exist are not made again.

    python -m cluster.experiments.study STUDY --data DATA --out OUT

First come the parts of the data set, then the runs that others start from. With a grid, every
variant is run with the first seed and every value of the grid's setting, and keeps the value with
the best number: the lowest error, or for each goal the fewest images. A run that misses a goal is
behind all that reach it, ordered by its last training error. The other seeds run with the kept
values only, each up to the last goal that it was kept for.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cli.options import StudyOptions
from cluster.config import fit_images
from cluster.experiments.study import results
from cluster.experiments.study.config import WHOLE, Study, Variant, read_study
from cluster.experiments.study.goals import StopRule
from cluster.experiments.study.plot import draw_plot
from cluster.experiments.study.results import Result, pick_best, read_result
from cluster.experiments.study.runner import (
    StudyRun,
    list_gpus,
    load_manifest,
    make_slots,
    run_side_by_side,
)
from cluster.experiments.study.subsets import make_subset
from cluster.run.folder import CONFIG
from pipeline.dataset.record import read_address
from pipeline.remote.dataset import locate_dataset
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, hint_resume
from pipeline.tools.errors import run as run_command
from pipeline.tools.files import ensure_writable
from pipeline.tools.progress import Progress

ResultsByVariant = dict[str, list[Result]]
"""Results by the name of their variant."""
Wanted = tuple[Variant, Mapping[Any, Sequence[float]]]
"""A variant and the values of the grid that it is made with, each with the goals it is run for."""


class StudyMaker:
    """Makes the runs of a study."""

    def __init__(self, options: StudyOptions, study: Study) -> None:
        """Prepare, and make the parts of the data set."""
        self._options, self._study = options, study
        used = {one.data for one in study.variants}
        self._data = {WHOLE: options.data} | {
            name: str(make_subset(options.data, subset, options.out / "data" / name))
            for name, subset in study.subsets.items()
            if name in used
        }
        gpus = [] if options.ray else list_gpus()
        self._slots = make_slots(1 if options.ray else options.at_once, gpus)

    def make(self) -> tuple[list[Result], list[Result]]:
        """Make all runs.

        Returns:
            results that count, by variant and seed; and those of the grid that were not best.
        """
        study = self._study
        first = study.seeds[:1] if study.grid[1] else study.seeds  # of a grid one seed has all
        rest = study.seeds[len(first) :]
        total = 0
        most = len(study.goals)  # values that the other seeds may run with
        for one in study.variants:
            each = [self._plan(one, 0, value, {}).total for value in one.values]
            total += len(first) * sum(each) + len(rest) * sum(each[:most])
        tried: ResultsByVariant = {}
        with Progress(study.name, total=total, unit="img") as progress:
            for stage in sort_stages(study.variants):
                wanted: list[Wanted] = [
                    (one, dict.fromkeys(one.values, study.goals)) for one in stage
                ]
                tried |= self._make_runs(wanted, first, tried, progress)
            best = {one.name: self._choose_values(one, tried[one.name]) for one in study.variants}
            kept = {
                name: [one for one in found if one.at in best[name]]
                for name, found in tried.items()
            }
            for one in study.variants:  # fewer values may be kept
                less = len(one.values[:most]) - len(best[one.name])
                progress.skip(less * len(rest) * self._plan(one, 0, one.values[0], {}).total)
            for stage in sort_stages(study.variants) if rest else ():
                wanted = [(one, best[one.name]) for one in stage]
                for name, found in self._make_runs(wanted, rest, kept, progress).items():
                    kept[name] += found
        shown = [one.name for one in study.shown]
        counted = [one for name in shown for one in kept[name]]
        others = (one for name, found in tried.items() if name in shown for one in found)
        return counted, [one for one in others if one not in counted]

    def _choose_values(self, variant: Variant, tried: list[Result]) -> dict[Any, list[float]]:
        """Return the values that are the best at some goal, with these goals."""
        best: dict[Any, list[float]] = {}
        for number, goal in enumerate(self._study.goals):
            at = pick_best(self._study, variant, tried, number).at
            best.setdefault(at, []).append(goal)
        return best

    def _make_runs(
        self, wanted: Sequence[Wanted], seeds: Sequence[int],
        before: ResultsByVariant, progress: Progress,
    ) -> ResultsByVariant:  # fmt: skip
        """Make some variants with some values and seeds, side by side."""
        planned = [
            (variant, goals, self._plan(variant, seed, value, before))
            for seed in seeds
            for variant, values in wanted
            for value, goals in values.items()
        ]
        runs = [run for _, _, run in planned]
        for run in runs:
            run.check()
        rivals: dict[Any, list[StudyRun]] = {}
        for variant, goals, run in planned:
            rivals.setdefault((variant.name, run.config.seed, tuple(goals)), []).append(run)
        rule = StopRule(self._study, [(found, goals) for (*_, goals), found in rivals.items()])
        undone = [
            run for run in runs if not (run.has_diverged or run.is_complete or rule.is_enough(run))
        ]
        progress.skip(sum(run.total for run in runs) - sum(one.images_left for one in undone))
        module = "cluster.train" if self._options.ray else "cluster.experiments.study.runner"
        run_side_by_side(undone, self._slots, module, progress, rule.is_enough)
        progress.skip(sum(one.images_left for one in undone))  # of runs that ended early
        found: ResultsByVariant = {variant.name: [] for variant, _ in wanted}
        for variant, _, run in planned:
            found[variant.name].append(read_result(self._study, variant.name, run))
        return found

    def _plan(self, variant: Variant, seed: int, value: Any, before: ResultsByVariant) -> StudyRun:
        study = self._study
        init = ""
        if variant.after:
            same = [one for one in before.get(variant.after, []) if one.run.config.seed == seed]
            best = min(same, key=lambda one: one.rank_at(-1), default=None)
            init = str(best.run.folder) if best else "?"
        config = study.make_config(variant, seed, value, init)
        if not self._options.ray:
            config = replace(config, columns_per_worker=2, replicas=1)
        data = self._data[variant.data]
        config = fit_images(config, load_manifest(data).side, data)  # as the run records it
        at = "" if value is None else f"-{study.grid[0]}{value}".replace("/", "_")
        name = f"{variant.name}{at}-{seed}"
        if config.store:  # a folder in it for each run
            config = replace(config, store=f"{config.store.rstrip('/')}/{name}")
        return StudyRun(
            name=name,
            config=config,
            data=data,
            out=self._options.out.resolve(),
        )


def find_data(out: Path) -> str:
    """Return the data set of the runs in a study's folder, as they have recorded it.

    Raises:
        UsageError: there is no run on the whole data set yet, or that has moved.
        StoreError: its store does not answer.
    """
    for run in sorted(path.parent for path in out.glob(f"*/{CONFIG}")):
        address = read_address(run)
        if address and not Path(address).is_relative_to(out.resolve()):  # no part of it
            return locate_dataset(run)[0]
    raise UsageError(f"{out} holds no run that says where its data set is; give --data")


def sort_stages(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Sort variants so that each comes in a later stage than the one it starts from."""
    level: dict[str, int] = {}
    for one in variants:
        level[one.name] = level[one.after] + 1 if one.after else 0
    return [
        [one for one in variants if level[one.name] == depth]
        for depth in range(max(level.values()) + 1)
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(StudyOptions, argv, "python -m cluster.experiments.study")
    if options.at_once < 0:
        raise UsageError(f"--at-once is {options.at_once}; give a number of runs, or 0")
    study = read_study(options.study)
    options = replace(options, data=options.data or find_data(options.out))
    ensure_writable(options.out, "folder of the study")
    with hint_resume(f"{options.out} keeps the runs"):
        counted, others = StudyMaker(options, study).make()
    found = results.summarize(study, counted, others)
    words = ["duet", "study", str(options.study), "--data", options.data]
    found["command"] = shlex.join([*words, "--ray"] if options.ray else words)
    if study.measure == "nets":
        averages = results.measure_averages(study, [one.run for one in counted])
        found |= averages | {"rows": found["rows"] + averages["rows"]}
    plot = options.out / results.PLOT
    draw_plot(study, counted, others, found, plot)
    text = results.write_results(study, found, options.out)
    out = sys.stderr if options.json else sys.stdout
    out.write(f"{text}\n-> {options.out / results.TABLE}, {plot}\n")
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
