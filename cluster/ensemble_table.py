"""The table of the paper's form: errors of one network, of three, of five."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cluster.run.probabilities import Saved
from cluster.together import Together, counted
from cluster.weights import search

MOST = 10
"""Combinations of one size that are counted; the first ones, in the order of the runs."""
KINDS = ("equal", "searched", "held_out")
"""Equal weights; searched on the pictures that are counted, as the original did; and searched on
every other picture, counted on those between, and the other way round."""
ERRORS = ("top1_error", "top5_error")


def table_of(saved: Sequence[Saved], sizes: Sequence[int]) -> dict[str, Any]:
    """Count averages of some of the runs.

    Args:
        saved: of all runs.
        sizes: how many of them are averaged, for each line.

    Returns:
        {"views", "split", "samples", "runs", "sizes": a list of {"nets", "combinations", and for
        each of `KINDS` its "top1_error" and "top5_error", means over the combinations, with "_sd",
        the standard deviation (None for one)}}. Errors are fractions.

    Raises:
        UsageError: the runs do not go together.
    """
    about = saved[0].about
    whole = Together(saved)
    return {
        "views": about.views,
        "split": about.split,
        "samples": round(float(whole.weights.sum())),
        "runs": [str(one.run) for one in saved],
        "sizes": [_line(saved, size, whole) for size in sizes],
    }


def _line(saved: Sequence[Saved], size: int, whole: Together) -> dict[str, Any]:
    some = list(itertools.islice(itertools.combinations(saved, size), MOST))
    found = [_errors(Together(one, whole.weights)) for one in some]
    line: dict[str, Any] = {"nets": size, "combinations": len(some)}
    for kind in KINDS:
        line[kind] = {}
        for name in ERRORS:
            values = [one[kind][name] for one in found]
            line[kind][name] = statistics.fmean(values)
            line[kind][f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return line


def _errors(nets: Together) -> dict[str, dict[str, float]]:
    """Errors of one combination with each kind of weights."""
    equal = counted(nets, (1 / nets.networks,) * nets.networks)[-1]
    if nets.networks == 1:
        return dict.fromkeys(KINDS, equal)
    return {
        "equal": equal,
        "searched": counted(nets, search(nets))[-1],
        "held_out": _held_out(nets),
    }


def _held_out(nets: Together) -> dict[str, float]:
    """Errors with weights searched on the pictures that are not counted."""
    odd = (torch.arange(len(nets.weights)) % 2).to(nets.weights.dtype)
    halves = [Together(nets.saved, nets.weights * part) for part in (odd, 1 - odd)]
    totals = dict.fromkeys(ERRORS, 0.0)
    for fitted, tested in (halves, reversed(halves)):
        errors = counted(tested, search(fitted))[-1]
        share = float(tested.weights.sum() / nets.weights.sum())
        for name in ERRORS:
            totals[name] += share * errors[name]
    return totals


def as_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the table in words."""
    views = "centre view" if result["views"] == 1 else "ten views"
    yield f"{result['split']}, {result['samples']:,} pictures, {views}; top-1 / top-5 error"
    yield "  nets  equal weights    searched on these  searched on the other half"
    for one in result["sizes"]:
        cells = [
            f"{one[kind]['top1_error']:7.2%} / {one[kind]['top5_error']:6.2%}" for kind in KINDS
        ]
        ways = f"  (mean of {one['combinations']})" if one["combinations"] > 1 else ""
        yield f"{one['nets']:6}  {cells[0]}  {cells[1]}  {cells[2]}{ways}"
