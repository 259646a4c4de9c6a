"""Command: nearest neighbors in the features of a trained network, figure 4 (right) of the paper.

    python -m cluster.experiments.neighbors RUN [-k 6] [--split val] [--base-split train]

Passes every image of both splits through the network once and keeps its fc7 features (4096
numbers at width 1) in RUN/neighbours; a call that was killed resumes, and a later one uses what is
there. Finds the exact k nearest base images of every query by squared L2 distance, and writes into
RUN/neighbours/

    summary.json      precision at k, how well distances tell classes apart, rates
    nearest.npz       queries, ids, distances: of every query
    sheet.png         some queries and their neighbors
    distances.svg     distances within and across classes
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.cli.options import NeighborsOptions
from cluster.config import read_run_config
from cluster.experiments.neighbors.extract import make_features
from cluster.experiments.neighbors.features import (
    FOLDER,
    Features,
    FeatureSource,
    Ids,
    open_source,
)
from cluster.experiments.neighbors.figures import (
    choose_queries,
    draw_sheet,
    read_images,
    sample_pairs,
    save_histogram,
)
from cluster.experiments.neighbors.search import LEAST_MEMORY, Nearest, SearchBase, find_nearest
from cluster.experiments.neighbors.summary import SUMMARY, describe_search, write_summary
from cluster.run.folder import CONFIG
from cluster.training.precision import choose_device
from pipeline.remote.dataset import open_dataset
from pipeline.tools.arguments import (
    MOST_PROCESSES,
    MOST_SEED,
    parse_options,
    require_range,
)
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import atomic_write, ensure_writable
from pipeline.tools.progress import Progress
from pipeline.tools.units import cpu_count, parse_size

MOST_SHOWN = 1000
"""Most neighbors of an image, and most queries on the sheet."""


def find_neighbors(options: NeighborsOptions, folder: Path) -> dict[str, Any]:
    """Compute features, search, draw, and return the content of summary.json.

    Args:
        options: the flags.
        folder: folder of the results.

    Raises:
        UsageError: a run without checkpoints, data of other classes, more neighbors than images.
        DataError: existing features are of another run, step or data set, or damaged.
    """
    torch.set_num_threads(cpu_count())
    source = open_source(options.run, options.data, options.checkpoint, options.best)
    _check_k(options, source)
    ensure_writable(folder, "the run's folder")
    devices = _choose_devices(options)
    kept = ensure_writable(options.features, "--features") if options.features else folder
    started = time.perf_counter()
    features = {
        split: make_features(
            kept, source, split, dtype=options.dtype, devices=devices, anew=options.anew
        )
        for split in dict.fromkeys((options.queries, options.base))
    }
    queries, base = features[options.queries], features[options.base]
    made = time.perf_counter() - started
    ids = np.flatnonzero(queries.sound)
    started = time.perf_counter()
    found = _search(options, queries, base, ids, devices[0])
    seconds = time.perf_counter() - started
    with atomic_write(folder / "nearest.npz") as file:
        np.savez(file, queries=ids, ids=found.ids, distances=found.distances)
    facts = {
        "k": options.k,
        "queries": {"split": options.queries, "pictures": len(ids)},
        "base": {"split": options.base, "pictures": int(base.sound.sum())},
        "units": base.about.units,
        "dtype": base.about.dtype,
        "bytes_per_picture": base.about.units * base.values.dtype.itemsize,
        **_measure_precision(queries.labels[ids], base, found.ids),
        **_measure_distances(options, queries, base, folder),
        "features_seconds": round(made, 2),
        "search_seconds": round(seconds, 3),
        "queries_s": round(len(ids) / seconds, 1),
        "searched_again": found.again,
        "device": devices[0],
        "files": {"sheet": "sheet.png", "distances": "distances.svg", "nearest": "nearest.npz"},
        "sheet": _draw_sheet(options, source, queries, found, ids, folder),
    }
    return write_summary(folder, options.run, base.about, "neighbours", facts)


def _search(
    options: NeighborsOptions, queries: Features, base: Features, ids: Ids, device: str
) -> Nearest:
    with Progress("nearest neighbours", total=len(ids), unit="queries") as progress:
        return find_nearest(
            queries.values,
            SearchBase(base.values, base.sound),
            options.k,
            memory=parse_size(options.memory),
            device=device,
            picked=ids,
            itself=options.base == options.queries,
            advance=progress.advance,
        )


def _measure_precision(labels: Ids, base: Features, found: Ids) -> dict[str, Any]:
    """Share of the neighbors `found` [Q, k] that have the labels [Q] of their queries."""
    right = base.labels[found] == labels[:, None]
    sizes = np.bincount(base.labels[base.sound], minlength=len(base.about.classes))
    return {
        "precision_at_k": float(right.mean()),
        "precision_at": [float(right[:, :k].mean()) for k in range(1, found.shape[1] + 1)],
        "precision_by_chance": float((sizes / sizes.sum())[labels].mean()),
    }


def _measure_distances(
    options: NeighborsOptions, queries: Features, base: Features, folder: Path
) -> dict[str, Any]:
    pairs = sample_pairs(queries, base, options.pairs, options.seed)
    if pairs is None:
        return {"auc": None, "pairs": 0}
    title = f"{options.run.resolve().name}, step {base.about.step}: {options.queries} against "
    save_histogram(pairs, title + options.base, folder / "distances.svg")
    return {
        "auc": pairs.auc,
        "auc_error": pairs.auc_error,
        "mean_ratio": None if math.isnan(pairs.ratio) else pairs.ratio,
        "mean_same": float(pairs.same.mean()),
        "mean_other": float(pairs.other.mean()),
        "pairs": options.pairs,
    }


def _draw_sheet(
    options: NeighborsOptions,
    source: FeatureSource,
    queries: Features,
    found: Nearest,
    ids: Ids,
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw sheet.png and list the images on it."""
    rows = choose_queries(queries.labels[ids], options.show, options.seed)
    names = source.manifest.titles or source.manifest.classes
    near = found.ids[rows]
    with closing(
        open_dataset(source.data, version=source.data_sha256, **source.config.cached)
    ) as dataset:
        asked = read_images(dataset, options.queries, ids[rows].tolist())
        flat = read_images(dataset, options.base, near.reshape(-1).tolist())
    others = [flat[at : at + options.k] for at in range(0, len(flat), options.k)]
    notes = (options.queries, f"the {options.k} nearest of {options.base}; x: of another class")
    with atomic_write(folder / "sheet.png") as file:
        draw_sheet(asked, others, names, notes).save(file, "PNG", optimize=True)
    return [
        {
            "query": int(ids[row]),
            "class": names[query.label],
            "neighbours": found.ids[row].tolist(),
            "classes": [names[one.label] for one in mine],
            "distances": [round(math.sqrt(far), 4) for far in found.distances[row].tolist()],
        }
        for row, query, mine in zip(rows.tolist(), asked, others, strict=True)
    ]


