"""Command: class probabilities of several networks averaged, and the errors of the average.

    python -m cluster.evaluate RUN --views 10 --save-probabilities     # for each RUN
    python -m cluster.experiments.ensemble RUN RUN ... [--weights 1 1 2 | --search] [--views 10]
    python -m cluster.experiments.ensemble RUN RUN RUN RUN RUN --sizes 1 3 5     # table 2

Paper, table 2: one network errs in 18.2 % of the images (top-5), the average of five in 16.4 %.
Prints each network and the average. `--search` searches weights on the images that are counted, as
the original's avg-valid.py did; that flatters them a little. `--sizes` prints a line for each
number of networks, a mean over the choices of runs: with equal weights, with weights searched so,
and with weights searched on the half of the images that is not counted.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cluster.checkpoint.storage import find_last_step
from cluster.cli.options import EnsembleOptions
from cluster.run.folder import read_store
from cluster.run.probabilities import SavedProbabilities
from model.metrics import count_errors, sum_metrics
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.units import cpu_count

PASSES = 5
GRID = tuple(step / 20 for step in range(21))
START = 0.5
KEPT_BYTES = 1 << 30
"""Most bytes of undecided images in memory; the rest is read again for each weight."""
CHUNK = 1 << 24
"""Probabilities, of all networks together, in memory at a time (64 MB)."""
MOST_COMBINATIONS = 10
"""Combinations of one size that are counted; the first ones, in the order of the runs."""
KINDS = ("equal", "searched", "held_out")
"""Kinds of weights: equal; searched on the images that are counted, as the original did; searched
on every other image and counted on those between, and the other way round."""
ERRORS = ("top1_error", "top5_error")
_ABSENT = -1.0
"""Probability of a padding class: below every other, whatever the weights."""


class Probabilities(NamedTuple):
    """Class probabilities of some images by all networks."""

    probabilities: Tensor
    """float32 [networks, n, classes]."""
    labels: Tensor
    """int64 [n]."""
    weights: Tensor
    """float32 [n], 0 for images that do not count."""


class Ensemble:
    """The probabilities of several runs, image by image.

    An image counts if it was sound for all of them.
    """

    def __init__(self, saved: Sequence[SavedProbabilities], weights: Tensor | None = None) -> None:
        """Check that the probabilities are of the same images.

        Args:
            saved: probabilities of each run.
            weights: float32 [N], 0 for more images that do not count.

        Raises:
            UsageError: they are of other images; names the runs and what differs.
        """
        self.saved, self.about = saved, saved[0].about
        self.networks = len(saved)
        self.weights = saved[0].weights * (1.0 if weights is None else weights)
        """float32 [N], 0 for images that do not count."""
        for other in saved[1:]:
            _check_same_images(saved[0], other)
            self.weights *= other.weights
        if not self.weights.any():
            raise UsageError("no image was sound for all runs; evaluate them anew")

    @property
    def samples(self) -> int:
        """Number of images that count."""
        return round(float(self.weights.sum()))

    def read_chunks(self, start: int = 0) -> Iterator[tuple[int, Probabilities]]:
        """Yield chunks of images from image `start` on, each with the number of the next image."""
        rows = max(1, CHUNK // (self.networks * len(self.about.classes)))
        for first in range(start, self.about.samples, rows):
            last = min(first + rows, self.about.samples)
            probabilities = torch.stack([one.rows(first, last) for one in self.saved])
            labels, weights = self.saved[0].labels[first:last], self.weights[first:last]
            yield last, Probabilities(probabilities, labels, weights)

    def measure_errors(self, weights: Sequence[float]) -> list[dict[str, float]]:
        """Return errors and loss of each network alone, then of their weighted average."""
        totals = torch.zeros(self.networks + 1, 4, dtype=torch.float64)
        for _, (probabilities, labels, counts) in self.read_chunks():
            answers: list[Tensor] = [*probabilities, combine(probabilities, weights)]
            totals += torch.stack([sum_metrics(answer, labels, counts) for answer in answers])
        return [
            {"top1_error": top1 / samples, "top5_error": top5 / samples, "loss": loss / samples}
            for loss, top1, top5, samples in totals.tolist()
        ]


def _check_same_images(first: SavedProbabilities, other: SavedProbabilities) -> None:
    """Refuse probabilities of other images or classes."""
    one, two = first.about, other.about
    if two.split != one.split:
        found = f"of split {two.split!r}, those of {first.run} of {one.split!r}"
    elif two.classes != one.classes:
        pairs = enumerate(zip(one.classes, two.classes, strict=False))
        differ = [f"number {i} is {b!r}, not {a!r}" for i, (a, b) in pairs if a != b]
        if len(one.classes) != len(two.classes):
            differ = [f"{len(two.classes)}, not {len(one.classes)}"]
        found = f"of other classes ({differ[0]}) than those of {first.run}"
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


def combine(probabilities: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted sum over networks of [networks, n, classes].

    The probabilities of a network of weight 0 do not matter, even if they are NaN.
    """
    total = torch.zeros_like(probabilities[0])
    for one, weight in zip(probabilities, weights, strict=True):
        if weight:
            total.add_(one, alpha=weight)
    return total


