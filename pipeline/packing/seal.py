"""The files about the shards, and the manifest last."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import INDEX_DTYPE, index_name
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.dataset.shards import shard_name
from pipeline.packing.ahead import ahead
from pipeline.packing.collect import Collected
from pipeline.packing.duplicates import NAME as DUPLICATES
from pipeline.packing.duplicates import Counts, Member, find, write
from pipeline.packing.options import Build
from pipeline.packing.plan import Plan
from pipeline.packing.shards import ShardDone, fetch_done, parse_done
from pipeline.remote.target import Target
from pipeline.tools.errors import UsageError
from pipeline.tools.files import sha256

REJECTS = "rejects.jsonl"


def all_classes(plan: Plan, collected: Collected, target: Target) -> None:
    """Refuse a training set that lacks a class, and a split without pictures.

    Raises:
        UsageError: names the class or the split, and a reject.
    """
    for split, rows in plan.orders.items():
        labels = collected.taken["label"][rows[collected.packed[rows]]]
        empty = np.flatnonzero(np.bincount(labels, minlength=len(plan.classes)) == 0)
        if len(labels) == 0 or (split == "train" and len(empty)):
            what = f"class {plan.classes[empty[0]]!r}" if len(labels) else f"split {split!r}"
            with collected.rejects_file.open(encoding="utf-8") as file:
                lines = (line.strip() for line in file)
                name = plan.classes[empty[0]] if len(labels) else ""
                example = next((line for line in lines if name in line), "")
            example = f" (for example {example})" if example else ""
            raise UsageError(
                f"no picture of {what} could be read{example}; replace them, delete "
                f"{target.address}, and run the same command again"
            )


def seal(
    options: Build,
    plan: Plan,
    target: Target,
    collected: Collected,
    shards: dict[str, int],
    scratch: Path,
    libraries: dict[str, str],
) -> Manifest:
    """Write index, statistics, rejects and duplicates, then the manifest, and return it.

    Raises:
        OSError: the target cannot be written.
    """
    splits = {name: _split(name, count, target) for name, count in shards.items()}
    with (scratch / DUPLICATES).open("wb") as file:
        same = _write_duplicates(file, plan, collected)
    stats_sha256 = Statistics.of(collected.sums).save(scratch)
    copied(scratch / STATS, target, STATS)
    copied(scratch / DUPLICATES, target, DUPLICATES)
    copied(collected.rejects_file, target, REJECTS)
    sources = {"train": str(options.train)}
    if "val" in splits:
        sources["val"] = str(options.val or f"{options.holdout:g} of {options.train}")
    manifest = Manifest(
        splits=splits,
        classes=plan.classes,
        titles=plan.listings[0].titles,
        seed=options.seed,
        sources=sources,
        plan=plan.fingerprint,
        stats_sha256=stats_sha256,
        rejected=collected.rejected,
        quality=options.quality if options.encoding == "jpeg" else None,
        chroma=options.chroma if options.encoding == "jpeg" else None,
        encoding=options.encoding,
        rejects_sha256=sha256(collected.rejects_file),
        duplicates=same.groups,
        leaks=same.leaks,
        duplicates_sha256=sha256(scratch / DUPLICATES),
        libraries=libraries,
    )
    with target.create(MANIFEST) as file:
        file.write(manifest.text())
    return manifest


def copied(path: Path, target: Target, name: str) -> None:
    """Put a local file into the target."""
    with path.open("rb") as source, target.create(name) as file:
        while block := source.read(1 << 20):
            file.write(block)


def _write_duplicates(file: IO[bytes], plan: Plan, collected: Collected) -> Counts:
    """Find and list the pictures that are the same, or nearly so."""
    rows = np.flatnonzero(collected.packed)
    split_of = np.zeros(plan.pictures, np.uint8)
    sample_of = np.zeros(plan.pictures, np.uint32)
    names = list(plan.orders)
    for number, name in enumerate(names):
        order = collected.order(plan, name)
        split_of[order] = number
        sample_of[order] = np.arange(len(order), dtype=np.uint32)

    def member(place: int) -> Member:
        row = int(rows[place])
        return Member(
            split=names[split_of[row]],
            sample=int(sample_of[row]),
            label=int(collected.taken["label"][row]),
            name=plan.name(row),
        )

    taken = collected.taken[rows]
    return write(
        file,
        find(collected.hashes, taken["size"], taken["crc"]),
        split_of[rows],
        taken["label"],
        member,
    )


def _split(name: str, shards: int, target: Target) -> Split:
    """Join the rows of a split's shards into its index, one shard in memory at a time."""
    facts = [done.shard for done in _all_done(target, name, shards)]
    digest = hashlib.sha256()
    with target.create(index_name(name)) as file:
        for data in _index(name, facts, target):
            file.write(data)
            digest.update(data)
    return Split(shards=tuple(facts), index_sha256=digest.hexdigest())


def _index(name: str, facts: list[Shard], target: Target) -> Iterator[bytes]:
    """Give what `np.save` would write of the rows of all shards."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
            "fortran_order": False,
            "shape": (sum(shard.samples for shard in facts),),
        },
    )
    yield header.getvalue()
    for done in _all_done(target, name, len(facts)):
        yield done.rows.tobytes()


def _all_done(target: Target, name: str, shards: int) -> Iterator[ShardDone]:
    files = ahead(partial(fetch_done, target, name), range(shards))
    for number, fetched in enumerate(files):
        done = parse_done(fetched, name, number)
        if done is None:
            raise OSError(f"{target.address}/{shard_name(name, number)} went away while packing")
        yield done
