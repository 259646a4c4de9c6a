"""Several networks together: their class probabilities averaged, and the errors of that.

    python -m cluster.evaluate RUN --data DATA --views 10 --save-probabilities      # for each RUN
    python -m cluster.experiments.ensemble RUN RUN ... [--weights 1 1 2 | --search] [--views 10] [--json]
    python -m cluster.experiments.ensemble RUN RUN RUN RUN RUN --sizes 1 3 5        # the paper's table 2

Paper, table 2: one network errs in 18.2 % of the pictures (top-5), the average of five in 16.4 %.
Prints each network and the average; `--search` looks for weights as the original's avg-valid.py
did, on the pictures that are counted: that flatters them a little. `--sizes` has a line for each
number of networks, a mean over which of the runs they are, with equal weights, with weights
searched so, and with weights searched on the half of the pictures that is not counted.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cluster.checkpoint.storage import reached
from cluster.ensemble_table import as_lines, table_of
from cluster.run.folder import store_of
from cluster.run.probabilities import Saved
from cluster.together import Together, counted
from cluster.weights import search
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import sealed, writable_folder


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Average the saved probabilities of runs, and count the errors of the average."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of runs; cluster.evaluate --save-probabilities has been there."""
    views: Literal[1, 10] = 10
    """Which of their probabilities: of the centre view, or of ten."""
    weights: tuple[float, ...] = ()
    """A weight for each run; default: all equal."""
    search: bool = False
    """Look for the weights with the fewest top-5 errors on these pictures."""
    sizes: tuple[int, ...] = ()
    """Instead: a table of averages of so many of the runs."""
    out: Path | None = None
    """File for what --json prints; default: none."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = tyro.cli(Ensemble, args=argv, prog="python -m cluster.experiments.ensemble")
    _check(options)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = average(options)
    if options.out is not None:
        with sealed(options.out) as file:
            file.write((json.dumps(result) + "\n").encode())
    out = sys.stderr if options.json else sys.stdout
    lines = as_lines(result) if options.sizes else _lines(result)
    out.write("\n".join(lines) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


def average(options: Ensemble) -> dict[str, Any]:
    """Return what --json prints; errors are fractions.

    Raises:
        UsageError: a run without probabilities, or with those of other data.
        DataError: probabilities that cannot be read.
    """
    nets = Together([Saved(path, options.views) for path in options.runs])
    for saved in nets.saved:
        _tell_old(saved)
    if options.sizes:
        return table_of(nets.saved, options.sizes)
    count = nets.networks
    weights: tuple[float, ...] = (1 / count,) * count
    if options.search:
        weights = search(nets)
    elif options.weights:
        weights = tuple(weight / sum(options.weights) for weight in options.weights)
    *each, together = counted(nets, weights)
    runs = [
        {"run": str(saved.run), "step": saved.about.step, "weight": weight, **errors}
        for saved, weight, errors in zip(nets.saved, weights, each, strict=True)
    ]
    about = nets.saved[0].about
    return {
        "views": about.views,
        "split": about.split,
        "samples": round(float(nets.weights.sum())),
        "searched": options.search,
        "runs": runs,
        "average": together,
    }


def _check(options: Ensemble) -> None:
    """Refuse options that do not go together."""
    count, weights = len(options.runs), options.weights
    if count < 2:
        raise UsageError(f"{count} runs given; name at least two to average")
    if weights and options.search:
        raise UsageError("--weights says the weights, --search looks for them; give one of the two")
    if options.sizes and (weights or options.search):
        raise UsageError("--sizes counts equal and searched weights alike; leave out the others")
    if wrong := [size for size in options.sizes if not 1 <= size <= count]:
        raise UsageError(f"--sizes has {wrong[0]}; there are {count} runs")
    if weights and len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} runs; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise UsageError(f"--weights {_words(weights)}: each must be finite, 0 or above")
    if weights and not sum(weights) > 0:
        raise UsageError(f"--weights {_words(weights)}: one at least must be above 0")
    if options.out is not None:
        if options.out.is_dir():
            raise UsageError(f"--out {options.out} is a folder; name a file")
        writable_folder(options.out.parent, "the folder of --out")


def _words(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


def _tell_old(saved: Saved) -> None:
    """Warn of probabilities that are older than the network."""
    if (step := reached(saved.run, store_of(saved.run))) > saved.about.step:
        sys.stderr.write(
            f"warning: the probabilities of {saved.run} are those of step {saved.about.step}; "
            f"it has come to step {step} since\n"
        )


def _lines(result: dict[str, Any]) -> Iterator[str]:
    views = "centre view" if result["views"] == 1 else "ten views"
    yield f"{result['split']}, {result['samples']:,} pictures, {views}"
    yield "   top-1     top-5     loss  weight"
    for one in result["runs"]:
        yield f"{_numbers(one)}  {one['weight']:6.3f}  {one['run']}, step {one['step']}"
    found = " (weights searched on these pictures)" if result["searched"] else ""
    yield f"{_numbers(result['average'])}          average{found}"


def _numbers(found: dict[str, float]) -> str:
    return f"{found['top1_error']:8.2%}  {found['top5_error']:8.2%}  {found['loss']:7.4f}"


if __name__ == "__main__":
    run(main)