def search_weights(images: Ensemble, kept: int = KEPT_BYTES) -> tuple[float, ...]:
    """Return the weights of the best average that the search finds, one a network; the sum is 1.

    As the original's avg-valid.py (`find_coeffs`): all weights start at one half; one after the
    other is tried at 0, .05, ... 1 and takes the value with the fewest top-5 errors, if these are
    fewer than before; the search ends after five passes, or when a whole pass has changed nothing.
    Where it differs: between values with equal top-5 errors the top-1 errors decide; ties count by
    the rule of `model.metrics.count_errors`; and weights of 0 for all networks are no candidate.

    Args:
        images: probabilities; read once, and, as far as the undecided images exceed `kept`, again
            for each weight that is tried.
        kept: bytes.
    """
    undecided = UndecidedImages(images, kept)
    weights = [START] * images.networks
    best = undecided.count_errors([weights])[0]
    changed = 0  # the weight that was changed last
    for turn in range(PASSES * len(weights)):
        index = turn % len(weights)
        if changed == index and turn >= len(weights):
            break  # a whole pass ago
        tried = [[*weights[:index], value, *weights[index + 1 :]] for value in GRID]
        tried = [one for one in tried if sum(one) > 0]
        found = undecided.count_errors(tried)
        first = min(range(len(tried)), key=found.__getitem__)
        if found[first] < best:
            best, weights, changed = found[first], tried[first], index
    return tuple(weight / sum(weights) for weight in weights)


