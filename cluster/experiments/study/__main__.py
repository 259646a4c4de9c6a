"""A study from its file to its table and plot; what is there already is not made again.

Order of things: the parts of the data; runs that others start from; with a grid, for the first
seed, every variant with every value of the grid's setting, of which each variant keeps the one with
the best number (the fewest images, the lowest error; a run that does not come to it is behind all
that do, and the lower its last training error the better); then the other seeds, with that value.

`python -m cluster.experiments.study STUDY.toml --data DATA --out OUT`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cluster.experiments.study import results
from cluster.experiments.study.config import WHOLE, Study, Variant, read
from cluster.experiments.study.plot import draw
from cluster.experiments.study.results import Result, result, showing, shown, train_error
from cluster.experiments.study.runner import Run, RunPool, slots, visible_gpus
from cluster.experiments.study.subsets import cut_out
from pipeline.tools.errors import UsageError
from pipeline.tools.errors import run as run_command
from pipeline.tools.files import ensure_writable
from pipeline.tools.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the runs of a study, and tell what they came to; the same command again goes on."""

    study: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """Study file, or the name of one in cluster/configs/studies, such as small/figure1."""
    data: str
    """Data set (folder or address) with train and val."""
    out: Path
    """Folder of the runs, study.json, study.md and study.png."""
    at_once: int = 0
    """Runs at a time, which share cores and GPUs; 0: one for each GPU, or for each core."""
    ray: bool = False
    """Make each run with cluster.train, one after the other: with columns and replicas as the
    configs say. Otherwise each is one process with both columns."""
    json: bool = False
    """Print study.json to stdout, everything else to stderr."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run that is there, with its number."""

    variant: Variant
    run: Run
    result: Result


class Maker:
    """Makes the runs of a study."""

    def __init__(self, options: Options, study: Study) -> None:
        """Prepare; cuts out the parts of the data."""
        self._options, self._study = options, study
        out = options.out
        self._data = {WHOLE: options.data} | {
            name: str(cut_out(options.data, part, out / "data" / name))
            for name, part in study.parts.items()
            if name in {one.data for one in study.variants}
        }
        gpus = [] if options.ray else visible_gpus()
        self._room = slots(1 if options.ray else options.at_once, gpus)

    def make(self) -> tuple[list[Made], list[Made]]:
        """Make all runs.

        Returns:
            those that count, by variant and seed; and those of the grid that were not best.
        """
        study = self._study
        grid = bool(study.grid[1])
        first = study.seeds[: 1 if grid else None]  # of a grid one seed has all values
        rest = study.seeds[len(first) :]
        total = 0
        for one in study.variants:
            each = [self._run(one, 0, value, {}).total for value in _values(one)]
            total += len(first) * sum(each) + len(rest) * each[0]
        tried: Found = {}
        with Progress(study.name, total=total, unit="img") as progress:
            for stage in stages(study.variants):
                wanted = [(one, _values(one)) for one in stage]
                tried |= self._all(wanted, first, tried, progress)
            kept = {name: self._best(made) for name, made in tried.items()}
            for stage in stages(study.variants) if rest else ():
                best = [(one, (self._value(kept[one.name][0]),)) for one in stage]
                for name, made in self._all(best, rest, kept, progress).items():
                    kept[name] += made
        others = [
            one for made in tried.values() for one in made if one not in kept[one.variant.name]
        ]
        count = [one for variant in study.shown for one in kept[variant.name]]
        return count, [one for one in others if not one.variant.hidden]

    def _best(self, made: list[Made]) -> list[Made]:
        """Of a grid the best run; all of them where there is none."""
        return [min(made, key=lambda one: one.result.rank)] if self._study.grid[1] else made

    def _value(self, made: Made) -> Any:
        return made.run.config.to_settings()[self._study.grid[0]] if self._study.grid[1] else None

    def _all(
        self, wanted: Sequence[tuple[Variant, Sequence[Any]]], seeds: Sequence[int],
        before: Found, progress: Progress,
    ) -> Found:  # fmt: skip
        """Make some variants with some values and seeds, side by side."""
        planned = [
            (variant, self._run(variant, seed, value, before))
            for seed in seeds
            for variant, values in wanted
            for value in values
        ]
        for _, run in planned:
            run.check()
        undone = [run for _, run in planned if not self._done(run)]
        progress.skip(sum(run.total for _, run in planned) - sum(map(_left, undone)))
        module = "cluster.train" if self._options.ray else "cluster.experiments.study.runner"
        RunPool(self._room, module, progress).make(undone, lambda run: showing(self._study, run))
        progress.skip(sum(map(_left, undone)))  # of those that ended early
        made: Found = {variant.name: [] for variant, _ in wanted}
        for variant, run in planned:
            made[variant.name].append(self._look(variant, run))
        return made

    def _done(self, run: Run) -> bool:
        return run.diverged or run.complete or shown(self._study, run)

    def _look(self, variant: Variant, run: Run) -> Made:
        errors = {}
        if self._study.measure == "gap" and not run.diverged:
            errors["train_error"] = train_error(run)
        return Made(
            variant=variant, run=run, result=result(self._study, variant.name, run, **errors)
        )

    def _run(
        self, variant: Variant, seed: int, value: Any, before: dict[str, list[Made]]
    ) -> Run:  # fmt: skip
        study = self._study
        init = ""
        if variant.after:
            made = before.get(variant.after, [])
            same = [one for one in made if one.run.config.seed == seed]
            init = str(min(same, key=lambda one: one.result.rank).run.folder) if same else "?"
        config = study.config(variant, seed, value, init)
        if not self._options.ray:
            config = replace(config, columns_per_worker=2, replicas=1)
        at = "" if value is None else f"-{study.grid[0]}{value}".replace("/", "_")
        return Run(
            name=f"{variant.name}{at}-{seed}",
            config=config,
            data=self._data[variant.data],
            out=self._options.out.resolve(),
        )


Found = dict[str, list[Made]]
"""Runs by the name of their variant."""


def _values(variant: Variant) -> tuple[Any, ...]:
    """Of the grid's setting; (None,) without a grid."""
    return variant.values or (None,)


def _left(run: Run) -> int:
    """Images it has still to see."""
    return max(0, run.total - run.position)


def stages(variants: Sequence[Variant]) -> list[list[Variant]]:
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
    options = tyro.cli(Options, args=argv, prog="python -m cluster.experiments.study")
    if options.at_once < 0:
        raise UsageError(f"--at-once is {options.at_once}; give a number of runs, or 0")
    study = read(options.study)
    ensure_writable(options.out, "folder of the study")
    made, others = Maker(options, study).make()
    runs = [one.run for one in made]
    found = results.summary(
        study, [one.result for one in made], [one.result for one in others], runs
    )
    if study.measure == "nets":
        averaged = results.measured(study, runs)
        found |= averaged | {"rows": found["rows"] + averaged["rows"]}
    draw(study, [(one.variant.name, one.run) for one in made], found, options.out / results.PLOT)
    text = results.write(study, found, options.out)
    out = sys.stderr if options.json else sys.stdout
    out.write(f"{text}\n-> {options.out / results.TABLE}, {options.out / results.PLOT}\n")
    if options.json:
        sys.stdout.write(results.as_json(found))
    return 0


if __name__ == "__main__":
    run_command(main)
