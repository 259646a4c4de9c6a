"""Check a sealed data set against its manifest, byte for byte, or prove what was delivered of it.

    python -m pipeline.verify DATA
    python -m pipeline.verify DATA --ledger RUN

Every shard and index is hashed; in a shard that differs, every sample's CRC-32 is checked, so
that the damage is named by shard and sample. With --ledger, the ledgers of a run are read instead:
was each epoch delivered exactly once? Exit code 0: sound. 4: damaged, or not exactly once.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.dataset import is_remote, open_dataset
from pipeline.errors import REBUILD, DataError, UsageError, run
from pipeline.files import sha256
from pipeline.index import Index, index_name, load_index
from pipeline.ledger.proof.exactly_once import prove
from pipeline.manifest import Manifest, Shard, Split
from pipeline.pixel_stats import NAME as STATS
from pipeline.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every byte of a data set, or prove that a run was given each sample once an epoch."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of the data set."""
    json: bool = False
    """Print one JSON object on stdout."""
    ledger: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Runs trained with --ledger, or folders with ledgers: prove from them that each epoch was
    delivered exactly once. No byte of the data is hashed then; for that, run without."""


DIFFERS = "SHA-256 differs from the manifest"

Damage = dict[str, Any]
"""One finding: `file`, `reason`, and for a damaged sample `sample` (its id in the split)."""


def verify(data: Path) -> list[Damage]:
    """Return all damage found in a data set; an empty list means it is sound.

    Raises:
        UsageError: `data` holds no data set.
        DataError: the manifest itself cannot be read.
    """
    manifest = Manifest.load(data)
    found: list[Damage] = []
    _same(data / STATS, manifest.stats_sha256, found)
    total = sum(split.bytes for split in manifest.splits.values()) >> 20
    workers = len(os.sched_getaffinity(0))
    with (
        Progress("checking", total=total, unit="MiB") as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        for name, split in manifest.splits.items():
            rows = _index(data, name, split, found)
            results = pool.map(partial(_shard, data, rows), split.shards, _starts(split))
            for shard, damage in zip(split.shards, results, strict=True):
                found.extend(damage)
                progress.advance(shard.bytes >> 20)
    return found


def _starts(split: Split) -> Iterator[int]:
    """Return the id of the first sample of each shard."""
    return accumulate((shard.samples for shard in split.shards[:-1]), initial=0)


def _index(data: Path, name: str, split: Split, found: list[Damage]) -> Index | None:
    """Return the rows of a split, unless they are damaged themselves."""
    if not _same(data / index_name(name), split.index_sha256, found):
        return None
    return load_index(data, name, split)


def _same(path: Path, expected: str, found: list[Damage]) -> bool:
    """Whether a file has its hash; if not, that is added to the findings."""
    if not path.is_file():
        found.append({"file": path.name, "reason": "missing"})
    elif sha256(path) != expected:
        found.append({"file": path.name, "reason": DIFFERS})
    else:
        return True
    return False


def _shard(data: Path, rows: Index | None, shard: Shard, start: int) -> list[Damage]:
    path = data / shard.name
    found: list[Damage] = []
    _same(path.with_suffix(".idx"), shard.idx_sha256, found)
    if not _same(path, shard.sha256, found) and path.is_file() and rows is not None:
        samples = _damaged(path, rows, shard, start)
        # The samples say it all, unless the damage lies between them.
        found[-1:] = samples or found[-1:]
    return found


def _damaged(path: Path, rows: Index, shard: Shard, start: int) -> list[Damage]:
    """Name the samples of a damaged shard whose bytes are not those that were packed."""
    samples = []
    with path.open("rb") as file:
        for place in range(start, start + shard.samples):
            row = rows[place]
            file.seek(row["offset"])
            if zlib.crc32(file.read(row["size"])) != row["crc"]:
                samples.append(
                    {"file": shard.name, "sample": place, "reason": "CRC-32 of the picture differs"}
                )
    return samples


def main() -> int:
    """Check, name all damage, and return 0 or 4."""
    options = tyro.cli(Verify, prog="python -m pipeline.verify", description=__doc__)
    if is_remote(options.data):
        raise UsageError(f"verify reads local folders, and {options.data} is an address")
    folder = open_dataset(options.data).folder
    if options.ledger:
        return _prove(options, folder)
    damage = verify(folder)
    if options.json:
        facts = {"data": str(options.data), "sound": not damage, "damage": damage}
        sys.stdout.write(json.dumps(facts) + "\n")
    for one in damage:
        sample = f" sample {one['sample']}" if "sample" in one else ""
        sys.stderr.write(f"{one['file']}{sample}: {one['reason']}\n")
    if damage:
        places = "1 place" if len(damage) == 1 else f"{len(damage)} places"
        raise DataError(f"{options.data} is damaged in {places}; {REBUILD}")
    sys.stderr.write(f"{options.data} is sound\n")
    return 0


def _prove(options: Verify, folder: Path) -> int:
    """Prove from ledgers, name what is wrong, and return 0 or 4."""
    proof = prove(folder, options.ledger)
    if options.json:
        facts = {"data": str(options.data), **proof.facts()}
        sys.stdout.write(json.dumps(facts) + "\n")
    for finding in proof.findings:
        sys.stderr.write(f"{finding.reason}\n")
    if proof.findings:
        ledgers = ", ".join(map(str, options.ledger))
        raise DataError(
            f"the ledgers in {ledgers} do not prove that each sample was delivered once an epoch; "
            "see above, and give the ledgers of all attempts"
        )
    sys.stderr.write(f"{proof.summary()}\n")
    return 0


if __name__ == "__main__":
    run(main)
