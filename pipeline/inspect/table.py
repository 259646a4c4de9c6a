"""The numbers for a terminal, and as one JSON object."""

from __future__ import annotations

from typing import Any

import numpy as np
import rich.console
from rich.table import Table
from rich.text import Text

from pipeline.describe.facts import ORIGINAL_MEAN, Facts, SplitFacts


def human_bytes(size: float) -> str:
    """A size in bytes, kB, MB or GB (powers of ten)."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:,.3g} {unit}" if size < 1e12 else f"{size / power:,.0f} GB"
    return f"{size:.0f} bytes"


def stored_as(facts: Facts) -> str:
    """How the pictures are stored, in a few words."""
    manifest = facts.manifest
    if manifest.encoding == "raw":
        return f"raw {manifest.image_size}×{manifest.image_size} pixels"
    parts = [f"{manifest.image_size}×{manifest.image_size} JPEG"]
    parts += [f"quality {manifest.quality}"] if manifest.quality is not None else []
    parts += [manifest.chroma] if manifest.chroma else []
    return ", ".join(parts)


def duplicates_line(facts: Facts) -> str:
    """What is known of duplicates, in a line."""
    if facts.duplicates is None:
        return "not looked for" if not facts.manifest.duplicates else "list missing"
    counts = facts.duplicates.counts
    if not counts["groups"]:
        return "none"
    return (
        f"{counts['pictures']:,} pictures in {counts['groups']:,} groups "
        f"({counts['exact']:,} exact, {counts['near']:,} near), "
        f"{counts['leaks']:,} in more than one split, "
        f"{counts['labels_differ']:,} with differing labels"
    )


def as_json(facts: Facts, page: str) -> dict[str, Any]:
    """Return all numbers as one object; pixel values are 0..255, channels R, G, B."""
    manifest, statistics = facts.manifest, facts.statistics
    reasons = facts.reasons
    return {
        "data": facts.data,
        "page": page,
        "encoding": manifest.encoding,
        "quality": manifest.quality,
        "chroma": manifest.chroma,
        "seed": manifest.seed,
        "sources": manifest.sources,
        "libraries": manifest.libraries,
        "classes": len(manifest.classes),
        "splits": {one.name: _split(one) for one in facts.splits},
        "channel_mean": statistics.channel_mean.tolist(),
        "channel_deviation": np.sqrt(np.diag(statistics.covariance)).tolist(),
        "eigenvalues": statistics.eigenvalues.tolist(),
        "components": [
            {
                "deviation": one.deviation,
                "vector": one.vector,
                "original_deviation": one.original_deviation,
                "original_vector": one.original_vector,
                "degrees_apart": one.angle,
            }
            for one in facts.components
        ],
        "original_channel_mean": ORIGINAL_MEAN,
        "rejected": manifest.rejected,
        "rejects": None if reasons is None else {one.reason: one.count for one in reasons},
        "duplicates": None if facts.duplicates is None else facts.duplicates.counts,
    }


def _split(facts: SplitFacts) -> dict[str, Any]:
    counts, sizes = facts.per_class, facts.picture_bytes
    known = len(sizes) > 0
    return {
        "samples": facts.split.samples,
        "shards": len(facts.split.shards),
        "bytes": facts.split.bytes,
        "pictures_per_class": {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
            "empty": int(np.count_nonzero(counts == 0)),
        },
        "bytes_per_picture": {
            "least": int(sizes.min()) if known else None,
            "median": float(np.median(sizes)) if known else None,
            "mean": float(sizes.mean()) if known else None,
            "most": int(sizes.max()) if known else None,
        },
    }


def print_tables(facts: Facts, console: rich.console.Console) -> None:
    """Print all numbers for a person."""
    console.print(Text(f"{facts.data}: {stored_as(facts)}"), soft_wrap=True)
    console.print(_splits(facts))
    console.print(_colours(facts))
    statistics = facts.statistics
    mean = "  ".join(f"{value:.2f}" for value in statistics.channel_mean)
    original = "  ".join(f"{value:.1f}" for value in ORIGINAL_MEAN)
    console.print(Text(f"channel means  {mean}   (original {original})"), soft_wrap=True)
    console.print(Text(f"duplicates     {duplicates_line(facts)}"), soft_wrap=True)
    console.print(Text(f"rejected       {facts.manifest.rejected:,}"), soft_wrap=True)
    for reason in facts.reasons or []:
        console.print(Text(f"  {reason.count:>8,}  {reason.reason}"), soft_wrap=True)


def _splits(facts: Facts) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("split")
    for name in ("pictures", "shards", "size", "a picture", "classes", "pictures a class"):
        table.add_column(name, justify="right")
    for one in facts.splits:
        counts, sizes = one.per_class, one.picture_bytes
        table.add_row(
            one.name,
            f"{one.split.samples:,}",
            f"{len(one.split.shards):,}",
            human_bytes(one.split.bytes),
            human_bytes(float(sizes.mean())) if len(sizes) else "–",
            f"{np.count_nonzero(counts):,}",
            f"{counts.min():,}–{counts.max():,}",
        )
    return table


def _colours(facts: Facts) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("colour component")
    for name in ("variance", "deviation", "R, G, B", "original", "its R, G, B", "degrees apart"):
        table.add_column(name, justify="right")
    for place, one in enumerate(facts.components):
        table.add_row(
            f"{place + 1}",
            f"{facts.statistics.eigenvalues[place]:,.1f}",
            f"{one.deviation:.2f}",
            " ".join(f"{value:+.3f}" for value in one.vector),
            f"{one.original_deviation:.2f}",
            " ".join(f"{value:+.3f}" for value in one.original_vector),
            f"{one.angle:.1f}",
        )
    return table
