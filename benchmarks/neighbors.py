"""Exact and Hamming search of `cluster.experiments.neighbors` beside faiss's, in turn.

    pip install -e ".[faiss]"
    python benchmarks/neighbors.py [--base 50000] [--queries 1000] [--units 4096] [--rounds 3]

Rows are random: sparse and not negative, as after a ReLU. Prints the median of the rounds in
queries a second, the peak memory of the process, and the share of equal answers.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from harness.report import Figure, Options, Report, Table, format_range, start
from harness.rounds import measure_seconds, take_turns

from cluster.experiments.neighbors.search import HammingIndex, SearchBase, find_nearest
from pipeline.tools.units import parse_size


@dataclass(frozen=True, kw_only=True)
class NeighborOptions(Options):
    """Time searches."""

    base: int = 50_000
    queries: int = 1000
    units: int = 4096
    k: int = 10
    bits: int = 128
    rounds: int = 3
    memory: str = "1GB"
    """Memory for our exact search, such as 1GB."""


def draw_rows(count: int, units: int, seed: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Random rows that share 64 directions, float16 [count, units]."""
    directions = np.random.default_rng(0).normal(size=(64, units)).astype(np.float32)
    rng = np.random.default_rng([seed, 1])
    parts = [
        np.maximum(rng.normal(size=(n, 64)).astype(np.float32) @ directions, 0).astype(np.float16)
        for n in [4096] * (count // 4096) + [count % 4096]
    ]
    return np.concatenate(parts)


def report(options: NeighborOptions) -> Report:
    """Measure all searches, and compare their answers."""
    rows, queries = (
        draw_rows(n, options.units, s) for s, n in enumerate((options.base, options.queries))
    )
    base = SearchBase(rows, np.ones(len(rows), bool))
    flat = faiss.IndexFlatL2(options.units)
    flat.add(rows.astype(np.float32))
    turn = np.random.default_rng(2).normal(size=(options.units, options.bits)).astype(np.float32)
    codes, short = (
        np.packbits(part.astype(np.float32) @ turn > 0, axis=1) for part in (rows, queries)
    )
    ours, theirs = HammingIndex(codes), faiss.IndexBinaryFlat(options.bits)
    theirs.add(codes)
    memory = parse_size(options.memory)
    ways: dict[str, Callable[[], Any]] = {
        "exact, ours": lambda: find_nearest(queries, base, options.k, memory=memory).ids,
        "exact, faiss": lambda: flat.search(queries.astype(np.float32), options.k)[1],
        "Hamming, ours": lambda: ours.find_nearest(short, options.k)[1],
        "Hamming, faiss": lambda: theirs.search(short, options.k)[0],
    }
    found: dict[str, Any] = {}

    def measure_rate(name: str) -> float:
        return len(queries) / measure_seconds(lambda: found.update({name: ways[name]()}))

    rates = take_turns({name: partial(measure_rate, name) for name in ways}, options.rounds)
    notes = [
        f"{kind}: {(found[f'{kind}, ours'] == found[f'{kind}, faiss']).mean():.4%} of the answers "
        "equal."
        for kind in ("exact", "Hamming")
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    notes.append(f"Peak memory of the process, both sides' data in it: {peak / 1e9:.2f} GB.")
    title = (
        f"{options.queries:,} queries among {options.base:,} of {options.units} float16, k "
        f"{options.k}; {torch.get_num_threads()} threads, faiss {faiss.__version__}"
    )
    cells = [
        (name, f"{statistics.median(rate):,.0f}", format_range(rate))
        for name, rate in rates.items()
    ]
    return Report(
        tables={"neighbors": Table(("search", "queries/s", "rounds"), cells, title, notes)},
        figures={name: Figure(rate, "queries/s") for name, rate in rates.items()},
    )


if __name__ == "__main__":
    start(NeighborOptions, report, __doc__)
