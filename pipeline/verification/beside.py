"""The files beside the shards: statistics, index, lists of rejects and duplicates; strangers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import SIZE
from pipeline.dataset.index import index_name, load_index
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest, Split
from pipeline.tools.errors import DataError
from pipeline.tools.files import sha256
from pipeline.verification.findings import DIFFERS, MISSING, Damage, damage

REJECTS, DUPLICATES = "rejects.jsonl", "duplicates.jsonl"

_SHAPES = {
    "mean_picture": (SIZE, SIZE, 3),
    "channel_mean": (3,),
    "covariance": (3, 3),
    "eigenvalues": (3,),
    "eigenvectors": (3, 3),
}


def file_damage(path: Path, expected: str) -> list[Damage]:
    """Return what is wrong with a file that should have a SHA-256, in hexadecimal."""
    try:
        if sha256(path) != expected:
            return [damage(path.name, DIFFERS)]
    except FileNotFoundError:
        return [damage(path.name, MISSING)]
    except OSError as error:
        return [damage(path.name, f"cannot be read ({error.strerror})")]
    return []


def index_damage(data: Path, name: str, split: Split) -> list[Damage]:
    """Return what is wrong with the index of a split as a file; `shard` looks at its rows."""
    if found := file_damage(data / index_name(name), split.index_sha256):
        return found
    try:
        load_index(data, name, split)
    except DataError:
        reason = f"it is no index of the {split.samples:,} samples that the manifest counts"
        return [damage(index_name(name), reason)]
    return []


def stats_damage(data: Path, manifest: Manifest) -> list[Damage]:
    """Return what is wrong with the statistics: the hash, or numbers that cannot be."""
    if found := file_damage(data / STATS, manifest.stats_sha256):
        return found
    try:
        statistics = Statistics.load(data)
    except Exception:  # of a damaged header, NumPy's reader raises what it pleases
        return [damage(STATS, "its bytes are as sealed, but it holds no statistics")]
    return [damage(STATS, reason) for reason in _strange(statistics)][:1]


def _strange(statistics: Statistics) -> Iterator[str]:
    for name, shape in _SHAPES.items():
        array = getattr(statistics, name)
        if array.shape != shape or array.dtype.kind != "f":
            yield f"{name} is {array.dtype} {list(array.shape)}, not floats {list(shape)}"
            return
        if not np.isfinite(array).all():
            yield f"{name} holds numbers that are not finite"
            return
    mean = statistics.mean_picture
    if mean.min() < 0 or mean.max() > 255:
        yield "mean_picture leaves 0..255"
    if not np.allclose(mean.mean((0, 1), np.float64), statistics.channel_mean, atol=1e-2):
        yield "channel_mean is not that of mean_picture"
    values, vectors = statistics.eigenvalues, statistics.eigenvectors
    if (values < 0).any() or (np.diff(values) > 0).any():
        yield "eigenvalues are negative or out of order"
    close = 1e-6 * max(1.0, float(values.max()))
    if not np.allclose(vectors @ np.diag(values) @ vectors.T, statistics.covariance, atol=close):
        yield "eigenvalues and eigenvectors are not those of covariance"


def list_damage(data: Path, manifest: Manifest) -> list[Damage]:
    """Return what is wrong with the lists of rejects and of duplicates."""
    columns = {"name", "reason"}
    return [
        *_rows_damage(
            data / REJECTS, manifest.rejected, "rejected", columns, manifest.rejects_sha256
        ),
        *_rows_damage(
            data / DUPLICATES, manifest.duplicates, "duplicates", set(), manifest.duplicates_sha256
        ),
    ]


def _rows_damage(
    path: Path, expected: int, field: str, columns: set[str], digest: str | None
) -> list[Damage]:
    if not path.exists() and expected == 0 and digest is None:
        return []  # an empty list says nothing that the manifest does not
    if digest is not None and (found := file_damage(path, digest)):
        return found
    count = 0
    try:
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict) or not columns <= row.keys():
                    raise ValueError
                count += 1
    except FileNotFoundError:
        return [damage(path.name, MISSING)]
    except OSError as error:
        return [damage(path.name, f"cannot be read ({error.strerror})")]
    except (ValueError, RecursionError):
        return [damage(path.name, f"line {count + 1} is not a row of this list")]
    if count != expected:
        return [damage(path.name, f"has {count:,} rows, the manifest says {field}: {expected:,}")]
    return []


def strangers(data: Path, manifest: Manifest) -> list[str]:
    """Return the names of files and folders that are no part of the set; they do no harm."""
    known = {MANIFEST, STATS, REJECTS, DUPLICATES, *map(index_name, manifest.splits)}
    for split in manifest.splits.values():
        for shard in split.shards:
            known |= {shard.name, Path(shard.name).with_suffix(".idx").name}
    return sorted(path.name for path in data.iterdir() if path.name not in known)
