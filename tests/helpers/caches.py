"""Content and size of a node's cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import RemoteDataset
from tests.helpers.http_servers import shards

ROOT = Path(__file__).resolve().parents[2]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def small_size(data: Path, count: int) -> int:
    """Return the bytes of a set's metadata and its `count` largest shards."""
    known = sorted((shard.bytes for shard in shards(data)), reverse=True)
    names = ("manifest.json", "stats.npz", *(f"{s}.index.npy" for s in Manifest.load(data).splits))
    return sum((data / name).stat().st_size for name in names) + sum(known[:count])


def here(data: RemoteDataset) -> set[int]:
    """Return the numbers of the training shards that are in the cache."""
    known = enumerate(shards(data.folder))
    return {number for number, shard in known if data.locate_shard(shard).is_file()}
