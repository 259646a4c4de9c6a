"""Damage done to a data set, under hashes that fit it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.dataset.manifest import Manifest

SHARD = "train-000001.tar"
"""Holds samples 10 to 19 of `tiny_data`."""


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reseal(data: Path) -> None:
    """Write a manifest whose hashes and sizes are those of the files as they are now."""
    manifest = Manifest.load(data)
    splits = {}
    for name, split in manifest.splits.items():
        shards = tuple(
            replace(
                shard,
                bytes=(data / shard.name).stat().st_size,
                sha256=sha(data / shard.name),
                idx_sha256=sha((data / shard.name).with_suffix(".idx")),
            )
            for shard in split.shards
        )
        splits[name] = replace(split, shards=shards, index_sha256=sha(data / f"{name}.index.npy"))
    replace(manifest, splits=splits, stats_sha256=sha(data / "stats.npz")).save(data)


def edit_manifest(data: Path, change: Callable[[dict], object]) -> None:
    """Let `change` edit the table of a manifest, which then has no digest of itself."""
    table = json.loads((data / "manifest.json").read_text())
    table.pop("manifest_sha256", None)
    change(table)
    (data / "manifest.json").write_text(json.dumps(table))


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
