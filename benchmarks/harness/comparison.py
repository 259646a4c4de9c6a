"""Comparison of two runs of a benchmark: changes beyond noise.

The rule is that of `duet throughput --compare`: a figure has changed if the medians of the two runs
differ by more than 3 standard errors, those of both together, and by more than 3 %. The standard
error of a median comes from the rounds within a run (`pipeline.throughput.clock.Rate`). A figure
with fewer than 3 rounds has no known spread and is never called changed; nor is one that is not a
ratio within rounds (unit `x`) where either machine was busy. Runs with other settings, other data
or on another machine are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.report import Figure, describe_load
from pipeline.throughput.clock import SURE
from pipeline.throughput.report import LEAST, RateComparison

FEWEST = 3
"""Fewest rounds whose spread says something."""
SAME_MACHINE = ("cpu", "cores", "features")
"""Facts of a machine that must agree."""


@dataclass(frozen=True)
class Change:
    """A figure in two runs."""

    figure: RateComparison
    unit: str
    verdict: str
    """`better`, `worse`, `same`, or why it cannot be told."""

    @property
    def is_change(self) -> bool:
        """True if it changed beyond noise."""
        return self.verdict in ("better", "worse")

    def __str__(self) -> str:
        one = self.figure
        unit = "x" if self.unit == "x" else f" {self.unit}"
        return (
            f"{one.name}: {one.before:.4g}{unit} -> {one.after:.4g}{unit} ({one.ratio - 1:+.1%}, "
            f"noise {one.noise:.1%}): {self.verdict}"
        )


def list_obstacles(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing in which two runs differ so that they cannot be compared."""
    found = []
    for part, names in (("settings", new["settings"]), ("machine", SAME_MACHINE)):
        before = old.get(part)
        if not isinstance(before, dict):
            return ["the last results were carried over from a page, without rounds"]
        found += [
            f"{name}: {before.get(name)} -> {new[part][name]}"
            for name in names
            if before.get(name) != new[part][name]
        ]
    return found


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Yield the figures that both of two comparable files of results have."""
    is_busy = any(describe_load(found["machine"]) for found in (old, new))
    for name, row in new["figures"].items():
        if name not in old["figures"]:
            continue
        before, after = (Figure(**found["figures"][name]) for found in (old, new))
        if not all(before.rounds) or not all(after.rounds):
            continue  # a ratio to nothing
        noise = max(LEAST, SURE * math.hypot(before.rate.error, after.rate.error))
        one = RateComparison(
            name=name, before=before.rate.median, after=after.rate.median, noise=noise
        )
        if min(len(before.rounds), len(after.rounds)) < FEWEST:
            verdict = f"cannot be told from fewer than {FEWEST} rounds"
        elif one.verdict == "same":
            verdict = "same"
        elif is_busy and row["unit"] != "x":
            verdict = "cannot be told on a busy machine"
        else:
            verdict = "better" if (one.ratio > 1) == (after.better == "higher") else "worse"
        yield Change(one, row["unit"], verdict)