class UndecidedImages:
    """The images whose answer depends on the weights, with the classes that compete for it.

    A class can rank before the right one in some average only if it does in some network, and where
    five classes do in every network the image is lost. So the search needs few of the
    probabilities.
    """

    def __init__(self, images: Ensemble, kept: int) -> None:
        """Read all images once; at most `kept` bytes of the undecided ones stay in memory."""
        self._images = images
        self._blocks: list[Probabilities] = []
        self._rest: int | None = None
        start = size = 0
        for end, chunk in images.read_chunks():
            blocks = list(select_undecided(chunk))
            size += sum(4 * block.probabilities.numel() for block in blocks)
            if size > kept:
                self._rest = start
                break
            self._blocks += blocks
            start = end

    def count_errors(self, candidates: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        """Return top-5 and top-1 errors among these images with each candidate's weights."""
        sums = torch.zeros(len(candidates), 2, dtype=torch.float64)
        for block in self._read():
            for row, weights in zip(sums, candidates, strict=True):
                average = combine(block.probabilities, weights)
                top1, top5 = count_errors(average, block.labels, block.weights)
                row += torch.stack((top5, top1))
        return [(top5, top1) for top5, top1 in sums.tolist()]

    def _read(self) -> Iterator[Probabilities]:
        yield from self._blocks
        if self._rest is not None:
            for _, chunk in self._images.read_chunks(self._rest):
                yield from select_undecided(chunk)


def select_undecided(chunk: Probabilities) -> Iterator[Probabilities]:
    """Yield the images of a chunk that depend on the weights, in blocks of about equal width.

    In a block the right class is the first one; besides it there are those that some network
    ranks before it or level with it. A class that every network ranks behind could at most be level
    in an average whose rounding hides the difference, which a search would not notice.
    """
    places = min(5, chunk.probabilities.shape[2])
    index = chunk.labels[None, :, None].expand(len(chunk.probabilities), -1, 1)
    own = chunk.probabilities.gather(2, index)
    lost = (chunk.probabilities > own).all(0).sum(1) >= places
    near = ((chunk.probabilities >= own) | chunk.probabilities.isnan()).any(0)
    width = near.sum(1)
    open_ = (width > 1) & ~lost & (chunk.weights > 0)
    rank = near.to(torch.int8)
    rank.scatter_(1, chunk.labels[:, None], 2)
    low, widest = 1, int(width[open_].max()) if open_.any() else 0
    while low < widest:
        high = min(2 * low, widest)
        rows = (open_ & (width > low) & (width <= high)).nonzero()[:, 0]
        if len(rows):
            yield _cut_block(chunk, rows, rank[rows], high)
        low = high


def _cut_block(chunk: Probabilities, rows: Tensor, rank: Tensor, width: int) -> Probabilities:
    """Cut out images `rows` and for each the `width` classes of the highest `rank` [n, classes].

    Rank 2 is the right class, 1 a class that competes with it, 0 any other.
    """
    ranks, classes = rank.topk(width, dim=1)
    index = classes[None].expand(len(chunk.probabilities), -1, -1)
    found = chunk.probabilities[:, rows].gather(2, index)
    found = found.masked_fill(ranks[None] == 0, _ABSENT)
    return Probabilities(found, torch.zeros(len(rows), dtype=torch.int64), chunk.weights[rows])


def make_table(whole: Ensemble, sizes: Sequence[int]) -> dict[str, Any]:
    """Count averages of some of the runs: table 2 of the paper.

    Args:
        whole: probabilities of all runs.
        sizes: number of runs that are averaged, for each line.

    Returns:
        {"views", "split", "samples", "runs", "sizes": a list of {"nets", "combinations", and for
        each of `KINDS` its "top1_error" and "top5_error", means over the combinations, with "_sd",
        the standard deviation (None for one)}}. Errors are fractions.
    """
    return {
        "views": whole.about.views,
        "split": whole.about.split,
        "samples": whole.samples,
        "runs": [str(one.run) for one in whole.saved],
        "sizes": [_make_line(whole, size) for size in sizes],
    }


def _make_line(whole: Ensemble, size: int) -> dict[str, Any]:
    some = list(itertools.islice(itertools.combinations(whole.saved, size), MOST_COMBINATIONS))
    found = [_count_kinds(Ensemble(one, whole.weights)) for one in some]
    line: dict[str, Any] = {"nets": size, "combinations": len(some)}
    for kind in KINDS:
        line[kind] = {}
        for name in ERRORS:
            values = [one[kind][name] for one in found]
            line[kind][name] = statistics.fmean(values)
            line[kind][f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return line


def _count_kinds(ensemble: Ensemble) -> dict[str, dict[str, float]]:
    """Errors of one combination with each kind of weights."""
    equal = ensemble.measure_errors((1 / ensemble.networks,) * ensemble.networks)[-1]
    if ensemble.networks == 1:
        return dict.fromkeys(KINDS, equal)
    return {
        "equal": equal,
        "searched": ensemble.measure_errors(search_weights(ensemble))[-1],
        "held_out": _count_held_out(ensemble),
    }


def _count_held_out(ensemble: Ensemble) -> dict[str, float]:
    """Errors with weights searched on the images that are not counted."""
    odd = (torch.arange(len(ensemble.weights)) % 2).to(ensemble.weights.dtype)
    halves = [Ensemble(ensemble.saved, ensemble.weights * part) for part in (odd, 1 - odd)]
    totals = dict.fromkeys(ERRORS, 0.0)
    for fitted, tested in (halves, reversed(halves)):
        errors = tested.measure_errors(search_weights(fitted))[-1]
        share = float(tested.weights.sum() / ensemble.weights.sum())
        for name in ERRORS:
            totals[name] += share * errors[name]
    return totals


def average_runs(options: EnsembleOptions) -> dict[str, Any]:
    """Return the object that --json prints; errors are fractions.

    Raises:
        UsageError: a run has no probabilities, or those of other data.
        DataError: probabilities cannot be read.
    """
    ensemble = Ensemble([SavedProbabilities(path, options.views) for path in options.runs])
    for saved in ensemble.saved:
        if (step := find_last_step(saved.run, read_store(saved.run))) > saved.about.step:
            sys.stderr.write(
                f"warning: the probabilities of {saved.run} are those of step {saved.about.step}; "
                f"it has come to step {step} since\n"
            )
    if options.sizes:
        return make_table(ensemble, options.sizes)
    if options.search:
        weights = search_weights(ensemble)
    else:
        given = options.weights or (1,) * ensemble.networks
        weights = tuple(weight / sum(given) for weight in given)
    *each, together = ensemble.measure_errors(weights)
    runs = [
        {"run": str(saved.run), "step": saved.about.step, "weight": weight, **errors}
        for saved, weight, errors in zip(ensemble.saved, weights, each, strict=True)
    ]
    return {
        "views": ensemble.about.views,
        "split": ensemble.about.split,
        "samples": ensemble.samples,
        "searched": options.search,
        "runs": runs,
        "average": together,
    }


def _check(options: EnsembleOptions) -> None:
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
    given = " ".join(f"{weight:g}" for weight in weights)
    if weights and len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} runs; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise UsageError(f"--weights {given}: each must be finite, 0 or above")
    if weights and not sum(weights) > 0:
        raise UsageError(f"--weights {given}: one at least must be above 0")
    if options.out is not None:
        if options.out.is_dir():
            raise UsageError(f"--out {options.out} is a folder; name a file")
        ensure_writable(options.out.parent, "the folder of --out")


def _format_average(result: dict[str, Any]) -> Iterator[str]:
    yield _format_images(result)
    yield "   top-1     top-5     loss  weight"
    for one in result["runs"]:
        yield f"{_format_errors(one)}  {one['weight']:6.3f}  {one['run']}, step {one['step']}"
    found = " (weights searched on these images)" if result["searched"] else ""
    yield f"{_format_errors(result['average'])}          average{found}"


def _format_table(result: dict[str, Any]) -> Iterator[str]:
    yield f"{_format_images(result)}; top-1 / top-5 error"
    yield "  nets  equal weights    searched on these  searched on the other half"
    for one in result["sizes"]:
        cells = [
            f"{one[kind]['top1_error']:7.2%} / {one[kind]['top5_error']:6.2%}" for kind in KINDS
        ]
        ways = f"  (mean of {one['combinations']})" if one["combinations"] > 1 else ""
        yield f"{one['nets']:6}  {cells[0]}  {cells[1]}  {cells[2]}{ways}"


def _format_images(result: dict[str, Any]) -> str:
    views = "centre view" if result["views"] == 1 else "ten views"
    return f"{result['split']}, {result['samples']:,} images, {views}"


def _format_errors(found: dict[str, float]) -> str:
    return f"{found['top1_error']:8.2%}  {found['top5_error']:8.2%}  {found['loss']:7.4f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(EnsembleOptions, argv, "python -m cluster.experiments.ensemble")
    _check(options)
    torch.set_num_threads(cpu_count())
    result = average_runs(options)
    if options.out is not None:
        with atomic_write(options.out) as file:
            file.write((json.dumps(result) + "\n").encode())
    out = sys.stderr if options.json else sys.stdout
    lines = _format_table(result) if options.sizes else _format_average(result)
    out.write("\n".join(lines) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