def _check(options: NeighborsOptions) -> None:
    """Refuse numbers out of range."""
    require_range("k", options.k, 1, MOST_SHOWN)
    require_range("workers", options.workers, 0, MOST_PROCESSES)
    require_range("show", options.show, 1, MOST_SHOWN)
    require_range("pairs", options.pairs, 1, 10**8)
    require_range("seed", options.seed, 0, MOST_SEED)
    if parse_size(options.memory) < LEAST_MEMORY:
        raise UsageError(f"--memory {options.memory} is too little; give 64MiB or more")


def _check_k(options: NeighborsOptions, source: FeatureSource) -> None:
    """Refuse a k above the number of images, before anything is computed."""
    source.manifest.split(options.queries, source.metadata)
    there = source.manifest.split(options.base, source.metadata).samples
    room = there - (options.base == options.queries)
    if options.k > room:
        raise UsageError(
            f"{options.k} neighbours asked for, and split {options.base} of {options.data} has "
            f"{room:,} images to find; ask for fewer with -k"
        )


def _choose_devices(options: NeighborsOptions) -> list[str]:
    """Choose the device of each worker; one without a GPU takes four cores."""
    gpus = torch.cuda.device_count() if options.device != "cpu" else 0
    choose_device(options.device)
    if gpus:
        return [f"cuda:{number % gpus}" for number in range(options.workers or gpus)]
    return ["cpu"] * (options.workers or max(1, cpu_count() // 4))


def _format_summary(facts: dict[str, Any], folder: Path) -> list[str]:
    at = facts["precision_at"]
    lines = [
        f"{describe_search(facts)}, {facts['units']} features each "
        f"({facts['bytes_per_picture']:,} bytes)",
        f"precision at {facts['k']}: {facts['precision_at_k']:.2%} of the neighbours are of the "
        f"query's class; at 1: {at[0]:.2%}; by chance: {facts['precision_by_chance']:.2%}",
    ]
    if facts["auc"] is not None:
        ratio = facts["mean_ratio"]
        lines.append(
            f"a pair of one class is closer than one of two in {facts['auc']:.1%} of the cases "
            f"(AUC, +-{facts['auc_error']:.1%}); mean distance "
            + ("0" if ratio is None else f"{ratio:.3f} times as large")
        )
    lines.append(
        f"features {facts['features_seconds']:,.1f} s, exact search {facts['search_seconds']:,.2f} "
        f"s ({facts['queries_s']:,.0f} queries/s on {facts['device']}) -> {folder / SUMMARY}, "
        "sheet.png, distances.svg"
    )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    options = parse_options(NeighborsOptions, argv, "python -m cluster.experiments.neighbors")
    read_run_config(options.run / CONFIG)
    _check(options)
    folder = options.run / FOLDER
    result = find_neighbors(options, folder)
    out = sys.stderr if options.json else sys.stdout
    out.write("\n".join(_format_summary(result["neighbours"], folder)) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
