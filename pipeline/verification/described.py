"""Does a manifest make sense? Its JSON is sound and of this version where this is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.dataset.images import SIZE
from pipeline.dataset.manifest import NAME, Manifest, Shard, Split
from pipeline.verification.findings import Damage, damage

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_plain(name: object) -> bool:
    """Whether a name is that of a file in the data set's folder, and of nothing elsewhere."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and not name.startswith(".")
        and "\0" not in name
    )


def manifest_damage(manifest: Manifest) -> list[Damage]:
    """Return what is wrong with a manifest; if anything is, nothing it says is to be followed."""
    return [damage(NAME, reason) for reason in _reasons(manifest)]


def _reasons(manifest: Manifest) -> Iterator[str]:
    classes, shards = manifest.classes, list[str]()
    if not manifest.splits:
        yield "it names no split"
    if len(classes) < 2 or not all(isinstance(name, str) and name for name in classes):
        yield "its classes are not two names or more"
    elif len(set(classes)) < len(classes):
        yield "it has a class twice"
    for name, split in manifest.splits.items():
        if not is_plain(name):
            yield f"split {name!r} has a name that leaves the folder"
        yield from _of_split(name, split)
        shards += [str(shard.name) for shard in split.shards]
    if len(set(shards)) < len(shards):
        yield "it names a shard twice"
    if not _is_hash(manifest.stats_sha256):
        yield "it has no SHA-256 of the statistics"
    if not _is_count(manifest.rejected):
        yield f"rejected is {manifest.rejected!r}, no count"
    if manifest.image_size != SIZE:
        yield f"image_size is {manifest.image_size!r}; this program reads {SIZE}"


def _of_split(name: str, split: Split) -> Iterator[str]:
    if not split.shards:
        yield f"split {name!r} has no shards"
    if not _is_hash(split.index_sha256):
        yield f"split {name!r} has no SHA-256 of its index"
    for shard in split.shards:
        yield from _of_shard(shard)


def _of_shard(shard: Shard) -> Iterator[str]:
    if not is_plain(shard.name):
        yield f"shard {shard.name!r} has a name that leaves the folder"
    elif not shard.name.endswith(".tar"):
        yield f"shard {shard.name!r} is no .tar by its name"
    for field in ("samples", "bytes"):
        if not _is_count(value := getattr(shard, field)) or value == 0:
            yield f"shard {shard.name!r} has {value!r} {field}"
    for field in ("sha256", "idx_sha256"):
        if not _is_hash(getattr(shard, field)):
            yield f"shard {shard.name!r} has no {field}"


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
