"""Our stream beside DALI's own WebDataset reader: same shards, same graph, in turn in one run.

    python benchmarks/stream.py DATA [--device cpu|gpu] [--rounds 5]

Prints the median rate of each and the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.errors import run
from pipeline.throughput import Throughput, measure


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Measure both readers in turn."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of the data set."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where pictures are decoded."""
    rounds: int = 5
    """How often each reader has its turn."""


def main() -> None:
    """Let the readers take turns, then print the medians."""
    options = tyro.cli(Comparison, description=__doc__)
    rates: dict[str, list[float]] = {"stream": [], "native": []}
    for _ in range(options.rounds):
        for reader, found in rates.items():
            setup = Throughput(
                data=options.data,
                device=options.device,
                reader=reader,  # type: ignore[arg-type]
                windows=3,
            )
            found.append(statistics.median(measure(setup)))
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    rows = [(reader, "8,.0f", found) for reader, found in rates.items()]
    for name, form, found in [*rows, ("ratio", "8.3f", ratios)]:
        median, low, high = (f(found) for f in (statistics.median, min, max))
        print(f"{name:8} {median:{form}}  ({low:{form}} to {high:{form}})")


if __name__ == "__main__":
    run(main)
