"""Versions of a data set, sealed by hand: samples of another set appended, or some withdrawn."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.dataset.index import index_name, load_index
from pipeline.dataset.manifest import NAME, Manifest, Split, identity, version_folder
from pipeline.dataset.versions import (
    WITHDRAWN,
    WithdrawnSample,
    format_withdrawn,
    load_withdrawn,
)
from pipeline.tools.files import sha256

BESIDE = ("stats.npz", "rejects.jsonl", "duplicates.jsonl")


def make_identity(number: int) -> str:
    """Return what might be the SHA-256 of a manifest, another one for each number."""
    return f"{number:064x}"


def append_samples(root: Path, other: Path, statistics: Path | None = None) -> str:
    """Seal a version with the training samples of another set behind its own.

    Args:
        root: the data set.
        other: a set of the same classes.
        statistics: set whose statistics it gets; None: its own.

    Returns:
        The identity of the version.
    """
    old, new = Manifest.load(root), Manifest.load(other)
    mine, theirs = old.splits["train"], new.splits["train"]
    rows = [np.array(load_index(one, "train", Manifest.load(one))) for one in (root, other)]
    rows[1]["shard"] += len(mine.shards)
    shards = []
    for number, shard in enumerate(theirs.shards, len(mine.shards)):
        name = f"train-{number:06d}.tar"
        for ending in (".tar", ".idx"):
            source = (other / shard.name).with_suffix(ending)
            shutil.copy(source, (root / name).with_suffix(ending))
        shards.append(replace(shard, name=name))
    split = Split(shards=(*mine.shards, *shards), index_sha256="")
    split_rows = {"train": (split, np.concatenate(rows))}
    return _seal(root, split_rows, {"added": len(rows[1])}, statistics=statistics)


def withdraw(root: Path, ids: Iterable[int], name: str = "train") -> str:
    """Seal a version without some samples of the newest; return its identity."""
    manifest, ids = Manifest.load(root), list(ids)
    split, rows = manifest.splits[name], np.array(load_index(root, name, manifest))
    gone = dict(load_withdrawn(root, manifest))
    for row in rows[ids]:
        shard = split.shards[row["shard"]].name
        place = WithdrawnSample(int(row["offset"]), int(row["size"]), int(row["crc"]))
        gone[shard] = (*gone.get(shard, ()), place)
    rows = np.delete(rows, ids)
    counts = np.bincount(rows["shard"], minlength=len(split.shards)).tolist()
    shards = [replace(one, samples=count) for one, count in zip(split.shards, counts, strict=True)]
    kept = replace(split, shards=tuple(shards), tables={})
    return _seal(root, {name: (kept, rows)}, {"withdrawn": len(ids)}, format_withdrawn(gone))


def _seal(
    root: Path,
    changed: dict[str, tuple[Split, np.ndarray]],
    change: dict[str, int],
    withdrawn: bytes = b"",
    statistics: Path | None = None,
) -> str:
    old = Manifest.load(root)
    place = root / version_folder(old.number + 1)
    kept = root / version_folder(old.number) / NAME
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes((root / NAME).read_bytes())
    place.mkdir()
    for name in BESIDE:
        shutil.copy(root / old.tables_in / name, place / name)
    if statistics is not None:
        shutil.copy(statistics / "stats.npz", place / "stats.npz")
    splits = {}
    for name, split in old.splits.items():
        if name in changed:
            split, rows = changed[name]
            np.save(place / index_name(name), rows)
        else:
            shutil.copy(root / old.tables_in / index_name(name), place / index_name(name))
        digest = sha256(place / index_name(name))
        splits[name] = replace(split, index_sha256=digest, tables={})
    digest = old.withdrawn_sha256
    if withdrawn:
        digest = hashlib.sha256(withdrawn).hexdigest()
        (place / WITHDRAWN).write_bytes(withdrawn)
    elif digest is not None:
        shutil.copy(root / old.tables_in / WITHDRAWN, place / WITHDRAWN)
    new = replace(
        old,
        splits=splits,
        number=old.number + 1,
        parent=identity(root),
        tables_in=version_folder(old.number + 1),
        change=change,
        stats_sha256=sha256(place / "stats.npz"),
        withdrawn_sha256=digest,
    )
    new.save(place)
    new.save(root)
    return identity(root)
