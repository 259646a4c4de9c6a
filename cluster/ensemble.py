"""Several networks together: their class probabilities averaged, and the errors of that.

    python -m cluster.evaluate RUN --data DATA --views 10 --save-probabilities      # for each RUN
    python -m cluster.ensemble RUN RUN ... [--weights 1 1 2 | --search] [--views 10] [--json]

Paper, table 2: one network errs in 18.2 % of the pictures (top-5), the average of five in 16.4 %.
Prints each network and the average; `--search` looks for weights as the original's avg-valid.py
did, on the pictures that are counted: that flatters them a little.
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
from torch import Tensor

from cluster.checkpoint_places import reached
from cluster.probabilities import About, Saved
from cluster.run_folder import store_of
from cluster.weights import Chunk, search, weighted
from model.evaluate import sums
from pipeline.errors import UsageError, run
from pipeline.files import sealed, writable_folder

CHUNK = 1 << 24
"""Probabilities, of all networks together, in memory at a time (64 MB)."""


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
    out: Path | None = None
    """File for what --json prints; default: none."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = tyro.cli(Ensemble, args=argv, prog="python -m cluster.ensemble")
    _check(options)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    result = average(options)
    if options.out is not None:
        with sealed(options.out) as file:
            file.write((json.dumps(result) + "\n").encode())
    out = sys.stderr if options.json else sys.stdout
    out.write("\n".join(_lines(result)) + "\n")
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
    count = nets.networks
    weights: tuple[float, ...] = (1 / count,) * count
    if options.search:
        weights = search(nets)
    elif options.weights:
        weights = tuple(weight / sum(options.weights) for weight in options.weights)
    *each, together = _counted(nets, weights)
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


class Together:
    """The probabilities of several runs, picture by picture.

    A picture counts if it was sound for all of them.
    """

    def __init__(self, saved: Sequence[Saved]) -> None:
        """Make sure that they are of the same pictures.

        Raises:
            UsageError: they are not; names the runs and what differs.
        """
        self.saved = saved
        self.networks = len(saved)
        self.weights = saved[0].weights.clone()
        """float32 [N], 0 for pictures that do not count."""
        for other in saved[1:]:
            _same(saved[0], other)
            self.weights *= other.weights
        if not self.weights.any():
            raise UsageError("no picture was sound for all runs; evaluate them anew")

    def chunks(self, start: int = 0) -> Iterator[tuple[int, Chunk]]:
        """Yield what comes after each chunk, and the chunk, from picture `start` on."""
        about = self.saved[0].about
        rows = max(1, CHUNK // (self.networks * len(about.classes)))
        for first in range(start, about.samples, rows):
            last = min(first + rows, about.samples)
            probabilities = torch.stack([one.rows(first, last) for one in self.saved])
            labels, weights = self.saved[0].labels[first:last], self.weights[first:last]
            yield last, Chunk(probabilities, labels, weights)


def _counted(nets: Together, weights: Sequence[float]) -> list[dict[str, float]]:
    """Return errors and loss of each network alone, then of their average."""
    totals = torch.zeros(nets.networks + 1, 4, dtype=torch.float64)
    for _, (probabilities, labels, counts) in nets.chunks():
        answers: list[Tensor] = [*probabilities, weighted(probabilities, weights)]
        totals += torch.stack([sums(answer, labels, counts) for answer in answers])
    return [
        {"top1_error": top1 / samples, "top5_error": top5 / samples, "loss": loss / samples}
        for loss, top1, top5, samples in totals.tolist()
    ]


def _check(options: Ensemble) -> None:
    """Refuse options that do not go together."""
    count, weights = len(options.runs), options.weights
    if count < 2:
        raise UsageError(f"{count} runs given; name at least two to average")
    if weights and options.search:
        raise UsageError("--weights says the weights, --search looks for them; give one of the two")
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


def _same(first: Saved, other: Saved) -> None:
    """Refuse probabilities of other pictures or classes."""
    one, two = first.about, other.about
    if two.split != one.split:
        found = f"of split {two.split!r}, those of {first.run} of {one.split!r}"
    elif two.classes != one.classes:
        found = f"of other classes ({_difference(one, two)}) than those of {first.run}"
    elif two.data_sha256 != one.data_sha256 or not torch.equal(first.labels, other.labels):
        found = (
            f"of another data set (manifest {two.data_sha256[:12]}) than those of {first.run} "
            f"({one.data_sha256[:12]})"
        )
    else:
        return
    raise UsageError(
        f"the probabilities of {other.run} are {found}; evaluate both on one with cluster.evaluate "
        "--save-probabilities"
    )


def _difference(one: About, two: About) -> str:
    if len(one.classes) != len(two.classes):
        return f"{len(two.classes)}, not {len(one.classes)}"
    names = zip(one.classes, two.classes, strict=True)
    place, (a, b) = next((i, pair) for i, pair in enumerate(names) if pair[0] != pair[1])
    return f"number {place} is {b!r}, not {a!r}"


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
